"""Arithmetic puzzles (arXiv 2406.02100): use every number once, in a chain of operations that ends at the target."""

import re
from collections import Counter
from fractions import Fraction

_GOLD = re.compile(r"\s*(-?\d+(?:[\s,]+-?\d+)*)\s*(?:->|=>|→|:|=)\s*(-?\d+)\s*")
_OPERAND = r"\(?\s*(-?\d+)\s*\)?"
_STEP = re.compile(rf"{_OPERAND}\s*([-+*/×÷])\s*{_OPERAND}\s*=\s*{_OPERAND}")
MAX_NUMBERS = 1000


def parse_puzzle(gold: str) -> tuple[list[int], int]:
    """The numbers and the target of "3, 6, 7, 51, 58 -> 4". Raises ValueError."""
    match = _GOLD.fullmatch(gold)
    if match is None:
        raise ValueError(f"the puzzle {gold[:80]!r} must look like '3, 6, 7, 51, 58 -> 4'")
    numbers = [int(number) for number in re.findall(r"-?\d+", match[1])]
    if len(numbers) > MAX_NUMBERS:
        raise ValueError(f"a puzzle of {len(numbers)} numbers: at most {MAX_NUMBERS} are allowed")
    return numbers, int(match[2])


def solves(response: str, gold: str) -> bool:
    """Whether the steps of a response solve a puzzle.

    There must be one step fewer than numbers; each is right, and uses numbers that are there: given ones, or results of
    steps before, each once. The last step's result is the target. Raises ValueError where `gold` is no puzzle.
    """
    numbers, target = parse_puzzle(gold)
    steps = [piece.strip() for piece in re.split(r"[;,\n]+", response.replace("−", "-")) if "=" in piece]
    if len(steps) != len(numbers) - 1 or not steps:
        return False
    there = Counter(numbers)
    result = 0
    for step in steps:
        match = _STEP.search(step)
        if match is None or len(step) > 200 or step.count("=") != 1:
            return False
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        for number in (left, right):
            there[number] -= 1
            if there[number] < 0:
                return False
        if _apply(left, match[2], right) != result:
            return False
        there[result] += 1
    return result == target


def _apply(left: int, sign: str, right: int) -> Fraction | None:
    if sign in "/÷":
        return Fraction(left, right) if right else None
    return Fraction(left + right if sign == "+" else left - right if sign == "-" else left * right)
