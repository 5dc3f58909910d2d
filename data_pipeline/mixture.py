"""How many rows of each dataset make an epoch, and which: by counts, or by weights."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data_pipeline.settings import UsageError


def nested_subset(
    num_rows: int, count: int, seed: int, among: Int[np.ndarray, " candidates"] | None = None
) -> Int[np.ndarray, " count"]:
    """`count` of the rows, if need be `among` some only: the first of one random order of all rows.

    So a smaller subset lies within a larger one. In ascending order. Raises ValueError where there are not so many.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, num_rows])).permutation(num_rows)
    if among is not None:
        order = order[np.isin(order, among)]
    if not 0 < count <= len(order):
        raise ValueError(f"count={count} of {len(order)} rows")
    return np.sort(order[:count])


def mixed_counts(available: Sequence[int], weights: Sequence[float], total: int | None) -> list[int]:
    """Rows of each dataset in an epoch: `total` in all, in proportion to the weights.

    Without `total` they are as many as need no row twice. Rounding gives the largest remainders one more. Raises
    UsageError where a dataset would have none.
    """
    shares = np.asarray(weights, float) / sum(weights)
    if total is None:
        total = int(min(rows / share for rows, share in zip(available, shares, strict=True)) + 1e-9)
    exact = shares * total
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    if not counts.all():
        raise UsageError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} leave a dataset without a row in an epoch "
            f"of {total} examples; raise data.num_examples, or the smallest weight"
        )
    return counts.tolist()


def repeated(rows: Int[np.ndarray, " rows"], count: int, seed: int) -> Int[np.ndarray, " count"]:
    """`count` of these rows: all of them as often as that goes, and of the last round a random subset."""
    rounds, rest = divmod(count, len(rows))
    last = rows[nested_subset(len(rows), rest, seed)] if rest else rows[:0]
    return np.concatenate([np.tile(rows, rounds), last])
