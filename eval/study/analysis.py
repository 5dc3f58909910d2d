"""What a study's report is made of: every metric at every point, its lines, and differences between variants."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from eval.study.cells import is_done
from eval.study.estimates import Estimate, Scores, combined, estimate, log_fit
from eval.study.figures import Line, are_numbers
from eval.study.grid import Cell
from eval.study.results import Point
from eval.study.settings import Contrast, StudySettings, variants_of

SIGNED = ("leakage:d1", "leakage:d2")  # nats; all other metrics are shares
_TITLES = {
    "accuracy": "accuracy", "pass_ratio": "PassRatio@{n}", "step_accuracy": "accuracy of a step",
    "calculation_errors": "samples with a calculation error", "reasoning_errors": "samples with a reasoning error",
    "calculation_share": "calculation errors, of wrong samples",
    "first_false_position": "place of the first false equation", "d1": "d1 = loss(test) - loss(new), nats",
    "d2": "d2 = loss(test) - loss(train), nats",
}  # fmt: skip


class Table:
    """Every metric at every point, and along each line."""

    def __init__(self, settings: StudySettings, points: Sequence[Point]):
        self.settings = settings
        x = settings.report.x
        self.scores: dict[str, list[Scores | None]] = {
            metric: [point.scores(metric) for point in points] for metric in settings.report.metrics
        }
        self.x_labels = [label for label, _ in variants_of(x, settings.axes[x])]
        self.lines: dict[str, list[int]] = {}  # name of a line -> its points, from left to right
        for index, point in enumerate(points):
            self.lines.setdefault(label_of(point, without=x), []).append(index)
        self.x = [point.labels[x] for point in points]

    def estimate(self, metric: str, index: int) -> Estimate | None:
        """A metric at a point."""
        scores = self.scores[metric][index]
        return None if scores is None else estimate(scores, None if metric in SIGNED else (0.0, 1.0))

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


def label_of(point: Point, without: str) -> str:
    """The variants that a point has on all axes but one."""
    return ", ".join(label for axis, label in point.labels.items() if axis != without)


def title_of(metric: str, settings: StudySettings) -> str:
    """A metric in words, with its eval's name where there are several."""
    name, _, kind = metric.partition(":")
    if name == "leakage":
        return _TITLES[kind]
    told = kind.replace("pass@", "Pass@") if kind.startswith("pass@") else _TITLES[kind]
    told = told.format(n=settings.evals[name].get("num_samples", 256))
    several = len({metric.partition(":")[0] for metric in settings.report.metrics}) > 1
    return f"{name}: {told}" if several else told


def differences_of(
    settings: StudySettings, points: Sequence[Point], contrast: Contrast
) -> Iterator[tuple[str, str, int, Estimate, float, float]]:
    """Where, group, problems, difference, first and second value: at each place, and over all places together."""
    pairs = []
    for point in points:
        if point.labels[contrast.axis] != contrast.first:
            continue
        wanted = {**point.labels, contrast.axis: contrast.second}
        other = next((each for each in points if each.labels == wanted), None)
        if other is not None:
            pairs.append((point, other))
    every: list[tuple[str, list[Scores]]] = []
    name = contrast.metric.partition(":")[0]
    for first, second in pairs:
        both = [first.scores(contrast.metric), second.scores(contrast.metric)]
        assert both[0] is not None and both[1] is not None  # metrics of problems are always there
        every.append((label_of(first, without=contrast.axis), [both[0], both[1]]))
    if not every:
        return
    if len(every) > 1:
        share = [1 / len(every)] * len(every)
        every.append(("all together", [combined(share, [both[i] for _, both in every]) for i in (0, 1)]))
    groups = pairs[0][0].groups(name, contrast.by) if contrast.by else []
    named = sorted({group for group in groups if group is not None})
    for place, (before, after) in every:
        for group in [None, *named]:
            if group is None:
                a, b, told = before, after, "all"
            else:
                members = [each == group for each in groups]
                a, b, told = before.of_group(members), after.of_group(members), f"{group} {contrast.by}"
            assert a.per_problem is not None
            yield (
                place, told, a.per_problem.shape[1], estimate(combined([1, -1], [b, a])),
                float(a.values.mean()), float(b.values.mean()),
            )  # fmt: skip


def numbers(settings: StudySettings, cells: Sequence[Cell], points: Sequence[Point], table: Table) -> dict[str, Any]:
    """study.json."""

    def told(found: Estimate | None) -> dict[str, Any] | None:
        if found is None:
            return None
        by_seed = {str(seed): value for seed, value in found.by_seed.items()}
        return {"value": found.value, "ci95": list(found.ci95), "by_seed": by_seed}

    metrics = settings.report.metrics
    fits: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        for name in table.lines:
            line = table.line(metric, name)
            if line is not None and line.fit is not None:
                fit = {"per_doubling": told(line.fit.slope), "intercept": line.fit.intercept, "off": line.fit.off}
                fits.setdefault(metric, {})[name] = fit
    contrasts = []
    for contrast in settings.report.contrasts:
        for place, group, number, difference, first, second in differences_of(settings, points, contrast):
            contrasts.append(
                {
                    **contrast.model_dump(), "where": place, "group": group, "num_problems": number,
                    "first_value": first, "second_value": second, "difference": told(difference),
                }
            )  # fmt: skip
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
