"""python -m benchmarks.input_pipeline: does a step ever wait for its batch, and how fast can batches be made?

    python -m benchmarks.input_pipeline --data gsm8k_train.jsonl --tokenizer tokenizer.model

Rows of GSM8K are packed from the token cache as in training, by one core: everything here is pinned to it. First a
consumer takes `rate` tokens a second, sleeping as long as its step would run on an accelerator; what it waits for
batches is compared with its step time. Then batches are made as fast as they can be.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pydantic

from benchmarks.flags import settings_and_command
from benchmarks.report import environment, table, write_results
from data_pipeline.cli import logger, run_command
from data_pipeline.loader import Batches, iterate
from data_pipeline.settings import Settings
from data_pipeline.sources import DataSettings, Source, load_rows
from data_pipeline.templates import load_template
from data_pipeline.tokenizer import Tokenizer


class PipelineSettings(Settings):
    """What is measured."""

    data: str = pydantic.Field(description="rows of GSM8K")
    tokenizer: str = pydantic.Field(description="tokenizer.model")
    rows: pydantic.PositiveInt = pydantic.Field(8, description="rows of a batch")
    context: pydantic.PositiveInt = pydantic.Field(2048, description="positions in a row")
    rate: pydantic.PositiveFloat = pydantic.Field(100_000.0, description="positions a second that the steps take")
    steps: pydantic.PositiveInt = pydantic.Field(200, description="steps of the consumer")
    prefetch: pydantic.NonNegativeInt = pydantic.Field(4, description="data.prefetch, batches made ahead")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


def measure(settings: PipelineSettings) -> dict[str, Any]:
    """Shares and rates; see the keys. Pins the process to one core while it measures."""
    data = DataSettings(
        sources=(Source(task="gsm8k", path=settings.data),), tokenizer=settings.tokenizer, context=settings.context
    )
    rows = load_rows(data, Tokenizer.load(settings.tokenizer), load_template(None))
    batches = Batches(rows, data, batch_size=settings.rows, seed=0, num_steps=10**9)
    step_seconds = settings.rows * settings.context / settings.rate
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # before grain's threads start, which inherit it
    try:
        waits = _waits(batches, settings, step_seconds)
        seconds = _seconds_of_a_batch(batches, settings.rows)
    finally:
        os.sched_setaffinity(0, cores)
    positions = settings.rows * settings.context
    return {
        "examples": len(rows),
        "filled": batches.fill,
        "step_seconds": step_seconds,
        "wait_share": statistics.mean(waits) / step_seconds,
        "longest_wait_share": max(waits) / step_seconds,
        "first_wait_seconds": waits[0],
        "positions_per_second": positions / seconds,
    }


def _waits(batches: Batches, settings: PipelineSettings, step_seconds: float) -> list[float]:
    """What the consumer waited for each batch, in seconds; the first one includes the pack plan of the epoch."""
    waits = []
    with contextlib.closing(iterate(batches, 0, settings.prefetch)) as made:
        for _ in range(settings.steps):
            asked = time.perf_counter()
            next(made)
            waits.append(time.perf_counter() - asked)
            time.sleep(step_seconds)
    return waits


def _seconds_of_a_batch(batches: Batches, rows: int) -> float:
    """Of a whole epoch and the beginning of the next, whose plan is made in between: the mean."""
    num_batches = batches.bins_per_epoch // rows + 2
    started = time.perf_counter()
    for step in range(num_batches):
        batches[step]
    return (time.perf_counter() - started) / num_batches


def benchmark(settings: PipelineSettings, command: str) -> None:
    """Measures, prints, and writes the results."""
    load = os.getloadavg()[0]
    measured = measure(settings)
    body = table(
        ["", "measured"],
        [
            ["step", f"{settings.rows} rows of {settings.context}, {1000 * measured['step_seconds']:.0f} ms"],
            ["consumption", f"{settings.rate:,.0f} positions/s"],
            ["wait for a batch, share of step time", f"{100 * measured['wait_share']:.3f} %"],
            ["longest wait, share of a step", f"{100 * measured['longest_wait_share']:.2f} %"],
            ["most that one core makes", f"{measured['positions_per_second']:,.0f} positions/s"],
            ["filled", f"{100 * measured['filled']:.1f} %"],
        ],
    )
    print(body, flush=True)
    if settings.out is not None:
        values = {"settings": settings.model_dump(exclude={"out"}), **measured}
        where = environment("cpu", load)
        logger.info("wrote %s", write_results(settings.out, "input pipeline", where, command, body, values))


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.input_pipeline", __doc__, PipelineSettings, argv))


if __name__ == "__main__":
    run_command(_main)
