"""SVAMP (Patel et al. 2021): short word problems, varied so that shallow tricks fail. Answers are numbers.

A row is {"Body": …, "Question": …, "Equation": "( 8.0 - 3.0 )", "Answer": 5.0, "Type": …, "ID": …}. There are no worked
solutions: the equation is one step an operation.
"""

import re

from data_pipeline.answers import parse_number
from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field


def parse(row: Row) -> Problem:
    """A problem from a public row. Raises ValueError where a text is missing, or the answer is no number."""
    body, question = text_field(row, "Body"), text_field(row, "Question")
    answer = text_field(row, "Answer")
    if parse_number(answer) is None:
        raise ValueError(f"'Answer' must be a number, got {answer!r}")
    answer = answer.removesuffix(".0")
    equation = re.sub(r"(\d)\.0\b", r"\1", optional_field(row, "Equation") or "").strip()
    if equation.startswith("( ") and equation.endswith(" )"):
        equation = equation[2:-2]
    return Problem(
        id=optional_field(row, "ID") or "",
        question=f"{body if body.endswith(('.', '?', '!', ',')) else body + '.'} {question}",
        solution=equation and f"{equation} = {answer}",
        answer=answer,
        num_steps=len(re.findall(r"\s[-+*/]\s", equation)) or None,
        subject=optional_field(row, "Type"),
    )


TASK = Task(
    "svamp",
    kind="number",
    parse=parse,
    about="SVAMP (Patel et al. 2021), MIT licence",
    splits={"test": 1000},
    advice="SVAMP.json of github.com/arkilpatel/SVAMP holds all 1,000",
)
