"""A contestant in a process of its own, so that its threads, its allocator and its failure are its own."""

import dataclasses
import multiprocessing
import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cli import RunError

START_SECONDS = 120.0  # what a process may take at least to start: it imports jax or torch
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")


class WorkerFailed(Exception):
    """The contestant cannot be measured; the message is what its row says."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What each contestant's process gets: time for a call, cores (None: all), additions to its environment."""

    seconds: float
    cores: int | None
    environment: dict[str, str]


class Worker:
    """`factory(*arguments)` made in a new process, whose methods `call` runs there. Use as a context manager.

    `limits` say what the process may use. A call that takes longer than its time ends the process.
    """

    def __init__(self, factory: Callable[..., Any], arguments: tuple[Any, ...], limits: Limits):
        self._time_limit = limits.seconds
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, factory, arguments, limits), daemon=True)
        self._process.start()
        child.close()  # so that the end of the process ends `recv` here

    def __enter__(self) -> "Worker":
        try:
            self._answer(max(self._time_limit, START_SECONDS))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of the method. Raises WorkerFailed."""
        self._connection.send((method, arguments))
        return self._answer(self._time_limit)

    def close(self) -> None:
        """Ends the process and waits for it, which frees its memory."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _answer(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise WorkerFailed(f"over the time limit of {seconds:g} s")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise WorkerFailed(f"its process died (exit code {self._process.exitcode})") from error
        if kind == "failed":
            raise WorkerFailed(value)
        return value


def _serve(connection: Any, factory: Callable[..., Any], arguments: tuple[Any, ...], limits: Limits) -> None:
    os.environ.update(limits.environment)
    if limits.cores is not None:  # both libraries make as many threads as they may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: limits.cores])
    try:
        contestant = factory(*arguments)
        connection.send(("done", None))
        while True:
            method, method_arguments = connection.recv()
            connection.send(("done", getattr(contestant, method)(*method_arguments)))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:  # whatever it is, it is a row of the table
        text = f"{type(error).__name__}: {error}"
        if any(mark in text for mark in _OUT_OF_MEMORY):
            connection.send(("failed", "out of memory"))
            return
        traceback.print_exc()
        connection.send(("failed", (text.strip().splitlines() or [""])[0][:200]))


def anonymous_memory(process: int | str = "self") -> int:
    """Bytes of a process's own memory that is resident (RssAnon): no file mappings, which mislead.

    0 off Linux, and of a process that has ended.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def family_memory(pid: int) -> int:
    """`anonymous_memory` of a process and of all that it has started, together."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return anonymous_memory(pid) + sum(family_memory(int(child)) for child in children)


def run_watched(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, float, int]:
    """What `command` prints, the seconds that it takes, and the most memory that its processes have together, bytes.

    Raises RunError, with the end of what it said, where it fails.
    """
    peak = 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=said, env={**os.environ, **(environment or {})})
        while process.poll() is None:
            peak = max(peak, family_memory(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        said.seek(0)
        printed.seek(0)
        if process.returncode != 0:
            raise RunError(f"{command[:4]} failed: {said.read()[-2000:]}")
        return printed.read(), seconds, peak


def busy_cpu_seconds() -> float | None:
    """CPU seconds that all processes of this machine have used; None off Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")
