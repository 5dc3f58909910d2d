"""What a synthesis leaves: the rows, the dataset of those that are kept, and the report."""

import dataclasses
import datetime
import importlib.metadata
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.clean.job import CleanSettings, NothingLeft, clean
from data_pipeline.cli import logger
from data_pipeline.dataset import read_dataset, write_dataset
from data_pipeline.files import json_line, write_atomically, write_json
from data_pipeline.problem import Problem
from data_pipeline.resample import histogram
from data_pipeline.synthesis.estimate import dollars
from data_pipeline.synthesis.ledger import Ledger
from data_pipeline.synthesis.recipe import Item, Lost, Made, Outcome
from data_pipeline.synthesis.report import Sample, write_report
from data_pipeline.synthesis.requests import NANO
from data_pipeline.synthesis.settings import BATCH_SHARE, SynthesisSettings
from data_pipeline.synthesis.strategies import load_strategy
from data_pipeline.tokenized import UNKNOWN_STEPS

ROWS_FILE, DATASET = "rows.jsonl", "dataset"
_SAMPLES, _LOST_SAMPLES = 24, 6  # in the report: rows beside their seeds, and texts of each reason of loss


def finish(
    settings: SynthesisSettings, seeds: Sequence[Problem], outcomes: Iterable[tuple[Item, Outcome]], ledger: Ledger
) -> dict[str, Any]:
    """Writes rows, dataset and report of what became of the items; returns the report.

    A dataset of an earlier run is removed where all items are done, and no row is kept.
    """
    folder = Path(settings.out)
    losses: Counter[tuple[str, str]] = Counter()
    lost_samples: dict[tuple[str, str], list[Sample]] = {}
    num_items = num_open = num_rows = 0

    def write(file: BinaryIO) -> None:
        nonlocal num_items, num_open, num_rows
        for item, outcome in outcomes:
            num_items += 1
            if isinstance(outcome, Made):
                num_rows += 1
                file.write(json_line(_row(outcome.problem)).encode() + b"\n")
            elif isinstance(outcome, Lost):
                reason = (outcome.stage, outcome.reason)
                losses[reason] += 1
                if losses[reason] <= _LOST_SAMPLES:
                    lost_samples.setdefault(reason, []).append(Sample(_told(item.seed), outcome.detail))
            else:
                num_open += 1

    write_atomically(folder / ROWS_FILE, write)
    cleaned = _clean(settings, seeds, folder) if num_rows else {}
    if not num_open and not cleaned.get("num_kept"):
        _remove_dataset(folder / DATASET)
    price, share = settings.teacher.prices(), BATCH_SHARE if settings.transport == "batch" else 1.0
    report = {
        "strategy": settings.strategy,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": importlib.metadata.version("mathscale-jax"),
        "num_items": num_items,
        "num_open": num_open,
        "lost": [{"stage": stage, "reason": reason, "count": n} for (stage, reason), n in losses.most_common()],
        "num_rows": num_rows,
        "removed": cleaned.get("removed", {}),
        "num_kept": cleaned.get("num_kept", 0),
        "requests": ledger.totals(),
        "dollars": ledger.account.spent / NANO,
        "dollars_held": ledger.account.held / NANO,
        "dollars_per_million_tokens": {"prompt": price.input * share, "reply": price.output * share},
        "settings": settings.model_dump(mode="json"),
    }
    write_json(folder / "report.json", report)
    samples, steps = _of_dataset(seeds, folder) if report["num_kept"] else ([], {})
    seed_steps = histogram(np.array([UNKNOWN_STEPS if s.num_steps is None else s.num_steps for s in seeds]))
    write_report(folder / "report.html", report, samples, lost_samples, {"seeds": seed_steps, "rows": steps})
    if losses:
        said = ", ".join(f"{count:,} {stage}: {reason}" for (stage, reason), count in losses.most_common(6))
        logger.info("lost: %s", said)
    kept, items = f"{report['num_kept']:,}", f"{num_items:,}"
    logger.info("%s rows are kept of %s items%s", kept, items, f", {num_open:,} of them not done" if num_open else "")
    if report["num_kept"]:
        a_row = dollars(ledger.account.total / report["num_kept"])
        logger.info("%s a row; the dataset is %s, the report %s", a_row, folder / DATASET, folder / "report.html")
    return report


def _clean(settings: SynthesisSettings, seeds: Sequence[Problem], folder: Path) -> dict[str, Any]:
    """`clean`, with the seeds as what is there already."""
    task, split = settings.seeds.task, settings.seeds.split
    strategy = load_strategy(settings.strategy)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            beside = str(Path(scratch) / "seeds")
            write_dataset(beside, task, {split: seeds})
            return clean(
                CleanSettings(
                    source=str(folder / ROWS_FILE),
                    out=str(folder / DATASET),
                    task=settings.rows_task,
                    against=settings.against,
                    beside=f"{task}:{split}={beside}",
                    duplicates="example" if strategy.keeps_question else "question",
                    # Questions that are made by rule are like their seeds, and each other, by design.
                    similarity=1.0 if strategy.mask or strategy.keeps_question else settings.similarity,
                )
            )
    except NothingLeft as error:  # the rows are there all the same
        logger.warning("no dataset was made: %s", error)
        return {"removed": error.removed, "num_kept": 0}


def _remove_dataset(dataset: Path) -> None:
    """Removes what an earlier run made of rows that are not kept any more: it would be trained on."""
    if dataset.exists():
        shutil.rmtree(dataset)
        logger.warning("%s of an earlier run is removed: none of its rows is kept now", dataset)


def _of_dataset(seeds: Sequence[Problem], folder: Path) -> tuple[list[Sample], dict[int, int]]:
    """Some kept rows beside their seeds, and how many have how many steps."""
    by_id = {seed.id: seed for seed in seeds}
    samples: list[Sample] = []
    steps: list[int] = []
    for row in read_dataset(str(folder / DATASET), "train"):
        steps.append(UNKNOWN_STEPS if row.num_steps is None else row.num_steps)
        seed = by_id.get(json.loads(row.lineage)["seed"])
        if len(samples) < _SAMPLES and seed is not None:
            samples.append(Sample(_told(seed), _told(row)))
    return samples, histogram(np.array(steps))


def _told(problem: Problem) -> str:
    """A problem as the report shows it."""
    return f"{problem.question}\n\n{problem.solution}\n\n{problem.answer}"


def _row(problem: Problem) -> dict[str, Any]:
    """A row of the tasks jsonl and latex."""
    row = {key: value for key, value in dataclasses.asdict(problem).items() if value is not None}
    return row | {"lineage": json.loads(problem.lineage)}
