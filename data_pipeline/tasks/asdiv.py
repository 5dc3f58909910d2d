"""ASDiv (Miao et al. 2020): word problems of primary school. Its licence allows no commercial use; for evaluation.

Read from the published XML, or rows with the same names: {"Body": …, "Question": …, "Solution-Type": …,
"Answer": "9 (apples)", "Formula": "7+2=9", "Grade": "1", "ID": …}. Most answers are numbers; some are words, times or
several numbers, so they are compared as those of MATH. There are no worked solutions: the formula is one step an
operation.
"""

import re

from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field


def parse(row: Row) -> Problem:
    """A problem from a public row. Raises ValueError where a text is missing."""
    answer = re.sub(r"\s*\([^()]*\)", "", text_field(row, "Answer", "answer")).strip()
    if not answer:
        raise ValueError(f"'Answer' must be more than a unit, got {row.get('Answer')!r}")
    formula = optional_field(row, "Formula", "formula") or ""
    return Problem(
        id=optional_field(row, "ID") or "",
        question=f"{text_field(row, 'Body', 'body')} {text_field(row, 'Question', 'question')}",
        solution=formula,
        answer="; ".join(part.strip() for part in answer.split(";")),
        num_steps=len(re.findall(r"[-+*/]", formula.partition("=")[0])) or None,
        level=optional_field(row, "Grade", "grade"),
        subject=optional_field(row, "Solution-Type", "solution_type"),
    )


TASK = Task(
    "asdiv",
    kind="latex",
    parse=parse,
    about="ASDiv (Miao et al. 2020), CC BY-NC 4.0: for evaluation, not for commercial use",
    splits={"test": 2305},
    evaluation_only=True,
    advice="ASDiv.xml of github.com/chaochun/nlu-asdiv-dataset",
)
