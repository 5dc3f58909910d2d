"""Two runs on the same problems: how much better is one, and is it more than chance?"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from data_pipeline.files import write_json
from data_pipeline.settings import UsageError
from eval.files import read_grades, read_metrics, read_problems
from eval.grading import vote_of
from eval.metrics import answer_classes, bootstrap_ci95, majorities, pass_at_k, pass_ratio

_SEED = 0


def compare(folders: Sequence[epath.Path], out: str | None = None) -> list[dict[str, Any]]:
    """Compares each graded eval folder with the first, problem by problem.

    Returns a row a metric and folder: both values, and their difference with its 95 % interval, which resamples
    problems and takes both runs' results of each (a paired bootstrap): what is hard for both does not blur it. Pass@k
    is compared up to the smaller number of samples, and the majority vote at it. With `out`, writes the rows as JSON.

    Raises UsageError where folders hold other problems, were graded by other versions, or are not complete.
    """
    runs = [GradedRun(folder) for folder in folders]
    first, rows = runs[0], []
    for run in runs[1:]:
        first.check_against(run)
        ks = [2**i for i in range(min(first.num_samples, run.num_samples).bit_length())]
        n = min(first.num_samples, run.num_samples)
        ks = sorted({*ks[1:], n} - {1})
        values = [
            np.concatenate(
                [pass_ratio(each.correct, each.num_samples)[:, None], each.pass_at(ks), each.majority_at(n)], axis=1
            )
            for each in (first, run)
        ]
        intervals = bootstrap_ci95(values[1] - values[0], _SEED)
        for column, name in enumerate(["PassRatio", *(f"Pass@{k}" for k in ks), f"maj@{n}"]):
            a, b = (float(each[:, column].mean()) for each in values)
            rows.append(
                {
                    "metric": name, "first": str(first.folder), "second": str(run.folder), "first_value": a,
                    "second_value": b, "difference": b - a, "ci95": [float(end) for end in intervals[column]],
                }
            )  # fmt: skip
    if out is not None:
        write_json(
            epath.Path(out), {"num_problems": len(first.problems), "grader_version": first.version, "rows": rows}
        )
    return rows


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; an asterisk marks a difference whose interval does not hold zero."""
    lines = []
    for second in dict.fromkeys(row["second"] for row in rows):
        lines += [f"A = {rows[0]['first']}", f"B = {second}", f"{'':12}{'A':>9}{'B':>9}   B - A, 95 % interval"]
        for row in rows:
            if row["second"] == second:
                low, high = row["ci95"]
                mark = " *" if low > 0 or high < 0 else ""
                lines.append(
                    f"{row['metric']:12}{100 * row['first_value']:>8.1f}%{100 * row['second_value']:>8.1f}%"
                    f"   {100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{mark}"
                )
    return "\n".join(lines)


class GradedRun:
    """What a graded folder says of each problem, in the order of their ids; complete ones only."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        metrics = read_metrics(folder)
        if metrics["complete"] is not True:
            raise UsageError(
                f"{folder} is not complete ({json.dumps(metrics['complete'])}): sample it to the end; part files that "
                "`eval grade` finds damaged are removed and sampled again"
            )
        self.version, self.num_samples = metrics["grader_version"], metrics["num_samples"]
        rows_of = {row["problem_id"]: row for row in read_problems(folder)}
        self.problems = {key: (row["question"], row["answer"]) for key, row in rows_of.items()}
        self._rows_of = [rows_of[key] for key in sorted(rows_of)]
        graded: dict[str, dict[int, tuple[bool, str | None]]] = {problem_id: {} for problem_id in self.problems}
        for row in read_grades(folder):
            if row["problem_id"] in graded:  # others are left out, as `eval grade` has said
                graded[row["problem_id"]].setdefault(row["sample_id"], (row["correct"], vote_of(row)))
        if any(len(of_problem) != self.num_samples for of_problem in graded.values()):
            raise UsageError(f"{folder} has changed since it was graded: run `python -m eval grade {folder}` again")
        rows = [[verdict for _, verdict in sorted(graded[key].items())] for key in sorted(graded)]
        self._right = np.array([[correct for correct, _ in of] for of in rows])
        self._classes = np.array([answer_classes([vote for _, vote in of]) for of in rows])
        self.correct: Int[np.ndarray, " problems"] = self._right.sum(axis=1)

    def groups(self, field: Literal["num_steps", "level", "subject"]) -> list[Any]:
        """Of each problem the group it belongs to; None where that is not known."""
        return [row[field] for row in self._rows_of]

    def pass_at(self, ks: Sequence[int]) -> Float[np.ndarray, "problems ks"]:
        """Pass@k of each problem."""
        return pass_at_k(self.correct, self.num_samples, ks)

    def majority_at(self, k: int) -> Float[np.ndarray, "problems 1"]:
        """maj@k of each problem."""
        return majorities(self._classes, self._right, [k])

    def check_against(self, other: "GradedRun") -> None:
        """Raises UsageError where the two cannot be compared."""
        if self.version != other.version:
            raise UsageError(
                f"{self.folder} was graded by version {self.version}, {other.folder} by {other.version}: "
                "`python -m eval grade DIR` grades both by the same"
            )
        if self.problems != other.problems:
            here, there = self.problems.keys() - other.problems.keys(), other.problems.keys() - self.problems.keys()
            example = next(iter(sorted(here or there)), None) or "the same ids with other texts"
            raise UsageError(
                f"{self.folder} and {other.folder} do not hold the same problems: {len(here)} only in the first, "
                f"{len(there)} only in the second, such as {example}"
            )
