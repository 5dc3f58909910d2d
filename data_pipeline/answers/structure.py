"""How an answer is built: lists, brackets, unions, matrices, inequalities, words. Texts are tidy ones."""

import re
from collections.abc import Sequence

_OPENING, _CLOSING = "([{", ")]}"
_MATRIX = re.compile(r"\\begin\s*\{([bBpvV]?matrix|array)\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_JOINED = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_UNION = re.compile(r"\\cup|(?<=[)\]])\s*U\s*(?=[(\[])")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|<|>")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_LETTER = r"\\?[A-Za-z]+"
_NAME = re.compile(r"(?:\\?[A-Za-z]+|\\text\s*\{[^{}]*\})(?:_\{?\w+\}?)?(?:\s*\([^()=]*\))?'*")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def squeezed(text: str) -> str:
    """Without white space."""
    return re.sub(r"\s+", "", text)


def unworded(text: str) -> str:
    r"""What stands in \text{…} without the command."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)


def says_words(text: str) -> bool:
    r"""Whether an answer is words: "\text{Monday}", "(B)", "\text{A, C}", "4:30 p.m."; not "5\text{ cm}", "x"."""
    bare = unworded(text)
    if re.fullmatch(r"\(?\s*[A-Z]\s*\)?", bare):  # a choice in brackets, or in \text
        return bare != text or text.startswith("(")
    if re.match(r"\d{1,2}:\d\d", bare):  # a time of the day; a ratio has no words
        return re.search(r"[A-Za-z]", bare) is not None
    if re.match(r"[-(\[]?\s*[\d.]", text) or re.search(r"[=<>\\^_]", bare) or _JOINED.fullmatch(text):
        return False
    return (bare != text and not _JOINED.search(text)) or re.search(r"[A-Za-z]{4,}", bare) is not None


def readings(text: str) -> list[str]:
    """The text with its thousands' commas taken for what they are, and, if they can be, for separators: "70,110"."""
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if joined == text:
        return [text]
    return [joined] if re.search(r",0", text) else [joined, text]


def sides(text: str) -> list[str]:
    """What equals signs divide, outside of brackets."""
    return split(text, "=")


def without_name(text: str, other: str) -> str:
    """The right side of "x = …", "f(x) = …", where the other answer has no sides."""
    parts = sides(text)
    return parts[1] if len(parts) == 2 and is_name(parts[0]) and "=" not in other else text


def is_name(text: str) -> bool:
    """Whether the left side of an equation only names the right one."""
    return _NAME.fullmatch(text) is not None


def as_set(text: str) -> str:
    r"""Without "x \in" before it; an inequality as the interval that it is; a set's condition alone."""
    text = re.sub(rf"^{_LETTER}\s*\\in(?![a-z])\s*", "", text)
    condition = re.fullmatch(rf"\\\{{\s*{_LETTER}\s*(?:\\in\s*\\?\w+\s*)?[|:](.*)\\\}}", text)
    if condition is not None:
        text = condition[1].strip()
    return _as_interval(text) or text


def _as_interval(text: str) -> str | None:
    r"""Intervals for "x > 3", "1 < x \le 2", "x \ne 3", or several of them joined by "or"; None for anything else."""
    pieces = split_at(text, _JOINED)
    if len(pieces) > 1:
        intervals = [_as_interval(piece) for piece in pieces]
        return r" \cup ".join(i for i in intervals if i) if all(intervals) else None
    signs = [match[0].replace("<=", r"\le").replace(">=", r"\ge") for match in _RELATION.finditer(text)]
    parts = [part.strip() for part in _RELATION.split(text)]
    if any(sign in (">", r"\ge") for sign in signs):  # from small to large
        signs, parts = [_TURNED[sign] for sign in reversed(signs)], parts[::-1]
    if not 1 <= len(signs) <= 2 or any(sign in (">", r"\ge") for sign in signs):
        return None
    opens, closes = ["[" if sign != "<" else "(" for sign in signs], ["]" if sign != "<" else ")" for sign in signs]
    unknown = [re.fullmatch(_LETTER, part) is not None for part in parts]
    if signs == [r"\ne"]:
        return rf"(-\infty,{parts[1]}) \cup ({parts[1]},\infty)" if unknown[0] else None
    if r"\ne" in signs:
        return None
    if len(signs) == 2:
        return f"{opens[0]}{parts[0]},{parts[2]}{closes[1]}" if unknown[1] else None
    if unknown[0]:
        return rf"(-\infty,{parts[1]}{closes[0]}"
    return rf"{opens[0]}{parts[0]},\infty)" if unknown[1] else None


def union(text: str) -> list[str]:
    """The members of a union of sets; of anything else itself."""
    return split_at(text, _UNION)


def bracketed(text: str) -> tuple[str, list[str]]:
    r"""The brackets around a whole answer ("()", "(]", "{}" of a set, "<>", or "") and what commas divide in it."""
    text = re.sub(r"^\\langle(?![a-z])(.*)\\rangle$", r"<\1>", text.strip())
    ends, inner = "", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        ends, inner = "{}", text[2:-2]
    elif len(text) > 1 and text[0] in "([<" and text[-1] in ")]>" and _encloses(text):
        ends, inner = text[0] + text[-1], text[1:-1]
    items = _items(inner)
    if ends and ends != "{}" and len(items) < 2:  # (x + 1) is no tuple
        return "", _items(text)
    return ends, items


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a matrix; None of anything else."""
    match = _MATRIX.fullmatch(text.strip())
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", match[2]) if row.strip()]
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def split(text: str, separators: str) -> list[str]:
    """Parts between separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if char in separators and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def split_at(text: str, separator: re.Pattern[str]) -> list[str]:
    """As `split`, at what a pattern finds; where nothing stands between two of them, nothing is given."""
    parts, start = [], 0
    for match in separator.finditer(text):
        before = text[: match.start()]
        if sum(before.count(c) for c in _OPENING) == sum(before.count(c) for c in _CLOSING):
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part] if len(parts) > 1 else parts


def _items(text: str) -> list[str]:
    items = [item for part in split(text, ",;") for item in split_at(part, _JOINED)]
    if items in ([""], [r"\emptyset"]):
        return []
    if len(items) > 1:  # "x = 1, y = 2"
        items = [re.sub(rf"^{_LETTER}\s*=(?!.*=)", "", item).strip() for item in items]
        items = [item for item in items if item]  # "7, -2, and -5" has a comma too many
    return [branch for item in items for branch in _branches(item)]


def _branches(item: str) -> Sequence[str]:
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
