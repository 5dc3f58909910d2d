"""Question-answer rows: the user's own, and those that `data_pipeline` makes.

A row is {"question": …, "solution": …, "answer": …} and may carry "id", "level", "subject", "num_steps" and
"lineage". The solution is the worked text without the answer line. A step is a non-blank line of it, where the row does
not say.
"""

import json
from typing import Any

from data_pipeline.answers import Kind, check_gold, parse_number
from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, count_lines, optional_field, text_field


def _parse(row: Row, kind: Kind) -> Problem:
    solution, answer = text_field(row, "solution"), text_field(row, "answer")
    if kind == "number" and parse_number(answer) is None:
        raise ValueError(
            f"'answer' must be a number such as 72, 3.5 or 1/2, got {answer!r} (the task latex takes any mathematics)"
        )
    check_gold(answer, kind)
    steps = row.get("num_steps")
    if steps is not None and (type(steps) is not int or not 0 <= steps < 2**31):
        raise ValueError(f"'num_steps' must be a whole number from 0 to {2**31 - 1}, got {steps!r}")
    return Problem(
        id="",
        question=text_field(row, "question"),
        solution=solution,
        answer=answer,
        num_steps=count_lines(solution) if steps is None else steps,
        level=optional_field(row, "level"),
        subject=optional_field(row, "subject"),
        lineage=_lineage(row.get("lineage")),
    )


def _lineage(said: Any) -> str:
    return "" if said is None else said if isinstance(said, str) else json.dumps(said)


def _parse_number(row: Row) -> Problem:
    return _parse(row, "number")


def _parse_latex(row: Row) -> Problem:
    return _parse(row, "latex")


JSONL = Task("jsonl", kind="number", parse=_parse_number, about="rows of your own whose answers are numbers")
LATEX = Task("latex", kind="latex", parse=_parse_latex, about="rows of your own whose answers are any mathematics")
DEMO = Task("demo", kind="number", parse=_parse_number, about="generated multi-step word problems")
