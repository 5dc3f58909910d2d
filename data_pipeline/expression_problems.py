r"""Arithmetic expressions in LaTeX with worked steps, generated: the second style of the demo's problems.

"Compute $(3 + 4) \cdot 2 - 5$." is worked out from its innermost parentheses, by lines like those of the stories
("3 + 4 = 7"), over the same small numbers: so what one style teaches of the arithmetic may serve the other, and what
tells them apart is how a question is read.
"""

import functools
import random
from collections import Counter
from collections.abc import Iterator

from data_pipeline.problem import Problem
from data_pipeline.settings import UsageError
from data_pipeline.word_problems import MAX_CHANGE, MAX_START, MAX_VALUE, MIN_NUMBER, Working, calculated

ASKING = ("Compute ${}$.", "Evaluate ${}$.", "Find the value of ${}$.", "What is ${}$?")
_LATEX = {"+": "+", "-": "-", "*": r"\cdot"}
_STARTS, _NUMBERS = range(MIN_NUMBER, MAX_START + 1), range(MIN_NUMBER, MAX_CHANGE + 1)


def generate_expressions(count: int, seed: int, min_steps: int = 2, max_steps: int = 4) -> Iterator[Problem]:
    """`count` problems of different expressions with `min_steps` to `max_steps` operations. Deterministic in `seed`.

    Of two operations there are some 1,700, of four 300,000: a large `count` holds few short ones. Raises UsageError
    where there are not so many.
    """
    there = sum(map(_number_of_expressions, range(min_steps, max_steps + 1)))
    if count > there:
        raise UsageError(
            f"there are {there:,} different expressions of {min_steps} to {max_steps} operations, and {count:,} were "
            "asked for: ask for fewer problems"
        )
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        expression, working, value = _generate(rng, rng.randint(min_steps, max_steps))
        question = rng.choice(ASKING).format(expression)
        if expression not in seen:
            problem_id = f"expression/{len(seen)}"
            seen.add(expression)
            yield Problem(problem_id, question, working.solution, str(value), len(working.lines), subject="expression")


def _generate(rng: random.Random, num_steps: int) -> tuple[str, Working, int]:
    """An expression, its steps and its value. Each operation takes what stands there as its left side."""
    value = rng.choice(_STARTS)
    expression, last = str(value), "*"  # a number alone needs no parentheses
    working = Working()
    for _ in range(num_steps):
        fitting = _numbers(value)
        sign = rng.choice(list(fitting))  # first, or there were few products: few numbers fit them
        number = rng.choice(fitting[sign])
        if sign == "*" and last != "*":
            expression = f"({expression})"
        expression, last = f"{expression} {_LATEX[sign]} {number}", sign
        value = working.line(value, sign, number)
    return expression, working, value


@functools.cache
def _numbers(value: int) -> dict[str, list[int]]:
    """The numbers that lead on from a value within bounds, by the sign before them."""
    fitting = {sign: [n for n in _NUMBERS if 0 < calculated(value, sign, n) <= MAX_VALUE] for sign in _LATEX}
    return {sign: numbers for sign, numbers in fitting.items() if numbers}


def _number_of_expressions(num_steps: int) -> int:
    ending_in = Counter(_STARTS)  # how many end in each value
    for _ in range(num_steps):
        longer: Counter[int] = Counter()
        for value, ways in ending_in.items():
            for sign, numbers in _numbers(value).items():
                for number in numbers:
                    longer[calculated(value, sign, number)] += ways
        ending_in = longer
    return ending_in.total()
