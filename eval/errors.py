"""Where a wrong solution goes wrong, and how (arXiv 2403.04706, section 4.3): calculation errors and reasoning errors.

A calculation error is found by program: a step states an equation between numbers that is false. Of a wrong solution
whose stated equations all hold, the error is one of reasoning. Nothing is judged where no equation can be read.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.stats

from data_pipeline.answers.expression import Unreadable, Value, close, value_of
from data_pipeline.answers.extract import cut
from data_pipeline.answers.spelling import tidy

_SIDE = r"(?:[-+*/^().\d\s%]|\\(?:cdot|times|div|frac|sqrt)(?![a-z])|[{}])"
_LEFT, _RIGHT = re.compile(rf"{_SIDE}*$"), re.compile(rf"^{_SIDE}*")
_TIMES = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_OPERATOR = re.compile(r"\d\s*[%)}]*\s*(?:[-+*/^]|\\cdot|\\times|\\div)|\\frac|\\sqrt")
_MAX_LINE = 1000
TYPES = ("calculation", "reasoning")


@dataclasses.dataclass(frozen=True)
class Equation:
    """What a step states: the text of both sides, and whether it holds."""

    left: str
    right: str
    holds: bool


def steps_of(response: str) -> list[str]:
    """The steps of a response: its lines, or the sentences of one that is a single line, before the answer line."""
    text = re.split(r"\n?\s*(?:The (?:final )?answer is|####)", cut(response))[0]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) == 1:
        lines = [line for line in re.split(r"(?<=[.!?])\s+(?=[A-Z])", lines[0]) if line]
    return lines


def equations(step: str) -> list[Equation]:
    """The equations between numbers that a step states: "3 * 4 = 12", "$5 + $2 = $7", "1/3 = 0.33".

    One side at least is a computation. A side that words or letters join is none: in "2 apples * 3 = 6" nothing is
    read. A decimal is taken as rounded to its places, a whole number beside a fraction as rounded either way.
    """
    text = _TIMES.sub(" * ", re.sub(r"\\text\s*\{\s*dollars\s*\}", " ", tidy(step[:_MAX_LINE]).replace(",", "")))
    sides = text.split("=")
    found = []
    for index, (before, after) in enumerate(itertools.pairwise(sides)):
        left, right = _at_the_end(before), _at_the_start(after)
        if left is None or right is None or not (_OPERATOR.search(left[0]) or _OPERATOR.search(right[0])):
            continue
        holds = _holds(left[1], right[1], left[0], right[0])
        if not holds and index + 2 < len(sides):  # "24 - 4 = 20 - 4 = 16": what goes on from its result
            result = _read((re.match(r"[\s$]*-?[\d.]+(?=\s*[-+*/^\\])", right[0]) or [""])[0].strip())
            holds = result is not None and _holds(left[1], result[1], left[0], result[0])
        found.append(Equation(left[0], right[0], holds))
    return found


def _at_the_end(text: str) -> tuple[str, Value] | None:
    """The expression that stands before "=", all of it: what a word or a letter joins by an operator is none."""
    match = _LEFT.search(text)
    assert match is not None
    side = match[0].strip().rstrip(".")
    before = text[: match.start()].rstrip()
    joined = before[-1:].isalnum() and re.match(r"[-+*/^%)]", side)
    times = re.search(r"(?:^|[\s)])[xX]$", before)  # "60 students x 2/3"
    return None if joined or times else _read(side)


def _at_the_start(text: str) -> tuple[str, Value] | None:
    match = _RIGHT.search(text)
    assert match is not None
    side = match[0].strip().rstrip(".")
    behind = text[match.end() :]
    if behind.lstrip()[:1].isalpha() and re.search(r"[-+*/^(]$", side):
        return None
    if behind[:1].isalpha() and not match[0][-1:].isspace() and _OPERATOR.search(side):  # 10 + 4c
        return None
    # "5 + 3 = 8 (as before" and "= 8 - the rest": what is cut off mid-way belongs to no number.
    return _read(re.sub(r"[-+*/^({\s.]+$", "", side))


def _read(side: str) -> tuple[str, Value] | None:
    while side:
        try:
            return side, value_of(side)
        except Unreadable:
            shorter = re.sub(r"^\S+\s+", "", side)  # a sentence's last number, or a list's mark, before it
            if shorter == side or re.match(r"[-+*/^%)]|0\d", shorter):  # 17 000 / 5
                return None
            side = shorter
    return None


def _holds(left: Value, right: Value, left_text: str, right_text: str) -> bool:
    if close(left, right):
        return True
    difference = abs(complex(left) - complex(right))
    for text in (left_text, right_text):
        decimals = re.fullmatch(r"\s*-?\d*\.(\d+)\s*%?\s*", text)
        if decimals is not None:
            places = len(decimals[1]) + (2 if "%" in text else 0)
            return difference <= 10.0**-places
    # "50 = 50%" and "100 * 20 / 100 = 20%" are manners of speaking.
    for literal, value, other in ((right_text, right, left), (left_text, left, right)):
        if re.fullmatch(r"\s*-?[\d.]+\s*%\s*", literal) and close(value * 100, other):
            return True
    whole = [isinstance(value, Fraction) and value.denominator == 1 for value in (left, right)]
    divided = re.search(r"/|\\div|\\frac", right_text if whole[0] else left_text)
    return whole[0] != whole[1] and divided is not None and difference < 1  # 10 / 3 = 3: rounded, or cut


@dataclasses.dataclass(frozen=True)
class Examined:
    """A wrong solution: its steps, how many state an equation, and the first whose equation is false, from 0."""

    num_steps: int
    num_checked: int
    first_false: int | None

    @property
    def error(self) -> str | None:
        """ "calculation", "reasoning", or None where nothing could be checked."""
        if self.first_false is not None:
            return "calculation"
        return "reasoning" if self.num_checked else None


def examine(response: str) -> Examined:
    """Checks the steps of a response."""
    stated = [equations(step) for step in steps_of(response)]
    false = [index for index, found in enumerate(stated) if not all(equation.holds for equation in found)]
    return Examined(len(stated), sum(map(bool, stated)), false[0] if false else None)


def error_types(examined: Sequence[Examined], problems: Sequence[str]) -> dict[str, Any]:
    """Wrong solutions by type, their shares with 95 % intervals, and where the first false equation stands.

    `problems` says of each solution which problem it solves. The position is the number of steps before the false
    equation, of all. Shares are of the solutions that can be checked; their intervals, see `share`.
    """
    types = [each.error for each in examined]
    checked = [(kind, problem) for kind, problem in zip(types, problems, strict=True) if kind is not None]
    positions = [each.first_false / each.num_steps for each in examined if each.first_false is not None]
    return {
        "num_wrong": len(examined),
        **{name: types.count(name) for name in TYPES},
        "not_checkable": types.count(None),
        "shares": {name: share([(kind == name, problem) for kind, problem in checked]) for name in TYPES},
        "first_false_position": float(np.mean(positions)) if positions else None,
    }


def share(found: Sequence[tuple[bool, str]]) -> dict[str, Any] | None:
    """The share of True with its 95 % interval, of pairs (found, problem); None of nothing.

    Solutions of one problem go wrong alike, so they are not as many witnesses: the interval is Wilson's (1927) for the
    number of independent ones that would vary as much (Kish's design effect, from the variance between problems), and
    for the number of problems where all solutions are of one kind.
    """
    if not found:
        return None
    counts: dict[str, list[int]] = {}
    for hit, problem in found:
        of_problem = counts.setdefault(problem, [0, 0])
        of_problem[0] += hit
        of_problem[1] += 1
    hits, sizes = np.array(list(counts.values()), float).T
    total, groups = sizes.sum(), len(sizes)
    value = float(hits.sum() / total)
    alone = value * (1 - value) / total  # the variance, if solutions were independent
    if alone > 0 and groups > 1:
        together = float(np.square(hits - value * sizes).sum() / total**2 * groups / (groups - 1))
        effective = total / max(1.0, together / alone)
    else:
        effective = float(groups)
    low, high = wilson(value, effective)
    return {"value": value, "ci95": [low, high]}


def wilson(value: float, number: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `number` independent cases, which may be no whole number."""
    squared = scipy.stats.norm.ppf(0.975) ** 2 / number
    middle = value + squared / 2
    half = float(np.sqrt(squared * (value * (1 - value) + squared / 4)))
    return max(0.0, float((middle - half) / (1 + squared))), min(1.0, float((middle + half) / (1 + squared)))
