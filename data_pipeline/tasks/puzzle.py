"""Arithmetic puzzles (arXiv 2406.02100): all numbers once, in a chain of operations that ends at the target.

A row is {"question": "3, 6, 7, 51, 58 -> 4", "solution": "58 - 51 = 7\\n6 - 7 = -1\\n…"}. The question is the gold
answer, too: whatever steps lead there are right. A step is a line.
"""

from data_pipeline.answers.puzzle import parse_puzzle
from data_pipeline.rows import Row
from data_pipeline.tasks.base import Problem, Task, count_lines, text_field


def parse(row: Row) -> Problem:
    """A problem from a generated row. Raises ValueError where the question is no puzzle."""
    question, solution = text_field(row, "question"), text_field(row, "solution")
    parse_puzzle(question)
    return Problem("", question, solution, answer=question, num_steps=count_lines(solution))


TASK = Task("puzzle", kind="puzzle", parse=parse, about="generated arithmetic puzzles (arXiv 2406.02100)")
