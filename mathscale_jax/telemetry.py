"""What a run says of itself: metrics.jsonl, TensorBoard, tokens per second, MFU, where the time goes."""

import contextlib
import json
import math
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from data_pipeline.files import write_text
from data_pipeline.loader import Batches
from data_pipeline.settings import UsageError
from data_pipeline.sources import Epoch
from mathscale_jax.chips import chip_of
from mathscale_jax.config import ModelConfig, ProfileSettings
from mathscale_jax.processes import is_primary


def flops_per_token(config: ModelConfig, context: int, adapter_parameters: int | None = None) -> float:
    """Training FLOPs of a token: 6 N for the weights, 12 L d T for attention (nothing off for causality).

    N counts every weight, the embedding too; T is the context, or a sliding window where that is shorter.
    With an adapter, 4 N for the weights, which get no gradient, and 6 for each of the `adapter_parameters`.
    """
    seen = min(context, config.sliding_window or context)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seen
    if adapter_parameters is None:
        return 6 * config.num_parameters + attention
    return 4 * config.num_parameters + 6 * adapter_parameters + attention


def peak_flops_per_device() -> float | None:
    """Peak of the devices at hand; None where it is not known (CPUs)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.peak_flops


class MetricsLog:
    """metrics.jsonl of a run, and TensorBoard's events if wanted. Process 0 writes, the others do nothing.

    One JSON object a line, each with its step. Lines after `resumed_step` are cut off.
    Raises UsageError where TensorBoard is wanted and its writer is not installed.
    """

    def __init__(self, directory: epath.Path, resumed_step: int, tensorboard: bool = False):
        self._path, self._remote = directory / "metrics.jsonl", "://" in str(directory)
        self._events = _tensorboard_writer(directory / "tensorboard", resumed_step) if tensorboard else None
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        self._lines = [line for line in lines if _step_of(line) <= resumed_step]
        if is_primary():
            write_text(self._path, "".join(self._lines))

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line; on an object store, which cannot append, it appears at the next flush."""
        if not is_primary():
            return
        self._lines.append(json.dumps(record) + "\n")
        if not self._remote:
            with self._path.open("a") as file:
                file.write(self._lines[-1])
        if self._events is not None:
            for name, value in record.items():
                parts = {f"{name}/{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
                for part, number in parts.items():
                    if part != "step" and number is not None:
                        self._events.add_scalar(part, number, record["step"])

    def flush(self) -> None:
        """Makes everything written so far visible on an object store, and to TensorBoard."""
        if self._remote and is_primary():
            write_text(self._path, "".join(self._lines))
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes, and ends TensorBoard's file."""
        self.flush()
        if self._events is not None:
            self._events.close()


def _tensorboard_writer(directory: epath.Path, resumed_step: int) -> Any:
    try:
        import tensorboardX  # heavy, and only for those who want it
    except ImportError as error:
        raise UsageError(
            "tensorboard=true needs tensorboardX: pip install -c constraints.txt -e '.[tensorboard]', or leave it out"
        ) from error
    # What an earlier run wrote after the step that this one goes on from is purged by TensorBoard itself.
    return tensorboardX.SummaryWriter(str(directory), purge_step=resumed_step + 1) if is_primary() else None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (json.JSONDecodeError, KeyError, TypeError):  # cut short when the run was killed, or not ours
        return math.inf


class SourceTokens:
    """Tokens that the steps since the last `read` took from each dataset, where there are several."""

    def __init__(self, epoch: Epoch, batches: Batches):
        self._batches = batches
        labels = [source.label for source in epoch.sources]
        self._labels = [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
        self._tokens = np.zeros(len(labels), np.int64)

    def add(self, step: int) -> None:
        """The step with this number, from 1, is finished."""
        if len(self._labels) > 1:
            self._tokens += self._batches.tokens_by_source(step - 1)

    def read(self) -> dict[str, dict[str, int]]:
        """{"source_tokens": {dataset: tokens}}; nothing of a single dataset."""
        told = dict(zip(self._labels, self._tokens.tolist(), strict=True))
        self._tokens[:] = 0
        return {"source_tokens": told} if len(told) > 1 else {}


class Throughput:
    """Rates since the last `read`, and where the time went: waiting for data, checkpoints, validation, steps.

    MFU is model FLOPs of `flops_per_token` (6 N + 12 L d T, nothing off for causality), over all positions of the
    batch, a second of step time and device / the device's peak in bf16.
    """

    def __init__(self, config: ModelConfig, context: int, adapter_parameters: int | None = None):
        self._flops_per_token = flops_per_token(config, context, adapter_parameters)
        self._peak = peak_flops_per_device()
        self.reset()

    def reset(self) -> None:
        """Starts counting anew: after the first step, which compiles."""
        self._since = time.monotonic()
        self._spent = {"data_wait": 0.0, "checkpoint": 0.0, "validation": 0.0}
        self._tokens = self._positions = self._steps = 0

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Books the time inside to "data_wait", "checkpoint" or "validation"."""
        started = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - started

    def add(self, tokens: int, positions: int) -> None:
        """A step over `positions` of which `tokens` hold an example is finished."""
        self._tokens += tokens
        self._positions += positions
        self._steps += 1

    def read(self) -> dict[str, float | None]:
        """Rates and seconds a step since the last read; None where no step was counted or the peak is not known."""
        elapsed = time.monotonic() - self._since
        # Checkpoints and validation are told apart; their time is not the steps', waiting for data is.
        stepping = elapsed - self._spent["checkpoint"] - self._spent["validation"]
        if not self._steps or stepping <= 0:
            return dict.fromkeys(self.KEYS)
        mfu = None
        if self._peak is not None:
            mfu = self._positions * self._flops_per_token / stepping / (self._peak * jax.device_count())
        rates = {
            "tokens_per_second": self._tokens / stepping,
            "tokens_per_second_per_device": self._tokens / stepping / jax.device_count(),
            "mfu": mfu,
            "step_s": stepping / self._steps,
            "data_wait_s": self._spent["data_wait"] / self._steps,
            "compute_s": (stepping - self._spent["data_wait"]) / self._steps,
            "checkpoint_s": self._spent["checkpoint"] / self._steps,
        }
        self.reset()
        return rates

    KEYS = (
        "tokens_per_second",
        "tokens_per_second_per_device",
        "mfu",
        "step_s",
        "data_wait_s",
        "compute_s",
        "checkpoint_s",
    )


class Watchdog:
    """Prints the stack of every thread to stderr when `alive` was not called for `minutes`, again and again.

    The run goes on: a step may only be slow. Use as a context manager; None never prints.
    """

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self._woken, self._ended = threading.Event(), False
        # Not faulthandler's own timer: it reads the frames of running threads, and can crash the process.
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """A step has ended."""
        self._woken.set()

    def _watch(self) -> None:
        while not self._ended:
            if not self._woken.wait(self._seconds) and not self._ended:
                self._print_stacks()
            self._woken.clear()

    def _print_stacks(self) -> None:
        assert self._seconds is not None  # without a limit, waiting never times out
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [f"no step has ended for {self._seconds / 60:g} minutes; the stacks of all threads:\n"]
        for ident, frame in sys._current_frames().items():
            lines += [f"thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
        print("".join(lines), file=sys.stderr, flush=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._woken.set()
        self._thread.join()


class Profile:
    """Records the steps that the settings name into a folder that TensorBoard and Perfetto read."""

    def __init__(self, settings: ProfileSettings | None, directory: epath.Path):
        self._directory = directory
        first = 0 if settings is None else settings.first_step  # steps count from 1: an empty window
        self._window = range(first, first + (0 if settings is None else settings.num_steps))
        self._recording = False

    def before(self, step: int) -> None:
        """Starts before the window's first step, or where a resumed run enters the window."""
        if step in self._window and not self._recording:
            jax.profiler.start_trace(str(self._directory))
            self._recording = True

    def after(self, step: int, results: Any) -> None:
        """Ends after the window's last step, whose `results` it waits for."""
        if self._recording and step == self._window[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was recorded."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
