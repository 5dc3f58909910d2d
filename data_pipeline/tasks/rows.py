"""Question-answer rows in JSON Lines: the user's own, and those that `data_pipeline prepare demo` writes.

A row is {"question": …, "solution": …, "answer": …} and may carry "id", "level" and "subject". The solution
is the worked text without the answer line; the answer is a number. A step is a non-blank line of the solution.
"""

from collections.abc import Iterator

from data_pipeline.answers import parse_number
from data_pipeline.settings import UsageError
from data_pipeline.tasks.base import Problem, Task, count_lines, read_jsonl, text_field


def _read(split: str, source: str | None) -> Iterator[Problem]:
    if source is None:
        raise UsageError(
            "this task reads a file of rows: name it with data.sources.0.path in training, --source in evaluation"
        )
    for number, row in read_jsonl(source, "source file"):
        where = f"{source}, line {number}"
        solution = text_field(row, "solution", where)
        answer = text_field(row, "answer", where)
        if parse_number(answer) is None:
            raise UsageError(f"{where}: 'answer' must be a number such as 72, 3.5 or 1/2, got {answer!r}")
        yield Problem(
            id=f"{split}/{number - 1}" if row.get("id") is None else str(row["id"]),
            question=text_field(row, "question", where),
            solution=solution,
            answer=answer,
            num_steps=count_lines(solution),
            level=None if row.get("level") is None else str(row["level"]),
            subject=None if row.get("subject") is None else str(row["subject"]),
        )


JSONL = Task("jsonl", kind="number", read=_read)
DEMO = Task("demo", kind="number", read=_read)
