"""CollegeMath (Tang et al. 2024): exercises of university textbooks with a final answer and no worked solution.

A row is {"question": …, "answer": …, "data_topic": …, "question_number": …}.
"""

from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field


def parse(row: Row) -> Problem:
    """A problem from a public row. Raises ValueError where a text is missing."""
    topic = optional_field(row, "data_topic", "topic")
    return Problem(
        id=optional_field(row, "question_number") or "",
        question=text_field(row, "question"),
        solution="",
        answer=text_field(row, "answer"),
        subject=topic.removeprefix("college_math.") if topic else None,
    )


TASK = Task(
    "college-math",
    kind="latex",
    parse=parse,
    about="CollegeMath (Tang et al. 2024), textbooks under several open licences: for evaluation",
    splits={"test": 2818},
    evaluation_only=True,
    advice="the MWPBench folder of github.com/microsoft/unilm/mathscale",
)
