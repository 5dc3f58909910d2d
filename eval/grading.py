"""The grades of one part file after another, here or in processes of their own, which `python -m eval.grading` is."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.answers import Kind, Votes, extract, is_equal
from data_pipeline.files import read_json_lines, write_json_lines
from data_pipeline.workers import serve
from eval.files import Oddities, read_samples

Row = dict[str, Any]
_GRADED = {"answer", "rule", "vote", "correct", "seconds", "finish_reason"}


class Graded(NamedTuple):
    """What the metrics need to know of a sample."""

    correct: bool
    vote: str | None  # the same for equal answers of a problem; none without an answer
    finish_reason: str
    rule: str | None
    killed: bool


PartGrades = tuple[list[tuple[tuple[str, int], Graded]], Oddities]  # by (problem_id, sample_id)


def grade_part(
    samples: epath.Path, grades: epath.Path, golds: Mapping[str, str], kind: Kind, num_samples: int
) -> PartGrades:
    """Grades a part file, unless that is done; `golds` are the right answers by problem.

    A sample id is one of 0 to `num_samples` - 1.
    """
    rows, oddities = read_samples(samples, golds, num_samples)
    graded = None
    if grades.exists() and _changed_at(grades) >= _changed_at(samples):
        graded = _graded_before(grades, rows)
    if graded is None:
        graded = _grades(rows, golds, kind)
        write_json_lines(grades, graded)
    return [
        (
            (row["problem_id"], row["sample_id"]),
            Graded(row["correct"], vote_of(row), row["finish_reason"], row["rule"], row["seconds"] == "killed"),
        )
        for row in graded
    ], oddities


def _changed_at(file: epath.Path) -> float:
    """When a file was written; to the nanosecond where it is a local one."""
    return file.stat().mtime if "://" in str(file) else Path(file).stat().st_mtime_ns


def _grades(rows: Sequence[Row], golds: Mapping[str, str], kind: Kind) -> list[Row]:
    verdicts: dict[tuple[str, str | None], bool | None] = {}  # None: killed
    votes: defaultdict[str, Votes] = defaultdict(lambda: Votes(kind))
    result = []
    for sample in rows:
        started = time.perf_counter()
        extracted = extract(sample["text"], kind)
        answer, key = extracted.answer, (sample["problem_id"], extracted.answer)
        if key not in verdicts:
            verdicts[key] = False if answer is None else is_equal(answer, golds[sample["problem_id"]], kind)
        verdict = verdicts[key]
        result.append(
            {
                "problem_id": sample["problem_id"],
                "sample_id": sample["sample_id"],
                "answer": answer,
                "rule": extracted.rule,
                "vote": votes[sample["problem_id"]].of(answer),
                "correct": bool(verdict),
                "seconds": "killed" if verdict is None else round(time.perf_counter() - started, 6),
                "finish_reason": sample["finish_reason"],
            }
        )
    return result


def _graded_before(grades: epath.Path, samples: Sequence[Row]) -> list[Row] | None:
    """The grades of just these samples; None where the file holds others, or is damaged: then they are graded anew."""
    try:
        rows = list(read_json_lines(grades))
        same = [(row["problem_id"], row["sample_id"]) for row in rows] == [
            (row["problem_id"], row["sample_id"]) for row in samples
        ]
        return rows if same and all(row.keys() >= _GRADED for row in rows) else None
    except (ValueError, KeyError, TypeError):
        return None


def vote_of(graded: Mapping[str, Any]) -> str | None:
    """What a sample votes for. Should equal answers have got two verdicts, as one took too long, they are apart."""
    return None if graded["vote"] is None else f"{graded['correct']} {graded['vote']}"


def begin(first: tuple[Mapping[str, str], Kind, int]) -> Callable[[tuple[str, str]], Any]:
    """What a process does: given gold answers, their kind and how many samples each has, it grades files."""
    golds, kind, num_samples = first

    def answer(files: tuple[str, str]) -> PartGrades:
        samples, grades = map(epath.Path, files)
        return grade_part(samples, grades, golds, kind, num_samples)

    return answer


if __name__ == "__main__":
    from eval.grading import begin  # whose classes have the names that the other end knows

    serve(begin)
