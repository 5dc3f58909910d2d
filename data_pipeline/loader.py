"""From rows to batches. The step determines the batch: `Batches[step]` is a pure function."""

import functools
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int

from data_pipeline.packing import PackPlan, pack, pad
from data_pipeline.sources import DataSettings
from data_pipeline.tokenized import TokenizedRows


class Batch(TypedDict):
    """Host arrays, all [rows, context]. Segment id 0 is padding; ids count the examples of a row from 1."""

    tokens: Int[np.ndarray, "rows context"]
    targets: Int[np.ndarray, "rows context"]
    loss_mask: Bool[np.ndarray, "rows context"]
    segment_ids: Int[np.ndarray, "rows context"]
    positions: Int[np.ndarray, "rows context"]


class Batches:
    """The batch of every step; for one process of several, its `rows_of_process` of the `batch_size` global rows.

    Steps run through epoch after epoch of the pack plan without a gap: a batch may hold the end of one epoch
    and the beginning of the next. With `num_steps` from `steps_in_epochs` the last batch is filled up with
    empty rows, so that each example is seen exactly once per epoch.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        settings: DataSettings,
        *,
        batch_size: int,
        seed: int,
        num_steps: int | None = None,
        num_epochs: int | None = None,
        rows_of_process: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
    ):
        """Give `num_steps` or `num_epochs`; a run in epochs ends when the last one does."""
        self._rows, self._settings, self._seed, self._batch_size = rows, settings, seed, batch_size
        self._mine = range(batch_size) if rows_of_process is None else rows_of_process
        self._num_sources = int(rows.sources.max()) + 1
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self.bins_per_epoch = len(self._plan(0))
        self._num_bins = None if num_epochs is None else num_epochs * self.bins_per_epoch
        if num_steps is None:
            if self._num_bins is None:
                raise ValueError("give num_steps or num_epochs")
            num_steps = math.ceil(self._num_bins / batch_size)
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.num_steps:  # also what ends `for batch in batches`
            raise IndexError(f"step {step} of {self.num_steps}")
        return self._filled(list(self._members(step, self._mine)))

    def examples(self, step: int) -> list[int]:
        """Indices of the examples in the batch of a step, over all processes: what `TokenizedRows` they are."""
        return [int(member) for members in self._members(step, range(self._batch_size)) for member in members]

    def tokens_by_source(self, step: int) -> Int[np.ndarray, " sources"]:
        """Of the batch of a step, over all processes: positions that hold examples of each dataset."""
        members = self.examples(step)
        lengths = self._rows.lengths[members] - 1
        return np.bincount(self._rows.sources[members], lengths, self._num_sources).astype(np.int64)

    def _members(self, step: int, rows: Iterable[int]) -> Iterator[Int[np.ndarray, " members"]]:
        """The examples of each of these rows; none once the last epoch has ended."""
        for row in rows:
            index = step * self._batch_size + int(row)
            if self._num_bins is None or index < self._num_bins:
                epoch, position = divmod(index, self.bins_per_epoch)
                yield self._plan(epoch)[position]

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch that hold an example."""
        return float(self._rows.input_lengths.sum()) / (self.bins_per_epoch * self._settings.context)

    def _make_plan(self, epoch: int) -> PackPlan:
        if self._settings.layout == "padded":
            return pad(len(self._rows), self._seed, epoch)
        return pack(self._rows.input_lengths, self._settings.context, self._seed, epoch)

    def _filled(self, members: Sequence[Int[np.ndarray, " members"]]) -> Batch:
        """The batch whose row r holds the examples `members[r]`; rows beyond them are empty.

        The examples are laid behind one another first, by few operations on long arrays; then each row of the batch is
        one slice of them.
        """
        every, rows = self._rows, np.concatenate([np.zeros(0, np.int64), *members])
        starts, lengths = every.starts[rows], every.lengths[rows] - 1
        ends = np.cumsum(lengths, dtype=np.int32)
        positions = np.arange(lengths.sum(), dtype=np.int32) - np.repeat(ends - lengths, lengths)
        sizes = np.array([len(of_row) for of_row in members], np.int32)
        firsts = np.cumsum(sizes, dtype=np.int32) - sizes
        segments = np.arange(1, len(rows) + 1, dtype=np.int32) - np.repeat(firsts, sizes)
        bounds = [0, *ends[firsts + sizes - 1].tolist()]

        def tokens(shift: int) -> Int[np.ndarray, " positions"]:
            places = zip((starts + shift).tolist(), (starts + lengths + shift).tolist(), strict=True)
            return np.concatenate([every.tokens[:0], *(every.tokens[start:end] for start, end in places)])

        def in_rows(flat: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
            filled = np.zeros((len(self._mine), self._settings.context), dtype)
            for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
                filled[row, : end - begin] = flat[begin:end]
            return filled

        return Batch(
            tokens=in_rows(tokens(0)),
            # Shifted here, before packing: the last position of one example never predicts the next one's first.
            targets=in_rows(tokens(1)),
            loss_mask=in_rows(positions >= np.repeat(every.prompt_lengths[rows] - 1, lengths), bool),
            segment_ids=in_rows(np.repeat(segments, lengths)),
            positions=in_rows(positions),
        )


def iterate(batches: Batches, start_step: int, prefetch: int) -> Generator[Batch, None, None]:
    """The batches from `start_step` to the end, made ahead by grain's threads, which end when it is closed."""
    dataset = grain.MapDataset.source(batches)[start_step:]
    options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
