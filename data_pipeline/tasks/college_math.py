"""CollegeMath (Tang et al. 2024): exercises of university textbooks with a final answer and no worked solution.

A row is {"question": …, "answer": …, "data_source": …, "data_topic": "college_math.algebra", "question_number": …}. The
published file, full_test.json, has one a line, those of other benchmarks (MATH.Algebra, gsm8k, tal, …) among them.
"""

from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, optional_field, text_field

_SUBJECTS = {
    "algebra", "precalculus", "calculus", "vector_calculus", "probability", "linear_algebra", "differential_equation",
}  # fmt: skip


def parse(row: Row) -> Problem | None:
    """A problem from a public row; None from one of another benchmark. Raises ValueError where a text is missing."""
    topic = optional_field(row, "data_topic", "topic")
    source, number = optional_field(row, "data_source"), optional_field(row, "question_number")
    subject = None if topic is None else topic.removeprefix("college_math.")
    if subject is not None and subject not in _SUBJECTS:
        return None  # of another benchmark
    return Problem(
        id="" if number is None else f"{source}/{number}" if source is not None else number,  # numbered by textbook
        question=text_field(row, "question"),
        solution="",
        answer=text_field(row, "answer"),
        subject=subject,
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
