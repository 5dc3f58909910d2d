"""Resampling by the length of the chain of thought: harder problems a larger share (arXiv 2403.04706, section 4.5).

The paper's target distribution is unpublished; both modes here reproduce its direction, a larger share of long
solutions. A resampled dataset is an index array: some rows come several times, some not at all.
"""

import logging
from typing import Any, Literal

import numpy as np
import pydantic
from jaxtyping import Float, Int

from data_pipeline.settings import Settings, UsageError

logger = logging.getLogger("mathscale")


class Resample(Settings):
    """How often a row comes, by the number of steps in its solution."""

    mode: Literal["steps_power", "target"] = pydantic.Field(
        "steps_power",
        description="steps_power: a row's weight is steps ** power; target: the shares of `target` over steps",
    )
    power: float = pydantic.Field(
        1.0, ge=-8, le=8, allow_inf_nan=False, description="of steps_power; 0 leaves all rows alike"
    )
    target: dict[int, pydantic.PositiveFloat] | None = pydantic.Field(
        None, description="of target: steps -> share of the resampled rows, such as {2: 1, 3: 1, 4: 2}"
    )
    num_rows: pydantic.PositiveInt | None = pydantic.Field(None, description="rows to come out; null: as many as go in")
    max_repeats: pydantic.PositiveInt = pydantic.Field(
        4, description="times that a row may come at most, before a mixture repeats rows"
    )
    min_bin: pydantic.PositiveInt = pydantic.Field(
        20, description="numbers of steps that fewer rows have are merged with the next lower one"
    )

    @pydantic.model_validator(mode="after")
    def _target_given(self) -> "Resample":
        if (self.mode == "target") != (self.target is not None):
            raise ValueError(
                "resample: write {mode: target, target: {2: 1, 4: 2}}, or {power: 1.0}: target belongs to mode=target"
            )
        return self


def resample(num_steps: Int[np.ndarray, " rows"], settings: Resample, seed: int) -> Int[np.ndarray, " chosen"]:
    """Indices, in ascending order, of rows drawn by their steps; unknown steps (-1) count as the fewest.

    Each row comes as often as its share of `num_rows` says, rounded down or up at random so that the sum is exact
    (systematic sampling), and at most `max_repeats` times: what is cut there goes to the others. Deterministic in
    `seed`. Raises UsageError where the rows cannot make so many.
    """
    num_rows = settings.num_rows or len(num_steps)
    if num_rows > settings.max_repeats * len(num_steps):
        raise UsageError(
            f"resample.num_rows={num_rows}: {len(num_steps)} rows, each at most {settings.max_repeats} times "
            "(resample.max_repeats), do not make so many"
        )
    absent = sorted(set(settings.target or ()) - set(np.unique(num_steps).tolist()))
    if absent:
        raise UsageError(
            f"resample.target: no row has {' or '.join(map(str, absent))} steps; there are rows of "
            f"{', '.join(str(steps) for steps in np.unique(num_steps).tolist() if steps != -1)}"
        )
    bins = merged_bins(num_steps, settings.min_bin)
    weights = _weights(bins, settings)
    expected = _capped(weights, num_rows, settings.max_repeats)
    _warn(bins, weights, expected, settings)
    rng = np.random.Generator(np.random.Philox(key=[seed, len(num_steps)]))
    copies = _systematic(expected, num_rows, rng)
    return np.repeat(np.arange(len(num_steps)), copies)


def resampling_report(
    before: Int[np.ndarray, " rows"], after: Int[np.ndarray, " drawn"], rows: Int[np.ndarray, " drawn"]
) -> dict[str, Any]:
    """What a draw made of the numbers of steps, for a file: `after` are those of the `rows` that were drawn.

    Histograms over steps, how many different rows there are, and the effective sample size (Kish's): the squared sum
    of their copies by the sum of the squares.
    """
    copies = np.unique(rows, return_counts=True)[1]
    return {
        "before": histogram(before), "after": histogram(after), "different_rows": len(copies),
        "effective_sample_size": float(copies.sum()) ** 2 / float(np.square(copies).sum()),
    }  # fmt: skip


def merged_bins(num_steps: Int[np.ndarray, " rows"], min_bin: int) -> Int[np.ndarray, " rows"]:
    """The number of steps that each row counts as: rare ones, at either end or between, as the next lower one."""
    known = num_steps[num_steps >= 0]
    values, counts = np.unique(known, return_counts=True)
    if not len(values):
        return np.zeros(len(num_steps), np.int64)
    bins, waiting = {}, 0  # from the top: what is rare is added to the one below
    members: list[int] = []
    for value, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        members.append(value)
        waiting += count
        if waiting >= min_bin:
            bins.update(dict.fromkeys(members, value))
            members, waiting = [], 0
    lowest = min(bins.values(), default=int(values[0]))
    bins.update(dict.fromkeys(members, lowest))  # too few are left at the bottom
    return np.array([bins.get(int(steps), lowest) for steps in values], np.int64)[
        np.searchsorted(values, np.where(num_steps < 0, values[0], num_steps))
    ]


def histogram(num_steps: Int[np.ndarray, " rows"]) -> dict[int, int]:
    """How many rows have each number of steps; -1 are unknown."""
    values, counts = np.unique(num_steps, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _warn(
    bins: Int[np.ndarray, " rows"], weights: Float[np.ndarray, " rows"], expected: Float[np.ndarray, " rows"],
    settings: Resample,
) -> None:  # fmt: skip
    """Says where the shares that come out are not those that were asked for."""
    values, counts = np.unique(bins, return_counts=True)
    if len(values) == 1:
        logger.warning(
            "resampling changes nothing: no two numbers of steps have resample.min_bin=%d rows each, so all %d rows "
            "count alike; lower it", settings.min_bin, counts[0],
        )  # fmt: skip
    asked, got = (np.bincount(np.searchsorted(values, bins), of) / of.sum() for of in (weights, expected))
    short = [
        f"{value}: {100 * wanted:.1f} % asked, {100 * had:.1f} % had"
        for value, wanted, had in zip(values.tolist(), asked.tolist(), got.tolist(), strict=True)
        if had < 0.98 * wanted
    ]
    if short:
        logger.warning(
            "resampling: rows of some numbers of steps come %d times each (resample.max_repeats) and are still too few "
            "(%s); the rest goes to the others", settings.max_repeats, "; ".join(short),
        )  # fmt: skip


def _weights(bins: Int[np.ndarray, " rows"], settings: Resample) -> Float[np.ndarray, " rows"]:
    if settings.mode == "steps_power":
        return np.maximum(bins, 1).astype(float) ** settings.power
    assert settings.target is not None
    values, counts = np.unique(bins, return_counts=True)
    nearest = {steps: int(values[np.abs(values - steps).argmin()]) for steps in settings.target}
    shares = dict.fromkeys(values.tolist(), 0.0)
    for steps, share in settings.target.items():
        shares[nearest[steps]] += share
    per_row = {value: shares[value] / count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}
    return np.array([per_row[value] for value in values.tolist()])[np.searchsorted(values, bins)]


def _capped(weights: Float[np.ndarray, " rows"], total: int, most: int) -> Float[np.ndarray, " rows"]:
    """Expected copies in proportion to the weights, none over `most`: what is cut goes to those below it."""
    expected, capped = np.zeros(len(weights)), np.zeros(len(weights), bool)
    while True:
        free = ~capped & (weights > 0)
        left = total - most * capped.sum()
        if not free.any():
            if left > 1e-9:
                raise UsageError(
                    f"resample.target: rows of these steps, each at most {most} times (resample.max_repeats), make "
                    f"{int(most * capped.sum())} of {total} rows; raise max_repeats, lower num_rows, or name more steps"
                )
            break
        expected[free] = weights[free] * (left / weights[free].sum())
        over = free & (expected > most)
        if not over.any():
            break
        capped |= over
    expected[capped] = most
    return expected


def _systematic(expected: Float[np.ndarray, " rows"], total: int, rng: np.random.Generator) -> Int[np.ndarray, " rows"]:
    """Copies of each row: its expectation rounded down or up, `total` in all."""
    order = rng.permutation(len(expected))
    ends = np.cumsum(expected[order])
    ends *= total / ends[-1]
    marks = np.floor(ends + rng.random() - 1e-9).astype(np.int64)
    marks[-1] = total
    copies = np.zeros(len(expected), np.int64)
    copies[order] = np.diff(np.minimum(marks, total), prepend=0)
    return copies
