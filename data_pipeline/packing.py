"""The pack plan: which rows share a row of the context. Index arrays, a pure function of its arguments."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Bin b holds the rows `rows[offsets[b]:offsets[b + 1]]`, in this order."""

    rows: Int[np.ndarray, " rows"]
    offsets: Int[np.ndarray, " bins+1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " members"]:
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def pack(lengths: Int[np.ndarray, " rows"], context: int, seed: int, epoch: int) -> PackPlan:
    """Packs each row exactly once into bins of `context` positions, best fit decreasing, bins then shuffled.

    The number of bins depends on the lengths alone, so every epoch has as many. Which of several equally long
    rows goes where, and the order of bins and of rows in them, is drawn from (seed, epoch).
    Raises ValueError where a row is longer than the context or empty.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and (lengths.max() > context or lengths.min() < 1):
        raise ValueError(f"row lengths must be 1 to {context}, got {lengths.min()} to {lengths.max()}")
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    # open_bins[r] are the bins with r positions left. Bit r of `available` says whether there are any, so the
    # best fit for a row is the lowest set bit from its length upwards: one integer operation, not a search.
    open_bins: list[list[int]] = [[] for _ in range(context + 1)]
    available = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = available >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            target = open_bins[room].pop()
            if not open_bins[room]:
                available &= ~(1 << room)
            bins[target].append(row)
        else:
            room = context
            target = len(bins)
            bins.append([row])
        open_bins[room - length].append(target)
        available |= 1 << (room - length)
    return _shuffled(bins, rng)


def pad(num_rows: int, seed: int, epoch: int) -> PackPlan:
    """One row a bin, shuffled: batches padded to the context."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return _shuffled([[row] for row in range(num_rows)], rng)


def _shuffled(bins: list[list[int]], rng: np.random.Generator) -> PackPlan:
    members = [rng.permutation(bins[b]) if len(bins[b]) > 1 else bins[b] for b in rng.permutation(len(bins))]
    offsets = np.concatenate([[0], np.cumsum([len(m) for m in members])]).astype(np.int64)
    rows = np.concatenate(members) if members else np.zeros(0)
    return PackPlan(rows.astype(np.int64), offsets)
