"""What a task is."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.answers import Kind
from data_pipeline.cli import logger
from data_pipeline.dataset import dataset_task, is_dataset, read_dataset
from data_pipeline.problem import Problem
from data_pipeline.rows import Located, Row, files_of, read_rows, says_split
from data_pipeline.settings import UsageError


class TextDigest:
    """Identifies the texts of problems, whatever their order and whatever layout they were read from."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, problem: Problem) -> None:
        """Counts a problem in."""
        texts = "\0".join((problem.question, problem.solution, problem.answer))
        self._sum += int.from_bytes(hashlib.sha256(texts.encode()).digest()[:16])

    def hexdigest(self) -> str:
        """32 hexadecimal digits: the sum, modulo 2^128, of the halves of the problems' SHA-256."""
        return f"{self._sum % 2**128:032x}"


class ExaminedRow(NamedTuple):
    """A row of a source: where it stands, its problem, what is wrong with it, and itself (not of a dataset)."""

    where: str
    problem: Problem | None
    error: str | None
    row: Row


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of problems.

    `parse(row)` makes a problem of a published row, raises ValueError that says what is wrong with it, and returns
    None for one that is known to be of no use. Where it leaves the id empty, the problem is called by the row's "id",
    or else by its question (public data), or by its line (the user's own). Where `kind`, which says when two answers
    are equal, is None, people grade.
    """

    name: str
    kind: Kind | None
    parse: Callable[[Row], Problem | None]
    about: str = ""  # for --help: whose it is, and its licence
    splits: Mapping[str, int] = dataclasses.field(default_factory=dict)  # rows as published; empty: any split
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)  # `TextDigest` of the splits as published
    evaluation_only: bool = False
    download: Callable[[str], Iterator[Located]] | None = None
    advice: str = ""  # where its files are found

    @property
    def graded_as(self) -> Kind:
        """`kind`. Raises UsageError where people grade."""
        if self.kind is None:
            raise UsageError(f"the answers to {self.name} are graded by people: `python -m eval sheet DIR` prints them")
        return self.kind

    def problems(self, split: str, source: str | None) -> Iterator[Problem]:
        """The problems of a split. Raises UsageError, which names the line, where a row is malformed, or an id repeats.

        `source` as in `examined`.
        """
        seen: set[str] = set()
        for where, problem, error, _ in self.examined(split, source):
            if error is not None:
                raise UsageError(f"{where}: {error}")
            if problem is None:
                continue
            if problem.id in seen:
                raise UsageError(f"{where}: the id {problem.id!r} was there before; ids must be unique")
            seen.add(problem.id)
            yield problem

    def examined(self, split: str, source: str | None) -> Iterator[ExaminedRow]:
        """Each row as a problem, or what is wrong with it; neither, where it is known to be of no use.

        `source` is a file or folder of rows as they are published, or a dataset; None takes the public place.
        Raises UsageError where nothing can be read at all.
        """
        if source is not None and is_dataset(source):
            holds = dataset_task(source)
            if holds != self.name:
                raise UsageError(f"task={self.name!r}: the dataset {source} holds problems of the task {holds!r}")
            for problem in read_dataset(source, split):
                yield ExaminedRow(source, problem, None, {})
            return
        for located in self._rows(split, source):
            try:
                yield ExaminedRow(located.where, self._problem(located, split), None, located.row)
            except ValueError as error:
                yield ExaminedRow(located.where, None, str(error), located.row)

    def check_split(self, split: str) -> None:
        """Raises UsageError where the task is published without this split."""
        if self.splits and split not in self.splits:
            raise UsageError(f"split={split!r}: {self.name} has {' and '.join(self.splits)}")

    def check_public(self, key: str) -> None:
        """Raises UsageError, which says to name a file by `key`, where there is no public place to read from."""
        if self.download is None:
            raise UsageError(
                f"{self.name} is read from a file of rows{self.advice and f' ({self.advice})'}: name it with {key}"
            )

    def fingerprint(self, split: str, source: str | None) -> str:
        """Identifies the problems of a split without reading them as problems: the files' bytes, and the code's.

        Of a public source, which is small, it is the problems' own texts.
        """
        digest = hashlib.sha256(f"{self.name} {split}".encode())
        if source is None:
            for problem in self.problems(split, None):
                digest.update(repr(dataclasses.astuple(problem)).encode())
            return digest.hexdigest()
        digest.update(_code_digest())
        for file in files_of(source, split, self.name):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()

    def _rows(self, split: str, source: str | None) -> Iterator[Located]:
        self.check_split(split)
        if source is not None:
            self._say_other_split(split, source)
            return read_rows(source, split, self.name)
        self.check_public("data.sources.0.path in training, --source elsewhere")
        assert self.download is not None
        return self.download(split)

    def _say_other_split(self, split: str, source: str) -> None:
        """Warns where a file that is trained on says in its name that it is another split."""
        path = epath.Path(source)
        said = [other for other in self.splits if says_split(path.name, other)]
        if split == "train" and said and split not in said and not path.is_dir():
            logger.warning("%s: its name says %s, and it is read as %s", source, " and ".join(said), split)

    def _problem(self, located: Located, split: str) -> Problem | None:
        if located.error is not None:
            raise ValueError(located.error)
        problem = self.parse(located.row)
        if problem is None or problem.id:
            return problem
        given = located.row.get("id")
        if given is None and self.splits:
            given = question_id(self.name, split, problem.question)
        return dataclasses.replace(problem, id=f"{split}/{located.number - 1}" if given is None else str(given))


def text_field(row: Mapping[str, Any], *keys: str) -> str:
    """The non-empty text (or number) under the first of `keys` that the row has. Raises ValueError."""
    key = next((key for key in keys if row.get(key) is not None), keys[0])
    value = row.get(key)
    if value is None and key not in row:
        raise ValueError(
            f"there is no {' or '.join(map(repr, keys))}; the row has {', '.join(map(str, row)) or 'nothing'}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a non-empty text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair
        raise ValueError(f"{key!r} holds a character that is no Unicode text: {error.reason}") from error
    if "\0" in value:
        raise ValueError(f"{key!r} holds the character U+0000, which is no text")
    return value.strip()


def optional_field(row: Mapping[str, Any], *keys: str) -> str | None:
    """What stands under the first of `keys` that the row has, as text."""
    return next((str(row[key]) for key in keys if row.get(key) is not None), None)


def question_id(task: str, split: str, question: str) -> str:
    """An id that a problem has whatever file, and line, it was read from: it is made from the question."""
    return f"{task}/{split}/{hashlib.sha256(question.encode()).hexdigest()[:12]}"


def count_lines(solution: str) -> int:
    """Steps of a solution written one step a line: its non-blank lines."""
    return sum(1 for line in solution.splitlines() if line.strip())


@functools.cache
def _code_digest() -> bytes:
    """Of what makes problems of rows: another version may make others of the same files."""
    package = Path(__file__).parent.parent
    files = [*package.glob("tasks/*.py"), *package.glob("answers/*.py"), package / "rows.py", package / "dataset.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).digest()
