"""The labelled fields of a reply, found whatever dress they come in: Markdown, other case, numbering, JSON."""

import json
import re
from collections.abc import Sequence
from typing import Any

_OBJECT = re.compile(r'\{\s*"')
_CONTROL = re.compile(r"[\x08\x0c\r]")  # what no text of a teacher holds, and LaTeX that was not escaped becomes
# What may stand before a label at the beginning of a line, and around it: heading marks, bullets, numbers, emphasis.
_BEFORE = (
    r"^[ \t>]*(?:#{1,6}[ \t]*)?(?:[-*+][ \t]+)?(?:\(?\d{1,2}[.)][ \t]*)?(?P<mark>[*_`]{0,3})"
    r"(?:(?:step|job|part)[ \t]*\d[ \t]*[:.)-][ \t]*)?"
    r"(?:\\(?:textbf|textit|underline|(?:sub)*section\*?|paragraph)\{|[\[<])?"
)
# A colon, within the emphasis or behind it, or a dash; or nothing else on the line.
_AFTER = (
    r"[\]>}]?(?:(?P=mark)[ \t]*[:：]\}?|[ \t]*[:：][ \t]*(?:(?P=mark))?|(?P=mark)[ \t]+[-–—](?=[ \t])"
    r"|(?P=mark)[ \t]*(?=\n))[ \t]*"
)
# A backslash that JSON would take for a control character, or not at all, and LaTeX means: before letters of a command.
# Those with n and t are named, as lines and columns of words begin behind \n and \t; those that are words, too, count
# only in a text that LaTeX was not escaped in. Backslashes that are escaped come in pairs, which are left alone.
_COMMAND = (
    r"[bf][a-zA-Z]|r[a-z]{2}|rm(?![a-z])|(?:neq|notin|nmid|nabla|nleq|ngeq|nsubseteq|nolimits)(?![a-z])"
    r"|t(?:imes|ext(?:bf|it|rm|tt|sf|style)?|heta|anh?|au|riangle(?:q|left|right)?|herefore|frac|ilde|op)(?![a-z])"
    r"|u(?![0-9a-fA-F]{4})|[^\"\\/bfnrtu]"
)
_ONE_BACKSLASH = re.compile(rf"\\\\|\\(?={_COMMAND})")
_ONE_BACKSLASH_UNESCAPED = re.compile(rf"\\\\|\\(?={_COMMAND}|t[a-z]{{2}}|(?:ne|ni|nu|not|neg|to|tt)(?![a-z]))")
# A question that is left as it is, in the words of who was to write it again: short, and it asks nothing.
_UNCHANGED = re.compile(
    r"\b(?:same|unchanged|identical to|as it is|as is|stays|remains|(?:as|see) above|see (?:the )?\w+ question"
    r"|no (?:change|modification)s?|not (?:need|have) to be (?:changed|modified)|none|n/a)\b", re.I
)  # fmt: skip
_LONGEST_UNCHANGED = 120
# What an assistant says to its user, in a paragraph at the end.
_TO_THE_USER = re.compile(r"(?:please )?(?:let me know|i hope|feel free)\b[^\d?]*", re.IGNORECASE)


def find_fields(text: str, labels: Sequence[str]) -> dict[str, str]:
    """The content of each of `labels` that is there and not empty, in the order of `labels`.

    A label is one at the beginning of a line with a colon behind it, or, in capitals, anywhere in a line; labels come
    in their order, and of one that is written twice the last counts where it is the last label, else the first: what
    lies between belongs to a field. A JSON object with these keys (spaces or underscores) is read as such, and so are
    tags of these names.
    """
    text = text.replace("\r\n", "\n")
    tagged = _tag_fields(text, labels)
    whole = _json_fields(text, labels) or (tagged if len(tagged) == len(labels) else None)
    if whole is not None:
        return whole
    found: list[tuple[str, int, int]] = []  # label, where it begins, where its content begins
    start = 0
    for label in labels:
        at_begin = re.compile(_BEFORE + _label(label, r"[ \t_-]+") + _AFTER, re.IGNORECASE | re.MULTILINE)
        in_line = re.compile(rf"(?<=[\s.!?*]){_label(label.upper(), ' +')}\**:[ \t]*\**")
        places = list(at_begin.finditer(text, start)) or list(in_line.finditer(text, start))
        if places:
            place = places[-1] if label == labels[-1] else places[0]
            found.append((label, place.start(), place.end()))
            start = place.end()
    fields = {}
    for index, (label, _, begin) in enumerate(found):
        end = found[index + 1][1] if index + 1 < len(found) else len(text)
        content = _tidied(text[begin:end])
        if content:
            fields[label] = content
    if len(fields) < len(labels):
        fields |= tagged
    return {label: fields[label] for label in labels if label in fields}


def _label(label: str, space: str) -> str:
    """A pattern for a label, in which words are apart by `space`; of two that "and" joins the second may be missing."""
    first, _, second = re.sub(r" and ", " & ", label, flags=re.IGNORECASE).partition(" & ")
    pattern = space.join(map(re.escape, first.split()))
    if second:
        pattern += rf"(?:{space}(?:and|AND|&|/){space}{space.join(map(re.escape, second.split()))}[sS]?)?"
    return pattern


def _tag_fields(text: str, labels: Sequence[str]) -> dict[str, str]:
    fields = {}
    for label in labels:
        name = r"[ _-]".join(map(re.escape, label.split()))
        places = re.findall(rf"<({name})>((?:(?!</?{name}>).)*)</\1>", text, re.IGNORECASE | re.DOTALL)
        if places and (content := _tidied(places[-1][1])):
            fields[label] = content
    return fields


def last_question(fields: dict[str, str], labels: Sequence[str]) -> str | None:
    """The question that a reply ends with: the last field, or the first where that is missing or says "the same"."""
    last = fields.get(labels[-1])
    if last is not None and not _says_unchanged(last):
        return last
    first = fields.get(labels[0])
    return None if first is None or _says_unchanged(first) else first


def _says_unchanged(text: str) -> bool:
    told = re.sub(r"\b(?:job|step)\s*\d", "", text, flags=re.IGNORECASE)
    short = len(text) <= _LONGEST_UNCHANGED and "?" not in text and not re.search(r"[\d$]", told)
    return short and _UNCHANGED.search(text) is not None


def schema(labels: Sequence[str]) -> dict[str, Any]:
    """What `response_format` of a request says, to have the fields as JSON."""
    names = [label.replace(" ", "_") for label in labels]
    return {
        "type": "json_schema",
        "json_schema": {
            "name": "reply",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in names},
                "required": names,
                "additionalProperties": False,
            },
        },
    }


def _json_fields(text: str, labels: Sequence[str]) -> dict[str, str] | None:
    begin = _OBJECT.search(text)
    if begin is None:
        return None
    body = text[begin.start() : text.rfind("}") + 1]
    content = _as_json(body)
    escaped = content is not None and not any(_CONTROL.search(str(value)) for value in content.values())
    pattern = _ONE_BACKSLASH if escaped else _ONE_BACKSLASH_UNESCAPED
    content = _as_json(pattern.sub(r"\\\\", body))
    if content is None:
        return None
    said = {str(key).lower().replace("_", " ").strip(): value for key, value in content.items()}
    fields = {label: _tidied(str(said[label])) for label in labels if isinstance(said.get(label), str | int | float)}
    fields = {label: content for label, content in fields.items() if content}
    return fields or None


def _as_json(text: str) -> dict[str, Any] | None:
    """The mapping in a text, in which line ends may stand within texts; None where there is none."""
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _tidied(text: str) -> str:
    """Without emphasis and fences around the whole, and lines that only separate."""
    before, _, last = text.strip().rpartition("\n\n")
    if before and _TO_THE_USER.fullmatch(last):
        text = before
    tagged = re.fullmatch(r"<([\w -]+)>(.*)</\1>", text.strip(), re.DOTALL)
    text = text if tagged is None else tagged[2]
    text = re.sub(r"\n[ \t]*(?:[-*_=]{3,}|#{1,6}|\*{2})[ \t]*$", "", text.strip()).strip()
    fenced = re.fullmatch(r"```\w*\n(.*)\n```", text, re.DOTALL)
    if fenced is not None:
        text = fenced[1].strip()
    if text.count("**") % 2 and text.endswith("**"):  # the whole line, label and all, was emphasised
        text = text[:-2].rstrip()
    for mark in ("**", "__", "*", "_", "`"):
        if (
            len(text) > 2 * len(mark)
            and text.startswith(mark)
            and text.endswith(mark)
            and mark not in text[1:-1].strip("*_`")
        ):
            text = text[len(mark) : -len(mark)].strip()
    if len(text) > 2 and text[0] == "<" and text[-1] == ">" and "<" not in text[1:]:  # as the form shows it
        text = text[1:-1].strip()
    return text
