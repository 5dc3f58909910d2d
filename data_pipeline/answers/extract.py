"""From a response to its answer, with the rule that found it."""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from data_pipeline.answers.counting import NUMBER_WORDS, SCALES, spelled
from data_pipeline.answers.expression import Unreadable, same_value, value_of
from data_pipeline.answers.numbers import MAX_NUMBER_LENGTH, find_numbers, parse_number
from data_pipeline.answers.spelling import closing, tidy
from data_pipeline.answers.units import without_unit

Kind = Literal["number", "latex", "puzzle"]

MAX_CHARS = 100_000  # of a response: what lies before its end is not looked at
_MAX_LINE = 2000  # characters of an announced answer, and of the end in which formulas are looked for
_MAX_MARKS = 20  # so many of the last marks, and boxes, are looked at
_MAX_BARE = 200  # characters of a response that is nothing but an answer
_MAX_BARE_WORDS = 3
_MAX_LINES = 5  # that an answer may be broken over

# Where a base model goes on with a question of its own, or a chat model with the next turn.
_RUN_ON = re.compile(
    r"\n[ \t]*(?:[#*]{1,4}[ \t]*)?"
    r"(?:Questions?|Q|Problem|Exercise|Example|Instruction|Input|User|Human|Student|USER|HUMAN)"
    r"[ \t]*\d*[ \t]*(?:(?:\*\*)?[:.](?:\*\*)?[ \t\n]|\n)"
    r"|\n[ \t]*#{2,4}[ \t]*(?:Response|Question|Problem|Instruction|Input|Example)\b"
    r"|\n[ \t]*(?:USER|Human|User|Assistant|ASSISTANT):"
    r"|<\|[a-z_]+\|>|</?s>|<(?:eos|start_of_turn|end_of_turn)>|\[INST\]"
)
_MARK = re.compile(
    r"(?P<answer_line>\b(?:answers?(?:[ \t]+(?:to|of|for)\b[^.\n:]{0,80}?)?|solutions)[ \t]*"
    r"\b(?:is|are|should be|must be|would be)\b[ \t]*:?"
    r"|^[ \t*#_-]*(?:(?:the|my|our|so|thus|therefore|final|correct|hence)\b[ \t,*]*){0,4}"
    r"\b(?:answers?|ans|result)[ \t*_]*:)[ \t*_]*"
    r"|(?P<hash_line>####)",
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_FENCED = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_SENTENCE_ENDS = re.compile(
    r"(?:(?<![\d)!])!|[.?])(?=\s+[A-Z(\\$]|\s*$)"
    r"|,?\s(?:because|when|if|since|which|where|so that|given that|that is|i\.e\.|as)[\s,]",
    re.DOTALL,
)
_TALK = re.compile(r"\b(?:so|thus|hence|therefore|we|it|this|he|she|they|is|are|get|gives|have|has)\b", re.IGNORECASE)
_CONNECTIVE = re.compile(r"\b(?:and|or|to)\b|[\s,;.:()*]", re.IGNORECASE)
_PLAIN = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?", re.ASCII)
_SCALED = re.compile(
    r"\$?\s*(-?[\d,.]*\d)\s*(?:\\\w+\s*\{\s*)?((?:hundred|thousand|million|billion|trillion)(?=s?\b)|(?<=\d)[kK]\b)",
    re.ASCII,
)
_SCIENTIFIC = re.compile(
    r"\$?\s*(-?\d[\d,]*(?:\.\d+)?)\s*(?:[eE]|(?:[xX×*]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*)([-+]?\d{1,2})(?!\d)",
    re.ASCII,
)
# What denies the number that follows, or says that it is none of the answer.
_DENIED = re.compile(r"\W*(?:not|isn't|less than|fewer than|more than|greater than|between)\b", re.IGNORECASE)
_OPERATION = re.compile(
    r"\s*(?:(?:plus|minus|times|over|divided by|multiplied by|choose|mod)\s+(?:[$\d]|[A-Za-z]\b)"
    r"|(?:\\times|\\cdot|\\div|[*^])\s*[\d{(]|[%:]\d)"
)
_NUMBER_WORD = rf"(?:{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})s?\b"
_IN_WORDS = re.compile(
    rf"\b(?:(?:negative|minus)\s+)?(?:an?\s+)?{_NUMBER_WORD}(?:[\s-]+(?:and\s+(?=\w))?(?:an?\s+)?{_NUMBER_WORD})*",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\bwhich (?:is|equals|makes|gives)\s+(?![-$\d.,]+\s+(?:more|less|fewer|times|higher|lower|percent)\b)(.+)"
)
_ALTERNATIVE = re.compile(r"\s*(?:[A-Za-z%]+\s+)?(?:,|;|\bor\b|\band\b|\bto\b|–|—|-)\s*(?:[A-Za-z]+\s+)?(?=[-$]*\d)")


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The answer found in a response, and the rule that found it; both None where there is none."""

    answer: str | None
    rule: str | None


def extract(response: str, kind: Kind) -> Extracted:
    r"""The answer of a worked response.

    First the response is cut where it runs on into another question or turn. Then, the first that yields an answer:
    the last line "The answer is …" (rule "answer_line") or "#### …" ("hash_line"), whichever comes later; the last
    \boxed or \fbox ("boxed"), unless an answer is announced after it; a text that is nothing but an answer ("whole");
    of anything but a number the last mathematics between dollar signs ("last_math"); the last number of the text
    ("last_number"). A puzzle's answer is its steps, all of the response ("whole").
    """
    response = response[-MAX_CHARS:]
    kept = cut(response)
    found = _extract(kept, kind)
    return found if found.answer is not None or kept == response else _extract(response, kind)


def _extract(response: str, kind: Kind) -> Extracted:
    if kind == "puzzle":
        return Extracted(response.strip(), "whole") if response.strip() else Extracted(None, None)
    try:
        for rule, candidate in _candidates(response):
            if kind == "number":
                answer = _number_of(candidate if rule == "boxed" else candidate.rstrip("!"))  # joy, no factorial
            else:
                answer = candidate
            if answer:
                return Extracted(answer, rule)
        if kind == "number" and len(response) <= _MAX_BARE and re.fullmatch(r"[^A-Za-z=+*]+", response.strip()):
            answer = _number_of(response)  # "2½", "1 080"
            if answer:
                return Extracted(answer, "whole")
    except _NoOneNumber:
        return Extracted(None, None)
    if kind == "latex":
        for rule, candidate in _unmarked(response):
            if candidate:
                return Extracted(candidate, rule)
    numbers = find_numbers(re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", response))
    return Extracted(numbers[-1], "last_number") if numbers else Extracted(None, None)


def cut(response: str) -> str:
    """The response without what it thought before it answered, and without the questions and turns it made up."""
    response = response.rpartition("</think>")[2]
    for match in _RUN_ON.finditer(response):
        if response[: match.start()].strip():
            return response[: match.start()]
    return response


def _candidates(response: str) -> Iterator[tuple[str, str]]:
    box, boxed_at = last_box(response), max((match.start() for match in _BOX.finditer(response)), default=-1)
    for mark in reversed(list(_MARK.finditer(response))[-_MAX_MARKS:]):
        line = _line_at(response, mark.end())
        if box and boxed_at > mark.start() and not _BOX.search(line):  # what comes last is what is meant
            break
        # "Our answer is correct", "the answer is independent of n" announce nothing where there is a box.
        if box and not _announces(line):
            continue
        candidate = _answer_in(line)
        if candidate:
            yield str(mark.lastgroup), candidate
    if box:
        yield "boxed", box


def _announces(line: str) -> bool:
    """Whether an answer follows at once: a formula, a number, a name and "=", or a word or two before a full stop."""
    if line.startswith((r"\begin{al", r"\[")):
        return False
    if re.match(r"[-+.\d$\\(\[{√π]|[A-Za-z]\w{0,2}\s*=", line):
        return True
    words = re.split(r"[.!?](?:\s|$)", line)[0].split()
    return 0 < len(words) <= 2 and not re.fullmatch(
        r"(?:correct|right|wrong|verified|yes|no|positive|negative|true)", words[0]
    )


def _unmarked(response: str) -> Iterator[tuple[str, str]]:
    text = response.strip()
    bare = re.sub(r"\\text\w*\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    short = "\n" not in text and len(text) <= _MAX_BARE
    short = short and len(re.findall(r"[A-Za-z]{3,}", bare)) <= _MAX_BARE_WORDS
    if short and not _TALK.search(text) and not _BOX.search(text):
        yield "whole", _answer_in(text)
    fenced = [next(group for group in match.groups() if group) for match in _FENCED.finditer(response[-_MAX_LINE:])]
    if fenced:
        yield "last_math", fenced[-1].strip()


def _line_at(text: str, start: int) -> str:
    """What a mark announces: the rest of its line, or the next where that is empty; a displayed formula whole."""
    rest = text[start : start + _MAX_LINE].lstrip(" \t*:")
    if not rest.partition("\n")[0].strip():
        rest = rest.lstrip()
    for opening, ending in ((r"\[", r"\]"), ("$$", "$$")):
        if rest.startswith(opening) and ending in rest[2:]:
            return rest[: rest.index(ending, 2) + 2]
    lines = rest.split("\n", _MAX_LINES)[:_MAX_LINES]
    line = lines.pop(0)
    while lines and (len(re.findall(r"(?<!\\)\$", line)) % 2 or line.count("{") > line.count("}")):
        line = f"{line} {lines.pop(0)}"  # a formula that is broken over lines
    return line


def _answer_in(line: str) -> str:
    """The answer in a line: what is boxed; else its first formula, if prose surrounds it; else its first sentence."""
    boxed = last_box(line)
    if boxed:
        return boxed
    shielded = _FENCED.sub(lambda match: "\0" * len(match[0]), line)  # a full stop in a formula ends no sentence
    end = _SENTENCE_ENDS.search(shielded)
    if end is not None and end.start() > 0:
        line = line[: end.start()]
    formulas = list(_FENCED.finditer(line))
    if formulas:
        around = _FENCED.sub(" ", line)
        if re.search(r"[A-Za-z]{2,}", _CONNECTIVE.sub(" ", around)):
            first, *_ = formulas
            behind = line[first.end() :]
            unit = re.match(r"\s+(?!and\b|or\b)([A-Za-z]+)\s*$", behind)
            return next(group for group in first.groups() if group).strip() + (unit[0] if unit else "")
    line = re.sub(r"(?<=[\d}$)])\s+\([^()]*[A-Za-z]{3,}[^()]*\)\s*$", "", line)  # a remark in brackets
    return line.strip().strip("*").strip()


def last_box(text: str) -> str | None:
    r"""What the last box holds; and those before it where only "and", "or" or a comma stands between."""
    contents: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(text))[-_MAX_MARKS:]:
        start = match.end()
        if text[start : start + 1] == "{":
            end = closing(text, start)
            if end < 0:  # cut off: not an answer
                continue
            contents.append((match.start(), end + 1, text[start + 1 : end]))
        else:
            word = re.match(r"[^\s$,.]+", text[start:])
            if word is not None:
                contents.append((match.start(), start + word.end(), word[0]))
    if not contents:
        return None
    joined = [contents[-1]]
    alternatives = False
    for content in reversed(contents[:-1]):
        between = text[content[1] : joined[0][0]]
        bare = re.sub(r"[A-Za-z]\s*=", "", _CONNECTIVE.sub("", between)).strip("$\\[]")
        if len(between) > 30 or bare or not re.search(r"\band\b|\bor\b|[,;]", between):
            break
        alternatives |= re.search(r"\bor\b", between) is not None
        joined.insert(0, content)
    texts = [content.strip() for _, _, content in joined]
    if alternatives and all(same_value(tidy(one), tidy(texts[-1])) for one in texts):  # "1/2, or 0.5"
        texts = texts[-1:]
    return ", ".join(texts) or None


class _NoOneNumber(Exception):
    """An answer was announced, and is no one number."""


def _number_of(candidate: str) -> str | None:
    """The number that a candidate says: its only one, or what a computation comes to ("3 + 4 = 7 apples").

    None where it says none. Raises _NoOneNumber where it denies it ("not 5"), leaves it open ("5 or 6"), or says a
    computation that is not read.
    """
    said = candidate.strip()[:_MAX_LINE]
    if _PLAIN.fullmatch(said):
        return said
    said = re.sub(r"(?:\\text\w*\s*\{\s*)?\b(?:negative|minus)\s+\}?(?=[\d$])", "-", said)
    if _DENIED.match(said):
        raise _NoOneNumber
    if (concluded := _CONCLUDED.search(said)) is not None:
        said = concluded[1]
    if not re.match(r"[-$\s]*[\d,.]+[^=]*(?:\b[A-Za-z]\s*=|\()", said):  # "22 when x = 10" says 22
        said = said.rpartition("=")[2].strip()
    share = re.match(r"\$?\s*(\d+(?:\.\d+)?)\s*(?:%|\\%|percent)\s+of\s+(?:the\s+)?\$?\s*([\d,]*\d(?:\.\d+)?)", said)
    if share is not None and (of := parse_number(share[2])) is not None:  # "25% of 80"
        return _written(Fraction(share[1]) / 100 * of)
    said = re.sub(r"(?<=\d)\s+\(.*$", "", said, flags=re.DOTALL)  # "72 (48 + 24)"
    for pattern, factor in (
        (_SCALED, lambda name: SCALES["thousand" if name in "kK" else name]),
        (_SCIENTIFIC, lambda power: Fraction(10) ** int(power)),
    ):
        match = pattern.match(said)
        if match is not None and (value := parse_number(match[1])) is not None:
            return _written(value * factor(match[2]))
    plain, _ = without_unit(tidy(said))
    if parse_number(plain) is not None:
        return plain.replace(" ", "").rstrip("%")
    if re.search(r"[\\ +*/^!]|\d-\d", plain):  # \frac{3}{4}, 3 1/2, 2*3
        try:
            exact = value_of(plain)
        except Unreadable:
            exact = None
        if isinstance(exact, Fraction) and (written := _written(exact)) is not None:
            return written
    numbers = find_numbers(said)
    if not numbers:
        return _number_in_words(plain)
    if not _is_alone(numbers[0], said):
        raise _NoOneNumber
    return numbers[0]


def _is_alone(number: str, said: str) -> bool:
    """Whether the first number of a candidate is the one it says: no operation and no other number follows."""
    rest = said[said.find(number) + len(number) :]
    if _OPERATION.match(rest):
        return False
    other = _ALTERNATIVE.match(rest)
    if other is None or re.search(r"\bnot\b", other[0]):  # "18, not 20"
        return True
    behind = rest[other.end() :]
    following = find_numbers(behind)
    if following and parse_number(following[0]) == parse_number(number):
        return True
    # "90 minutes, or 1.5 hours" says one thing twice; "2 hours and 30 minutes" does not.
    units = [re.search(pattern, text) for pattern, text in ((r"^\s*([A-Za-z]+)", rest), (r"\d\s*([A-Za-z]+)", behind))]
    connective = re.search(r"\b(?:or|and|to)\b|[,;–—-]", other[0])
    said_twice = connective is not None and connective[0] in ("or", ",")
    return said_twice and None not in units and len({unit[1] for unit in units if unit}) == 2


def _number_in_words(text: str) -> str | None:
    """The number that the first run of number words says."""
    run = _IN_WORDS.search(text)
    value = None if run is None else spelled(run[0])
    return None if value is None else _written(value)


def _written(value: Fraction) -> str | None:
    """A number of a size that an answer may have."""
    text = str(value) if max(value.numerator.bit_length(), value.denominator.bit_length()) < 160 else ""
    return text if 0 < len(text) <= MAX_NUMBER_LENGTH else None
