"""One sampling job as several processes on this machine, each with GPUs of its own."""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import NoReturn

from etils import epath

from data_pipeline.cli import EXIT_PREEMPTED, EXIT_USAGE, RunError, Stopped, StopSignal, flags_of, logger
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError
from eval.files import parts, problems_of, read_run
from eval.sample import SampleSettings

_RESTARTS = 5  # of one shard
_GRACE = 600.0  # seconds for a shard to finish what is under way
_PATIENCE = 5.0  # seconds for its last lines
_SECONDS = 2.0  # between two looks at the files
_KEPT = 12  # last lines of a shard that are shown where it fails


@dataclasses.dataclass
class _Shard:
    """A process that draws a share, its last lines, and how often it was begun again."""

    name: str
    command: list[str]
    devices: str | None
    process: subprocess.Popen[str]
    lines: deque[str]
    reader: threading.Thread
    restarts: int = 0


def sample_in_shards(settings: SampleSettings, num_shards: int) -> epath.Path:
    """Draws what is not there yet in `num_shards` processes; returns the eval folder.

    The files are those of one process alone. A process that dies is begun again, some times. Raises UsageError where
    the GPUs cannot be shared evenly, or what a shard says of wrong use; RunError where one dies too often; Stopped
    where a signal asked to stop: each has ended then, and what is in files is kept.
    """
    devices = gpus_of_shards(os.environ, num_shards)
    command = [sys.executable, "-m", "eval", "sample", *flags_of(settings, SampleSettings)]
    shards: list[_Shard] = []
    stopping, deadline = False, 0.0
    with StopSignal() as stop, _Count(epath.Path(settings.out)) as count:
        try:
            for number, own in enumerate(devices):
                shards.append(_start(f"{number}/{num_shards}", command, own))
            while not all(shard.process.poll() == 0 for shard in shards):
                time.sleep(0.1)
                count.look()
                if stop.exit_code is not None and not stopping:
                    stopping, deadline = True, time.monotonic() + _GRACE
                    for shard in shards:  # Ctrl-C has reached them, too; another signal changes nothing
                        shard.process.terminate()
                if stopping:
                    if all(shard.process.poll() is not None for shard in shards):
                        break
                    if time.monotonic() > deadline:
                        logger.warning("not all shards end by themselves: ending them")
                        break
                    continue
                for place, shard in enumerate(shards):
                    if shard.process.poll() not in (None, 0):
                        shards[place] = _again(shard)
            count.look(at_once=True)
        finally:
            for shard in shards:  # all of them, before one is waited for
                shard.process.kill()
            for shard in shards:
                shard.process.wait()
                shard.reader.join(_PATIENCE)  # what it started may hold its stderr
    if stop.exit_code is not None:
        raise Stopped("stopped: what is drawn is kept; run the same command again", stop.exit_code)
    return epath.Path(settings.out)


def gpus_of_shards(environ: Mapping[str, str], num_shards: int, flag: str = "--shards") -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each shard; None where there is no GPU. Raises UsageError where shares are not even."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        num_gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())  # and no part of one
        visible = ",".join(map(str, range(num_gpus))) if listed.returncode == 0 else None
    gpus = [name for name in (visible or "").split(",") if name]
    if not gpus:
        return [None] * num_shards
    if len(gpus) % num_shards:
        even = [number for number in range(1, len(gpus) + 1) if len(gpus) % number == 0]
        raise UsageError(f"{flag} {num_shards} does not share the {len(gpus)} GPUs here evenly; these do: {even}")
    each = len(gpus) // num_shards
    return [",".join(gpus[first : first + each]) for first in range(0, len(gpus), each)]


def _start(name: str, command: list[str], devices: str | None, restarts: int = 0) -> _Shard:
    process = subprocess.Popen(
        [*command, "--shard", name],
        env=os.environ | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines: deque[str] = deque(maxlen=_KEPT)
    reader = threading.Thread(target=_read, args=(process, name, lines), daemon=True)
    reader.start()
    return _Shard(name, command, devices, process, lines, reader, restarts)


def _read(process: "subprocess.Popen[str]", name: str, lines: deque[str]) -> None:
    """Says what a shard says, but for its share of the progress."""
    assert process.stderr is not None
    for line in process.stderr:
        line = line.rstrip()
        if line and not line.startswith(("sampling:", "asked to stop")):
            lines.append(line)
            if not line.startswith(("error:", "stopped")):
                logger.info("shard %s: %s", name, line)


def _again(shard: _Shard) -> _Shard:
    """The shard in a new process. Raises where that would be in vain."""
    shard.reader.join(_PATIENCE)
    if shard.process.returncode == EXIT_USAGE or shard.restarts >= _RESTARTS:
        _fail(shard)
    last = next((f" ({line})" for line in reversed(shard.lines) if line.startswith("error:")), "")
    logger.warning(
        "shard %s %s%s: begun again (%d of at most %d)", shard.name, _how(shard), last, shard.restarts + 1, _RESTARTS
    )
    return _start(shard.name, shard.command, shard.devices, shard.restarts + 1)


def _fail(shard: _Shard) -> NoReturn:
    shard.reader.join(_PATIENCE)
    said = "\n".join(shard.lines)
    if shard.process.returncode == EXIT_USAGE:
        raise UsageError(said.rpartition("error: ")[2])
    raise RunError(f"shard {shard.name} {_how(shard)}; run the same command again. Its last lines:\n{said}")


def _how(shard: _Shard) -> str:
    code = shard.process.returncode
    if code == EXIT_PREEMPTED:
        return "was told to stop"
    return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"


class _Count:
    """Progress by the files that are there, as soon as somebody has said how many there will be."""

    def __init__(self, folder: epath.Path):
        self._folder, self._next = folder, 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "_Count":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def look(self, at_once: bool = False) -> None:
        """Looks, now and then."""
        if time.monotonic() < self._next and not at_once:
            return
        self._next = time.monotonic() + (_SECONDS if "://" not in str(self._folder) else 10 * _SECONDS)
        try:
            if not (self._folder / "run.json").exists():
                return
            run = read_run(self._folder)
            done = len({index for part in parts(self._folder, "samples") for index in problems_of(part)})
        except (OSError, RunError):  # a look is no more than that: another one will see
            return
        if self._bar is None:
            self._bar = Progress(run["num_problems"], "sampling", "problems", done)
        self._bar.update(done - self._bar.done)
