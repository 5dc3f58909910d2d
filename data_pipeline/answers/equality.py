r"""When two answers of mathematics are equal: compared by how they are built, down to expressions, and those by value.

An answer is a list, a set, a tuple or an interval, a union, a matrix, an equation, an inequality, words, or an
expression. What our own reader cannot decide is asked of a computer algebra system through `ask` (see `symbolic`).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from data_pipeline.answers import structure
from data_pipeline.answers.counting import SCALES, spelled
from data_pipeline.answers.expression import Unreadable, close, letters_in, proportional, same_value, value_of
from data_pipeline.answers.spelling import tidy, words
from data_pipeline.answers.structure import squeezed
from data_pipeline.answers.units import Unit, alters, without_unit

Ask = Callable[[str, str], bool]

MAX_CHARS = 1000  # a longer answer is none: the longest of MATH's has 158
_MAX_ITEMS = 64
_MAX_DEPTH = 6
_MAX_WORDS = 8  # of a sentence that says an answer in words
_ELSE = set(
    """
    not no never neither nor or and but isn isnt aren cannot cant can doesn don t hardly rarely almost nearly partly
    except other another than if unless wrong false incorrect
    """.split()
)
_REALS = [{r"(-\infty,\infty)", name} for name in ("R", "allrealnumbers", "allreals", r"x\inR")]
_BASE = re.compile(r"(-?[0-9A-Za-z.]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_CHOICE = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])(?=[.:)]|$))(.*)", re.DOTALL)
_OF_A_FUNCTION = {"y", "f(x)", "g(x)", "h(x)"}
_RATIO = re.compile(r"(-?\d+(?:\.\d+)?)\s*(?::|to)\s*(\d+(?:\.\d+)?)")
_SCALE = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*)?(hundred|thousand|million|billion|trillion)s?\b\s*\}?")


def equal(answer: str, gold: str, ask: Ask | None = None) -> bool:
    """Whether an answer is the gold one in another spelling. Neither is evaluated but by our own reader, and by `ask`.

    Lists and sets are equal in any order, tuples, intervals and matrices place by place. A unit may be left out; where
    both name one, they must say the same. `ask` is given two expressions that could not be compared; without it they
    are taken as different.
    """
    if len(answer) > MAX_CHARS:
        return False
    return _Comparison(ask or (lambda a, b: False)).same(tidy(answer), tidy(gold))


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Of two tidy answers; `depth` is how many lists they stand in."""

    ask: Ask
    depth: int = 0

    def same(self, answer: str, gold: str) -> bool:
        answer, gold = structure.without_name(answer, gold), structure.without_name(gold, answer)
        answer, gold = _without_signs(answer), _without_signs(gold)
        if squeezed(answer) == squeezed(gold):
            return bool(answer)
        if not answer or not gold or self.depth > _MAX_DEPTH:
            return False
        if {re.sub(r"\\text|[{}]", "", squeezed(text)) for text in (answer, gold)} in _REALS:
            return True
        if structure.says_words(gold):
            return _same_words(answer, gold)
        if answer.startswith(r"\text") and structure.unworded(answer) == answer[len(r"\text{") : -1].strip():
            answer = structure.unworded(answer).strip()
        if re.fullmatch("[A-Z]", gold) and structure.says_words(answer):  # the choice E, or a letter in words
            return words(answer) == words(gold)
        pairs = [(a, g) for a in structure.readings(answer) for g in structure.readings(gold)]
        return any(self._same_as_read(a, g) for a, g in pairs)

    def _same_as_read(self, answer: str, gold: str) -> bool:
        deeper = dataclasses.replace(self, depth=self.depth + 1)
        matrices = structure.matrix(answer), structure.matrix(gold)
        if any(matrix is not None for matrix in matrices):
            return deeper._same_matrix(*(_rows(m, text) for m, text in zip(matrices, (answer, gold), strict=True)))
        was, answer, gold = answer, structure.as_set(answer), structure.as_set(gold)
        unions = structure.union(answer), structure.union(gold)
        if max(map(len, unions)) > 1:
            return deeper._same_in_any_order(*unions)
        (a_ends, a_items), (g_ends, g_items) = structure.bracketed(answer), structure.bracketed(gold)
        if not (len(g_items) > 1 or len(a_items) > 1 or "{}" in (a_ends, g_ends)):
            return self._same_leaf(answer, gold)
        if {a_ends, g_ends} <= {"", "{}"}:
            if len(g_items) == 1 and not a_ends:  # "1/2, or 0.5"
                return all(deeper.same(item, gold) for item in a_items)
            return deeper._same_in_any_order(a_items, g_items)
        if a_ends != g_ends and (a_ends or "()", g_ends or "()") != ("()", "()"):
            return False
        if not g_ends and was != answer:  # an inequality is no list of two numbers
            return False
        return deeper._same_in_order(a_items, g_items)

    def _same_in_order(self, answers: Sequence[str], golds: Sequence[str]) -> bool:
        return len(answers) == len(golds) and all(map(self.same, answers, golds))

    def _same_in_any_order(self, answers: Sequence[str], golds: Sequence[str]) -> bool:
        if len(answers) != len(golds) or len(golds) > _MAX_ITEMS:
            return False
        left = list(answers)
        for gold in golds:
            found = next((index for index, answer in enumerate(left) if self.same(answer, gold)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _same_matrix(self, answer: list[list[str]], gold: list[list[str]]) -> bool:
        return len(answer) == len(gold) and all(map(self._same_in_order, answer, gold))

    def _same_leaf(self, answer: str, gold: str) -> bool:
        a_sides, g_sides = structure.sides(answer), structure.sides(gold)
        if len(a_sides) == 2 and len(g_sides) == 2:
            return self._same_equation(a_sides, g_sides)
        if len(g_sides) > 1 or len(a_sides) > 1:
            # "2 + 3 = 5" for 5, "x = 2 + 3 = 5" for 5, and the other way round; but not "x + 1 = 5" for 5.
            # "m + n = 5", "|AB| = 5" name what was asked for.
            last = [of[-1] for of in (a_sides, g_sides) if len(of) != 2 or _is_number(of[0]) or _names(of[0])]
            return len(last) == 2 and dataclasses.replace(self, depth=self.depth + 1).same(*last)
        answer, gold = (text.partition(r"\approx")[0].strip() or text for text in (answer, gold))
        based = [_BASE.fullmatch(_with_base(text)) for text in (answer, gold)]
        if any(match is not None and re.search(r"\d", match[1]) for match in based):
            # The answer may leave out its base; a number of another base is another one, even of the same value.
            digits = [
                match[1] if match is not None else text for match, text in zip(based, (answer, gold), strict=True)
            ]
            bases = {match[2] for match in based if match is not None}
            return digits[0] == digits[1] and len(bases) == 1 and based[1] is not None
        if structure.says_words(answer) and spelled(answer) is None and re.search(r"[\d\\^]", gold):
            return False
        if answer.count("'") != gold.count("'"):
            return False
        if answer.count("!") != gold.count("!") and "!!" in answer + gold:
            return False
        decided = _same_amount(answer, gold)
        if decided is None and alters(answer) != alters(gold):
            return False
        return self.ask(answer, gold) if decided is None else decided

    def _same_equation(self, answer: Sequence[str], gold: Sequence[str]) -> bool:
        names = {squeezed(answer[0]), squeezed(gold[0])}
        same_name = structure.is_name(gold[0]) and (len(names) == 1 or names <= _OF_A_FUNCTION)
        if same_name and dataclasses.replace(self, depth=self.depth + 1).same(answer[1], gold[1]):
            return True
        differences = [f"({left}) - ({right})" for left, right in (answer, gold)]
        return proportional(*differences) is True


def _rows(matrix: list[list[str]] | None, text: str) -> list[list[str]]:
    """A matrix, or the column that is written as a tuple; of anything else nothing."""
    if matrix is not None:
        return matrix
    ends, items = structure.bracketed(text)
    return [[item] for item in items] if ends in ("()", "[]", "<>") else []


def _same_words(answer: str, gold: str) -> bool:
    wanted = words(gold)
    if words(answer) == wanted:
        return True
    answer, gold = structure.unworded(answer).strip(), structure.unworded(gold)
    if re.fullmatch(r"[a-z]", wanted):  # a choice: "(E) 5", "E. five"
        match = _CHOICE.fullmatch(answer)
        if match is None or re.search(r"\b[A-Z]\b|\b(?:or|and|is|not|wrong|incorrect)\b|n't\b", match[3]):
            return False
        return (match[1] or match[2]).casefold() == wanted
    items = [[words(item) for item in structure.bracketed(text)[1]] for text in (answer, gold)]
    if len(items[1]) > 1:
        return sorted(items[0]) == sorted(items[1])
    # "The function is even.", but not "neither even nor odd".
    if re.search(r"[,;/:()]", answer):  # "odd, even"
        return False
    said = re.findall(r"\w+", answer.casefold())
    _else = _ELSE - set(re.findall(r"\w+", gold.casefold()))
    return len(wanted) > 2 and len(said) <= _MAX_WORDS and said.count(wanted) == 1 and _else.isdisjoint(said)


def _same_amount(answer: str, gold: str) -> bool | None:
    """Two expressions, perhaps with units, percent signs, as ratios or in words; None where they cannot be read."""
    answer, gold = (_SCALE.sub(lambda match: rf"\cdot {SCALES[match[1]]}", text) for text in (answer, gold))
    decided = same_value(answer, gold)
    if decided:
        return True
    (a, a_unit), (g, g_unit) = without_unit(answer), without_unit(gold)
    if a_unit is not None and g_unit is not None:
        return _same_quantity((a, a_unit), (g, g_unit))
    if (a_unit is not None and g.endswith("%")) or (g_unit is not None and a.endswith("%")):
        return False
    ratios = [_RATIO.fullmatch(structure.unworded(text)) for text in (answer, gold)]
    a, g = (f"{m[1]}/{m[2]}" if m is not None else text for m, text in zip(ratios, (a, g), strict=True))
    if (number := spelled(a)) is not None:
        a = str(number)
    if a.endswith("%") != g.endswith("%") and same_value(a.rstrip("%"), g.rstrip("%")):
        return True
    if (a, g) != (answer, gold):
        again = same_value(a, g)
        return again if again is not None else decided
    return decided


def _same_quantity(answer: tuple[str, Unit], gold: tuple[str, Unit]) -> bool | None:
    (a, (a_dimension, a_power, a_factor)), (g, (g_dimension, g_power, g_factor)) = answer, gold
    if a_power != g_power or (a_dimension != g_dimension and "units" not in (a_dimension, g_dimension)):
        return False
    if a_dimension != g_dimension:
        a_factor = g_factor
    if a_factor == g_factor:
        return same_value(a, g)
    try:
        a_value, g_value = value_of(a), value_of(g)
    except Unreadable:
        return None
    if isinstance(a_value, Fraction) and isinstance(g_value, Fraction):
        return close(a_value * a_factor, g_value * g_factor)
    return close(complex(a_value) * float(a_factor), complex(g_value) * float(g_factor))


def _without_signs(text: str) -> str:
    r"""Without what may stand before an answer and says nothing: "=", "+", "\approx"."""
    return re.sub(r"^(?:=|\+|\\approx(?![a-z]))\s*", "", text)


def _with_base(text: str) -> str:
    """A number of some base as digits and subscript: 204_{five}, 204 (base 5)."""
    text = structure.unworded(text)
    text = re.sub(r"\s*_?\s*\{?\s*\(?\s*(?:in\s+)?base\s*\{?(\w+)\}?\s*\)?\s*\}?$", r"_{\1}", text)
    return re.sub(r"_\s*\{\s*([a-z]+)\s*\}$", lambda match: f"_{{{spelled(match[1])}}}", text)


def _names(text: str) -> bool:
    """Whether the left side of an equation is the quantity that was asked for: letters, but no computation of one."""
    letters = re.findall(r"(?<!\\)[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))
    if re.search(r"\d", text) or not letters or text.startswith("-"):
        return False
    return len(letters) > 1 or re.match(r"\\(?:angle|sin|cos|tan|triangle)|\|", text) is not None


def _is_number(text: str) -> bool:
    try:
        return not letters_in(text)
    except Unreadable:
        return False
