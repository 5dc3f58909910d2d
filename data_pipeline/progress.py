"""A progress bar on a terminal, plain lines now and then in a log."""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import tqdm

T = TypeVar("T")
logger = logging.getLogger("mathscale")
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts up to `total` on stderr, from any thread. `note` is shown behind the count (a loss, a rate).

    Where the unit is "bytes", GB are shown.
    """

    def __init__(self, total: int | None, title: str, unit: str, done: int = 0):
        self.total, self.title, self.unit, self.done = total, title, unit, done
        self._started_at, self._started_from = time.monotonic(), done
        self._last_line, self._told = self._started_at, done
        self._lock = threading.Lock()
        self._bar: Any = None
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            self._bar = tqdm.tqdm(
                total=total, desc=title, initial=done, dynamic_ncols=True, smoothing=0.05,
                **({"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}),
            )  # fmt: skip

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more are done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                if note:
                    self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
            elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
                self._line(note)

    def skip(self, count: int = 1) -> None:
        """`count` were done before: they say nothing of the rate."""
        with self._lock:
            self.done += count
            self._started_from += count
            if self._bar is not None:
                self._bar.initial += count
                self._bar.n += count
                self._bar.last_print_n += count

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._told:
            self._line("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, note: str) -> None:
        self._last_line, self._told = time.monotonic(), self.done
        rate = (self.done - self._started_from) / max(self._last_line - self._started_at, 1e-9)
        note = note and f", {note}"
        if self.total is not None and self.total > self.done and rate > 0:
            note += f", {tqdm.tqdm.format_interval((self.total - self.done) / rate)} left"
        if self.unit == "bytes":
            of = "" if self.total is None else f"/{self.total / 1e9:.2f}"
            logger.info("%s: %.2f%s GB, %.2f GB/s%s", self.title, self.done / 1e9, of, rate / 1e9, note)
        else:
            of = "" if self.total is None else f"/{self.total}"
            logger.info("%s: %d%s %s, %.3g/s%s", self.title, self.done, of, self.unit, rate, note)


def progress(items: Iterable[T], title: str, unit: str) -> Iterator[T]:
    """Yields `items`, showing how many are done."""
    with Progress(len(items) if isinstance(items, Sized) else None, title, unit) as bar:
        for item in items:
            yield item
            bar.update()
