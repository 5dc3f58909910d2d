"""CollegeMath (Tang et al. 2024): exercises of university textbooks with a final answer and no worked solution.

A row is {"question": …, "answer": …, "data_source": …, "data_topic": …, "question_number": …}.
"""

from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field


def parse(row: Row) -> Problem | None:
    """A problem from a public row; None from one of another benchmark. Raises ValueError where a text is missing."""
    topic = optional_field(row, "data_topic", "topic")
    source, number = optional_field(row, "data_source"), optional_field(row, "question_number")
    if topic is not None and "." in topic and not topic.startswith("college_math"):
        return None  # the file holds other benchmarks, too
    return Problem(
        id="" if number is None else f"{source}/{number}" if source is not None else number,  # numbered by textbook
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
