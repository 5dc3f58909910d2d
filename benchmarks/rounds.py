"""Contestants measured in turns, round after round: machines are noisy, and the noise meets all of them."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers import Measurement
from benchmarks.worker import Limits, Worker, WorkerFailed, busy_cpu_seconds
from data_pipeline.cli import logger

QUIET_CORES = 0.15  # what others may use of the cores in a measurement that counts as undisturbed


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A row of the table: what makes it in its own process, and what it trains on in a step."""

    name: str
    layout: str  # contestants of one layout train on the same batches
    factory: Callable[..., Any]
    arguments: tuple[Any, ...]
    positions: int  # of a step on one device
    tokens: int  # those of them that hold an example


@dataclasses.dataclass
class Row:
    """What was measured of a contestant: nothing more where `failure` says why."""

    contestant: Contestant
    failure: str | None = None
    description: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_losses: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)  # one entry a round
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)  # of a step, likewise
    others_cpu: list[float] = dataclasses.field(default_factory=list)  # cores that other processes kept busy
    peak_memory: int | None = None

    @property
    def positions_per_second(self) -> float:
        """Of one device, in the median round."""
        return self.contestant.positions / statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of examples, of one device, in the median round."""
        return self.contestant.tokens / statistics.median(self.step_seconds)


def measure(
    contestants: Sequence[Contestant],
    *,
    warmup_steps: int,
    rounds: int,
    steps: int,
    together: bool,
    patience: float,
    limits: Limits,
) -> list[Row]:
    """Each contestant's row. One that fails, or goes beyond its `limits`, has one too.

    `together`: all of them stay in memory and every round measures each once, every second round backwards.
    Otherwise each is measured alone, all its rounds in a process that has ended when the next one begins.
    `patience`: seconds that a measurement may wait, and be repeated, until other processes leave the cores alone.
    """
    rows = [Row(contestant) for contestant in contestants]
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for number, row in enumerate(rows):
            logger.info("%s: compiling and warming up", row.contestant.name)
            try:
                worker = Worker(row.contestant.factory, row.contestant.arguments, limits)
                stack.enter_context(worker)
                row.first_losses = worker.call("run", warmup_steps).losses
                row.description = worker.call("describe")
            except WorkerFailed as failure:
                _fail(row, failure)
                continue
            workers[number] = worker
            if not together:
                for _ in range(rounds):
                    _measure_once(row, worker, steps, patience)
                _measure_memory(row, worker)
                worker.close()
        if together:
            for round_number in range(rounds):
                for number in sorted(workers, reverse=round_number % 2 == 1):
                    _measure_once(rows[number], workers[number], steps, patience)
            for number, worker in workers.items():
                _measure_memory(rows[number], worker)
    return rows


def _others(busy_from: float | None, own: float, seconds: float) -> float:
    """Cores that other processes kept busy in the last `seconds`; 0 where the system does not say."""
    busy = busy_cpu_seconds()
    return 0.0 if busy is None or busy_from is None else max(0.0, (busy - busy_from - own) / seconds)


def _fail(row: Row, failure: WorkerFailed) -> None:
    row.failure = str(failure)
    logger.warning("%s: %s", row.contestant.name, failure)


def _measure_once(row: Row, worker: Worker, steps: int, patience: float) -> None:
    if row.failure is not None:
        return
    deadline = time.monotonic() + patience
    while True:
        while time.monotonic() < deadline:
            idle_from = busy_cpu_seconds()
            time.sleep(1)
            if _others(idle_from, 0.0, 1.0) <= QUIET_CORES:
                break
        busy_from = busy_cpu_seconds()
        try:
            measurement: Measurement = worker.call("run", steps)
        except WorkerFailed as failure:
            _fail(row, failure)
            return
        others = _others(busy_from, measurement.cpu_seconds, measurement.seconds)
        if others <= QUIET_CORES or time.monotonic() >= deadline:
            break
    row.step_seconds.append(measurement.seconds / steps)
    row.cpu_seconds.append(measurement.cpu_seconds / steps)
    row.others_cpu.append(others)
    logger.info("%s: %.0f ms a step", row.contestant.name, 1000 * row.step_seconds[-1])


def _measure_memory(row: Row, worker: Worker) -> None:
    if row.failure is None:
        try:
            row.peak_memory = worker.call("peak_memory")
        except WorkerFailed as failure:
            _fail(row, failure)


def ratios(row: Row, reference: Row) -> list[float]:
    """For every round, how many times as many tokens of examples a second `row` did as `reference`."""
    pairs = zip(row.step_seconds, reference.step_seconds, strict=False)
    per_step = row.contestant.tokens / reference.contestant.tokens
    return [per_step * theirs / ours for ours, theirs in pairs]


def cpu_ratio(row: Row, reference: Row) -> float:
    """How many times as many tokens of examples `row` did as `reference` with a second of CPU time: medians."""
    per_step = row.contestant.tokens / reference.contestant.tokens
    return per_step * statistics.median(reference.cpu_seconds) / statistics.median(row.cpu_seconds)
