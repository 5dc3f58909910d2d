"""`eval study`: makes the data, runs the cells that are not done, and writes the report of those that are."""

import contextlib
import difflib
import json
import os
import queue
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import pydantic
from etils import epath

from data_pipeline.cli import RunError, Stopped, StopSignal, logger, make_folder
from data_pipeline.files import damage_named, locked, write_json, write_text
from data_pipeline.progress import Progress
from data_pipeline.settings import Settings, UsageError, to_yaml
from data_pipeline.synthesis.rules import Handler, Server
from eval.shards import gpus_of_shards
from eval.study.cells import (
    CellFailed,
    Interrupted,
    Place,
    Stage,
    is_begun,
    is_done,
    places,
    run_cell,
    run_command,
    stages_left,
)
from eval.study.grid import Cell, cells_of, paths_of
from eval.study.record import check_unchanged, done_stages
from eval.study.report import write_study_report
from eval.study.settings import Preparation, StudySettings

_PATIENCE = 2.0  # seconds between two looks whether another job has made the data


class StudyOptions(Settings):
    """How a study is run."""

    parallel: pydantic.PositiveInt = pydantic.Field(
        1,
        description="cells at once, each on its share of this machine's cores and GPUs, to which the config's mesh "
        "must fit; an evaluation that was stopped goes on with as many GPUs as it began with",
    )
    cell: str | None = pydantic.Field(
        None, description="only this one, and no report; or i/N: every N-th cell from the i-th on, for N jobs"
    )


def study(settings: StudySettings, options: StudyOptions) -> None:
    """Runs what is not done.

    Raises UsageError, before anything is run, where cells clash, hold results of other settings, or miss data;
    RunError, after all others are done, where a cell failed; Stopped where a signal asked to stop.
    """
    cells = cells_of(settings)
    check_unchanged(cells)
    chosen = choose(cells, options.cell)
    slots = list(places(options.parallel, gpus_of_shards(os.environ, options.parallel, "--parallel")))
    out = epath.Path(settings.out)
    make_folder(out, "out")
    with StopSignal() as stop, contextlib.ExitStack() as alone:
        _lock(alone, out, patient=options.cell is not None)
        make_data(settings, cells, stop)
        check_paths(chosen)
        if options.cell is None:
            write_text(out / "study.yaml", to_yaml(settings))
        else:
            alone.close()  # other jobs have cells of their own
        todo = [cell for cell in chosen if not is_done(cell, settings)]
        if len(todo) < len(chosen):
            logger.info("%d of %d cells are done already", len(chosen) - len(todo), len(chosen))
        failed = _run_all(todo, settings, stop, slots)
        if stop.exit_code is not None:
            raise Stopped("stopped: what is done is kept; run the same command again", stop.exit_code)
    listed = "\n".join(f"{cell.name}: {message}" for cell, message in failed)
    try:
        if options.cell is None:
            logger.info("the report: %s", write_study_report(settings, cells, failed))
    finally:
        if failed:
            raise RunError(f"{len(failed)} of {len(chosen)} cells failed; the others are done:\n{listed}")


def _lock(alone: contextlib.ExitStack, out: epath.Path, patient: bool) -> None:
    """Keeps other commands from making the same data; jobs that share a study wait for the one that makes it."""
    waiting = False
    while True:
        try:
            alone.enter_context(locked(out, "out"))
            return
        except UsageError:
            if not patient:
                raise
            if not waiting:
                logger.info("waiting for another command that has %s, to make its data or to run it all", out)
            waiting = True
            StopSignal.heed()
            time.sleep(_PATIENCE)


def choose(cells: Sequence[Cell], which: str | None) -> list[Cell]:
    """The cell of a name, every N-th one for i/N, or all. Raises UsageError."""
    if which is None:
        return list(cells)
    number, slash, of = which.partition("/")
    if slash and number.isdecimal() and of.isdecimal() and int(number) < int(of):
        return list(cells[int(number) :: int(of)])
    names = [cell.name for cell in cells]
    if which not in names:
        near = difflib.get_close_matches(which, names, n=3)
        known = f"{', '.join(near)}; --dry-run lists all {len(names)}" if near else ", ".join(names)
        raise UsageError(f"--cell {which!r}: write i/N with i from 0 to N - 1, or a cell's name: {known}")
    return [cells[names.index(which)]]


def make_data(settings: StudySettings, cells: Sequence[Cell], stop: StopSignal) -> None:
    """Makes what is not made, which must be what cells that are done have read. Raises as `prepare` does."""
    if prepare(settings, stop):
        check_unchanged(cells)


def prepare(settings: StudySettings, stop: StopSignal) -> bool:
    """Runs the commands that make data, but for those that have ended well before: a file beside the data says so.

    Returns whether one was run.
    Raises UsageError where that file names another command; RunError where a command fails.
    """
    made = False
    for index, step in enumerate(settings.prepare):
        if _is_made(step, index):
            continue
        made = True
        log = None if "://" in settings.out else Path(settings.out) / "prepare.log"
        logger.info("making %s%s", step.makes, "" if log is None else f"; what its command says: {log}")
        handler = type("StudyTeacher", (Handler,), {"rules": step.teacher}) if step.teacher else Handler
        with Server(handler) if step.teacher else contextlib.nullcontext() as server:
            words = shlex.split(step.run.replace("{teacher}", getattr(server, "url", "")))
            try:
                run_command([sys.executable, "-m", *words], f"prepare.{index}", log, stop, Place())
            except CellFailed as failure:
                raise RunError(f"{step.makes} could not be made: {failure}") from failure
            except Interrupted:
                raise Stopped("stopped: run the same command again", stop.exit_code or 1) from None
        if not epath.Path(step.makes).exists():
            raise UsageError(f"prepare.{index}.makes={step.makes!r}: its command has not made it: {step.run}")
        write_json(_record_of(step), step.model_dump(mode="json", exclude_defaults=True))
    return made


def _is_made(step: Preparation, index: int) -> bool:
    """Whether its data is there. Raises UsageError where another command made it."""
    record = _record_of(step)
    if not (record.exists() and epath.Path(step.makes).exists()):
        return False
    with damage_named(record, "remove it, and what was made"):
        before = json.loads(record.read_text())
        said = before["run"]
    if before != step.model_dump(mode="json", exclude_defaults=True):
        raise UsageError(
            f"{step.makes} was made by another command than prepare.{index} says:\n  before: {said}\n"
            f"  now:    {step.run}\nchoose another out for the changed study, or remove what was made"
        )
    return True


def _record_of(step: Preparation) -> epath.Path:
    """The file that says what made a step's data."""
    return epath.Path(f"{step.makes.rstrip('/')}.prepared.json")


def check_paths(cells: Sequence[Cell]) -> None:
    """Raises UsageError where a cell reads what is not there."""
    seen: set[str] = set()
    for cell in cells:
        for key, path in paths_of(cell):
            if path in seen:
                continue
            seen.add(path)
            if not epath.Path(path).exists():
                raise UsageError(
                    f"{key}={path} does not exist (cell {cell.name}): make it first, as the head of the config says, "
                    "or name another one"
                )


def tell(settings: StudySettings, options: StudyOptions) -> str:
    """What would be run, and what is done, a line a cell: for --dry-run."""
    cells = choose(cells_of(settings), options.cell)
    check_unchanged(cells)
    lines = [f"make   {step.makes}" for index, step in enumerate(settings.prepare) if not _is_made(step, index)]
    if not lines:
        absent = {f"absent {key}={path}": None for cell in cells for key, path in paths_of(cell)}
        lines += [line for line in absent if not epath.Path(line.partition("=")[2]).exists()]
    took: dict[str, list[float]] = {}
    waiting: list[tuple[Cell, list[Stage]]] = []
    for cell in cells:
        left, done = stages_left(cell, settings), done_stages(cell)
        for name, seconds in done.items():
            took.setdefault(name, []).append(seconds)
        if left:
            waiting.append((cell, left))
            state = "begun " if is_begun(cell) else "to do "
            lines.append(f"{state} {cell.name}: {', '.join(stage.title for stage in left)}")
        else:
            lines.append(f"done   {cell.name} ({sum(done.values()):.0f} s)")
    return "\n".join([*lines, *_size_of(waiting, took, options.parallel)])


def _size_of(
    waiting: Sequence[tuple[Cell, list[Stage]]], took: Mapping[str, Sequence[float]], parallel: int
) -> Iterator[str]:
    """How much there is to do, and how long that takes, where commands of each kind have been done."""
    if not waiting:
        return
    left = [(cell, stage) for cell, stages in waiting for stage in stages]
    counts = Counter(_kind_of(cell, stage) for cell, stage in left)
    yield f"To do in {len(waiting)} cells: {'; '.join(f'{number} x {kind}' for kind, number in counts.items())}."
    if all(took.get(stage.name) for _, stage in left):
        seconds = sum(sum(took[stage.name]) / len(took[stage.name]) for _, stage in left) / parallel
        yield f"About {seconds / 60:.0f} minutes at {parallel} at once, if they take as long as those that are done."


def _kind_of(cell: Cell, stage: Stage) -> str:
    if stage.name == "train":
        steps, epochs = cell.train.num_steps, cell.train.num_epochs
        return f"training of {steps:,} steps" if steps else f"training of {epochs} epochs"
    if stage.name in cell.evals:
        number = cell.evals[stage.name].num_samples
        return f"{stage.title} with {number} sample{'s' * (number > 1)} a problem"
    return stage.title


def _run_all(
    cells: Sequence[Cell], settings: StudySettings, stop: StopSignal, slots: Sequence[Place]
) -> list[tuple[Cell, str]]:
    """Runs cells, as many at once as there are slots; returns those that failed, and why."""
    failed: list[tuple[Cell, str]] = []
    free: queue.SimpleQueue[Place] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    lock = threading.Lock()

    def told(message: str) -> None:
        with lock:
            logger.info("%s", message)

    def one(cell: Cell) -> None:
        slot = free.get()
        try:
            run_cell(cell, settings, stop, told, slot)
        finally:
            free.put(slot)

    with Progress(len(cells), "study", "cells") as bar, ThreadPoolExecutor(len(slots)) as pool:
        futures: dict[Future[None], Cell] = {pool.submit(one, cell): cell for cell in cells}
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    cell = futures[future]
                    try:
                        future.result()
                        bar.update(1, cell.name)
                    except Interrupted:
                        pass
                    except (CellFailed, RunError, UsageError, OSError) as error:
                        failed.append((cell, str(error)))
                        told(f"{cell.name} FAILED, the others go on: {str(error).splitlines()[0]}")
                        bar.update(1, cell.name)
        except BaseException:  # a second Ctrl-C, or a defect of ours: no cell is begun after it
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed
