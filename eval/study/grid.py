"""The cells of a study's grid, all of them checked before one is run."""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.settings import UsageError, read_yaml, set_key, validated
from data_pipeline.tasks import get_task
from eval.leakage import LeakageSettings
from eval.sample import RunSettings
from eval.study.settings import StudySettings, merged, variants_of
from mathscale_jax.config import TrainSettings

_OURS = ("checkpoint", "out", "shard", "endpoint", "model", "template")  # what a cell says of its own runs
_LABEL = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True)
class Cell:
    """One run of the grid: where it stands, its seed, and its settings, all of them checked."""

    point: dict[str, str]  # axis -> label
    seed: int
    folder: str
    train: TrainSettings
    evals: dict[str, RunSettings]
    leakage: LeakageSettings | None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.rsplit("/", 1)[1]

    def settings(self) -> dict[str, Any]:
        """What determines its results."""
        return {
            "train": self.train.model_dump(mode="json", exclude={"output_dir"}),
            "evals": {
                name: given.model_dump(mode="json", exclude={"checkpoint", "out"}) for name, given in self.evals.items()
            },
            "leakage": self.leakage and self.leakage.model_dump(mode="json", exclude={"checkpoint", "out"}),
        }


def cells_of(study: StudySettings) -> list[Cell]:
    """The cells, in order: the first axis changes slowest, seeds fastest.

    Raises UsageError where an axis cannot be meant so, a cell's settings are wrong, or two cells are the same.
    """
    axes = {name: variants_of(name, axis) for name, axis in study.axes.items()}
    _check_order(axes)
    _check_skips(study, axes)
    tree: dict[str, Any] = {} if study.base is None else read_yaml(study.base)
    cells: list[Cell] = []
    for chosen in itertools.product(*axes.values()):
        point = {axis: label for axis, (label, _) in zip(axes, chosen, strict=True)}
        if any(all(point[axis] == str(label) for axis, label in skipped.items()) for skipped in study.skip):
            continue
        overrides = [(key, value) for _, changes in chosen for key, value in changes.items()]
        cells += [_cell(study, tree, point, overrides, seed) for seed in study.seeds]
    if not cells:
        raise UsageError("skip leaves no cell")
    _check_different(study, cells)
    _check_samples(study, cells[0])
    return cells


def _cell(
    study: StudySettings,
    base: Mapping[str, Any],
    point: dict[str, str],
    overrides: Sequence[tuple[str, Any]],
    seed: int,
) -> Cell:
    name = "_".join([*(_LABEL.sub("-", label) for label in point.values()), f"seed{seed}"])
    folder = f"{(study.cells or study.out + '/cells').rstrip('/')}/{name}"
    tree = merged(copy.deepcopy(dict(base)), study.train, "train")
    for key, value in overrides:
        set_key(tree, key, copy.deepcopy(value), f"axes: {key}")
    for key, value in (("output_dir", f"{folder}/train"), ("seed", seed), ("data.seed", seed)):
        set_key(tree, key, value, "train")
    evals = {}
    for eval_name, given in study.evals.items():
        for key in _OURS:
            if key in given:
                raise UsageError(f"evals.{eval_name}.{key} is said by the study: leave it out")
        ours = {
            "seed": seed,
            **study.eval_settings,
            **given,
            "checkpoint": f"{folder}/train",
            "out": f"{folder}/{eval_name}",
        }
        evals[eval_name] = validated(RunSettings, ours, f"evals.{eval_name}")
        if eval_name in study.sheets:
            get_task(evals[eval_name].task)
        else:
            _ = get_task(evals[eval_name].task).graded_as  # what people grade is refused here
    leakage = None
    if study.leakage is not None:
        ours = {**study.leakage, "checkpoint": f"{folder}/train", "out": f"{folder}/leakage.json"}
        leakage = validated(LeakageSettings, ours, "leakage")
    return Cell(point, seed, folder, validated(TrainSettings, tree, f"cell {name}"), evals, leakage)


def _check_order(axes: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]) -> None:
    """An axis must not undo what an earlier one sets."""
    for (first, before), (second, after) in itertools.combinations(axes.items(), 2):
        for key in {key for _, changes in before for key in changes}:
            for other in {key for _, changes in after for key in changes}:
                if key == other or key.startswith(f"{other}."):
                    raise UsageError(
                        f"axes.{second} sets {other} and so undoes what axes.{first} sets ({key}): two axes must not "
                        "set the same thing; of a whole and a part of it, the whole comes first"
                    )


def _check_skips(study: StudySettings, axes: Mapping[str, Sequence[tuple[str, Any]]]) -> None:
    for index, skipped in enumerate(study.skip):
        for axis, label in skipped.items():
            if axis not in axes:
                raise UsageError(f"skip.{index}: {axis!r} is none of axes: {', '.join(axes)}")
            labels = [known for known, _ in axes[axis]]
            if str(label) not in labels:
                raise UsageError(f"skip.{index}.{axis}={label!r} is none of {', '.join(labels)}")


def _check_samples(study: StudySettings, cell: Cell) -> None:
    """Each Pass@K must have K samples, and accuracy be of one."""
    for metric in (*study.report.metrics, *(contrast.metric for contrast in study.report.contrasts)):
        name, _, kind = metric.partition(":")
        drawn = cell.evals[name].num_samples if name in cell.evals else 0
        if kind.startswith("pass@") and int(kind.removeprefix("pass@")) > drawn:
            raise UsageError(f"report: {metric}: {name!r} draws {drawn} samples a problem")
        if kind == "accuracy" and drawn > 1:
            raise UsageError(f"report: {metric}: {name!r} draws {drawn} samples a problem: say {name}:pass_ratio")


def _check_different(study: StudySettings, cells: Sequence[Cell]) -> None:
    names: dict[str, Cell] = {}
    settings: dict[str, Cell] = {}
    for cell in cells:
        if cell.name in names:
            raise UsageError(f"two cells would share the folder {cell.folder}: name their variants more differently")
        names[cell.name] = cell
        content = cell.train.model_dump_json(exclude={"output_dir"})
        if content in settings:
            other = settings[content]
            axis = next(axis for axis in cell.point if cell.point[axis] != other.point[axis])
            keys = sorted({key for _, changes in variants_of(axis, study.axes[axis]) for key in changes})
            raise UsageError(
                f"the cells {other.name} and {cell.name} are the same run: axes.{axis} changes nothing between "
                f"{other.point[axis]} and {cell.point[axis]}. It sets {', '.join(keys) or 'nothing'}: do "
                "the values mean the same?"
            )
        settings[content] = cell


def paths_of(cell: Cell) -> Iterator[tuple[str, str]]:
    """What a cell reads of this machine or a bucket: key, path."""
    train = cell.train
    validation = () if train.validation is None else train.validation.sources
    for index, source in enumerate((*train.data.sources, *validation)):
        if source.path is not None:
            yield f"data.sources.{index}.path", source.path
    for key, path in (
        ("init_from", train.init_from), ("data.tokenizer", train.data.tokenizer),
        *((f"evals.{name}.source", given.source) for name, given in cell.evals.items()),
        *((f"evals.{name}.shots_source", given.shots_source) for name, given in cell.evals.items()),
        *((f"leakage.{key}", getattr(cell.leakage, key, None)) for key in ("test", "new", "train", "original")),
    ):  # fmt: skip
        if path is not None:
            yield key, path.partition("@")[0] if key == "init_from" else path
