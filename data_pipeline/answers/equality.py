r"""When two answers of mathematics are equal: how they are built is compared here, what they are worth by `expression`.

An answer is a list, a set, a tuple or an interval, a union, a matrix, an equation, an inequality, words, or an
expression. What neither decides is asked of a computer algebra system through `ask` (see `symbolic`).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from data_pipeline.answers.expression import Unreadable, close, letters_in, proportional, same_value, value_of
from data_pipeline.answers.spelling import counted, tidy, words
from data_pipeline.answers.units import Unit, without_unit

Ask = Callable[[str, str], bool]

MAX_CHARS = 1000  # a longer answer is none: the longest of MATH's has 158
_MAX_ITEMS = 64
_OPENING, _CLOSING = "([{", ")]}"
_MATRIX = re.compile(r"\\begin\s*\{([bBpvV]?matrix|array)\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_SEPARATOR = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|<|>")
_NAME = re.compile(r"(?:\\?[A-Za-z]+|\\text\s*\{[^{}]*\})(?:_\{?\w+\}?)?(?:\s*\([^()=]*\))?'*")
_BASE = re.compile(r"(-?[0-9A-Za-z.]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_CHOICE = re.compile(r"\(?\s*(?:\\text\s*\{\s*)?\(?\s*([A-Z])\s*\)?\s*\}?\s*\)?(?:[.:)\s].*)?", re.DOTALL)


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
    ask: Ask
    depth: int = 0

    def same(self, answer: str, gold: str) -> bool:
        """Two tidy answers."""
        answer, gold = _without_name(answer, gold), _without_name(gold, answer)
        if _squeezed(answer) == _squeezed(gold):
            return bool(answer)
        if not answer or not gold or self.depth > 6:
            return False
        if _says_words(gold):
            return self._same_words(answer, gold)
        return any(self._same_as_read(a, g) for a in _readings(answer) for g in _readings(gold))

    def _same_as_read(self, answer: str, gold: str) -> bool:
        deeper = dataclasses.replace(self, depth=self.depth + 1)
        a_matrix, g_matrix = _matrix(answer), _matrix(gold)
        if g_matrix is not None or a_matrix is not None:
            return deeper._same_matrix(a_matrix, g_matrix, answer, gold)
        answer, gold = _as_set(answer), _as_set(gold)
        a_union, g_union = _union(answer), _union(gold)
        if len(g_union) > 1 or len(a_union) > 1:
            return deeper._same_in_any_order(a_union, g_union)
        a_ends, a_items = _bracketed(answer)
        g_ends, g_items = _bracketed(gold)
        if len(g_items) > 1 or g_ends == "{}":
            if a_ends and g_ends and a_ends != g_ends:
                return False
            if g_ends in ("", "{}") and a_ends in ("", "{}"):
                return deeper._same_in_any_order(a_items, g_items)
            return deeper._same_in_order(a_items, g_items)
        if len(a_items) > 1 or a_ends == "{}":
            return a_ends == "{}" and len(a_items) == 1 and deeper.same(a_items[0], gold)
        return self._same_leaf(answer, gold)

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

    def _same_matrix(self, a: list[list[str]] | None, g: list[list[str]] | None, answer: str, gold: str) -> bool:
        # A column is also written as a tuple.
        for matrix, other, swapped in ((g, answer, False), (a, gold, True)):
            if (g if swapped else a) is None and matrix is not None:
                if any(len(row) != 1 for row in matrix) and len(matrix) != 1:
                    return False
                entries = [entry for row in matrix for entry in row]
                ends, items = _bracketed(other)
                ordered = ends in ("()", "[]", "<>")
                return ordered and (
                    self._same_in_order(entries, items) if swapped else self._same_in_order(items, entries)
                )
        assert a is not None and g is not None
        return len(a) == len(g) and all(map(self._same_in_order, a, g))

    def _same_words(self, answer: str, gold: str) -> bool:
        wanted = words(gold)
        if words(answer) == wanted:
            return True
        if re.fullmatch(r"[a-z]", wanted):  # a choice: "(E) 5", "E. five"
            match = _CHOICE.fullmatch(answer)
            return match is not None and match[1].casefold() == wanted
        answers, golds = ([words(item) for item in _split(unwrap_all(text), ",")] for text in (answer, gold))
        return len(golds) > 1 and sorted(answers) == sorted(golds)

    def _same_leaf(self, answer: str, gold: str) -> bool:
        a_sides, g_sides = (_split(text, "=") for text in (answer, gold))
        if len(a_sides) == 2 and len(g_sides) == 2:
            return self._same_equation(a_sides, g_sides)
        if len(g_sides) > 1 or len(a_sides) > 1:
            # "2 + 3 = 5" for 5, "x = 5" for 5, and the other way round; but not "x + 1 = 5" for 5.
            named = [
                sides[-1]
                for sides in (a_sides, g_sides)
                if len(sides) != 2 or _is_number(sides[0])
            ]
            return len(named) == 2 and dataclasses.replace(self, depth=self.depth + 1).same(*named)
        if answer.endswith("!") and not gold.endswith("!"):
            answer = answer.rstrip("!")
        answer = re.split(r"\\approx", answer)[0].strip()
        based = _BASE.fullmatch(gold)
        if based is not None and re.search(r"\d", based[1]):
            other = _BASE.fullmatch(answer)
            return based.groups() == other.groups() if other is not None else answer == based[1]
        decided = _same_amount(answer, gold)
        if decided is None:
            return self.ask(answer, gold)
        return decided

    def _same_equation(self, answer: Sequence[str], gold: Sequence[str]) -> bool:
        if _NAME.fullmatch(gold[0]) and _squeezed(answer[0]) == _squeezed(gold[0]):
            if dataclasses.replace(self, depth=self.depth + 1).same(answer[1], gold[1]):
                return True
        differences = [f"({left}) - ({right})" for left, right in (answer, gold)]
        return proportional(*differences) is True


def _same_amount(answer: str, gold: str) -> bool | None:
    """Two expressions, perhaps with units, percent signs, as ratios or in words; None where they cannot be read."""
    decided = same_value(answer, gold)
    if decided:
        return True
    (a, a_unit), (g, g_unit) = without_unit(answer), without_unit(gold)
    if a_unit is not None and g_unit is not None:
        return _same_quantity((a, a_unit), (g, g_unit))
    a, g = (re.sub(r"^(-?\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)$", r"\1/\2", text) for text in (a, g))
    if counted(a) is not None:
        a = str(counted(a))
    if a.endswith("%") != g.endswith("%") and same_value(a.rstrip("%"), g.rstrip("%")):
        return True
    if (a, g) != (answer, gold):
        again = same_value(a, g)
        return again if again is not None else decided
    return decided


def _same_quantity(answer: tuple[str, Unit], gold: tuple[str, Unit]) -> bool | None:
    (a, (a_dimension, a_power, a_factor)), (g, (g_dimension, g_power, g_factor)) = answer, gold
    if (a_dimension, a_power) != (g_dimension, g_power):
        return False
    if a_factor == g_factor:
        return same_value(a, g)
    try:
        a_value, g_value = value_of(a), value_of(g)
    except Unreadable:
        return None
    if not isinstance(a_value, Fraction) or not isinstance(g_value, Fraction):
        return close(complex(a_value) * float(a_factor), complex(g_value) * float(g_factor))
    return close(a_value * a_factor, g_value * g_factor)


# ------------------------------------------------------------------------------------------- how it is built


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _says_words(text: str) -> bool:
    r"""Whether a gold answer is words: "\text{Monday}", "\text{(A)}", "Evelyn", "4:30 p.m."; not "5\text{ cm}", "x"."""
    if re.fullmatch(r"\(\s*(?:\\text\s*\{)?\s*[A-Z]\s*\}?\s*\)", text):
        return True
    if _bracketed(text)[0] or re.search(r"[=<>\\^_]", text.replace(r"\text", "")):
        return False
    if re.match(r"[-\d.]+(?!\s*:\s*\d)", text) and not re.search(r"^\d+:\d+", text):
        return False
    return re.search(r"[A-Za-z]{4,}|\d\s*[ap]\.?m\b|^\\text", text) is not None and not re.search(r"\\text\s*\{\s*(and|or)\s", text)


def unwrap_all(text: str) -> str:
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)


def _readings(text: str) -> list[str]:
    """The text, with its thousands' commas taken for what they are if they can be, and for separators."""
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return [text] if joined == text else [joined, text]


def _without_name(text: str, other: str) -> str:
    """The right side of "x = …", "f(x) = …", where the other answer has no sides."""
    sides = _split(text, "=")
    return sides[1] if len(sides) == 2 and _NAME.fullmatch(sides[0]) and "=" not in other else text


def _as_set(text: str) -> str:
    r"""Without "x \in" before it; an inequality as the interval that it is; a set's condition alone."""
    text = re.sub(r"^\\?[A-Za-z]+\s*\\in(?![a-z])\s*", "", text)
    condition = re.fullmatch(r"\\\{\s*\\?[A-Za-z]+\s*(?:\\in\s*\\?\w+\s*)?[|:](.*)\\\}", text)
    if condition is not None:
        text = condition[1].strip()
    return _as_interval(text) or text


def _as_interval(text: str) -> str | None:
    r"""Intervals for "x > 3", "1 < x \le 2", "x \ne 3", or several of them joined by "or"; None for anything else."""
    pieces = _split_at(text, _SEPARATOR)
    if len(pieces) > 1:
        intervals = [_as_interval(piece) for piece in pieces]
        return r" \cup ".join(i for i in intervals if i) if all(intervals) else None
    signs = [match[0].strip().replace("<=", r"\le").replace(">=", r"\ge") for match in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if not 1 <= len(signs) <= 2:
        return None
    turned = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
    if any(sign in (">", r"\ge") for sign in signs):
        signs, sides = [turned[sign] for sign in reversed(signs)], sides[::-1]
    if any(sign in (">", r"\ge") for sign in signs):
        return None
    letter = r"\\?[A-Za-z]+"
    if len(signs) == 1 and re.fullmatch(letter, sides[0]):
        if signs[0] == r"\ne":
            return rf"(-\infty,{sides[1]}) \cup ({sides[1]},\infty)"
        return rf"(-\infty,{sides[1]}{']' if signs[0] != '<' else ')'}"
    if len(signs) == 1 and re.fullmatch(letter, sides[1]) and signs[0] != r"\ne":
        return rf"{'[' if signs[0] != '<' else '('}{sides[0]},\infty)"
    if len(signs) == 2 and re.fullmatch(letter, sides[1]) and r"\ne" not in signs:
        opening, ending = "[" if signs[0] != "<" else "(", "]" if signs[1] != "<" else ")"
        return f"{opening}{sides[0]},{sides[2]}{ending}"
    return None


def _union(text: str) -> list[str]:
    return _split_at(text, re.compile(r"\\cup|(?<=[)\]])\s*U\s*(?=[(\[])"))


def _bracketed(text: str) -> tuple[str, list[str]]:
    r"""The brackets around a whole answer ("()", "(]", "{}" of a set, "<>", or "") and what commas divide in it."""
    text = re.sub(r"^\\langle(.*)\\rangle$", r"<\1>", text.strip())
    ends = ""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        ends, inner = "{}", text[2:-2]
    elif len(text) > 1 and text[0] in "([<" and text[-1] in ")]>" and _encloses(text):
        ends, inner = text[0] + text[-1], text[1:-1]
    items = _items(inner if ends else text)
    if ends and ends != "{}" and len(items) < 2:  # (x + 1) is no tuple
        return "", _items(text)
    return ends, items


def _items(text: str) -> list[str]:
    items = [item for part in _split(text, ",;") for item in _split_at(part, _SEPARATOR)]
    if len(items) == 1 and items[0] == "" or items == [r"\emptyset"]:
        return []
    named = [re.sub(r"^\\?[A-Za-z]\s*=(?!.*=)", "", item).strip() for item in items] if len(items) > 1 else items
    return [branch for item in named for branch in _branches(item)]


def _branches(item: str) -> list[str]:
    r"""The two values of "1 \pm \sqrt{2}"."""
    if item.count(r"\pm") != 1:
        return [item]
    return [item.replace(r"\pm", sign).strip().removeprefix("+") for sign in "+-"]


def _encloses(text: str) -> bool:
    depth = 0
    for index, char in enumerate(text):
        depth += (char in _OPENING + "<") - (char in _CLOSING + ">")
        if depth == 0 and index < len(text) - 1:
            return False
    return True


def _split(text: str, separators: str) -> list[str]:
    """Parts between separators that stand in no bracket; relations such as <= are no equals sign."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if char in separators and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _split_at(text: str, separator: re.Pattern[str]) -> list[str]:
    """As `_split`, at what a pattern finds; nothing between two of them is left out."""
    parts, start = [], 0
    for match in separator.finditer(text):
        before = text[: match.start()]
        if sum(before.count(c) for c in _OPENING) == sum(before.count(c) for c in _CLOSING) or r"\text" in match[0]:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts = [*parts, text[start:].strip()]
    return [part for part in parts if part] if len(parts) > 1 else parts


def _matrix(text: str) -> list[list[str]] | None:
    match = _MATRIX.fullmatch(text.strip())
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", match[2]) if row.strip()]
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def _is_number(text: str) -> bool:
    try:
        return not letters_in(text)
    except Unreadable:
        return False


