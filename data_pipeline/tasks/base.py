"""What a problem and a task are, and how a file of JSON rows is read."""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.answers import Kind
from data_pipeline.settings import UsageError, require_file


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its worked solution (without the answer line) and its gold answer.

    `num_steps` is the number of steps in the solution, counted as the task says.
    """

    id: str
    question: str
    solution: str
    answer: str
    num_steps: int | None = None
    level: str | None = None
    subject: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of problems. `read(split, source)` yields them; `kind` says when two answers are equal."""

    name: str
    kind: Kind
    read: Callable[[str, str | None], Iterator[Problem]]


def read_jsonl(path: str, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for each non-blank line of a .jsonl or .jsonl.gz file. Raises UsageError."""
    file = require_file(path, what)
    data = file.read_bytes()
    try:
        if path.endswith(".gz"):
            data = gzip.decompress(data)
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} must be a JSON object, not {type(row).__name__}")
        yield number, row


def text_field(row: dict[str, Any], key: str, where: str) -> str:
    """The non-empty text (or number) under `key`. Raises UsageError that names the line."""
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: {key!r} must be a non-empty text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair
        raise UsageError(f"{where}: {key!r} holds a character that is no Unicode text: {error.reason}") from error
    return value.strip()


def question_hash(question: str) -> str:
    """Twelve letters that a problem's id is made of: the same whatever file, and line, it was read from."""
    return hashlib.sha256(question.encode()).hexdigest()[:12]


def count_lines(solution: str) -> int:
    """Steps of a solution written one step a line: its non-blank lines."""
    return sum(1 for line in solution.splitlines() if line.strip())
