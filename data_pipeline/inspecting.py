"""`inspect`: what the model will see, on a terminal or as a page: trained spans, lengths, fill, steps."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydantic
import rich.console
import rich.table
import rich.text
from etils import epath
from jaxtyping import Int

from data_pipeline.cli import logger
from data_pipeline.files import damage_named, write_text
from data_pipeline.loader import Batch, Batches
from data_pipeline.pages import without_controls
from data_pipeline.resample import histogram
from data_pipeline.settings import Settings, UsageError, apply_override, read_yaml, validated
from data_pipeline.sources import DataSettings, Epoch, load_epoch
from data_pipeline.templates import Template, load_template
from data_pipeline.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_NUM_BINS = 12

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a model sees</title>
<style>
{stylesheet}
body {{ color: {foreground}; background: {background}; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }}
</style>
</head>
<body><pre>{code}</pre></body>
</html>
"""


class InspectSettings(Settings):
    """`inspect --config CONFIG [data.key=value ...]`: the data of a training config as the model sees it."""

    config: str = pydantic.Field(
        description="YAML file of training settings, of which data, seed and init_from are read"
    )
    rows: pydantic.NonNegativeInt = pydantic.Field(2, description="rows of the first epoch that are shown")
    html: str | None = pydantic.Field(None, description="write what is shown to this file, as a page")


def inspect(settings: InspectSettings, overrides: Sequence[str] = ()) -> Epoch:
    """Prints the datasets, histograms and first rows of an epoch. Raises UsageError."""
    if settings.html is not None and epath.Path(settings.html).is_dir():
        raise UsageError(f"html={settings.html} is a folder: name a file")
    data, seed, init_from = _data_of(settings.config, overrides)
    tokenizer = Tokenizer.load(data.tokenizer or _tokenizer_of(init_from))
    template = load_template(data.template) if data.template is not None else _template_of(init_from)
    epoch = load_epoch(data, tokenizer, template)
    batches = Batches(epoch.rows, data, batch_size=1, seed=seed, num_epochs=1)
    console = rich.console.Console(record=settings.html is not None, highlight=False)
    console.print(_sources(epoch))
    console.print(
        f"{len(epoch.rows):,} examples in {len(batches):,} rows of {data.context} tokens, {100 * batches.fill:.1f} % "
        "filled\n"
    )
    console.print(_lengths(epoch.rows.input_lengths, data.context))
    for table in _steps(epoch):
        console.print(table)
    console.print("\n[dim]dim: given to the model[/dim], [green]green: what the loss is taken on[/green]")
    for index in range(min(settings.rows, len(batches))):
        console.rule(f"row {index + 1} of {len(batches):,}")
        for text in examples_of(batches[index], 0, tokenizer):
            console.print(text, soft_wrap=True)
    if settings.html is not None:
        write_text(epath.Path(settings.html), console.export_html(inline_styles=True, code_format=_PAGE))
        logger.info("wrote %s", settings.html)
    return epoch


def examples_of(batch: Batch, row: int, tokenizer: Tokenizer) -> list[rich.text.Text]:
    """The examples of a row as text: what is given dim, what the loss is taken on green, special tokens in brackets."""
    segments, mask = batch["segment_ids"][row], batch["loss_mask"][row]
    shown = []
    for segment in range(1, int(segments.max()) + 1):
        place = np.flatnonzero(segments == segment)
        tokens = [*batch["tokens"][row][place].tolist(), int(batch["targets"][row][place[-1]])]
        trained = [False, *mask[place].tolist()]  # a token is trained on where it is a target
        text = rich.text.Text()
        start = 0
        for end in range(1, len(tokens) + 1):
            if end == len(tokens) or trained[end] != trained[start]:
                text.append(_decoded(tokens[start:end], tokenizer), style="green" if trained[start] else "dim")
                start = end
        shown.append(text)
    return shown


def _decoded(tokens: list[int], tokenizer: Tokenizer) -> str:
    begins = f"[{tokenizer.piece(tokenizer.bos_id)}]" if tokens[0] == tokenizer.bos_id else ""
    ends = f"[{tokenizer.piece(tokenizer.eos_id)}]" if tokens[-1] == tokenizer.eos_id else ""
    return f"{begins}{without_controls(tokenizer.decode(tokens))}{ends}"


def _sources(epoch: Epoch) -> rich.table.Table:
    table = rich.table.Table(title="Datasets", title_justify="left")
    table.add_column("dataset", overflow="fold")
    for heading in ("problems", "too long", "examples", "tokens", "share of them"):
        table.add_column(heading, justify="right")
    total = max(1, sum(report.num_tokens for report in epoch.sources))
    for report in epoch.sources:
        numbers = (report.num_read, report.num_overlong, report.num_examples, report.num_tokens)
        table.add_row(report.label, *(f"{n:,}" for n in numbers), f"{100 * report.num_tokens / total:.1f} %")
    return table


def _lengths(lengths: Int[np.ndarray, " rows"], context: int) -> rich.table.Table:
    ends = np.unique(np.ceil(np.linspace(0, max(int(lengths.max()), 1), _NUM_BINS + 1)).astype(int))
    counts, _ = np.histogram(lengths, bins=[*ends[:-1], ends[-1] + 1])
    labels = [f"{low}–{high - 1}" for low, high in zip(ends[:-1], [*ends[1:-1], ends[-1] + 1], strict=True)]
    title = f"Tokens of an example: median {np.median(lengths):.0f}, longest {lengths.max()}, context {context}"
    return _histogram(title, "tokens", {"examples": dict(zip(labels, counts.tolist(), strict=True))})


def _steps(epoch: Epoch) -> Iterator[rich.table.Table]:
    """The steps of each dataset that was resampled, and of all of them."""
    for report in epoch.sources:
        if report.resampled is not None:
            before, after = report.resampled["before"], report.resampled["after"]
            title = f"Steps of {report.label}; effective sample size {report.resampled['effective_sample_size']:,.0f}"
            steps = sorted({*before, *after})
            columns = {"before": {key: before.get(key, 0) for key in steps}, "examples": after}
            yield _histogram(title, "steps", columns)
    if len(epoch.sources) > 1 or epoch.sources[0].resampled is None:
        yield _histogram("Steps of a solution", "steps", {"examples": histogram(epoch.rows.num_steps)})


def _histogram(title: str, what: str, columns: dict[str, dict[Any, int]]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column(what, justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("share")
    shown = columns["examples"]
    largest, total = max(shown.values(), default=1), max(1, sum(shown.values()))
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        bar = ("█" * round(_BAR * shown.get(key, 0) / largest), "steel_blue3")
        share = rich.text.Text.assemble(bar, f" {100 * shown.get(key, 0) / total:.1f} %")
        counts = (f"{column.get(key, 0):,}" for column in columns.values())
        table.add_row("unknown" if key == -1 else str(key), *counts, share)
    return table


def _data_of(path: str, overrides: Sequence[str]) -> tuple[DataSettings, int, str | None]:
    """`data`, `seed` and `init_from` of a training config."""
    tree = read_yaml(path)
    for override in overrides:
        if not override.removeprefix("--").startswith(("data.", "data=", "seed=", "init_from=")):
            raise UsageError(f"override {override!r}: inspect reads data.KEY, seed and init_from")
        apply_override(tree, override)
    if not isinstance(tree.get("data"), dict):
        raise UsageError(f"{path} has no group `data`: name a training config")
    seed = tree.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError(f"{path}: seed={seed!r} must be a whole number from 0")
    return validated(DataSettings, tree["data"], where=f"{path}: data"), seed, tree.get("init_from")


def _tokenizer_of(init_from: str | None) -> str:
    """The tokenizer.model in a published folder, or beside the checkpoints of a run."""
    for place in _places_of(init_from):
        if (place / "tokenizer.model").exists():
            return str(place / "tokenizer.model")
    raise UsageError("the config names no tokenizer file: add data.tokenizer=FILE")


def _template_of(init_from: str | None) -> Template:
    """The template that came with the weights, as training takes it; without weights, the default."""
    for place in _places_of(init_from):
        if (place / "prompt_template.yaml").exists():
            return load_template(str(place / "prompt_template.yaml"))
        steps = sorted((int(step.name) for step in place.iterdir() if step.name.isdigit()), reverse=True)
        for step in steps:
            for file in (place / str(step) / "meta").glob("*"):
                with damage_named(file, "name data.template"):
                    told = json.loads(file.read_text())
                    if "template" in told:
                        return validated(Template, told["template"], where=str(file))
    return load_template(None)


def _places_of(init_from: str | None) -> list[epath.Path]:
    """Folders where what belongs to the weights may lie."""
    if init_from is None:
        return []
    folder = epath.Path(init_from.partition("@")[0])
    return [place for place in (folder, folder / "checkpoints") if place.is_dir()]
