"""The grades of one part file after another, here or in a process of its own, which `python -m eval.grading` is.

It reads JSON lines: the gold answers and their kind first, then pairs of files; and answers each with what the metrics
need. It needs nothing of the program that started it, and ends with it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.answers import Kind, answer_class, extract, is_equal
from data_pipeline.cli import RunError
from data_pipeline.files import read_json_lines, write_json_lines
from eval.files import Oddities, read_samples

Row = dict[str, Any]


class Graded(NamedTuple):
    """What the metrics need to know of a sample."""

    correct: bool
    vote: str | None  # right answers vote for one, however they are written; no answer votes for nothing
    finish_reason: str
    rule: str | None
    killed: bool


PartGrades = tuple[list[tuple[tuple[str, int], Graded]], Oddities]  # by (problem_id, sample_id)


def grade_part(samples: epath.Path, grades: epath.Path, golds: Mapping[str, str], kind: Kind) -> PartGrades:
    """Grades a part file, unless that is done; `golds` are the right answers by problem."""
    rows, oddities = read_samples(samples, golds)
    graded = None
    if grades.exists() and grades.stat().mtime >= samples.stat().mtime:
        graded = _graded_before(grades, rows)
    if graded is None:
        graded = _grades(rows, golds, kind)
        write_json_lines(grades, graded)
    return [
        (
            (row["problem_id"], row["sample_id"]),
            Graded(
                row["correct"],
                "right" if row["correct"] else answer_class(row["answer"], kind),
                row["finish_reason"],
                row["rule"],
                row["seconds"] == "killed",
            ),
        )
        for row in graded
    ], oddities


def _grades(rows: Sequence[Row], golds: Mapping[str, str], kind: Kind) -> list[Row]:
    verdicts: dict[tuple[str, str | None], bool | None] = {}  # None: killed
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
        return rows if same and all(row.keys() >= {"answer", "correct", "finish_reason"} for row in rows) else None
    except (ValueError, KeyError, TypeError):
        return None


class GradingProcess:
    """Grades part files in another process. Use it from one thread."""

    def __init__(self, golds: Mapping[str, str], kind: Kind):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eval.grading"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._send([dict(golds), kind])

    def grade(self, samples: epath.Path, grades: epath.Path) -> PartGrades:
        """As `grade_part`. Raises RunError where the process has ended."""
        assert self._process.stdout is not None
        self._send([os.fspath(samples), os.fspath(grades)])
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"the process that graded {samples} has ended (exit code {self._process.wait()})")
        rows, oddities = json.loads(line)
        return [((problem_id, sample_id), Graded(*of_sample)) for problem_id, sample_id, *of_sample in rows], Counter(
            oddities
        )

    def close(self) -> None:
        """Ends the process, at once."""
        self._process.kill()
        self._process.wait()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # what it has to say is read, or missed, by who waits for the answer
            pass


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    golds, kind = json.loads(sys.stdin.buffer.readline())
    while line := sys.stdin.buffer.readline():
        samples, grades = map(epath.Path, json.loads(line))
        rows, oddities = grade_part(samples, grades, golds, kind)
        print(json.dumps([[[*key, *graded] for key, graded in rows], oddities]), flush=True)


if __name__ == "__main__":
    _serve()
