"""How an answer is built: lists, brackets, unions, matrices, inequalities, words. Texts are tidy ones."""

import re
from collections.abc import Sequence

from data_pipeline.answers.expression import Unreadable, value_of

_OPENING, _CLOSING = "([{", ")]}"
_MATRIX = re.compile(
    r"(?P<factor>[^&]*?)[(\[]?\s*\\begin\s*\{(?P<name>[bBpvV]?matrix|smallmatrix|array)\}(?:\s*\{[^{}]*\})?"
    r"(?P<body>.*)\\end\s*\{(?P=name)\}\s*[)\]]?",
    re.DOTALL,
)
_JOINED = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_UNION = re.compile(r"\\cup|(?<=[)\]])\s*U\s*(?=[(\[])")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|<|>")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_LETTER = r"\\?[A-Za-z]+(?:\([A-Za-z]\))?"  # or f(x)
_FUNCTION = re.compile(r"sqrt|arcsin|arccos|arctan|sinh|cosh|tanh")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]+|\\text\s*\{[^{}]*\})(?:_\{?\w+\}?)?(?:\^\{?-1\}?)?(?:\s*\([^()=]*\))?'*"
    r"|\(\s*\\?[A-Za-z]+(?:_\d)?\s*(?:,\s*\\?[A-Za-z]+(?:_\d)?\s*)+\)"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def squeezed(text: str) -> str:
    """Without white space."""
    return re.sub(r"\s+", "", text)


def unworded(text: str) -> str:
    r"""What stands in \text{…} without the command."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)


def says_words(text: str) -> bool:
    r"""Whether an answer is words: "\text{Monday}", "(B)", "\text{A, C}", "4:30 p.m."; not "5\text{ cm}", "x"."""
    text = _FUNCTION.sub("", text)
    bare = unworded(text)
    if re.fullmatch(r"\(?\s*[A-Z]\s*\)?", bare):  # a choice in brackets, or in \text
        return bare != text or text.startswith("(")
    if re.match(r"\d{1,2}:\d\d", bare):  # a time of the day; a ratio has no words
        return re.search(r"[A-Za-z]", bare) is not None
    if re.match(r"[-(\[]?\s*[\d.]", text) or re.search(r"[=<>\\^_]", bare) or _JOINED.fullmatch(text):
        return False
    return (bare != text and not _JOINED.search(text)) or re.search(r"[A-Za-z]{4,}", bare) is not None


def readings(text: str) -> list[str]:
    """The text with its thousands' commas taken for what they are, and, if they can be, for separators: "70,110".

    In brackets a comma separates: (100,101) is a pair.
    """
    if bracketed(text)[0]:
        return [text]
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
    if len(parts) != 2 or "=" in other:
        return text
    if is_name(parts[1]) and len(parts[1]) == 1:  # 5 = x
        parts = parts[::-1]
    return parts[1] if is_name(parts[0]) else text


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
    pieces = [piece for part in split(text, ",") for piece in split_at(part, _JOINED) if piece]
    if len(pieces) > 1:
        intervals = [interval for piece in pieces if (interval := _as_interval(piece)) is not None]
        if len(intervals) < len(pieces):
            return None
        # "x > 1 and x < 2" is one interval, "x < 1, x > 2" are two.
        return (_intersection(intervals) if "or" not in text else None) or r" \cup ".join(intervals)
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


def _intersection(intervals: Sequence[str]) -> str | None:
    """Of an interval that is open to the right and one that is open to the left: "x > 1 and x < 2"."""
    ends = [(interval[0], *split(interval[1:-1], ","), interval[-1]) for interval in intervals]
    lower = [end for end in ends if end[2:] == (r"\infty", ")")]
    upper = [end for end in ends if end[:2] == ("(", r"-\infty")]
    if len(ends) != 2 or len(lower) != 1 or len(upper) != 1:
        return None
    try:
        if complex(value_of(lower[0][1])).real >= complex(value_of(upper[0][2])).real:
            return None
    except (Unreadable, OverflowError):
        pass
    return f"{lower[0][0]}{lower[0][1]},{upper[0][2]}{upper[0][3]}"


def union(text: str) -> list[str]:
    """The members of a union of sets; of anything else itself."""
    return split_at(text, _UNION)


def bracketed(text: str) -> tuple[str, list[str]]:
    r"""The brackets around a whole answer ("()", "(]", "{}" of a set, "<>", or "") and what commas divide in it."""
    text = re.sub(r"^\\langle(?![a-z])(.*)\\rangle$", r"<\1>", text.strip())
    text = re.sub(r"^(?:[A-Z]|\\text\s*\{[^{}]*\})\s*(?=\(.*,.*\)$)", "", text)  # the point P(1, 2)
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
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?|\\cr(?![a-z])", match["body"]) if row.strip()]
    factor = match["factor"].strip()
    return [[f"({factor})({entry.strip()})" if factor else entry.strip() for entry in row.split("&")] for row in rows]


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
    if len(items) > 1:
        items = _unnamed([item for item in items if item])  # "7, -2, and -5" has a comma too many
    return [branch for item in items for branch in _branches(item)]


def _unnamed(items: Sequence[str]) -> list[str]:
    """The values of "y = 3, x = 4" in the order of their names."""
    named = [re.fullmatch(rf"({_LETTER})\s*=([^=]*)", item) for item in items]
    found = [(match[1], match[2].strip()) for match in named if match is not None]
    if len(found) < len(items):
        return [match[2].strip() if match is not None else item for match, item in zip(named, items, strict=True)]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


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
