"""The Hungarian national high school exam of 2023 in mathematics: 33 questions that people grade, by points.

A row is {"question": …} and may carry "solution" and "id".
"""

from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field


def parse(row: Row) -> Problem:
    """A problem from a public row. Raises ValueError where the question is missing."""
    return Problem(
        id=optional_field(row, "id") or "",
        question=text_field(row, "question", "Question"),
        solution=optional_field(row, "solution", "Solution") or "",
        answer="",
    )


TASK = Task(
    "hungarian",
    kind=None,
    parse=parse,
    about="the Hungarian national exam of 2023 (33 questions), graded by people",
    splits={"test": 33},
    evaluation_only=True,
    advice="keirp/hungarian_national_hs_finals_exam on Hugging Face",
)
