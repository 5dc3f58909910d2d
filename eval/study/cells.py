"""One cell of a study: the ordinary commands that it consists of, and how they are run.

cell.json     what determines its results, and which commands are done: see record.py
train.yaml    what `python -m mathscale_jax.train` reads
log.txt       what the commands said
train/, NAME/ of each eval, leakage.json
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from etils import epath

from data_pipeline.cli import EXIT_PREEMPTED, EXIT_USAGE, StopSignal, flags_of
from data_pipeline.files import write_text
from data_pipeline.settings import UsageError, to_yaml
from eval.files import not_sampled, parts
from eval.study.grid import Cell
from eval.study.record import add_time, begin_record, done_stages, mark_done, read_json
from eval.study.settings import StudySettings

_KEPT = 8  # last lines of a command that are shown where it fails
_LOOK = 0.2  # seconds between two looks at a command
_GRACE = 600.0  # seconds for a command to save what it has


@dataclass(frozen=True)
class Stage:
    """A command of a cell: its name, what is said of it, and the words behind `python -m`."""

    name: str
    title: str
    words: list[str]


class CellFailed(Exception):
    """A command of a cell failed; the message says which, and its last lines."""


class Interrupted(Exception):
    """A command was told to stop, and has saved what it had."""


def stages_of(cell: Cell, study: StudySettings) -> list[Stage]:
    """The commands of a cell, in order."""
    stages = [Stage("train", "training", ["mathscale_jax.train", "--config", f"{cell.folder}/train.yaml"])]
    for name, given in cell.evals.items():
        command = "sample" if name in study.sheets else "run"
        stages.append(Stage(name, f"eval {name!r}", ["eval", command, *flags_of(given)]))
        if name in study.sheets:
            stages.append(Stage(f"{name}-sheet", f"answer sheet of {name!r}", ["eval", "sheet", given.out]))
        if name in study.errors:
            stages.append(Stage(f"{name}-errors", f"errors of {name!r}", ["eval", "errors", given.out]))
    if cell.leakage is not None:
        stages.append(Stage("leakage", "leakage", ["eval", "leakage", *flags_of(cell.leakage)]))
    return stages


def stages_left(cell: Cell, study: StudySettings) -> list[Stage]:
    """The commands of a cell that are not done."""
    done = done_stages(cell)
    return [stage for stage in stages_of(cell, study) if stage.name not in done]


def is_done(cell: Cell, study: StudySettings) -> bool:
    """Whether nothing is left to do for it."""
    return not stages_left(cell, study)


def is_begun(cell: Cell) -> bool:
    """Whether a command of it is done, or has saved something before it was stopped."""
    checkpoints = epath.Path(cell.train.output_dir) / "checkpoints"
    return bool(done_stages(cell)) or (checkpoints.exists() and any(checkpoints.iterdir()))


def begin(cell: Cell) -> None:
    """Makes the folder of a cell, with its settings."""
    folder = epath.Path(cell.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "train.yaml", to_yaml(cell.train))
    begin_record(cell)


def run_cell(cell: Cell, study: StudySettings, stop: StopSignal, told: Callable[[str], None], place: "Place") -> None:
    """Runs what is not done yet, when no other command does. Raises CellFailed, or Interrupted by `stop`."""
    if stop.exit_code is not None:
        raise Interrupted
    epath.Path(cell.folder).mkdir(parents=True, exist_ok=True)
    with _alone(cell, stop, told) as lock:
        begin(cell)
        log = log_of(cell)
        told(f"{cell.name}: begun" + ("" if log is None else f"; what its commands say: {log}"))
        for stage in stages_of(cell, study):
            if stage.name in done_stages(cell):
                continue
            if stop.exit_code is not None:
                raise Interrupted
            started = time.monotonic()
            try:
                for words in _left_of(cell, stage):
                    run_command([sys.executable, "-m", *words], stage.title, log, stop, place, lock)
            except (Interrupted, CellFailed):
                add_time(cell, stage.name, time.monotonic() - started)
                raise
            seconds = time.monotonic() - started
            mark_done(cell, stage.name, seconds)
            told(f"{cell.name}: {stage.title} done in {seconds:.0f} s{_result(cell, stage)}")


def _left_of(cell: Cell, stage: Stage) -> list[list[str]]:
    """The commands that a stage still needs: none, or less than all, where jobs elsewhere have done some of it."""
    if stage.name == "train":
        return [] if _is_trained(cell) else [stage.words]
    out = stage.words[-1]
    if stage.name.endswith("-errors"):
        metrics = read_json(epath.Path(out) / "metrics.json")
        nothing_wrong = metrics["pass_ratio"][str(metrics["num_samples"])]["value"] == 1
        return [] if nothing_wrong else [stage.words]
    if stage.name in cell.evals:
        folder = epath.Path(cell.evals[stage.name].out)
        if (folder / "run.json").exists() and parts(folder, "samples") and not not_sampled(folder):
            if stage.words[1] == "sample":
                return []
            return [["eval", "grade", str(folder)], ["eval", "report", str(folder), "--complete"]]
    return [stage.words]


def _is_trained(cell: Cell) -> bool:
    """Whether the newest checkpoint is that of the last step."""
    from mathscale_jax.checkpoint import open_checkpoint, steps_in

    if not steps_in(epath.Path(cell.train.output_dir) / "checkpoints"):
        return False
    try:
        checkpoint = open_checkpoint(cell.train.output_dir)
    except UsageError:  # training says what is wrong with it
        return False
    training = checkpoint.meta.training
    return training is not None and checkpoint.step == training["num_steps"]


@contextlib.contextmanager
def _alone(cell: Cell, stop: StopSignal, told: Callable[[str], None]) -> Iterator[int | None]:
    """Waits until no other command runs the cell, be it one whose study was killed; gives the lock to be inherited."""
    if "://" in cell.folder:  # no locks there
        yield None
        return
    with (Path(cell.folder) / ".lock").open("w") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    told(f"{cell.name}: waiting for another command that runs it")
                waiting = True
                if stop.exit_code is not None:
                    raise Interrupted from None
                time.sleep(_LOOK)
        yield file.fileno()


@dataclass(frozen=True)
class Place:
    """Where commands run that share a machine with others: CPU cores and GPUs; None: on whatever there is."""

    cores: frozenset[int] | None = None
    gpus: str | None = None


def run_command(
    words: Sequence[str], title: str, log: Path | None, stop: StopSignal, place: Place, lock: int | None = None
) -> None:
    """Runs a command to its end; what it says goes to `log`. Raises CellFailed, or Interrupted.

    The command holds `lock`, too, and so longer than a study that is killed.
    """
    environment = os.environ | ({} if place.gpus is None else {"CUDA_VISIBLE_DEVICES": place.gpus})
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        pass_fds=() if lock is None else (lock,),
    )  # fmt: skip
    if place.cores is not None:  # before it has begun to count them
        os.sched_setaffinity(process.pid, place.cores)
    lines: deque[str] = deque(maxlen=_KEPT)
    assert process.stdout is not None
    reader = threading.Thread(target=_keep, args=(process.stdout, lines, log, " ".join(words[1:])), daemon=True)
    reader.start()
    deadline = None
    try:
        while process.poll() is None:
            time.sleep(_LOOK)
            if stop.exit_code is not None and deadline is None:
                deadline = time.monotonic() + _GRACE
                process.terminate()
            if stop.at_once or (deadline is not None and time.monotonic() > deadline):
                break
    finally:
        process.kill()
        process.wait()
        reader.join(5.0)  # what it started may hold its output
    if stop.exit_code is not None:
        raise Interrupted
    code = process.returncode
    if code:
        how = {EXIT_USAGE: "refuses its settings", EXIT_PREEMPTED: "was told to stop"}.get(code, f"ended with {code}")
        said = "\n  ".join(lines)
        where = "" if log is None else f" (all of it: {log})"
        raise CellFailed(f"{title} {f'was killed by signal {-code}' if code < 0 else how}{where}\n  {said}")


def _keep(stream: IO[str], lines: deque[str], log: Path | None, title: str) -> None:
    """Reads to the end, whatever becomes of the log: a command whose output nobody takes would stand still."""
    with contextlib.ExitStack() as open_files:
        file: IO[str] | None = None
        with contextlib.suppress(OSError):
            file = open_files.enter_context(open(os.devnull if log is None else log, "a"))  # noqa: PTH123
            file.write(f"\n$ python {title}\n")
        for line in stream:
            if line.strip():
                lines.append(line.rstrip())
            with contextlib.suppress(OSError):  # a full disk, which the command itself will meet
                if file is not None:
                    file.write(line)
                    file.flush()


def log_of(cell: Cell) -> Path | None:
    """Where a cell's commands are heard; nowhere on an object store, which has no append."""
    return None if "://" in cell.folder else Path(cell.folder) / "log.txt"


def _result(cell: Cell, stage: Stage) -> str:
    """What came out, in a few words."""
    if stage.name == "train":
        lines = (epath.Path(cell.folder) / "train" / "metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, lines[-20:]) if "loss" in row]
        return f": loss {losses[-1]:.3f}" if losses else ""
    if stage.name in cell.evals and stage.words[1] == "run":
        metrics = read_json(epath.Path(cell.evals[stage.name].out) / "metrics.json")
        n = str(metrics["num_samples"])
        ratio, passed = (100 * metrics[key][n]["value"] for key in ("pass_ratio", "pass_at"))
        return f": {ratio:.1f} % right" + (f", Pass@{n} {passed:.1f} %" if n != "1" else "")
    return ""


def places(parallel: int, gpus: Sequence[str | None]) -> Iterator[Place]:
    """A share of this machine for each of `parallel` cells at once."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // parallel
    for number in range(parallel):
        mine = cores[number * each : (number + 1) * each] if parallel > 1 and each else None
        yield Place(None if mine is None else frozenset(mine), gpus[number])
