"""The files of an eval folder: where they lie, and how they are read back.

run.json                        everything that determines the samples, and its hash
problems.jsonl                  the problems with their gold answers, in order
samples/part-00000-00007.jsonl  all samples of problems 0 to 7, written whole and never changed
grades/part-00000-00007.jsonl   their grades
metrics.json, report.html
"""

import json
from collections.abc import Container, Iterator
from typing import Any

from etils import epath

from data_pipeline.cli import logger
from data_pipeline.files import damage_named, read_json_lines
from data_pipeline.settings import UsageError


def part_name(problems: range) -> str:
    """The file of a group of problems, by their indices, in samples/ and in grades/."""
    return f"part-{problems[0]:05d}-{problems[-1]:05d}.jsonl"


def problems_of(part: epath.Path) -> range:
    """The indices of the problems in a part file."""
    first, last = part.name.removesuffix(".jsonl").split("-")[1:]
    return range(int(first), int(last) + 1)


def parts(folder: epath.Path, kind: str) -> list[epath.Path]:
    """The part files under `kind` (samples or grades), in order."""
    directory = folder / kind
    return sorted(directory.glob("part-*.jsonl")) if directory.exists() else []


def read_run(folder: epath.Path) -> dict[str, Any]:
    """run.json. Raises UsageError where the folder is no eval folder, RunError where the file is damaged."""
    file = folder / "run.json"
    if not file.exists():
        raise UsageError(f"{folder} is not an eval folder (it has no run.json): `python -m eval sample` makes one")
    with damage_named(file, "sample into another folder"):
        return json.loads(file.read_text())


def read_problems(folder: epath.Path) -> list[dict[str, Any]]:
    """problems.jsonl. Raises RunError where it is damaged."""
    file = folder / "problems.jsonl"
    with damage_named(file, "sample into another folder"):
        return [{**row, "answer": row["answer"], "problem_id": row["problem_id"]} for row in read_json_lines(file)]


def read_metrics(folder: epath.Path) -> dict[str, Any]:
    """metrics.json. Raises UsageError where nothing is graded yet, RunError where it is damaged."""
    file = folder / "metrics.json"
    if not file.exists():
        raise UsageError(f"{folder} has no metrics.json yet: run `python -m eval grade {folder}` first")
    with damage_named(file, "grade again"):
        return json.loads(file.read_text())


def read_grades(folder: epath.Path) -> Iterator[dict[str, Any]]:
    """The rows of all grades. Raises RunError where a file is damaged."""
    for part in parts(folder, "grades"):
        with damage_named(part, "grade again"):
            yield from list(read_json_lines(part))


def read_samples(part: epath.Path, known: Container[str]) -> list[dict[str, Any]]:
    """The samples of a part file, the first of each (problem_id, sample_id); what is odd is named and left out.

    Raises RunError where a line is no sample at all.
    """
    samples: dict[tuple[str, int], dict[str, Any]] = {}
    with damage_named(part, "remove it and sample again"):
        for row in read_json_lines(part):
            key = (row["problem_id"], row["sample_id"])
            if not all(isinstance(row[name], str) for name in ("text", "finish_reason")):
                raise TypeError("text and finish_reason must be strings")
            if key[0] not in known:
                logger.warning("%s: problem %r is not in problems.jsonl: left out", part, key[0])
            elif key in samples:
                logger.warning("%s: sample %d of %r occurs twice: the first counts", part, key[1], key[0])
            else:
                samples[key] = row
    return list(samples.values())
