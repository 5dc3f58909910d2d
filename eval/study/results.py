"""What the cells of a study that are done say: scores by point of the grid."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from data_pipeline.files import damage_named
from eval.compare import GradedRun
from eval.errors import TYPES
from eval.files import read_errors, read_metrics
from eval.step_law import as_arrays, step_law
from eval.study.cells import is_done
from eval.study.estimates import Scores
from eval.study.grid import Cell
from eval.study.settings import StudySettings

_ERRORS = {f"{name}_errors": name for name in TYPES}
_WIDTH = 2 * 1.959964  # of a 95 % interval, in standard errors
GROUPS = {"steps": "num_steps", "level": "level", "subject": "subject"}


@dataclass
class Point:
    """The cells of one place in the grid that are done, one a seed."""

    labels: dict[str, str]
    cells: list[Cell]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its cells."""
        return tuple(cell.seed for cell in self.cells)

    def scores(self, metric: str) -> Scores | None:
        """EVAL:KIND of each seed, see `Report.metrics`; None where no cell has it."""
        name, _, kind = metric.partition(":")
        if kind in ("accuracy", "pass_ratio") or kind.startswith("pass@"):
            runs = self.graded(name)
            if kind.startswith("pass@"):
                k = int(kind.removeprefix("pass@"))
                return Scores.of_problems(self.seeds, np.array([run.pass_at([k])[:, 0] for run in runs]))
            return Scores.of_problems(self.seeds, np.array([run.correct / run.num_samples for run in runs]))
        found = [_value(cell, name, kind) for cell in self.cells]
        there = [(seed, *value) for seed, value in zip(self.seeds, found, strict=True) if value is not None]
        if not there:
            return None
        seeds, values, errors = zip(*there, strict=True)
        return Scores(seeds, np.array(values), None, np.array(errors))

    def groups(self, name: str, by: str) -> list[Any]:
        """The group of each problem of an eval, in the order of the scores."""
        return self.graded(name)[0].groups(GROUPS[by])  # type: ignore[arg-type]

    def step_law(self, name: str) -> dict[str, Any] | None:
        """The law fitted to an eval's problems, each with its share of right samples in all seeds."""
        runs = self.graded(name)
        accuracy = np.mean([run.correct / run.num_samples for run in runs], axis=0)
        return step_law(*as_arrays(runs[0].groups("num_steps"), accuracy.tolist()))

    def graded(self, name: str) -> list[GradedRun]:
        """The graded runs of an eval, one a seed, in which the problems are the same."""
        if name not in self._runs:
            runs = [GradedRun(epath.Path(cell.evals[name].out)) for cell in self.cells]
            for run in runs[1:]:
                runs[0].check_against(run)
            self._runs[name] = runs
        return self._runs[name]

    @cached_property
    def _runs(self) -> dict[str, list[GradedRun]]:
        return {}


def points_of(settings: StudySettings, cells: Sequence[Cell]) -> list[Point]:
    """The places of the grid at which something is done, in the order of the cells."""
    points: dict[tuple[str, ...], Point] = {}
    for cell in cells:
        if is_done(cell, settings):
            points.setdefault(tuple(cell.point.values()), Point(cell.point, [])).cells.append(cell)
    return list(points.values())


def _value(cell: Cell, name: str, kind: str) -> tuple[float, float] | None:
    """A number of a cell that is not a mean over problems, and its standard error (0: not known)."""
    if name == "leakage":
        file = epath.Path(cell.folder) / "leakage.json"
        with damage_named(file, "remove the cell's folder to run it again"):
            told = json.loads(file.read_text())
            return _with_error(told[kind] if kind in told else told["loss"][kind])
    folder = epath.Path(cell.evals[name].out)
    metrics = read_metrics(folder)
    ratio = metrics["pass_ratio"][str(metrics["num_samples"])] if kind in _ERRORS else None
    if kind == "step_accuracy":
        law = metrics["step_law"]
        if law is None:
            return None
        return _with_error({"value": law["all"]["accuracy_step"], "ci95": law["all"]["ci95"]})
    if ratio is not None and ratio["value"] == 1:
        return 0.0, 0.0
    errors = read_errors(folder)
    if errors is None:
        return None
    if kind == "first_false_position":
        position = errors["program"]["first_false_position"]
        return None if position is None else (position, 0.0)
    program = errors["program"]
    share = program["shares"][_ERRORS.get(kind, "calculation")]
    if share is None:
        return None
    if ratio is None:  # calculation_share, which is of the wrong samples
        return _with_error(share)
    right, right_error = _with_error(ratio)
    checked = 1 - program["not_checkable"] / program["num_wrong"]  # those without an equation are of neither type
    of_wrong, of_wrong_error = (checked * each for each in _with_error(share))
    return (1 - right) * of_wrong, float(np.hypot((1 - right) * of_wrong_error, of_wrong * right_error))


def _with_error(entry: dict[str, Any]) -> tuple[float, float]:
    low, high = entry["ci95"]
    return entry["value"], (high - low) / _WIDTH
