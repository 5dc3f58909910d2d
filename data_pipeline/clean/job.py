"""`clean`: a dataset without what is malformed, wrong by itself, in a test set, or there already; with a report."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pydantic
from etils import epath
from jaxtyping import Int

from data_pipeline.clean.duplicates import exact_duplicates, near_duplicates
from data_pipeline.clean.examine import Examined, Malformed, Row, Rules, begin
from data_pipeline.clean.report import Pair, write_report
from data_pipeline.clean.shingles import Shingles
from data_pipeline.cli import logger
from data_pipeline.dataset import check_out, write_dataset
from data_pipeline.files import write_json
from data_pipeline.problem import Problem
from data_pipeline.progress import Progress
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import TASKS, Task, get_task, read_problems
from data_pipeline.workers import in_processes

_CHUNK = 1000
_ROWS_A_PROCESS = 10_000  # fewer are not worth processes
_EXAMPLES = 20  # of each reason in the report


class CleanSettings(Settings):
    """`clean`: what is left is a dataset; what is removed lies beside it in removed.jsonl, with the reason."""

    source: str = pydantic.Field(description="file or folder of rows, or dataset")
    out: str = pydantic.Field(description="folder of the clean dataset, with removed.jsonl and report.html")
    task: str = pydantic.Field("jsonl", description=f"task of the rows: one of {', '.join(TASKS)}")
    split: str = pydantic.Field("train", description="split of the source")
    against: str | None = pydantic.Field(
        None, description="test sets that nothing may be taken from, as TASK:SPLIT=SOURCE, several by commas"
    )
    beside: str | None = pydantic.Field(
        None, description="rows that are there already, likewise as TASK:SPLIT=SOURCE: what repeats one goes"
    )
    contamination: float = pydantic.Field(
        0.4, gt=0, le=1, description="share of a test question's n-grams of words in a row that is taken from it; of a "
        "short question at least 0.7, and 0.8 where all of a row is compared with all of it",
    )  # fmt: skip
    similarity: float = pydantic.Field(
        0.8, gt=0, le=1, description="Jaccard similarity of n-grams of words from which two rows are one; 1: exact only"
    )
    duplicates: Literal["example", "question"] = pydantic.Field(
        "example", description="what makes rows alike: example (question and solution), or question (it alone)"
    )
    min_chars: pydantic.PositiveInt = pydantic.Field(
        4, description="characters of a question, and a solution, at least"
    )
    max_chars: pydantic.PositiveInt = pydantic.Field(20_000, description="and at most")

    @pydantic.model_validator(mode="after")
    def _chars_in_order(self) -> "CleanSettings":
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars={self.min_chars} must not be above max_chars={self.max_chars}")
        return self


class NothingLeft(UsageError):
    """Every row was removed, for these reasons so many times."""

    def __init__(self, message: str, removed: dict[str, int]):
        super().__init__(message)
        self.removed = removed


class Removed(NamedTuple):
    """Why a row was left out; the number of what it repeats, if anything, and among what; and what was found."""

    reason: str
    like: int | None
    detail: str
    among: Literal["rows", "tests", "beside"] = "rows"


class Others(NamedTuple):
    """Problems that rows may repeat: those of test sets, and those that are there already."""

    tests: list[Problem]
    beside: list[Problem]
    test_sets: list[str]  # of each problem of `tests`, as gsm8k:test


def clean(settings: CleanSettings) -> dict[str, Any]:
    """Decides row by row and of all together, then writes what is left. Returns the report. Raises UsageError.

    Of rows that repeat each other the first is kept. The result is the same for any number of processes. Rows wait on
    the disk meanwhile, beside `out`; memory holds their n-grams, about 5 GB for a million of GSM8K's length.
    """
    task = get_task(settings.task)
    sources = [
        settings.source,
        *(spec[2] for name in ("against", "beside") for spec in named_problems(name, getattr(settings, name))),
    ]
    if any(_same(settings.out, source) for source in sources):
        raise UsageError(f"out={settings.out} is, or lies in, what is read: choose another folder")
    check_out(settings.out, settings.task, [settings.split])
    specs = {name: list(named_problems(name, getattr(settings, name))) for name in ("against", "beside")}
    tests, beside = ([read_problems(*spec) for spec in specs[name]] for name in ("against", "beside"))
    names = [f"{task}:{split}" for task, split, _ in specs["against"]]
    of_problem = [name for name, test_set in zip(names, tests, strict=True) for _ in test_set]
    others = Others(list(itertools.chain(*tests)), list(itertools.chain(*beside)), of_problem)
    rules = Rules(
        task.graded_as, settings.min_chars, settings.max_chars,
        [[problem.question for problem in test_set] for test_set in tests],
        settings.contamination, whole=settings.duplicates == "example",
    )  # fmt: skip
    beside_out = None if "://" in settings.out else Path(settings.out).parent
    with tempfile.TemporaryFile(dir=beside_out) as waiting:
        removed, num_rows = _decide(_rows(task, settings), waiting, others, rules, settings.similarity)
        if not num_rows:
            raise UsageError(f"source={settings.source}: there are no rows")
        if len(removed) == num_rows:
            first = removed[0]
            raise NothingLeft(
                f"source={settings.source}: nothing is left of {num_rows} rows; they were {_said(removed)}; the first: "
                f"{first.reason}{first.detail and f', {first.detail}'}",
                _counts(removed),
            )
        waiting.seek(0)
        report = _write(_read_back(waiting), settings, removed, num_rows, others, beside_out)
    logger.info(
        "%s of %s rows are left; removed: %s", f"{report['num_kept']:,}", f"{num_rows:,}", _said(removed) or "none"
    )
    found = ", ".join(f"{count:,} of {name}" for name, count in report["test_sets"].items())
    logger.info("rows with a question of a test set: %s", found or "not looked for, as none is named (against)")
    logger.info("wrote %s and report.html, removed.jsonl in it", settings.out)
    return report


def _decide(
    rows: Iterator[Row], waiting: BinaryIO, others: Others, rules: Rules, similarity: float
) -> tuple[dict[int, Removed], int]:
    """What is removed, by the row's number; and how many rows there are. They are written to `waiting`."""
    beside = others.beside
    removed: dict[int, Removed] = {}
    ids: list[bytes] = []
    counted = 0

    def chunks() -> Iterator[list[Row]]:
        nonlocal counted
        while chunk := list(itertools.islice(rows, _CHUNK)):
            ids.extend(_id_digest(row) for row in chunk)
            counted += len(chunk)
            pickle.dump(chunk, waiting, protocol=pickle.HIGHEST_PROTOCOL)
            yield chunk

    parts: list[Examined] = []
    first = 0
    with Progress(None, "examining", "rows") as bar:
        for part in _examined(chunks(), rules):
            for place, (reason, detail) in part.reasons.items():
                removed.setdefault(first + place, Removed(reason, None, detail))
            for match in part.matches:
                told = f"{others.test_sets[match.problem]}, {match.told}"
                found = Removed("in a test set", match.problem, told, "tests")
                removed.setdefault(first + match.row, found)
            parts.append(part)
            first += len(part.digests)
            bar.update(len(part.digests))
    # What is there already comes first, so that a row repeats it and never the other way round.
    chunks_beside: Iterator[list[Row]] = (list(beside[at : at + _CHUNK]) for at in range(0, len(beside), _CHUNK))
    parts = [*_examined(chunks_beside, rules._replace(tests=[])), *parts]

    def left() -> Int[np.ndarray, " left"]:
        return np.array([n for n in range(len(beside) + counted) if n - len(beside) not in removed], np.int64)

    def remove(repeats: dict[int, tuple[int, str]], numbers: Int[np.ndarray, " left"], nearly: str) -> None:
        for place, (like, detail) in repeats.items():
            row, other = int(numbers[place]) - len(beside), int(numbers[like])
            if row >= 0 and other < len(beside):
                removed[row] = Removed(f"{nearly}there beside it", other, detail, "beside")
            elif row >= 0:
                removed[row] = Removed(f"{nearly}there already", other - len(beside), detail)

    numbers = left()
    digests = np.concatenate([np.zeros((0, 2), np.uint64), *(part.digests for part in parts)])
    remove({row: (like, "exactly") for row, like in exact_duplicates(digests[numbers]).items()}, numbers, "")
    numbers = left()[len(beside) :] - len(beside)
    digests_of_ids = np.frombuffer(b"".join(ids), np.uint64).reshape(counted, 2)
    for place, like in exact_duplicates(digests_of_ids[numbers]).items():
        removed[int(numbers[place])] = Removed("id there already", int(numbers[like]), "")
    if similarity < 1 and parts:
        numbers = left()
        every = Shingles.join([part.shingles for part in parts]).select(numbers)
        found_near = near_duplicates(every, similarity).items()
        remove({row: (like, f"{int(100 * share)} % alike") for row, (like, share) in found_near}, numbers, "nearly ")
    return removed, counted


def _examined(chunks: Iterator[list[Row]], rules: Rules) -> Iterator[Examined]:
    ahead = list(itertools.islice(chunks, _ROWS_A_PROCESS // _CHUNK))
    every = itertools.chain(ahead, chunks)
    processes = len(os.sched_getaffinity(0))
    if processes > 1 and len(ahead) * _CHUNK >= _ROWS_A_PROCESS:
        yield from in_processes("data_pipeline.clean.examine", rules, every, processes)
    else:
        yield from map(begin(rules), every)


def _id_digest(row: Row) -> bytes:
    """16 bytes of a row's id."""
    name = row.id if isinstance(row, Problem) else ""
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=16).digest()


def _read_back(waiting: BinaryIO) -> Iterator[Row]:
    """The rows that this process wrote."""
    with contextlib.suppress(EOFError):
        while True:
            yield from pickle.load(waiting)


def _write(
    rows: Iterator[Row], settings: CleanSettings, removed: dict[int, Removed], num_rows: int, others: Others,
    beside_out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The dataset of what is left, then removed.jsonl, report.json and report.html in its folder."""
    shown = _examples(removed)
    needed: dict[int, Row] = dict.fromkeys(shown, Malformed("", {}))  # rows that the report shows, by number
    for found in (removed[number] for number in shown):
        if found.like is not None and found.among == "rows":
            needed[found.like] = Malformed("", {})

    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=beside_out) as apart:

        def kept() -> Iterator[Problem]:
            for number, row in enumerate(rows):
                if number in needed:
                    needed[number] = row
                found = removed.get(number)
                if found is None:
                    assert isinstance(row, Problem)
                    yield row
                else:
                    apart.write(json.dumps(_told(number, row, found, others)) + "\n")

        report = {
            "source": settings.source,
            "num_rows": num_rows,
            "num_kept": num_rows - len(removed),
            "removed": _counts(removed),
            "test_sets": dict.fromkeys(others.test_sets, 0)
            | Counter(others.test_sets[r.like] for r in removed.values() if r.among == "tests" and r.like is not None),
            "settings": settings.model_dump(),
        }

        def add(folder: Path) -> None:
            apart.seek(0)
            with (folder / "removed.jsonl").open("w", encoding="utf-8") as file:
                shutil.copyfileobj(apart, file)
            write_json(folder / "report.json", report)
            pairs = [
                Pair(removed[number].reason, removed[number].detail, *_texts(number, needed, removed[number], others))
                for number in shown
            ]
            write_report(epath.Path(folder / "report.html"), report, pairs)

        write_dataset(settings.out, settings.task, {settings.split: kept()}, {"cleaned": report}, add)
    return report


def _texts(number: int, rows: dict[int, Row], found: Removed, others: Others) -> tuple[str, str]:
    """The row that was removed, and what it repeats."""
    if found.like is None:
        return _shown(rows[number]), ""
    like = rows[found.like] if found.among == "rows" else getattr(others, found.among)[found.like]
    return _shown(rows[number]), _shown(like)


def _shown(row: Row) -> str:
    if isinstance(row, Malformed):
        return f"{row.error}\n\n{json.dumps(row.row, ensure_ascii=False, default=str)}"
    return f"{row.question}\n\n{row.solution}".strip()


def _told(number: int, row: Row, found: Removed, others: Others) -> dict[str, Any]:
    """A line of removed.jsonl: the row, counted from 1, why it went, and the row or problem that it repeats."""
    like: int | str | None = None
    if found.like is not None:
        like = found.like + 1 if found.among == "rows" else getattr(others, found.among)[found.like].id
    told = {"row": number + 1, "reason": found.reason, "detail": found.detail, "like": like}
    if isinstance(row, Malformed):
        return told | {"detail": row.error, "found": row.row}
    return told | dataclasses.asdict(row)


def _examples(removed: dict[int, Removed]) -> list[int]:
    """The first few rows of each reason."""
    taken: Counter[str] = Counter()
    chosen = []
    for number in sorted(removed):
        taken[removed[number].reason] += 1
        if taken[removed[number].reason] <= _EXAMPLES:
            chosen.append(number)
    return sorted(chosen, key=lambda number: removed[number].reason)


def _rows(task: Task, settings: CleanSettings) -> Iterator[Row]:
    """Every row of the source as a problem, or what is wrong with it."""
    for where, problem, error, row in task.examined(settings.split, settings.source):
        yield problem or Malformed(f"{where}: {error or 'of no use'}", row)


def _same(out: str, source: str) -> bool:
    """Whether `out` is what `source` names, or lies in it."""
    if "://" in out or "://" in source:
        return out.rstrip("/") == source.rstrip("/")
    return Path(out).resolve().is_relative_to(Path(source).resolve())


def named_problems(name: str, value: str | None) -> Iterator[tuple[str, str, str]]:
    """Task, split and source of each data set that a setting names."""
    for spec in value.split(",") if value else []:
        where, equals, source = spec.partition("=")
        task, colon, split = where.strip().partition(":")
        if not (equals and colon and source.strip()):
            raise UsageError(f"{name}={spec!r} must look like gsm8k:test=FILE (TASK:SPLIT=SOURCE, several by commas)")
        yield task, split, source.strip()


def _counts(removed: dict[int, Removed]) -> dict[str, int]:
    """How many rows were removed for each reason, the commonest first."""
    return dict(Counter(found.reason for found in removed.values()).most_common())


def _said(removed: dict[int, Removed]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in _counts(removed).items())
