"""MATH (Hendrycks et al. 2021): competition problems with worked solutions whose answer stands in a box.

A row is {"problem": …, "solution": …, "level": "Level 3", "type": "Algebra"} and may carry an "id".
"""

import re
from collections.abc import Iterator

from data_pipeline.answers.extract import last_box
from data_pipeline.cli import logger
from data_pipeline.settings import UsageError
from data_pipeline.tasks.base import Problem, Task, question_hash, read_jsonl, text_field

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_FORMULA = re.compile(r"\$\$.+?\$\$|\$.+?\$|\\\[.+?\\\]|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
_SENTENCE = re.compile(r"[.!?](?:\s|$)|\n\s*\n")


def _read(split: str, source: str | None) -> Iterator[Problem]:
    if source is None:
        raise UsageError(
            "MATH is not downloaded: name its file of rows with data.sources.0.path in training, --source in evaluation"
        )
    for number, row in read_jsonl(source, "MATH source"):
        where = f"{source}, line {number}"
        solution = text_field(row, "solution", where)
        question = text_field(row, "problem", where)
        answer = last_box(solution)
        if not answer:  # one of the 7,500 public training rows has an empty box
            logger.warning("%s: the solution has no answer in a \\boxed{}: left out", where)
            continue
        yield Problem(
            id=str(row["id"]) if row.get("id") is not None else f"math/{split}/{question_hash(question)}",
            question=question,
            solution=solution,
            answer=answer,
            num_steps=count_sentences(solution),
            level=_level(row.get("level")),
            subject=None if row.get("type") is None else str(row["type"]),
        )


def count_sentences(solution: str) -> int:
    """The steps of a solution: its sentences, where formulas are one word each and drawings are none."""
    text = _FORMULA.sub("X", _DRAWING.sub(" ", solution))
    return max(1, sum(bool(re.search(r"\w", part)) for part in _SENTENCE.split(text)))


def _level(given: object) -> str | None:
    found = re.fullmatch(r"(?:Level )?(\d)", str(given))
    return found[1] if found is not None else None


TASK = Task("math", kind="latex", read=_read)
