"""The files of an eval folder: where they lie, and how they are read back.

run.json                    everything that determines the samples, and its hash
problems.jsonl              the problems with their gold answers, in order
samples/part-00000.jsonl    all samples of the first problem, written whole and never changed
grades/part-00000.jsonl     their grades
metrics.json, report.html
"""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from data_pipeline.cli import RunError, logger
from data_pipeline.files import read_json_lines
from data_pipeline.settings import UsageError


def part_name(problem_index: int) -> str:
    """The file of a problem, in samples/ and in grades/."""
    return f"part-{problem_index:05d}.jsonl"


def parts(folder: epath.Path, kind: str) -> list[epath.Path]:
    """The part files under `kind` (samples or grades), in order."""
    directory = folder / kind
    return sorted(directory.glob("part-*.jsonl")) if directory.exists() else []


def read_run(folder: epath.Path) -> dict[str, Any]:
    """run.json. Raises UsageError where the folder is no eval folder."""
    file = folder / "run.json"
    if not file.exists():
        raise UsageError(f"{folder} is not an eval folder (it has no run.json): `python -m eval sample` makes one")
    return json.loads(file.read_text())


def read_problems(folder: epath.Path) -> list[dict[str, Any]]:
    """problems.jsonl."""
    return list(read_json_lines(folder / "problems.jsonl"))


def read_samples(part: epath.Path, known: set[str]) -> Iterator[dict[str, Any]]:
    """The samples of a part file, the first of each (problem_id, sample_id); what is odd is named and left out.

    Raises RunError where a line is no sample at all.
    """
    seen: set[tuple[str, int]] = set()
    try:
        for row in read_json_lines(part):
            key = (row["problem_id"], row["sample_id"])
            if key[0] not in known:
                logger.warning("%s: problem %r is not in problems.jsonl: left out", part, key[0])
            elif key in seen:
                logger.warning("%s: sample %d of %r occurs twice: the first counts", part, key[1], key[0])
            else:
                seen.add(key)
                yield row
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{part} is damaged ({type(error).__name__}: {error}): remove it and sample again") from error
