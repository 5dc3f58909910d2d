"""What a study's report is made of: every metric at every point, its lines, and differences between variants."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from eval.study.cells import is_done
from eval.study.estimates import Estimate, Scores, combined, estimate, log_fit, paired
from eval.study.figures import Line, are_numbers
from eval.study.grid import Cell
from eval.study.results import Point
from eval.study.settings import Contrast, StudySettings, variants_of

TOGETHER = "all together"  # over all places of the grid
_TITLES = {
    "accuracy": "accuracy", "pass_ratio": "PassRatio@{n}", "step_accuracy": "accuracy of a step",
    "calculation_errors": "samples with a calculation error", "reasoning_errors": "samples with a reasoning error",
    "calculation_share": "calculation errors, of wrong samples",
    "first_false_position": "place of the first false equation", "d1": "d1 = loss(test) - loss(new), nats",
    "d2": "d2 = loss(test) - loss(train), nats", "test": "loss(test), nats", "new": "loss(new), nats",
    "train": "loss(train), nats",
}  # fmt: skip


class Table:
    """Every metric at every point, and along each line."""

    def __init__(self, settings: StudySettings, points: Sequence[Point]):
        x = settings.report.x
        _check_same_problems(settings, points)
        self.scores: dict[str, list[Scores | None]] = {
            metric: [point.scores(metric) for point in points] for metric in settings.report.metrics
        }
        self.x_labels = [label for label, _ in variants_of(x, settings.axes[x])]
        self.lines: dict[str, list[int]] = {}  # name of a line -> its points, from left to right
        for index, point in enumerate(points):
            self.lines.setdefault(label_of(point, without=x), []).append(index)
        self.x = [point.labels[x] for point in points]
        if are_numbers(self.x_labels):
            for line in self.lines.values():
                line.sort(key=lambda index: float(self.x[index]))

    def estimate(self, metric: str, index: int) -> Estimate | None:
        """A metric at a point."""
        scores = self.scores[metric][index]
        return None if scores is None else estimate(scores, (0.0, 1.0) if is_share(metric) else None)

    def line(self, metric: str, name: str) -> Line | None:
        """A metric along x."""
        there = [index for index in self.lines[name] if self.scores[metric][index] is not None]
        if not there:
            return None
        labels = [self.x[index] for index in there]
        scores = [found for index in there if (found := self.scores[metric][index]) is not None]
        estimates = [of for index in there if (of := self.estimate(metric, index)) is not None]
        fit = log_fit([float(label) for label in labels], scores) if are_numbers(labels) else None
        return Line(name, labels, estimates, fit)


def is_share(metric: str) -> bool:
    """Whether it is a share, told in percent; else nats."""
    return not metric.startswith("leakage:")


def _check_same_problems(settings: StudySettings, points: Sequence[Point]) -> None:
    """Raises UsageError where the runs of an eval are not of the same problems, or graded by the same version."""
    told = [*settings.report.metrics, *(contrast.metric for contrast in settings.report.contrasts)]
    names = {m.partition(":")[0] for m in told if re.search(r":(accuracy|pass_ratio|pass@\d+)$", m)}
    for name in sorted(names):
        runs = [run for point in points for run in point.graded(name)]
        for run in runs[1:]:
            runs[0].check_against(run)


def label_of(point: Point, without: str) -> str:
    """The variants that a point has on all axes but one."""
    return ", ".join(label for axis, label in point.labels.items() if axis != without)


def title_of(metric: str, settings: StudySettings) -> str:
    """A metric in words, with its eval's name where there are several."""
    name, _, kind = metric.partition(":")
    if name == "leakage":
        return _TITLES[kind]
    told = kind.replace("pass@", "Pass@") if kind.startswith("pass@") else _TITLES[kind]
    told = told.format(n={**settings.eval_settings, **settings.evals[name]}.get("num_samples", 256))
    several = len({metric.partition(":")[0] for metric in settings.report.metrics}) > 1
    return f"{name}: {told}" if several else told


@dataclass(frozen=True)
class Difference:
    """Two variants at a place of the grid, on a group of problems: second - first, over the seeds that both have.

    `where` is empty where the study has no other axis, `num_problems` None of a loss.
    """

    where: str
    group: str
    num_problems: int | None
    difference: Estimate
    first: float
    second: float


def differences_of(settings: StudySettings, points: Sequence[Point], contrast: Contrast) -> list[Difference]:
    """At each place, and over all places together where there are several."""
    pairs = []
    for point in points:
        wanted = {**point.labels, contrast.axis: contrast.second}
        other = next((each for each in points if each.labels == wanted), None)
        if other is not None and point.labels[contrast.axis] == contrast.first:
            pairs.append((point, other))
    every: list[tuple[str, list[Scores]]] = []
    for first, second in pairs:
        scores = [found for point in (first, second) if (found := point.scores(contrast.metric)) is not None]
        common = paired(scores) if len(scores) == 2 else None
        if common is not None:
            every.append((label_of(first, without=contrast.axis), common))
    everywhere = paired([scores for _, both in every for scores in both]) if len(every) > 1 else None
    if every and every[0][1][0].per_problem is None:  # errors on the same examples do not average out over places
        everywhere = None
    if everywhere is not None:
        share = [1 / len(every)] * len(every)
        every.append((TOGETHER, [combined(share, everywhere[side::2]) for side in (0, 1)]))
    groups = pairs[0][0].groups(contrast.metric.partition(":")[0], contrast.by) if every and contrast.by else []
    named = sorted({group for group in groups if group is not None})
    return [
        _difference(place, f"{group} {contrast.by}" if group is not None else "all", before, after, members)
        for place, (before, after) in every
        for group in [None, *named]
        for members in [None if group is None else [each == group for each in groups]]
    ]


def _difference(where: str, group: str, before: Scores, after: Scores, members: Sequence[bool] | None) -> Difference:
    a, b = (of if members is None else of.of_group(members) for of in (before, after))
    difference = estimate(combined([1, -1], [b, a]))
    number = None if a.per_problem is None else a.per_problem.shape[1]
    return Difference(where, group, number, difference, float(a.values.mean()), float(b.values.mean()))


def numbers(settings: StudySettings, cells: Sequence[Cell], points: Sequence[Point], table: Table) -> dict[str, Any]:
    """study.json."""

    def told(found: Estimate | None) -> dict[str, Any] | None:
        if found is None:
            return None
        by_seed = {str(seed): value for seed, value in found.by_seed.items()}
        return {"value": found.value, "ci95": found.ci95 and list(found.ci95), "by_seed": by_seed}

    metrics = settings.report.metrics
    fits: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        for name in table.lines:
            line = table.line(metric, name)
            if line is not None and line.fit is not None:
                fit = line.fit
                fits.setdefault(metric, {})[name] = {
                    "per_doubling": told(fit.slope), "intercept": fit.intercept, "off": fit.off,
                    "straight": fit.straight, "last_doubling": told(fit.last),
                }  # fmt: skip
    contrasts = [
        {
            **contrast.model_dump(), "where": found.where, "group": found.group, "num_problems": found.num_problems,
            "first_value": found.first, "second_value": found.second, "difference": told(found.difference),
        }
        for contrast in settings.report.contrasts
        for found in differences_of(settings, points, contrast)
    ]  # fmt: skip
    law = settings.report.step_law
    return {
        "title": settings.title,
        "scale": settings.scale,
        "complete": all(is_done(cell, settings) for cell in cells),
        "points": [
            {
                "axes": point.labels,
                "seeds": list(point.seeds),
                "steps": [steps_of(cell) for cell in point.cells],
                "metrics": {metric: told(table.estimate(metric, index)) for metric in metrics},
                **({} if law is None else {"step_law": point.step_law(law)}),
            }
            for index, point in enumerate(points)
        ],
        "fits": fits,
        "contrasts": contrasts,
    }


def steps_of(cell: Cell) -> int:
    """Optimizer steps that a cell was trained."""
    lines = (epath.Path(cell.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return max((json.loads(line)["step"] for line in lines[-5:]), default=0)
