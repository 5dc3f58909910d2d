"""What a run says of itself: metrics.jsonl, tokens per second, MFU."""

import json
import math
import time
from typing import Any

import jax
from etils import epath

from data_pipeline.files import write_text
from mathscale_jax.config import ModelConfig

# Dense bf16 FLOP/s of one device, from the makers' data sheets, by a part of jax's device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Training FLOPs of a token: 6 N for the weights, 12 L d T for attention (nothing off for causality)."""
    return 6 * config.num_parameters + 12 * config.num_layers * config.num_heads * config.head_dim * context


def peak_flops_per_device() -> float | None:
    """Peak of the devices at hand; None where it is not known (CPUs)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


class MetricsLog:
    """metrics.jsonl of a run: one JSON object a logged step. Lines after `resumed_step` are cut off."""

    def __init__(self, path: epath.Path, resumed_step: int):
        self._path, self._remote = path, "://" in str(path)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self._lines = [line for line in lines if _step_of(line) <= resumed_step]
        write_text(path, "".join(self._lines))

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line; on an object store, which cannot append, it appears at the next flush."""
        self._lines.append(json.dumps(record) + "\n")
        if not self._remote:
            with self._path.open("a") as file:
                file.write(self._lines[-1])

    def flush(self) -> None:
        """Makes everything written so far visible on an object store."""
        if self._remote:
            write_text(self._path, "".join(self._lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (json.JSONDecodeError, KeyError, TypeError):  # cut short when the run was killed, or not ours
        return math.inf


class Throughput:
    """Rates since the last `read`: of tokens that hold an example, and of all positions for MFU."""

    def __init__(self, config: ModelConfig, context: int):
        self._flops_per_token = flops_per_token(config, context)
        self._peak = peak_flops_per_device()
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self.data_wait_s = 0.0
        self._tokens = self._positions = 0

    def add(self, tokens: int, positions: int) -> None:
        """A step over `positions` of which `tokens` hold an example is finished."""
        self._tokens += tokens
        self._positions += positions

    def read(self) -> dict[str, float | None]:
        """tokens_per_second, mfu (None where the peak is unknown) and data_wait_s since the last read."""
        elapsed = time.monotonic() - self._since
        mfu = None
        if self._peak is not None:
            mfu = self._positions * self._flops_per_token / elapsed / (self._peak * jax.device_count())
        rates = {"tokens_per_second": self._tokens / elapsed, "mfu": mfu, "data_wait_s": self.data_wait_s}
        self._reset()
        return rates
