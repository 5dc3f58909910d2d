"""What a study is: what its cells differ in, what is measured of each, and what the report makes of them."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic

from data_pipeline.cli import RunError
from data_pipeline.settings import Settings, UsageError, apply_override, read_yaml, set_key, validated
from data_pipeline.synthesis.rules import RuleTeacher
from mathscale_jax.config import TrainSettings

SAID_BY_STUDY = {"seed": "name seeds", "data.seed": "name seeds", "output_dir": "name out"}  # of training
PUBLISHED = "configs/studies/published.yaml"
_OF_ERRORS = ("calculation_errors", "reasoning_errors", "calculation_share", "first_false_position")
_KINDS = ("accuracy", "pass_ratio", "pass@K", "step_accuracy", *_OF_ERRORS)
OF_LEAKAGE = ("d1", "d2", "test", "new", "train")
_METRIC = re.compile(rf"\w+:({'|'.join(_KINDS).replace('@K', '@[1-9][0-9]*')})|leakage:({'|'.join(OF_LEAKAGE)})")


class Preparation(Settings):
    """A command that makes data before the cells run. A file beside what it makes says that it has ended well."""

    makes: str = pydantic.Field(description="file or folder; once it is made to the end, it is not made again")
    run: str = pydantic.Field(
        description='what stands behind "python -m", such as "data_pipeline prepare demo --out …"'
    )
    teacher: RuleTeacher | None = pydantic.Field(
        None, description="the rule-based teacher that listens meanwhile, at {teacher} in `run`; null: none"
    )


class Contrast(Settings):
    """A difference between two variants of an axis, all else equal, paired over problems and seeds."""

    axis: str = pydantic.Field(description="axis whose variants are compared")
    first: str = pydantic.Field(coerce_numbers_to_str=True, description="the one that is subtracted")
    second: str = pydantic.Field(coerce_numbers_to_str=True, description="the one it is subtracted from")
    metric: str = pydantic.Field(description="EVAL:pass_ratio, EVAL:accuracy, EVAL:pass@K, or one of leakage")
    by: Literal["steps", "level", "subject"] | None = pydantic.Field(
        None, description="in groups of problems as well: steps, level or subject; null: all only"
    )


class Report(Settings):
    """What the report shows. A metric is EVAL:accuracy, EVAL:pass_ratio, EVAL:pass@K or one of those in --help."""

    x: str = pydantic.Field(description="axis that runs from left to right; numbers are fitted over their logarithm")
    metrics: tuple[str, ...] = pydantic.Field(
        min_length=1,
        description="EVAL:accuracy, :pass_ratio, :pass@K, :step_accuracy (of the step law), :calculation_errors, "
        ":reasoning_errors (shares of all samples), :calculation_share (of wrong ones), :first_false_position; "
        "leakage:d1, leakage:d2, and the losses they are of: leakage:test, leakage:new, leakage:train",
    )
    contrasts: tuple[Contrast, ...] = pydantic.Field((), description="pairs of variants")
    step_law: str | None = pydantic.Field(None, description="eval whose accuracy is shown by steps; null: none")
    published: tuple[str, ...] = pydantic.Field((), description=f"tables of {PUBLISHED} that stand beside")

    @pydantic.field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for metric in metrics:
            if not _METRIC.fullmatch(metric):
                raise ValueError(
                    f"{metric!r} is no metric: write EVAL:KIND, with KIND one of {', '.join(_KINDS)}, or one of "
                    f"{', '.join(f'leakage:{kind}' for kind in OF_LEAKAGE)}"
                )
        return metrics


class StudySettings(Settings):
    """A study. In all of its texts {out} stands for its folder."""

    extends: str | None = pydantic.Field(
        None,
        description="YAML file that this one adds to: its prepare steps come first, train, evals and eval_settings are "
        "joined with its own, all else is replaced",
    )
    out: str = pydantic.Field(description="folder of the study: cells/, report.html, study.json")
    cells: str | None = pydantic.Field(
        None, description="folder of its runs: those that another study has done there are taken; null: OUT/cells"
    )
    title: str = pydantic.Field(description="the question, or what is repeated")
    about: str = pydantic.Field("", description="a paragraph for the report: what was chosen, and why")
    scale: str = pydantic.Field(description="at what scale: model, data, hardware")
    prepare: tuple[Preparation, ...] = pydantic.Field((), description="commands that make the data")
    base: str | None = pydantic.Field(None, description="config of a training run that all cells start from")
    train: dict[str, Any] = pydantic.Field({}, description="settings of training, over those of base")
    axes: dict[str, dict[str, Any]] = pydantic.Field(
        description="NAME: {KEY: [values]} for a setting of training, or NAME: {VARIANT: {KEY: value, …}, …}"
    )
    skip: tuple[dict[str, Any], ...] = pydantic.Field((), description="cells that are left out, such as {size: 960000}")
    seeds: tuple[pydantic.NonNegativeInt, ...] = pydantic.Field(
        (0,), min_length=1, description="of weights, order, subsets and samples; each cell is run with each"
    )
    evals: dict[str, dict[str, Any]] = pydantic.Field(
        {}, description="NAME: settings of eval run (task, source, num_samples, …), for every cell"
    )
    eval_settings: dict[str, Any] = pydantic.Field({}, description="settings of all evals, below their own")
    errors: tuple[str, ...] = pydantic.Field((), description="evals whose errors are typed (eval errors)")
    sheets: tuple[str, ...] = pydantic.Field((), description="evals that people grade (eval sheet)")
    leakage: dict[str, Any] | None = pydantic.Field(None, description="settings of eval leakage; null: not computed")
    report: Report = pydantic.Field(description="what is shown")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _place(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("out"), str):
            tree = {**tree, "out": tree["out"].rstrip("/")}
            return _replaced(tree, "{out}", tree["out"])
        return tree

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "StudySettings":
        if not self.axes:
            raise ValueError("axes: name at least one thing that cells differ in")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: one is there twice")
        if not self.evals and self.leakage is None:
            raise ValueError("evals: say what is measured of each cell (or leakage)")
        for key, instead in SAID_BY_STUDY.items():
            data = self.train.get("data")
            if key in self.train or (key == "data.seed" and isinstance(data, dict) and "seed" in data):
                raise ValueError(f"train.{key} is said by the study: {instead}")
        for name in self.evals:
            if not re.fullmatch(r"\w+", name) or name in ("train", "leakage"):
                raise ValueError(f"evals: {name!r} must be a word, and neither train nor leakage, which are taken")
        for key in ("errors", "sheets"):
            unknown = [name for name in getattr(self, key) if name not in self.evals]
            if unknown:
                raise ValueError(f"{key}: {unknown[0]!r} is none of evals: {', '.join(self.evals)}")
        self._check_report()
        return self

    def _check_report(self) -> None:
        report, graded = self.report, [name for name in self.evals if name not in self.sheets]
        if report.x not in self.axes:
            raise ValueError(f"report.x={report.x!r} is none of axes: {', '.join(self.axes)}")
        named = [("metrics", metric) for metric in report.metrics]
        named += [(f"contrasts.{index}.metric", contrast.metric) for index, contrast in enumerate(report.contrasts)]
        named += [("step_law", report.step_law)] if report.step_law else []
        for key, metric in named:
            name = metric.partition(":")[0]
            if name == "leakage" and self.leakage is None:
                raise ValueError(f"report.{key}: {metric} needs the settings of leakage")
            if name != "leakage" and name not in graded:
                raise ValueError(f"report.{key}: {name!r} is none of the graded evals: {', '.join(graded)}")
        for metric in report.metrics:
            name, _, kind = metric.partition(":")
            if kind in _OF_ERRORS and name not in self.errors:
                raise ValueError(f"report.metrics: {metric} needs {name!r} in errors")
        for index, contrast in enumerate(report.contrasts):
            where = f"report.contrasts.{index}"
            if contrast.axis not in self.axes:
                raise ValueError(f"{where}.axis={contrast.axis!r} is none of axes: {', '.join(self.axes)}")
            labels = [label for label, _ in variants_of(contrast.axis, self.axes[contrast.axis])]
            for label in (contrast.first, contrast.second):
                if label not in labels:
                    raise ValueError(f"{where}: {label!r} is none of axes.{contrast.axis}: {', '.join(labels)}")
            of_leakage = contrast.metric in {f"leakage:{kind}" for kind in OF_LEAKAGE}
            if not of_leakage and not re.fullmatch(r"\w+:(accuracy|pass_ratio|pass@[1-9]\d*)", contrast.metric):
                raise ValueError(
                    f"{where}.metric={contrast.metric!r}: differences are of accuracy, pass_ratio, pass@K, leakage"
                )
            if of_leakage and contrast.by is not None:
                raise ValueError(
                    f"{where}.by={contrast.by!r}: losses are not known by groups of problems: leave it out"
                )
        tables = read_yaml(PUBLISHED)
        unknown = set(report.published) - set(tables)
        if unknown:
            raise ValueError(
                f"report.published: {min(unknown)!r} is not in {PUBLISHED}, which has {', '.join(sorted(tables))}"
            )


def load_study(path: str, overrides: Sequence[str] = ()) -> StudySettings:
    """A study from its YAML file, what it extends, and `key=value` overrides. Raises UsageError."""
    below = _extended(path)
    for override in overrides:
        first = re.split(r"[.=]", override, maxsplit=1)[0]
        if first in TrainSettings.model_fields.keys() - StudySettings.model_fields.keys() - SAID_BY_STUDY.keys():
            raise UsageError(f"{override}: {first} is no setting of a study; for its training runs: train.{override}")
        apply_override(below, override)
    return validated(StudySettings, below, path)


def _extended(path: str, above: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a file, over those of the file that it extends."""
    if path in above:
        raise UsageError(f"{path} extends itself, by {', '.join(above)}")
    tree = read_yaml(path)
    extends = tree.pop("extends", None)
    if not isinstance(extends, str | None):
        raise UsageError(f"{path}: extends={extends!r}: must be the path of a YAML file")
    below = {} if extends is None else _extended(extends, (*above, path))
    for key, value in tree.items():
        if key == "prepare" and isinstance(value, list):
            below[key] = [*below.get(key, []), *value]
        elif key in ("train", "evals", "eval_settings") and isinstance(value, dict):
            below[key] = merged(below.get(key, {}), value, key)
        else:
            below[key] = value
    return below


def published_tables(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tables of published numbers. Raises RunError where the file is damaged."""
    tables = read_yaml(PUBLISHED)
    for name in names:
        if not {"title", "columns", "rows"} <= set(tables[name]):
            raise RunError(f"{PUBLISHED}: {name} must have title, columns and rows")
    return {name: tables[name] for name in names}


def _replaced(tree: Any, mark: str, text: str) -> Any:
    if isinstance(tree, str):
        return tree.replace(mark, text)
    if isinstance(tree, dict):
        return {key: _replaced(value, mark, text) for key, value in tree.items()}
    return [_replaced(value, mark, text) for value in tree] if isinstance(tree, list) else tree


def variants_of(name: str, axis: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The variants of an axis: label, and what it sets. Raises UsageError."""
    if len(axis) == 1 and isinstance(next(iter(axis.values())), list):
        ((key, values),) = axis.items()
        if not values or any(isinstance(value, dict | list) for value in values):
            raise UsageError(f"axes.{name}.{key}={values!r}: must be a list of plain values")
        found = [(str(value), {key: value}) for value in values]
    else:
        wrong = [label for label, changes in axis.items() if not isinstance(changes, dict)]
        if wrong or not axis:
            raise UsageError(
                f"axes.{name}{''.join(f'.{label}' for label in wrong[:1])}: write {{KEY: [values]}} for one setting, "
                "or {VARIANT: {KEY: value, …}, …} for named variants"
            )
        found = [(str(label), dict(changes)) for label, changes in axis.items()]
    for key in (key for _, changes in found for key in changes):
        if str(key).startswith("train."):
            raise UsageError(f"axes.{name}: an axis sets settings of training: write {key[6:]}, not {key}")
        if key in SAID_BY_STUDY:
            raise UsageError(f"axes.{name}: {key} is said by the study: {SAID_BY_STUDY[key]}")
    labels = [label for label, _ in found]
    if len(set(labels)) < len(labels):
        raise UsageError(f"axes.{name}: {max(labels, key=labels.count)} is there twice")
    return found


def merged(below: dict[str, Any], above: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """`above` over `below`: mappings are joined, all else is replaced. A dotted key is one of a mapping within.

    Raises UsageError, which names `where`, for a key that is no text.
    """
    for key, value in above.items():
        if not isinstance(key, str):
            raise UsageError(f"{where}: {key!r} is no name of a setting")
        if "." in key:
            set_key(below, key, copy.deepcopy(value), f"{where}: {key}")
        elif isinstance(value, dict) and isinstance(below.get(key), dict):
            below[key] = merged(below[key], value, f"{where}.{key}")
        else:
            below[key] = copy.deepcopy(value)
    return below
