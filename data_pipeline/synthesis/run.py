"""`synthesize`: asks for what is missing, then makes rows of what is there."""

import asyncio
import dataclasses
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath

from data_pipeline.clean.job import CleanSettings, clean, named_problems
from data_pipeline.cli import RunError, Stopped, StopSignal, logger, make_folder
from data_pipeline.dataset import check_out, read_dataset, write_dataset
from data_pipeline.files import damage_named, json_line, locked, write_atomically, write_json
from data_pipeline.problem import Problem
from data_pipeline.progress import Progress
from data_pipeline.resample import histogram
from data_pipeline.settings import UsageError, differences
from data_pipeline.synthesis.batch import BatchTeacher
from data_pipeline.synthesis.direct import DirectTeacher, Ended, each
from data_pipeline.synthesis.estimate import described, dollars, estimate
from data_pipeline.synthesis.ledger import BudgetReached, Ledger
from data_pipeline.synthesis.recipe import Item, Lost, Made, Needs, Outcome, Recipe, items
from data_pipeline.synthesis.report import Sample, write_report
from data_pipeline.synthesis.requests import NANO, Request
from data_pipeline.synthesis.settings import SynthesisSettings
from data_pipeline.synthesis.strategies import load_strategy
from data_pipeline.tasks import read_problems
from data_pipeline.tokenized import UNKNOWN_STEPS

RUN_FILE, LEDGER_FILE, ROWS_FILE, DATASET = "run.json", "ledger.sqlite", "rows.jsonl", "dataset"
_SAMPLES, _LOST_SAMPLES = 24, 6  # in the report: rows beside their seeds, and texts of each reason of loss


def synthesize(settings: SynthesisSettings, dry_run: bool = False) -> dict[str, Any]:
    """Makes rows.jsonl, the cleaned dataset/, report.json and report.html in `settings.out`; returns the report.

    What was paid is in ledger.sqlite there, and is never asked again: the same command goes on after any end, and more
    items or answers pay for what is new. A dry run says what would be asked, and sends and writes nothing. Raises
    UsageError before anything is sent; RunError where the budget, or the server, ended it early: the rows that
    there are have been written then.
    """
    strategy = load_strategy(settings.strategy)
    settings.teacher.prices()
    seeds = _read("seeds", settings.seeds.task, settings.seeds.split, settings.seeds.path)
    for spec in named_problems("against", settings.against):
        _read("against", *spec)  # what is wrong with it is said now, and not when all is paid
    recipe = Recipe(settings, strategy)
    num_items = settings.num_items or len(seeds)
    folder = Path(settings.out)
    determining = settings.determining() | {"wording": strategy.digests(settings.kind)}
    if dry_run:
        _check_unchanged(folder, determining)
        every = items(seeds, num_items, settings.seed)
        with tempfile.TemporaryDirectory() as scratch:
            file = folder / LEDGER_FILE
            with Ledger(file if file.exists() else Path(scratch) / LEDGER_FILE) as ledger:
                print(described(estimate(settings, recipe, ledger, every), settings), flush=True)
        return {}
    settings.teacher.key()
    check_out(str(folder / DATASET), settings.rows_task, ["train"])
    make_folder(epath.Path(folder), "out")
    with locked(epath.Path(folder), "out"):
        _check_unchanged(folder, determining)
        _warn_of_fewer(folder, num_items, len(seeds))
        now = {"settings": settings.model_dump(mode="json"), "num_items": num_items, "num_seeds": len(seeds)}
        write_json(folder / RUN_FILE, {"determining": determining} | now)
        with Ledger(folder / LEDGER_FILE) as ledger:
            if settings.transport == "direct" and (under_way := ledger.batches("new", "open")):
                raise UsageError(
                    f"transport=direct: {len(under_way)} batches of this folder are under way, and would be paid "
                    "again: run it with transport=batch until they are collected"
                )
            run = _Run(settings, recipe, ledger, seeds, num_items)
            ended = run.ask()
            report = _finish(run, folder)
    if ended is None and report["num_open"]:
        ended = RunError(f"{report['num_open']:,} items are not done: run the same command again")
    if ended is None and not report["num_kept"]:
        ended = RunError(f"no row is kept of {num_items:,} items: {folder / 'report.html'} shows why")
    if ended is not None:
        raise ended
    return report


class _Run:
    """A synthesis under way."""

    def __init__(
        self, settings: SynthesisSettings, recipe: Recipe, ledger: Ledger, seeds: Sequence[Problem], num_items: int
    ):
        self.settings, self.recipe, self.ledger, self.seeds, self.num_items = settings, recipe, ledger, seeds, num_items
        self.budget = round(settings.budget * NANO)

    def items(self) -> Iterator[Item]:
        """All of them, always in the same order."""
        return items(self.seeds, self.num_items, self.settings.seed)

    def outcome(self, item: Item) -> Outcome:
        """What the ledger says of an item."""
        return self.recipe.advance(item, self.ledger.reply, self.ledger.unreadable)

    def ask(self) -> RunError | None:
        """Asks for all that is missing. An error that ended it early is returned; Stopped is raised."""
        left_open, held = self.ledger.left_open()
        if left_open:
            logger.warning(
                "%d requests were under way when an earlier run ended; %s counts for them, as nobody knows whether "
                "they were paid", left_open, dollars(held),
            )  # fmt: skip
        began = self.ledger.account.total
        started = time.monotonic()
        try:
            with StopSignal() as stop, Progress(self.num_items, "synthesising", "items") as bar:
                note = self._note(began, bar)
                if self.settings.transport == "direct":
                    ended = asyncio.run(self._ask_directly(stop, bar, note))
                else:
                    ended = self._ask_in_batches(stop, bar, note)
                exit_code = stop.exit_code
        except BaseExceptionGroup as group:  # of the tasks; one says what it was
            raise group.exceptions[0] from None
        spent = self.ledger.account.total
        logger.info(
            "%s spent in %.0f s, %s in all of a budget of %s",
            dollars(spent - began), time.monotonic() - started, dollars(spent), dollars(self.budget),
        )  # fmt: skip
        if exit_code is not None:
            raise Stopped("stopped: every reply is kept; run the same command again", exit_code)
        return ended

    def _note(self, began: int, bar: Progress) -> Callable[[], str]:
        """What the progress bar says: dollars so far, and at the end if all goes on like this."""

        def note() -> str:
            spent = self.ledger.account.spent - began
            if not bar.done:
                return dollars(spent)
            return f"{dollars(spent)}, {dollars(spent * self.num_items / bar.done)} at the end"

        return note

    async def _ask_directly(self, stop: StopSignal, bar: Progress, note: Callable[[], str]) -> RunError | None:
        teacher = DirectTeacher(self.settings.teacher, self.settings.limits, self.ledger, self.budget, stop)
        every = self.items()

        async def work(item: Item) -> None:
            while isinstance(outcome := self.outcome(item), Needs):
                # Each is waited for, whatever becomes of the others: it may be under way, and paid.
                answered = await asyncio.gather(*map(teacher.ask, outcome.requests), return_exceptions=True)
                failures = [failure for failure in answered if isinstance(failure, BaseException)]
                if failures:  # what is an error of its own, before what follows from another one
                    raise min(failures, key=lambda failure: isinstance(failure, Ended))
                if not all(answered):
                    return  # it stays open: the next run asks again
            bar.update(1, note())

        try:
            await each(
                lambda: next(every, None), work, self.settings.limits.concurrency,
                lambda: stop.exit_code is not None or teacher.ended is not None,
            )  # fmt: skip
        finally:
            await teacher.close()
        return self._why(teacher.ended, teacher.num_failed, teacher.refusal)

    def _ask_in_batches(self, stop: StopSignal, bar: Progress, note: Callable[[], str]) -> RunError | None:
        teacher = BatchTeacher(self.settings.teacher, self.settings.batch, self.ledger, self.budget, stop)
        more = True  # there may be requests that are not on their way
        seen = _Seen(bytearray(self.num_items), {})
        while stop.exit_code is None:
            more = bool(teacher.adopt()) or more
            if more and teacher.has_room():
                missing = _Missing(self, teacher, stop, seen)
                submitted = teacher.submit(missing)
                more = not missing.is_complete or submitted < missing.num_given
                if missing.is_complete:
                    bar.update(missing.num_done - bar.done, note())
                if not submitted and teacher.is_idle:
                    break  # all is there, or the budget is reached, or what is missing failed too often
            elif teacher.is_idle:
                break
            if teacher.collect():
                more = True
            else:
                _sleep(self.settings.batch.poll_seconds, stop)
        if stop.exit_code is not None and teacher.num_open:
            logger.warning("%d batches go on at the server: the same command collects them", teacher.num_open)
        if teacher.errors:
            return teacher.errors[0]
        return self._why(teacher.budget_reached, teacher.num_failed, teacher.refusal)

    def _why(self, ended: Exception | None, num_failed: int, refusal: str) -> RunError | None:
        """What a run that did not ask for everything ends with."""
        if isinstance(ended, BudgetReached):
            return RunError(
                f"the budget of {dollars(self.budget)} is reached: {dollars(ended.taken)} are spent or held, and the "
                f"next request may cost {dollars(ended.wanted)}. Raise budget and run the same command again; nothing "
                "is paid twice"
            )
        if isinstance(ended, RunError):
            return ended
        if num_failed:
            return RunError(
                f"{num_failed} requests failed as often as they may{refusal and f' (the last: {refusal})'}; run the "
                "same command again, which asks for these only"
            )
        return None


class _Seen(NamedTuple):
    """What earlier looks at the items found, so that later ones are quick.

    By an item's place: whether it needs nothing any more, and the requests that it waits for.
    """

    done: bytearray
    waiting: dict[int, tuple[bytes, ...]]


class _Missing:
    """The requests of all items that no batch has, each once. Iterate it once."""

    def __init__(self, run: _Run, teacher: BatchTeacher, stop: StopSignal, seen: _Seen):
        self._run, self._teacher, self._stop, self._seen = run, teacher, stop, seen
        self.num_done, self.num_given, self.is_complete = 0, 0, False

    def __iter__(self) -> Iterator[Request]:
        met: set[bytes] = set()
        for place, item in enumerate(self._run.items()):
            if self._stop.exit_code is not None:
                return
            if self._seen.done[place]:
                self.num_done += 1
                continue
            if any(map(self._teacher.is_under_way, self._seen.waiting.get(place, ()))):
                continue
            outcome = self._run.outcome(item)
            if not isinstance(outcome, Needs):
                self._seen.done[place] = 1
                self._seen.waiting.pop(place, None)
                self.num_done += 1
                continue
            self._seen.waiting[place] = tuple(request.key for request in outcome.requests)
            for request in outcome.requests:
                if request.key not in met and not self._teacher.is_asked(request):
                    met.add(request.key)
                    self.num_given += 1
                    yield request
        self.is_complete = True


def _finish(run: _Run, folder: Path) -> dict[str, Any]:
    """Rows, dataset and report of what the ledger has."""
    settings = run.settings
    losses: Counter[tuple[str, str]] = Counter()
    lost_samples: dict[tuple[str, str], list[Sample]] = {}
    num_open = num_rows = 0

    def write(file: BinaryIO) -> None:
        nonlocal num_open, num_rows
        for item in run.items():
            outcome = run.outcome(item)
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
    cleaned = _clean(run, folder) if num_rows else {}
    ledger = run.ledger
    report = {
        "strategy": settings.strategy,
        "num_items": run.num_items,
        "num_open": num_open,
        "lost": [{"stage": stage, "reason": reason, "count": n} for (stage, reason), n in losses.most_common()],
        "num_rows": num_rows,
        "removed": cleaned.get("removed", {}),
        "num_kept": cleaned.get("num_kept", 0),
        "requests": ledger.totals(),
        "dollars": ledger.account.spent / NANO,
        "dollars_held": ledger.account.held / NANO,
        "settings": settings.model_dump(mode="json"),
    }
    write_json(folder / "report.json", report)
    samples, steps = _of_dataset(run, folder) if report["num_kept"] else ([], {})
    seed_steps = histogram(np.array([UNKNOWN_STEPS if s.num_steps is None else s.num_steps for s in run.seeds]))
    write_report(folder / "report.html", report, samples, lost_samples, {"seeds": seed_steps, "rows": steps})
    if losses:
        said = ", ".join(f"{count:,} {stage}: {reason}" for (stage, reason), count in losses.most_common(6))
        logger.info("lost: %s", said)
    kept, items = f"{report['num_kept']:,}", f"{run.num_items:,}"
    logger.info("%s rows are kept of %s items%s", kept, items, f", {num_open:,} of them not done" if num_open else "")
    if report["num_kept"]:
        a_row = dollars(ledger.account.total / report["num_kept"])
        logger.info("%s a row; the dataset is %s, the report %s", a_row, folder / DATASET, folder / "report.html")
    return report


def _clean(run: _Run, folder: Path) -> dict[str, Any]:
    """`clean`, with the seeds as what is there already."""
    settings, seeds = run.settings, run.settings.seeds
    strategy = load_strategy(settings.strategy)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            beside = str(Path(scratch) / "seeds")
            write_dataset(beside, seeds.task, {seeds.split: run.seeds})
            return clean(
                CleanSettings(
                    source=str(folder / ROWS_FILE),
                    out=str(folder / DATASET),
                    task=settings.rows_task,
                    against=settings.against,
                    beside=f"{seeds.task}:{seeds.split}={beside}",
                    duplicates="example" if strategy.keeps_question else "question",
                    # Questions that are made by rule are like their seeds, and each other, by design.
                    similarity=1.0 if strategy.mask or strategy.keeps_question else settings.similarity,
                )
            )
    except UsageError as error:  # nothing is left; the rows are there all the same
        logger.warning("no dataset was made: %s", error)
        return {}


def _of_dataset(run: _Run, folder: Path) -> tuple[list[Sample], dict[int, int]]:
    """Some kept rows beside their seeds, and how many have how many steps."""
    seeds = {seed.id: seed for seed in run.seeds}
    samples: list[Sample] = []
    steps: list[int] = []
    for row in read_dataset(str(folder / DATASET), "train"):
        steps.append(UNKNOWN_STEPS if row.num_steps is None else row.num_steps)
        seed = seeds.get(json.loads(row.lineage)["seed"])
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


def _check_unchanged(folder: Path, determining: dict[str, Any]) -> None:
    """Raises UsageError where the folder belongs to another synthesis."""
    file = folder / RUN_FILE
    if not file.exists():
        if (folder / LEDGER_FILE).exists():
            raise UsageError(f"out={folder} has a ledger and no {RUN_FILE}: choose another folder")
        return
    with damage_named(epath.Path(file), "choose another out; the ledger beside it has what was paid"):
        before = json.loads(file.read_text())["determining"]
    changed = differences(before, determining)
    if changed and _has_replies(folder):
        raise UsageError(
            f"out={folder} is another synthesis, which these settings would change:\n  "
            + "\n  ".join(changed)
            + "\nchoose another out; num_items, answers, agreement, attempts, limits, transport, price and budget may "
            "change"
        )


def _read(key: str, task: str, split: str, path: str | None) -> list[Problem]:
    """The problems that a setting names. Raises UsageError, which says so."""
    try:
        return read_problems(task, split, path)
    except UsageError as error:
        advice = f" (`python -m data_pipeline prepare {task}` makes a dataset of it)" if path is not None else ""
        raise UsageError(f"{key}: {error}{advice if 'does not exist' in str(error) else ''}") from error


def _warn_of_fewer(folder: Path, num_items: int, num_seeds: int) -> None:
    """Says where rows of an earlier run will not be there: of fewer items, or of more seeds for the same number."""
    if not (folder / RUN_FILE).exists():
        return
    before = json.loads((folder / RUN_FILE).read_text())
    if num_items / num_seeds < before["num_items"] / before["num_seeds"]:
        logger.warning(
            "%d items of %d seeds, after %d of %d: rows of items that are not among them are left out this time (their "
            "replies stay in the ledger)", num_items, num_seeds, before["num_items"], before["num_seeds"],
        )  # fmt: skip


def _has_replies(folder: Path) -> bool:
    """Whether anything was answered yet: until then, another synthesis may take the folder."""
    if not (folder / LEDGER_FILE).exists():
        return False
    with Ledger(folder / LEDGER_FILE) as ledger:
        answered = any(row["status"] != "unpaid" for row in ledger.totals())
        return bool(answered or ledger.account.total or ledger.batches("new", "open"))


def _sleep(seconds: float, stop: StopSignal) -> None:
    """Sleeps, and wakes to a signal."""
    until = time.monotonic() + seconds
    while stop.exit_code is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.25))
