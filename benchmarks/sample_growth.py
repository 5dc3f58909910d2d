"""python -m benchmarks.sample_growth: useful tokens a second as samples, prompts and responses grow.

    python -m benchmarks.sample_growth --checkpoint runs/small --dtype float32
    python -m benchmarks.sample_growth --preset llama2-7b --num-problems 8

Random weights of a checkpoint's or a preset's architecture, which end a response after a given number of tokens on
average (see benchmarks.sample). From the same middle one thing is changed at a time.
"""

import os
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from benchmarks import samplers
from benchmarks.flags import Numbers, settings_and_command
from benchmarks.report import environment, table, write_results
from benchmarks.samplers import Drawn, Work
from benchmarks.worker import Limits, Worker, WorkerFailed
from data_pipeline.cli import logger, run_command
from data_pipeline.settings import Settings
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.config import ModelConfig

MIDDLE = {"num_samples": 256, "prompt_length": 150, "mean_length": 150}


class GrowthSettings(Settings):
    """What is measured."""

    checkpoint: str | None = pydantic.Field(None, description="whose architecture is taken")
    preset: str | None = pydantic.Field(None, description="or: name of an architecture")
    num_samples: Numbers = pydantic.Field((16, 64, 256, 1024), description="samples a problem")
    prompt_length: Numbers = pydantic.Field((100, 300, 750, 1500), description="tokens of a prompt")
    mean_length: Numbers = pydantic.Field((50, 150, 450), description="tokens of a response; at most four times that")
    num_problems: pydantic.PositiveInt = pydantic.Field(2, description="problems")
    temperature: pydantic.PositiveFloat = pydantic.Field(0.7, description="of the draws")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("bfloat16", description="of weights, activations, caches")
    kv_cache: Literal["int8"] | None = pydantic.Field(None, description="dtype of the caches")
    rows: pydantic.PositiveInt = pydantic.Field(256, description="samples that are decoded at once")
    rounds: pydantic.PositiveInt = pydantic.Field(3, description="times that everything is drawn; medians are shown")
    time_limit: pydantic.PositiveFloat = pydantic.Field(1800, description="seconds for one round")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")

    @pydantic.model_validator(mode="after")
    def _one_architecture(self) -> "GrowthSettings":
        if (self.checkpoint is None) == (self.preset is None):
            raise ValueError("give a checkpoint, or a preset")
        return self


def benchmark(settings: GrowthSettings, command: str) -> None:
    """Measures, prints, and writes the results."""
    load, where = os.getloadavg()[0], {"device": "cpu"}
    config = (
        ModelConfig.model_validate({"preset": settings.preset})
        if settings.checkpoint is None
        else open_checkpoint(settings.checkpoint).meta.model
    )
    rows: list[list[str]] = []
    measured: list[dict[str, Any]] = []
    for cell in _cells(settings):
        try:
            where, drawn = _drawn(settings, config, cell)
        except WorkerFailed as failure:
            rows.append([*map(str, cell.values()), str(failure), "", ""])
            measured.append({**cell, "failed": str(failure)})
            continue
        speeds = [samplers.speed(each) for each in drawn]
        lengths, prompt = drawn[0].lengths, cell["prompt_length"]
        bound = samplers.bound(config, where, settings.kv_cache, prompt, lengths, settings.rows)
        rows.append([
            *map(str, cell.values()),
            f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
            f"{np.mean([length for each in drawn for length in each.lengths]):.0f}",
            "" if bound is None else f"{100 * statistics.median(speeds) / bound:.0f} %",
        ])  # fmt: skip
        measured.append({**cell, "useful_tokens_per_second": speeds, "bound": bound})
        logger.info("%s: %s useful tokens/s", cell, rows[-1][3])
    header = ["samples a problem", "prompt", "mean response asked for", "useful tokens/s", "drawn", "of the bound"]
    body = (
        f"{settings.num_problems} problems, {settings.rows} rows at once, temperature {settings.temperature:g}; "
        f"{settings.dtype}{', caches in int8' if settings.kv_cache else ''}; {config.num_parameters / 1e6:,.0f} M "
        f"weights\n\n{table(header, rows)}"
    )
    print(body, flush=True)
    if settings.out is not None:
        name = settings.preset or f"{config.num_parameters / 1e6:.0f}m"
        values = {"settings": settings.model_dump(exclude={"out"}), "measured": measured}
        at, subject = environment(where["device"], load), f"sample-growth-{name}"
        logger.info("wrote %s", write_results(settings.out, subject, at, command, body, values))


def _cells(settings: GrowthSettings) -> list[dict[str, int]]:
    """The middle with one thing changed, each once."""
    cells: list[dict[str, int]] = []
    for name in MIDDLE:
        for value in getattr(settings, name):
            cell = {**MIDDLE, name: value}
            if cell not in cells:
                cells.append(cell)
    return cells


def _drawn(settings: GrowthSettings, config: ModelConfig, cell: dict[str, int]) -> tuple[dict[str, Any], list[Drawn]]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, config.vocab_size, (settings.num_problems, cell["prompt_length"])).tolist()
    work = Work(tuple(map(tuple, prompts)), cell["num_samples"], settings.temperature, 4 * cell["mean_length"])
    arguments = (config, work, settings.dtype, settings.rows, cell["mean_length"], settings.kv_cache)
    with Worker(samplers.Ours, arguments, Limits(settings.time_limit, None, {})) as worker:
        worker.call("run", 0)
        return worker.call("describe"), [worker.call("run", seed) for seed in range(1, settings.rounds + 1)]


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.sample_growth", __doc__, GrowthSettings, argv))


if __name__ == "__main__":
    run_command(_main)
