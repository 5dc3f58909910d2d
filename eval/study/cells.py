"""One cell of a study: the ordinary commands that it consists of, what is done of them, and how they are run.

cell.json     the settings that determine the results, and which commands are done, in how many seconds
train.yaml    what `python -m mathscale_jax.train` reads
log.txt       what the commands said
train/, NAME/ of each eval, leakage.json
"""

import importlib.metadata
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
from typing import IO, Any

from etils import epath

from data_pipeline.cli import EXIT_PREEMPTED, EXIT_USAGE, RunError, StopSignal, flags_of
from data_pipeline.files import damage_named, write_json, write_text
from data_pipeline.settings import UsageError, differences, to_yaml, validated
from eval.study.grid import Cell
from eval.study.settings import StudySettings
from mathscale_jax.config import TrainSettings, changes_that_forbid_resume

_KEPT = 8  # last lines of a command that are shown where it fails
_LOOK = 0.2  # seconds between two looks at a command
_GRACE = 600.0  # seconds for a command to save what it has
_VERSIONS = ("mathscale-jax", "jax", "jaxlib", "flax", "optax", "numpy")


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


def done_stages(cell: Cell) -> dict[str, float]:
    """The commands that are done, and the seconds they took."""
    return _record(cell).get("done", {})


def is_done(cell: Cell, study: StudySettings) -> bool:
    """Whether nothing is left to do for it."""
    done = done_stages(cell)
    return all(stage.name in done for stage in stages_of(cell, study))


def check_unchanged(cells: Sequence[Cell]) -> None:
    """Raises UsageError where a folder holds results of other settings than its cell has now."""
    for cell in cells:
        record = _record(cell)
        if not record:
            continue
        now, before = cell.settings(), record["settings"]
        earlier = validated(TrainSettings, {**before["train"], "output_dir": "-"}, f"{cell.folder}/cell.json")
        lines = changes_that_forbid_resume(earlier, cell.train)
        for name in before["evals"].keys() & now["evals"].keys():  # others may come, or go
            changes = differences(before["evals"][name], now["evals"][name])
            lines += [f"evals.{name}.{line}" for line in changes if not line.startswith("shards:")]
        if before["leakage"] and now["leakage"]:
            lines += [f"leakage.{line}" for line in differences(before["leakage"], now["leakage"])]
        if lines:
            listed = "\n  ".join(lines)
            raise UsageError(
                f"{cell.folder} holds results of other settings:\n  {listed}\n"
                "choose another out for the changed study, or remove the folder to run this cell again"
            )


def begin(cell: Cell) -> None:
    """Makes the folder of a cell, with its settings."""
    folder = epath.Path(cell.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "train.yaml", to_yaml(cell.train))
    _write_record(cell, done_stages(cell))


def run_cell(cell: Cell, study: StudySettings, stop: StopSignal, told: Callable[[str], None], place: "Place") -> None:
    """Runs what is not done yet. Raises CellFailed, or Interrupted where `stop` was asked for."""
    if stop.exit_code is not None:
        raise Interrupted
    begin(cell)
    for stage in stages_of(cell, study):
        done = done_stages(cell)
        if stage.name in done:
            continue
        if stop.exit_code is not None:
            raise Interrupted
        started = time.monotonic()
        if not _nothing_wrong(cell, stage):
            run_command([sys.executable, "-m", *stage.words], stage.title, log_of(cell), stop, place)
        seconds = time.monotonic() - started
        _write_record(cell, {**done, stage.name: round(seconds, 1)})
        told(f"{cell.name}: {stage.title} done in {seconds:.0f} s{_result(cell, stage)}")


@dataclass(frozen=True)
class Place:
    """Where commands run that share a machine with others: CPU cores and GPUs; None: on whatever there is."""

    cores: frozenset[int] | None = None
    gpus: str | None = None


def run_command(words: Sequence[str], title: str, log: Path | None, stop: StopSignal, place: Place) -> None:
    """Runs a command to its end; what it says goes to `log`. Raises CellFailed, or Interrupted."""
    environment = os.environ | ({} if place.gpus is None else {"CUDA_VISIBLE_DEVICES": place.gpus})
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
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
            if deadline is not None and time.monotonic() > deadline:
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
    with open(os.devnull if log is None else log, "a") as file:  # noqa: PTH123
        file.write(f"\n$ python {title}\n")
        for line in stream:
            file.write(line)
            file.flush()
            if line.strip():
                lines.append(line.rstrip())


def log_of(cell: Cell) -> Path | None:
    """Where a cell's commands are heard; nowhere on an object store, which has no append."""
    return None if "://" in cell.folder else Path(cell.folder) / "log.txt"


def _nothing_wrong(cell: Cell, stage: Stage) -> bool:
    """Whether the errors of an eval without a wrong sample are asked for."""
    if not stage.name.endswith("-errors"):
        return False
    metrics = _json(epath.Path(stage.words[-1]) / "metrics.json")
    return metrics["pass_ratio"][str(metrics["num_samples"])]["value"] == 1


def _result(cell: Cell, stage: Stage) -> str:
    """What came out, in a few words."""
    if stage.name == "train":
        lines = (epath.Path(cell.folder) / "train" / "metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, lines[-20:]) if "loss" in row]
        return f": loss {losses[-1]:.3f}" if losses else ""
    if stage.name in cell.evals and stage.words[1] == "run":
        metrics = _json(epath.Path(cell.evals[stage.name].out) / "metrics.json")
        n = str(metrics["num_samples"])
        ratio, passed = (100 * metrics[key][n]["value"] for key in ("pass_ratio", "pass_at"))
        return f": {ratio:.1f} % right" + (f", Pass@{n} {passed:.1f} %" if n != "1" else "")
    return ""


def _json(file: epath.Path) -> Any:
    with damage_named(file, "remove the cell's folder to run it again"):
        return json.loads(file.read_text())


def _record(cell: Cell) -> dict[str, Any]:
    file = epath.Path(cell.folder) / "cell.json"
    if not file.exists():
        return {}
    record = _json(file)
    if not {"settings", "done", "versions"} <= set(record):
        raise RunError(f"{file} is damaged: remove the cell's folder to run it again")
    return record


def _write_record(cell: Cell, done: dict[str, float]) -> None:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    record = {"point": cell.point, "seed": cell.seed, "settings": cell.settings(), "done": done, "versions": versions}
    write_json(epath.Path(cell.folder) / "cell.json", record)


def places(parallel: int, gpus: Sequence[str | None]) -> Iterator[Place]:
    """A share of this machine for each of `parallel` cells at once."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // parallel
    for number in range(parallel):
        mine = cores[number * each : (number + 1) * each] if parallel > 1 and each else None
        yield Place(None if mine is None else frozenset(mine), gpus[number])
