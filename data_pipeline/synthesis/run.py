"""`synthesize`: asks for what is missing, then makes rows of what is there."""

import asyncio
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_pipeline.clean.job import named_problems
from data_pipeline.cli import RunError, Stopped, StopSignal, logger, make_folder
from data_pipeline.dataset import check_out
from data_pipeline.files import damage_named, locked, write_atomically, write_json
from data_pipeline.problem import Problem
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError, differences
from data_pipeline.synthesis.batch import BatchTeacher
from data_pipeline.synthesis.direct import DirectTeacher, Ended, each
from data_pipeline.synthesis.estimate import described, dollars, estimate
from data_pipeline.synthesis.finish import DATASET, finish
from data_pipeline.synthesis.ledger import Account, BudgetReached, Ledger
from data_pipeline.synthesis.recipe import Item, Needs, Outcome, Recipe, items
from data_pipeline.synthesis.requests import NANO, Request
from data_pipeline.synthesis.settings import SynthesisSettings
from data_pipeline.synthesis.strategies import load_strategy
from data_pipeline.tasks import read_problems

RUN_FILE, SEEDS_FILE, LEDGER_FILE = "run.json", "seeds.npy", "ledger.sqlite"


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
        _warn_of_fewer(folder, num_items, seeds)
        now = {"settings": settings.model_dump(mode="json"), "num_items": num_items, "num_seeds": len(seeds)}
        write_json(folder / RUN_FILE, {"determining": determining} | now)
        with Ledger(folder / LEDGER_FILE) as ledger:
            ledger.keep_free()
            if settings.transport == "direct" and (under_way := ledger.batches("new", "open")):
                raise UsageError(
                    f"transport=direct: {len(under_way)} batches of this folder are under way, and would be paid "
                    "again: run it with transport=batch until they are collected"
                )
            run = _Run(settings, recipe, ledger, seeds, num_items)
            ended = run.ask()
            report = finish(settings, seeds, ((item, run.outcome(item)) for item in run.items()), ledger)
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
        began = self.ledger.account.spent
        started = time.monotonic()
        try:
            with StopSignal() as stop, Progress(self.num_items, "synthesising", "items") as bar:
                shown = _Shown(bar, self.ledger.account)
                if self.settings.transport == "direct":
                    ended = asyncio.run(self._ask_directly(stop, shown))
                else:
                    ended = self._ask_in_batches(stop, shown)
                exit_code = stop.exit_code
        except BaseExceptionGroup as group:  # of the tasks; one says what it was
            raise group.exceptions[0] from None
        account = self.ledger.account
        logger.info(
            "%s spent in %.0f s, %s in all of a budget of %s",
            dollars(account.spent - began), time.monotonic() - started, dollars(account.total), dollars(self.budget),
        )  # fmt: skip
        if exit_code is not None:
            raise Stopped("stopped: every reply is kept; run the same command again", exit_code)
        return ended

    async def _ask_directly(self, stop: StopSignal, shown: "_Shown") -> RunError | None:
        teacher = DirectTeacher(self.settings.teacher, self.settings.limits, self.ledger, self.budget, stop)
        every = self.items()

        async def work(item: Item) -> None:
            asked = False
            while isinstance(outcome := self.outcome(item), Needs):
                asked = True
                # Each is waited for, whatever becomes of the others: it may be under way, and paid.
                answered = await asyncio.gather(*map(teacher.ask, outcome.requests), return_exceptions=True)
                failures = [failure for failure in answered if isinstance(failure, BaseException)]
                if failures:  # what is an error of its own, before what follows from another one
                    raise min(failures, key=lambda failure: isinstance(failure, Ended))
                if not all(answered):
                    return  # it stays open: the next run asks again
            if asked:
                shown.done()
            else:
                shown.bar.skip()

        try:
            await each(
                lambda: next(every, None), work, self.settings.limits.concurrency,
                lambda: stop.exit_code is not None or teacher.ended is not None,
            )  # fmt: skip
        finally:
            await teacher.close()
        return self._why(teacher.ended, teacher.num_failed, teacher.refusal)

    def _ask_in_batches(self, stop: StopSignal, shown: "_Shown") -> RunError | None:
        teacher = BatchTeacher(self.settings.teacher, self.settings.batch, self.ledger, self.budget, stop)
        more = True  # there may be requests that are not on their way
        seen = _Seen(bytearray(self.num_items), {})
        looked = False
        while stop.exit_code is None:
            more = bool(teacher.adopt()) or more
            if more and teacher.has_room():
                missing = _Missing(self, teacher, stop, seen)
                submitted = teacher.submit(missing)
                more = not missing.is_complete or submitted < missing.num_given
                if missing.is_complete and looked:
                    shown.done(missing.num_done - shown.bar.done)
                elif missing.is_complete:
                    shown.bar.skip(missing.num_done)
                    looked = True
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


class _Shown:
    """What a progress bar says beside the items: dollars so far, and at the end if all goes on like this."""

    def __init__(self, bar: Progress, account: Account):
        self.bar, self._account = bar, account
        self._before, self._num_asked = account.spent, 0

    def done(self, count: int = 1) -> None:
        """Items that were asked for in this run are done."""
        self._num_asked += count
        spent = self._account.spent
        note = dollars(spent)
        if self._num_asked and self.bar.total is not None:
            left = self.bar.total - self.bar.done - count
            note += f", {dollars(spent + left * (spent - self._before) / self._num_asked)} at the end"
        self.bar.update(count, note)


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


def _warn_of_fewer(folder: Path, num_items: int, seeds: Sequence[Problem]) -> None:
    """Says where rows of an earlier run will not be there: fewer items, more seeds for as many, other seeds."""
    file = folder / SEEDS_FILE
    known = np.array(sorted(_seed_digest(seed) for seed in seeds), np.uint64)
    if (folder / RUN_FILE).exists():
        before = json.loads((folder / RUN_FILE).read_text())
        if num_items / len(seeds) < before["num_items"] / before["num_seeds"]:
            logger.warning(
                "%d items of %d seeds, after %d of %d: rows of items that are not among them are left out this time "
                "(their replies stay in the ledger)", num_items, len(seeds), before["num_items"], before["num_seeds"],
            )  # fmt: skip
        if file.exists() and (gone := len(np.setdiff1d(np.load(file), known))):
            logger.warning(
                "%d of the %d seeds of before are not there any more, or are other ones: their rows are left out "
                "(their replies stay in the ledger), and other seeds are paid for", gone, before["num_seeds"],
            )  # fmt: skip
    write_atomically(file, lambda opened: np.save(opened, known))


def _seed_digest(seed: Problem) -> int:
    """64 bits of all of a seed that prompts are made of."""
    whole = json.dumps([seed.id, seed.question, seed.answer])
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest())


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
