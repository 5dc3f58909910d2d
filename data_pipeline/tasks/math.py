"""MATH (Hendrycks et al. 2021): competition problems with worked solutions whose answer stands in a box.

A row is {"problem": …, "solution": …, "level": "Level 3", "type": "Algebra"} and may carry an "id"; MATH-500's names
are read, too ("subject", and "unique_id"). A step is a sentence of the solution.
"""

import re

from data_pipeline.answers.extract import last_box
from data_pipeline.cli import logger
from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_FORMULA = re.compile(r"\$\$.+?\$\$|\$.+?\$|\\\[.+?\\\]|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
_SENTENCE = re.compile(r"[.!?](?:\s|$)|\n\s*\n")


def parse(row: Row) -> Problem | None:
    """A problem from a public row; None where the box is missing or empty. Raises ValueError where a text is."""
    solution = text_field(row, "solution")
    question = text_field(row, "problem")
    answer = last_box(solution)
    if not answer:  # two of the 7,500 public training rows have an empty box
        logger.warning("a MATH solution has no answer in a \\boxed{}: left out (%s…)", question[:60])
        return None
    level = re.fullmatch(r"(?:Level )?(\d)", optional_field(row, "level") or "")
    return Problem(
        id=optional_field(row, "id", "unique_id") or "",
        question=question,
        solution=solution,
        answer=answer,
        num_steps=count_sentences(solution),
        level=level[1] if level is not None else None,
        subject=optional_field(row, "type", "subject"),
    )


def count_sentences(solution: str) -> int:
    """The steps of a solution: its sentences, where formulas are one word each and drawings are none."""
    text = _FORMULA.sub("X", _DRAWING.sub(" ", solution))
    return max(1, sum(bool(re.search(r"\w", part)) for part in _SENTENCE.split(text)))


TASK = Task(
    "math",
    kind="latex",
    parse=parse,
    about="MATH (Hendrycks et al. 2021), MIT licence; split math500: the 500 test problems in MATH-500's own file",
    splits={"train": 7500, "test": 5000, "math500": 500},
    advice="as Hugging Face has it: EleutherAI/hendrycks_math, HuggingFaceH4/MATH-500",
)
