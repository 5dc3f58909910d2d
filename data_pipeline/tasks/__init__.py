"""Tasks: where problems come from, what the gold answer is, how steps are counted, how it is graded.

A task is one file that makes one `Task`; it is listed in `TASKS` below.
"""

from data_pipeline.problem import Problem
from data_pipeline.settings import UsageError
from data_pipeline.tasks import asdiv, college_math, gsm8k, hungarian, math, own, puzzle, svamp
from data_pipeline.tasks.base import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        gsm8k.TASK, math.TASK, svamp.TASK, asdiv.TASK, college_math.TASK, hungarian.TASK,
        puzzle.TASK, own.DEMO, own.JSONL, own.LATEX,
    )
}  # fmt: skip


def get_task(name: str) -> Task:
    """The task called `name`. Raises UsageError."""
    if name not in TASKS:
        raise UsageError(f"task={name!r} is unknown; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def read_problems(task: str, split: str, source: str | None) -> list[Problem]:
    """All problems of a split. `source` is a file or folder of rows; None takes the task's public source.

    Raises UsageError where the source is missing, a row is malformed (its line is named), ids repeat, or
    nothing is in it.
    """
    problems = list(get_task(task).problems(split, source))
    if not problems:
        raise UsageError(f"task={task} split={split} source={source}: the dataset is empty, no problem was read")
    return problems


__all__ = ["TASKS", "Problem", "Task", "get_task", "read_problems"]
