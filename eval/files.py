"""The files of an eval folder: where they lie, and how they are read back.

run.json                        everything that determines the samples, and its hash
problems.jsonl                  the problems with their gold answers, in order
samples/part-00000-00007.jsonl  all samples of problems 0 to 7, written whole and never changed
grades/part-00000-00007.jsonl   their grades
metrics.json, errors.json, report.html
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

from etils import epath

from data_pipeline.cli import logger
from data_pipeline.files import damage_named, read_json_lines
from data_pipeline.settings import UsageError

_NEEDED = ("task", "split", "checkpoint", "num_problems", "num_samples", "temperature", "max_tokens")  # of run.json
Oddities = Counter[str]  # what was left out of the files, and how often
_NAMED = 3  # lines of a file that are named for each kind of oddity; the others are counted


def part_name(problems: range) -> str:
    """The file of a group of problems, by their indices, in samples/ and in grades/."""
    return f"part-{problems[0]:05d}-{problems[-1]:05d}.jsonl"


def problems_of(part: epath.Path) -> range:
    """The indices of the problems in a part file."""
    _, first, last = part.name.removesuffix(".jsonl").split("-")
    return range(int(first), int(last) + 1)


def parts(folder: epath.Path, kind: str) -> list[epath.Path]:
    """The part files under `kind` (samples or grades), in order."""
    directory = folder / kind
    return sorted(directory.glob("part-*.jsonl")) if directory.exists() else []


def gaps(problems: range, covered: Container[int]) -> Iterator[range]:
    """The problems that are not covered, as ranges."""
    begin = None
    for index in (*problems, None):
        if index is not None and index not in covered:
            begin = index if begin is None else begin
        elif begin is not None:
            yield range(begin, problems.stop if index is None else index)
            begin = None


def what_is_missing(folder: epath.Path) -> str | None:
    """What sampling and grading have not done yet, for people; None where that is nothing.

    Raises UsageError where the folder is no eval folder.
    """
    num_problems, there = read_run(folder)["num_problems"], parts(folder, "samples")
    missing = not_sampled(folder)
    if missing:
        sampled = num_problems - sum(map(len, missing))
        told = ", ".join(f"{gap[0]} to {gap[-1]}" for gap in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more gaps" if len(missing) > _NAMED else ""
        is_local = "://" not in str(folder)  # elsewhere each look is a request
        minutes = [(time.time() - part.stat().mtime) / 60 for part in there if is_local]
        age = f"; the newest file is {max(0, min(minutes)):.0f} minutes old" if minutes else ""
        return f"{sampled:,} of {num_problems:,} problems have their samples; missing: {told}{more}{age}"
    ungraded = {part.name for part in there} - {part.name for part in parts(folder, "grades")}
    return f"all samples are there; {len(ungraded)} of {len(there)} files are not graded yet" if ungraded else None


def not_sampled(folder: epath.Path) -> list[range]:
    """The problems without samples, as ranges. Raises UsageError where the folder is no eval folder."""
    num_problems = read_run(folder)["num_problems"]
    try:
        sampled = {index for part in parts(folder, "samples") for index in problems_of(part)}
    except ValueError:  # samples of another origin, whose files are called as they like
        return []
    return list(gaps(range(num_problems), sampled))


def read_run(folder: epath.Path) -> dict[str, Any]:
    """run.json. Raises UsageError where the folder is no eval folder, RunError where the file is damaged."""
    file = folder / "run.json"
    if not file.exists():
        raise UsageError(f"{folder} is not an eval folder (it has no run.json): `python -m eval sample` makes one")
    with damage_named(file, "sample into another folder"):
        run = json.loads(file.read_text())
        missing = [key for key in _NEEDED if key not in run]
        if missing:
            raise ValueError(f"it does not say {', '.join(missing)}")
        return run


def read_problems(folder: epath.Path) -> list[dict[str, Any]]:
    """problems.jsonl, with what may be left out filled in. Raises RunError where it is damaged, or an id repeats."""
    file = folder / "problems.jsonl"
    problems: dict[str, dict[str, Any]] = {}
    with damage_named(file, "mend it, or sample into another folder"):
        for row in read_json_lines(file):
            for name in ("problem_id", "question", "answer"):
                if not isinstance(row[name], str):
                    raise TypeError(f"{name} must be a text, not {row[name]!r}")
            if row["problem_id"] in problems:
                raise ValueError(f"the problem {row['problem_id']!r} occurs twice")
            problems[row["problem_id"]] = {**dict.fromkeys(("level", "subject", "num_steps")), **row}
    return list(problems.values())


def read_metrics(folder: epath.Path) -> dict[str, Any]:
    """metrics.json. Raises UsageError where nothing is graded yet, RunError where it is damaged."""
    file = folder / "metrics.json"
    if not file.exists():
        read_run(folder)  # what is no eval folder at all is told so
        raise UsageError(f"{folder} has no metrics.json yet: run `python -m eval grade {folder}` first")
    with damage_named(file, "grade again"):
        return json.loads(file.read_text())


def read_errors(folder: epath.Path) -> dict[str, Any] | None:
    """errors.json, if `eval errors` was run on what is graded now. Raises RunError where it is damaged."""
    file = folder / "errors.json"
    if not file.exists():
        return None
    with damage_named(file, "run `python -m eval errors` again"):
        errors = json.loads(file.read_text())
        if errors["metrics_sha256"] != metrics_digest(folder):
            logger.warning("%s is of other grades: run `python -m eval errors %s` again", file, folder)
            return None
        return errors


def metrics_digest(folder: epath.Path) -> str:
    """Of metrics.json, by which errors.json knows the grades that it was made of; "" without one."""
    file = folder / "metrics.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def read_grades(folder: epath.Path) -> Iterator[dict[str, Any]]:
    """The rows of all grades. Raises RunError where a file is damaged."""
    for part in parts(folder, "grades"):
        with damage_named(part, "grade again"):
            yield from list(read_json_lines(part))


def read_samples(
    part: epath.Path, known: Container[str], num_samples: int | None = None
) -> tuple[list[dict[str, Any]], Oddities]:
    """The samples of a part file, the first of each (problem_id, sample_id); what is odd is named and left out.

    Returns how often there was what, too. Where `num_samples` is given, ids beyond it are odd.
    """
    samples: dict[tuple[str, int], dict[str, Any]] = {}
    oddities: Oddities = Counter()

    def odd(number: int, what: str, detail: str) -> None:
        oddities[what] += 1
        if oddities[what] <= _NAMED:
            logger.warning("%s, line %d: %s: left out", part, number, detail)

    for number, line in enumerate(part.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key = (row["problem_id"], row["sample_id"])
            well_formed = all(isinstance(row[name], str) for name in ("problem_id", "text", "finish_reason"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            odd(number, "malformed lines", f"no sample ({type(error).__name__}: {error})")
            continue
        if not well_formed or type(key[1]) is not int:  # true is an int
            odd(
                number, "malformed lines", "no sample (problem_id, text and finish_reason are text, sample_id a number)"
            )
        elif key[0] not in known:
            odd(number, "samples of unknown problems", f"problem {key[0]!r} is not in problems.jsonl")
        elif key[1] < 0 or (num_samples is not None and key[1] >= num_samples):
            odd(number, "samples of unknown numbers", f"sample {key[1]} of {key[0]!r} is none of {num_samples}")
        elif key in samples:
            odd(number, "samples that occur twice", f"sample {key[1]} of {key[0]!r} occurs twice")
        else:
            samples[key] = row
    for what, count in oddities.items():
        if count > _NAMED:
            logger.warning("%s: %d %s in all", part, count, what)
    return list(samples.values()), oddities
