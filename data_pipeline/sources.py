"""The datasets of a run: read, tokenised, counted, resampled and mixed into the rows of an epoch."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from etils import epath
from jaxtyping import Int

from data_pipeline.mixture import mixed_counts, nested_subset, repeated
from data_pipeline.problem import Problem
from data_pipeline.resample import Resample, resample, resampling_report
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import TASKS
from data_pipeline.templates import Template
from data_pipeline.tokenized import UNKNOWN_STEPS, TokenizedRows, tokenize_cached
from data_pipeline.tokenizer import Tokenizer

logger = logging.getLogger("mathscale")


class ProblemSet(Settings):
    """Where problems are read from."""

    task: str = pydantic.Field(description=f"one of {', '.join(TASKS)}")
    split: str = pydantic.Field("train", description="split of the task")
    path: str | None = pydantic.Field(
        None, description="dataset, or file or folder of rows; null takes the task's public source"
    )
    allow_evaluation_only: bool = pydantic.Field(
        False, description="take data that is published for evaluation: see its licence"
    )

    @pydantic.field_validator("task")
    @classmethod
    def _task_known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"unknown task; allowed: {', '.join(TASKS)}")
        return task

    def check_licence(self, key: str) -> None:
        """Raises ValueError, which names `key`, where training on the task wants a word of the user's."""
        if TASKS[self.task].evaluation_only and not self.allow_evaluation_only:
            raise ValueError(
                f"{key}.task={self.task!r} is for evaluation: {TASKS[self.task].about}. If you may train on it, set "
                f"{key}.allow_evaluation_only=true"
            )


class Source(ProblemSet):
    """One dataset of problems, and how much of it is read."""

    name: str | None = pydantic.Field(None, description="what logs call it; null: its path, or task and split")
    count: pydantic.PositiveInt | None = pydantic.Field(
        None, description="only so many of its rows, drawn by data.seed: smaller counts lie within larger ones"
    )
    resample: Resample | None = pydantic.Field(None, description="draw its rows by their number of steps")
    weight: pydantic.PositiveFloat | None = pydantic.Field(
        None,
        allow_inf_nan=False,
        description="its share of an epoch, beside the other datasets' weights; null: each of its rows once",
    )

    @property
    def label(self) -> str:
        """What it is called."""
        split = "" if self.split == "train" else f" ({self.split})"
        return self.name or (f"{self.task}/{self.split}" if self.path is None else f"{self.path}{split}")


class DataSettings(Settings):
    """What the model reads."""

    sources: tuple[Source, ...] = pydantic.Field(description="list of datasets, which make up an epoch together")
    num_examples: pydantic.PositiveInt | None = pydantic.Field(
        None, description="of an epoch of weighted datasets; null: as many as need no row twice"
    )
    seed: int = pydantic.Field(0, ge=0, lt=2**63, description="of counts, resampling and mixing")
    tokenizer: str | None = pydantic.Field(
        None, description="tokenizer.model file; null takes the one that came with init_from"
    )
    template: str | None = pydantic.Field(
        None, description="chat template: default, or a YAML file; null takes the one that came with init_from"
    )
    context: pydantic.PositiveInt = pydantic.Field(2048, description="tokens in a row of a batch")
    layout: Literal["packed", "padded"] = pydantic.Field(
        "packed", description="packed: several examples share a row; padded: one example a row"
    )
    overlong: Literal["drop", "refuse"] = pydantic.Field(
        "drop", description="examples longer than the context: dropped and counted, or refused"
    )
    cache_dir: str | None = pydantic.Field(None, description="token cache; null takes ~/.cache/mathscale_jax")
    prefetch: pydantic.NonNegativeInt = pydantic.Field(4, description="batches made ahead of the step")

    @pydantic.model_validator(mode="after")
    def _sources_fit(self) -> "DataSettings":
        if not self.sources:
            raise ValueError("sources: name at least one dataset")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(f"sources.{weighted.index(False)}.weight is missing: give every dataset a weight, or none")
        if self.num_examples is not None and not any(weighted):
            raise ValueError("num_examples is that of weighted datasets: give every one of sources a weight")
        for index, source in enumerate(self.sources):
            source.check_licence(f"sources.{index}")
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"sources: {max(labels, key=labels.count)!r} is there twice: give each a name, if that is meant"
            )
        return self


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What became of a dataset: problems read, too long, of an epoch; its tokens; its steps before and after."""

    label: str
    num_read: int
    num_overlong: int
    num_examples: int
    num_tokens: int
    resampled: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The rows of an epoch, some perhaps several times, and a report on each dataset."""

    rows: TokenizedRows
    sources: list[SourceReport]

    def table(self) -> str:
        """The reports as lines."""
        lines = []
        for report in self.sources:
            notes = f", {report.num_overlong} too long" if report.num_overlong else ""
            if report.resampled is not None:
                resampled = report.resampled
                notes += (
                    f", resampled: {resampled['different_rows']:,} different rows, effective sample size "
                    f"{resampled['effective_sample_size']:,.0f}, steps {_shares(resampled['before'])} before and "
                    f"{_shares(resampled['after'])} after"
                )
            share = 100 * report.num_tokens / max(1, int(self.rows.lengths.sum()))
            lines.append(
                f"{report.label}: {report.num_read:,} problems read{notes}; {report.num_examples:,} examples and "
                f"{report.num_tokens:,} tokens ({share:.1f} %) of an epoch"
            )
        return "\n".join(lines)


def _shares(histogram: dict[int, int]) -> str:
    """A histogram in a few words: percent of the rows by their steps."""
    total = max(1, sum(histogram.values()))
    return " ".join(
        f"{'unknown' if steps == UNKNOWN_STEPS else steps}:{100 * count / total:.0f}%"
        for steps, count in histogram.items()
    )


def load_rows(settings: DataSettings, tokenizer: Tokenizer, template: Template) -> TokenizedRows:
    """The rows of an epoch; see `load_epoch`."""
    epoch = load_epoch(settings, tokenizer, template)
    logger.info("%s", epoch.table())
    return epoch.rows


def load_epoch(settings: DataSettings, tokenizer: Tokenizer, template: Template) -> Epoch:
    """Reads and tokenises every dataset, drops or refuses what is too long, and draws counts, resampling and mixture.

    Deterministic in the data and `settings.seed`. Raises UsageError.
    """
    _check_places(settings)
    parts, reports = [], []
    for source in settings.sources:
        rows = _tokenized(source, settings, tokenizer, template)
        fits = np.flatnonzero(rows.input_lengths <= settings.context)
        num_overlong = len(rows) - len(fits)
        if num_overlong:
            _say_overlong(rows, source, settings)
        if not len(fits):
            raise UsageError(f"{source.label}: no example is left that fits data.context={settings.context}; raise it")
        if source.count is not None:
            if source.count > len(fits):
                raise UsageError(f"{source.label}: count={source.count}, and there are {len(fits)} rows that fit")
            fits = nested_subset(len(rows), source.count, settings.seed, among=fits)
        before = rows.num_steps[fits]
        if source.resample is not None:
            try:
                fits = fits[resample(before, source.resample, settings.seed)]
            except UsageError as error:
                raise UsageError(f"{source.label}: {error}") from error
        parts.append(rows.select(fits))
        reports.append((source, len(rows), num_overlong, before))
    joined = TokenizedRows.join(parts)
    if settings.sources[0].weight is not None:
        joined = joined.select(_mixed(joined, settings))
    epoch = []
    for index, (source, num_read, num_overlong, before) in enumerate(reports):
        mine = joined.sources == index
        epoch.append(
            SourceReport(
                source.label,
                num_read,
                num_overlong,
                num_examples=int(mine.sum()),
                num_tokens=int(joined.lengths[mine].sum()),
                resampled=None
                if source.resample is None
                else resampling_report(before, joined.num_steps[mine], joined.starts[mine]),
            )
        )
    return Epoch(joined, epoch)


def _check_places(settings: DataSettings) -> None:
    """Raises UsageError where a dataset is not there, before another one is read for minutes; warns of test sets."""
    for index, source in enumerate(settings.sources):
        if source.split != "train" and source.split in TASKS[source.task].splits:
            logger.warning("%s: its split %r, which is for evaluation, is trained on", source.label, source.split)
        key = f"data.sources.{index}.path"
        if source.path is None:
            TASKS[source.task].check_public(key)
        elif not epath.Path(source.path).exists():
            raise UsageError(f"{key}={source.path!r} does not exist")


def _mixed(rows: TokenizedRows, settings: DataSettings) -> Int[np.ndarray, " chosen"]:
    of_source = [np.flatnonzero(rows.sources == index) for index in range(len(settings.sources))]
    weights = [source.weight or 0.0 for source in settings.sources]
    counts = mixed_counts([len(of) for of in of_source], weights, settings.num_examples)
    for source, of, count in zip(settings.sources, of_source, counts, strict=True):
        if count > len(of):
            logger.warning("%s: %d rows make %d examples of an epoch, so they repeat", source.label, len(of), count)
    return np.concatenate([repeated(of, count, settings.seed) for of, count in zip(of_source, counts, strict=True)])


def _tokenized(source: Source, settings: DataSettings, tokenizer: Tokenizer, template: Template) -> TokenizedRows:
    task = TASKS[source.task]

    def problems() -> Iterator[Problem]:
        for problem in task.problems(source.split, source.path):
            if not problem.solution:
                raise UsageError(f"{source.label}: {problem.id!r} has no worked solution to learn from")
            yield problem

    cache_dir = None if settings.cache_dir is None else Path(settings.cache_dir)
    rows = tokenize_cached(problems, task.fingerprint(source.split, source.path), tokenizer, template, cache_dir)
    if not len(rows):
        raise UsageError(f"{source.label}: the dataset is empty, no problem was read")
    return rows


def _say_overlong(rows: TokenizedRows, source: Source, settings: DataSettings) -> None:
    """Raises UsageError, or warns, as the settings say."""
    too_long = np.flatnonzero(rows.input_lengths > settings.context)
    first = int(too_long[0])
    what = (
        f"{source.label}: {len(too_long)} of {len(rows)} examples are longer than data.context={settings.context} "
        f"(the first is {rows.name(first)!r} with {rows.input_lengths[first]} tokens)"
    )
    if settings.overlong == "refuse":
        raise UsageError(f"{what}; raise data.context, or set data.overlong=drop")
    logger.warning("%s: dropped", what)
