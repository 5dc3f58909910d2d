"""Whether what a teacher gives as a final answer is one of its kind: a number, or mathematics that can be read."""

import re

from data_pipeline.answers import Kind, check_gold

_MOST_WORDS = 4  # in a row outside of \text{}: "all numbers but 3" is an answer, a sentence is none
_ESCAPED = re.compile(r"\\[{}\\$%&#_]")
_TEXT = re.compile(r"\\(?:text\w*|[mh]box|mathrm|operatorname|emph|begin|end)\*?\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'’-]+[^\W\d_]{2,})*")
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])")
_TOKEN = re.compile(r"\s*(?:\\[A-Za-z]+|[^\s{}\\^_&])")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([A-Za-z*]+)\}")
_SIDE = re.compile(r"\\(left|right)(?![A-Za-z])")


def check_answer(answer: str, kind: Kind) -> None:
    """Raises ValueError, which says why, where an answer is none of its kind.

    Mathematics has its braces, environments and fractions whole, and is no sentence.
    """
    check_gold(answer, kind)
    if kind != "latex":
        return
    plain = _ESCAPED.sub(" ", answer)
    if not _is_nested(re.findall(r"[{}]", plain), {"}": "{"}):
        raise ValueError("its braces do not match")
    if not _is_nested([side[1] for side in _SIDE.finditer(plain)], {"right": "left"}):
        raise ValueError(r"\left and \right do not match")
    environments = [(match[1], match[2]) for match in _ENVIRONMENT.finditer(answer)]
    marks = [f"{'/' if side == 'end' else ''}{name}" for side, name in environments]
    if not _is_nested(marks, {f"/{name}": name for _, name in environments}):
        raise ValueError(r"\begin and \end do not match")
    for match in _FRACTION.finditer(plain):
        if _after_argument(plain, _after_argument(plain, match.end())) is None:
            raise ValueError("a fraction lacks a part")
    words = _COMMAND.sub(" ", _TEXT.sub(" 0 ", plain))
    if any(len(run.split()) > _MOST_WORDS for run in _WORDS.findall(words)):
        raise ValueError("it is a sentence")


def _is_nested(marks: list[str], opening: dict[str, str]) -> bool:
    """Whether each closing mark closes the last one that is open, and none stays open."""
    stack: list[str] = []
    for mark in marks:
        if mark not in opening:
            stack.append(mark)
        elif not stack or stack.pop() != opening[mark]:
            return False
    return not stack


def _after_argument(text: str, at: int | None) -> int | None:
    """Where the argument of a command that begins at `at` ends: a group, or a token; None where there is none."""
    if at is None:
        return None
    begin = at + len(text[at:]) - len(text[at:].lstrip())
    if text[begin : begin + 1] != "{":
        token = _TOKEN.match(text, begin)
        return None if token is None else token.end()
    depth = 0
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return None
