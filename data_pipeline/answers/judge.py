"""Whether a response is right: its answer extracted, and compared with the gold answer as its kind asks."""

from collections.abc import Callable
from fractions import Fraction

from data_pipeline.answers import symbolic
from data_pipeline.answers.equality import MAX_CHARS, equal
from data_pipeline.answers.expression import Unreadable, value_of
from data_pipeline.answers.extract import Kind
from data_pipeline.answers.numbers import canonical_number, numbers_equal, parse_number
from data_pipeline.answers.puzzle import parse_puzzle, solves
from data_pipeline.answers.spelling import tidy

# Raised whenever an answer could be extracted or judged differently: metrics of two versions do not compare.
GRADER_VERSION = "3"
_MAX_SPELLINGS = 32  # of one problem's answers that a new one is compared with
KINDS: tuple[Kind, ...] = ("number", "latex", "puzzle")


def is_equal(answer: str, gold: str, kind: Kind, ask: Callable[[str, str], bool] | None = None) -> bool | None:
    """Whether an answer, as `extract` gives it, is the gold one; None where that took too long to find out.

    A number must be equal exactly, or to 1e-3 relative where the gold one is no integer; LaTeX is compared as
    mathematics, where `ask` (a computer algebra system) is given what our own reader cannot decide; a puzzle's steps
    are verified. `ask` may raise TooHard. Raises ValueError where `gold` is no answer of its kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not gradable; allowed: {', '.join(KINDS)}")
    if kind == "number":
        return numbers_equal(answer, gold)
    if kind == "puzzle":
        return solves(answer, gold)
    try:
        return equal(answer, gold, symbolic.Questions() if ask is None else ask)
    except symbolic.TooHard:
        return None


def check_gold(gold: str, kind: Kind) -> None:
    """Raises ValueError where `gold` is no answer of its kind, or the kind is unknown."""
    if kind == "number" and parse_number(gold) is None:
        raise ValueError(f"the gold answer {gold!r} is not a number")
    if kind == "puzzle":
        parse_puzzle(gold)
    if kind == "latex" and not tidy(gold):
        raise ValueError("the gold answer is empty")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not gradable; allowed: {', '.join(KINDS)}")


class Votes:
    """What the answers to one problem vote for: equal ones for one. The gold answer has no part in it."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._votes: dict[str, str | None] = {}  # by answer
        self._spelled: list[str] = []  # votes that are no plain numbers, each by the answer that came first

    def of(self, answer: str | None) -> str | None:
        """One spelling for all answers that are equal to this one; None for no answer."""
        if answer is None:
            return None
        if answer not in self._votes:
            self._votes[answer] = self._new(answer)
        return self._votes[answer]

    def _new(self, answer: str) -> str | None:
        if self._kind == "number":
            return canonical_number(answer)
        if self._kind == "puzzle" or len(answer) > MAX_CHARS:
            return answer
        try:
            value = value_of(tidy(answer))
        except Unreadable:
            value = None
        if isinstance(value, Fraction):  # Python refuses to write more than 4,300 digits of it in tens
            long = max(value.numerator.bit_length(), value.denominator.bit_length()) > 1000
            return f"{value.numerator:#x}/{value.denominator:#x}" if long else str(value)
        for spelling in self._spelled[:_MAX_SPELLINGS]:
            if equal(answer, spelling):
                return spelling
        self._spelled.append(answer)
        return answer
