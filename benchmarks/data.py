"""python -m benchmarks.data: from a file of rows to batches, beside Hugging Face datasets and TRL.

    python -m benchmarks.data --data gsm8k_train.jsonl.gz --tokenizer tokenizer.model --peers true
    python -m benchmarks.data --data gsm8k_train.jsonl.gz --tokenizer tokenizer.model --num-rows 1000000

Rows are GSM8K's, as often as it takes, each named apart. A contestant runs on one core, then on two, in a process of
its own: "cold" with an empty cache, "cached" once more with what the cold run left. "ours, mixed" resamples the rows by
their steps and mixes them 3 : 1 with others, from caches. The first batch is there when everything is read, tokenised
and planned; then the batches of the rest of an epoch are made and thrown away.

The peers (pip install -c constraints.txt -e '.[torch]' trl datasets) tokenise and pack the same texts as TRL's
SFTTrainer does with packing, masked prompts and its collator: lists, as it comes, and once more with its rows as
tensors, which its collator takes faster. Each makes as many trained tokens as ours, to one in 500 (a tokenizer may
split a text otherwise); else nothing is reported. Two cores make batches no faster than one: a thread makes them for
another, and handing one over takes about as long as making it.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pydantic

from benchmarks.data_pipelines import Made, Work
from benchmarks.flags import Numbers, settings_and_command
from benchmarks.report import environment, table, write_results
from benchmarks.worker import run_watched
from data_pipeline.cli import RunError, logger, run_command
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import Problem, read_problems
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax.convert.tokenizer_files import write_tokenizer


class DataBenchmark(Settings):
    """What is measured."""

    data: str = pydantic.Field(description="rows of GSM8K")
    tokenizer: str = pydantic.Field(description="tokenizer.model")
    num_rows: pydantic.PositiveInt = pydantic.Field(100_000, description="rows to tokenise and pack")
    context: pydantic.PositiveInt = pydantic.Field(2048, description="positions in a row of a batch")
    rows: pydantic.PositiveInt = pydantic.Field(8, description="rows of a batch")
    cores: Numbers = pydantic.Field((1, 2), description="numbers of cores, by commas")
    peers: bool = pydantic.Field(False, description="measure datasets with TRL, too")
    rounds: pydantic.PositiveInt = pydantic.Field(3, description="cached runs of each; the fastest is shown")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


class Row(Settings):
    """A line of the table."""

    contestant: str
    cache: str
    cores: int
    made: Made
    memory_gb: float


def write_rows(path: Path, problems: Sequence[Problem], count: int) -> None:
    """`count` rows, those of `problems` again and again, each with another first sentence."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            problem = problems[number % len(problems)]
            row = {"question": f"Problem {number}. {problem.question}", "solution": problem.solution}
            file.write(json.dumps(row | {"answer": problem.answer}) + "\n")


def measure(settings: DataBenchmark, folder: Path) -> list[Row]:
    """The rows of the table. Raises RunError where two contestants did not do the same work."""
    problems = read_problems("gsm8k", "train", settings.data)
    write_rows(folder / "first.jsonl", problems, settings.num_rows)
    write_rows(folder / "second.jsonl", problems[::-1], max(1, settings.num_rows // 3))
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", Tokenizer.load(settings.tokenizer), {}, settings.context)
    contestants = ["ours", "ours, mixed", *(["trl", "trl, as tensors"] if settings.peers else [])]
    rows: list[Row] = []
    for cores in settings.cores:
        caches = {name: folder / f"cache-{name.split(',')[0]}-{cores}" for name in contestants}
        for name in contestants:
            runs = settings.rounds + (name in ("ours", "trl"))  # the others find a cache, or make it in one run more
            if name == "ours, mixed":
                _run(settings, folder, name, caches[name], cores)
            made = [_run(settings, folder, name, caches[name], cores) for _ in range(runs)]
            if name in ("ours", "trl"):
                rows.append(Row(contestant=name, cache="cold", cores=cores, made=made[0][0], memory_gb=made[0][1]))
                made = made[1:]
            best, memory = max(made, key=lambda run: run[0].rate)
            first = min(run.first_seconds for run, _ in made)
            best = best.model_copy(update={"first_seconds": first})
            rows.append(Row(contestant=name, cache="cached", cores=cores, made=best, memory_gb=memory))
            logger.info("%s, %d cores: %.1f M tokens/s", name, cores, best.rate / 1e6)
        for cache in set(caches.values()):
            shutil.rmtree(cache)
    trained = {row.contestant: row.made.trained for row in rows if row.contestant != "ours, mixed"}
    if max(trained.values()) > 1.002 * min(trained.values()):  # their tokenizers may differ in a few pieces
        raise RunError(f"the contestants made different numbers of trained tokens: {trained}")
    return rows


def _run(settings: DataBenchmark, folder: Path, name: str, cache: Path, cores: int) -> tuple[Made, float]:
    """What a run made, and the GB that its processes took together."""
    cache.mkdir(exist_ok=True)
    work = Work.model_validate(
        {
            "contestant": name, "source": str(folder / "first.jsonl"), "second": str(folder / "second.jsonl"),
            "tokenizer": str(folder / "tokenizer"), "cache": str(cache), "context": settings.context,
            "rows": settings.rows, "cores": cores,
        }
    )  # fmt: skip
    printed, _, memory = run_watched([sys.executable, "-m", "benchmarks.data_pipelines", work.model_dump_json()])
    return Made.model_validate_json(printed.splitlines()[-1]), memory / 1e9


def described(rows: Sequence[Row], context: int) -> str:
    """The table."""
    header = ["", "cache", "cores", "first batch after", "tokens/s until then", "tokens/s then", "filled", "memory"]
    lines = []
    for row in rows:
        made = row.made
        lines.append(
            [
                row.contestant, row.cache, str(row.cores), f"{made.first_seconds:.2f} s",
                f"{made.tokens / made.first_seconds / 1e6:.2f} M", f"{made.rate / 1e6:.1f} M",
                f"{100 * made.tokens / (made.bins * context):.1f} %", f"{row.memory_gb:.2f} GB",
            ]
        )  # fmt: skip
    return table(header, lines)


def benchmark(settings: DataBenchmark, command: str) -> None:
    """Measures, prints, and writes the results."""
    if settings.peers and not (find_spec("trl") and find_spec("datasets")):
        raise UsageError("peers=true: pip install -c constraints.txt -e '.[torch]' trl datasets")
    where = environment("cpu", os.getloadavg()[0], ("datasets", "trl"))
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(settings, Path(scratch))
    body = described(rows, settings.context)
    print(body, flush=True)
    if settings.out is not None:
        values: dict[str, Any] = {
            "settings": settings.model_dump(exclude={"out"}),
            "rows": [row.model_dump() | {"tokens_per_second": row.made.rate} for row in rows],
        }
        subject = f"data {settings.num_rows // 1000}k"
        logger.info("wrote %s", write_results(settings.out, subject, where, command, body, values))


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.data", __doc__, DataBenchmark, argv))


if __name__ == "__main__":
    run_command(_main)
