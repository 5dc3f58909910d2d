"""Rows of files and folders, in the layouts that public data sets come in. A row is a mapping of names to values."""

import csv
import gzip
import io
import itertools
import json
import re
import xml.etree.ElementTree
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.settings import UsageError

Row = dict[str, Any]
DATASET_INFO = "dataset_info.json"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".xml")
_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # beside rows, and none
_DEFAULT = ("main", "default")  # what Hugging Face calls the configuration that is meant where none is named


class Located(NamedTuple):
    """A row, its number (a line's counts from 1), and where it stands, for messages; `error` where it is no row.

    What there is of one that is none stands under "line".
    """

    row: Row
    number: int
    where: str
    error: str | None = None


def read_rows(source: str, split: str, owner: str = "") -> Iterator[Located]:
    """The rows of a split in `source`: a file, or a folder that holds the split's files.

    Files are JSON Lines (called .jsonl or .json), JSON (a list of objects, an object of columns, or one object),
    Parquet, CSV with a header, or XML whose rows are elements named Problem; the first two may be compressed by gzip.
    In a folder a split's files are those, at any depth, that are named for it (train.jsonl, train_1.jsonl,
    algebra/train-00000-of-00001.parquet) or stand in a folder of its name (train/algebra/1.json), or else those that
    have it among the words of their names (gsm8k_train.jsonl.gz), of several the one that has the name of the task
    `owner` there, too; beside others, a configuration called main is meant alone. An only file is read whatever its
    name.
    A line that is no JSON object is yielded with its `error`. Raises UsageError where nothing can be read at all.
    """
    files = files_of(source, split, owner)
    start = 0
    for file in files:
        located = None
        for located in _rows_of(file, start):
            yield located
        start = start if located is None else located.number


def files_of(source: str, split: str, owner: str = "") -> list[epath.Path]:
    """The files that the rows of a split are read from; of a dataset all of its files. Raises UsageError."""
    path = epath.Path(source)
    if not path.exists():
        raise UsageError(f"{owner} source {source!r} does not exist".strip())
    if not path.is_dir():
        return [path]
    if is_tfds_folder(path):
        return list(files_below(path))
    return _files_of_split(path, split, owner)


def is_tfds_folder(path: epath.Path) -> bool:
    """Whether a folder is one of TensorFlow Datasets; those that Hugging Face saves have one of these files, too."""
    return (path / DATASET_INFO).exists() and (path / "features.json").exists()


def holds_split(source: str, split: str) -> bool:
    """Whether `source` is a folder with files of a split."""
    path = epath.Path(source)
    return path.is_dir() and bool(_named_for(path, split))


def _files_of_split(folder: epath.Path, split: str, owner: str) -> list[epath.Path]:
    what = f"{owner} source".strip()
    files = _named_for(folder, split)
    if _num_kinds(files, folder, split) > 1 and owner:
        owned = re.compile(rf"(?<![A-Za-z0-9]){re.escape(owner)}(?![A-Za-z0-9])")
        files = [path for path in files if owned.search(path.name)] or files
    if _num_kinds(files, folder, split) > 1:
        raise UsageError(
            f"{what} {str(folder)!r} has several files for the split {split!r}: name one of "
            f"{', '.join(path.name for path in files[:8])}"
        )
    if not files:
        files = _files_of_rows(folder)
        if len(files) != 1:
            raise UsageError(
                f"{what} {str(folder)!r} is a folder without the split {split!r}: it must hold {split}.jsonl (or "
                f"another of {', '.join(SUFFIXES)}), or a folder {split} of such files; or name one file of it. "
                f"It holds {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
            )
    return files


def _num_kinds(files: Iterable[epath.Path], folder: epath.Path, split: str) -> int:
    """How many names there are of files that only mention a split, but for the numbers of parts."""
    names = (path.name for path in files if not _is_named(path, folder, split))
    return len({re.sub(r"\d+-of-\d+|[-_]\d+\b|-[0-9a-f]{8,}\b", "", name) for name in names})


def says_split(file: str, split: str) -> bool:
    """Whether a split is among the words of a file's name."""
    return split in re.split(r"[-_.]", file)


def _named_for(folder: epath.Path, split: str) -> list[epath.Path]:
    """The files, at any depth, that are named for a split or stand in a folder of its name, or else that mention it."""
    files = _files_of_rows(folder)
    found = [path for path in files if _is_named(path, folder, split)]
    found = found or [path for path in files if says_split(path.name, split)]
    of_default = [path for path in found if path.relative_to(folder).parts[0] in _DEFAULT]
    return of_default or found


def _is_named(path: epath.Path, folder: epath.Path, split: str) -> bool:
    named = re.match(rf"{re.escape(split)}(?:[-_]\d+(?:-of-\d+)?)?\.", path.name)
    return named is not None or split in path.relative_to(folder).parts[:-1]


def _files_of_rows(folder: epath.Path) -> list[epath.Path]:
    return [path for path in files_below(folder) if path.name.endswith(SUFFIXES) and path.name not in _ABOUT]


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file in a folder and its folders, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def _rows_of(file: epath.Path, start: int) -> Iterator[Located]:
    if not file.name.endswith(SUFFIXES):
        raise UsageError(f"{file}: what it holds is told by its name, which must end in {', '.join(SUFFIXES)}")
    name = file.name.removesuffix(".gz")
    if name.endswith(".jsonl") or (name.endswith(".json") and _is_json_lines(file)):
        yield from _json_lines(file, start)
        return
    if name.endswith(".parquet"):
        yield from _parquet(file, start)
        return
    text = _text(file)
    if name.endswith(".csv"):
        rows = _csv(file, text)
    elif name.endswith(".xml"):
        rows = _xml(file, text)
    else:
        rows = _json(file, text)
    for number, row in enumerate(rows, 1):
        alone = len(rows) == 1 and name.endswith(".json")  # MATH comes as a file a problem
        where = str(file) if alone else f"{file}, row {number}"
        yield _checked(row, start + number, where)


def _json_lines(file: epath.Path, start: int) -> Iterator[Located]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        if isinstance(line, NotText):
            yield Located({"line": line.shown}, start + number, where, str(line))
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else str(error)
            yield Located({"line": line.rstrip("\n")}, start + number, where, f"is not valid JSON: {said}")
        else:
            yield _checked(row, start + number, where)


def _checked(row: Any, number: int, where: str) -> Located:
    if isinstance(row, dict):
        return Located(row, number, where)
    return Located({"line": row}, number, where, f"must be a JSON object, not {type(row).__name__}")


def _lines(file: epath.Path) -> Iterator[str]:
    """The lines with their ends, one after another: a file may be larger than the memory."""
    compressed = file.name.endswith(".gz")
    if compressed:
        _check_gzip(file)
    with file.open("rb") as opened:
        for number, line in enumerate(gzip.GzipFile(fileobj=opened) if compressed else opened, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                yield NotText(error, line)
            else:
                yield text if number > 1 else text.removeprefix("\ufeff")


class NotText(str):
    """What is wrong with a line that is no text, in its place; and the line, its bytes `shown` as they are written."""

    shown: str

    def __new__(cls, error: UnicodeDecodeError, line: bytes) -> "NotText":
        """Of the error that its bytes gave."""
        self = super().__new__(cls, f"is not UTF-8 text (byte {error.start + 1} of the line)")
        self.shown = line.decode(errors="backslashreplace").rstrip("\n")
        return self


def _is_json_lines(file: epath.Path) -> bool:
    """Whether the first line is an object, and more follows: so are some JSON Lines called .json."""
    lines = list(itertools.islice((line for line in _lines(file) if line.strip()), 2))
    try:
        return len(lines) == 2 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _text(file: epath.Path) -> str:
    """All of a file. Raises UsageError."""
    lines = list(_lines(file))
    for number, line in enumerate(lines, 1):
        if isinstance(line, NotText):
            raise UsageError(f"{file}, line {number}: {line}")
    return "".join(lines)


def _check_gzip(file: epath.Path) -> None:
    """Raises UsageError where a file is damaged: its checksum comes last, after what would be read as rows."""
    try:
        with file.open("rb") as opened, gzip.GzipFile(fileobj=opened) as content:
            while content.read(2**22):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file} is not a whole gzip file: {error}") from error


def _json(file: epath.Path, text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from error
    if isinstance(content, dict):
        columns = list(content.values())
        if columns and all(isinstance(column, list) for column in columns) and len({len(c) for c in columns}) == 1:
            return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]
        return [content]
    if isinstance(content, list):
        return content
    raise UsageError(f"{file} must hold a list of objects, not {type(content).__name__}")


def _csv(file: epath.Path, text: str) -> list[Any]:
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise UsageError(f"{file} is not valid CSV: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UsageError(f"{file}, row {number}: it has more fields than the header; one with a comma wants quotes")
    return rows


def _xml(file: epath.Path, text: str) -> list[Row]:
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError as error:
        raise UsageError(f"{file} is not valid XML: {error}") from error
    return [
        {**problem.attrib, **{child.tag: (child.text or "").strip() for child in problem}}
        for problem in root.iter("Problem")
    ]


def _parquet(file: epath.Path, start: int) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    number = start
    try:
        with file.open("rb") as opened:
            for batch in pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(row, number, f"{file}, row {number - start}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file} is not a whole Parquet file: {error}") from error
