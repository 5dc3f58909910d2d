"""What several seeds on the same problems say: values, differences and slopes with 95 % intervals. Arrays only.

Two things are left to chance in a run: which problems the test set holds, and the seed (weights, order, subset of the
data, samples). Both are part of each interval; the problems are the same for all runs, so that differences are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float


@dataclass(frozen=True)
class Scores:
    """A number of each seed's run, and where it comes from: a score a problem, or a standard error.

    `per_problem` has a row a seed; each row's mean is the seed's value. Without it, `errors` are the standard errors
    that the problems give to the values (0: not known).
    """

    seeds: tuple[int, ...]
    values: Float[np.ndarray, " seeds"]
    per_problem: Float[np.ndarray, "seeds problems"] | None
    errors: Float[np.ndarray, " seeds"]

    @classmethod
    def of_problems(cls, seeds: Sequence[int], per_problem: Float[np.ndarray, "seeds problems"]) -> "Scores":
        """From each problem's score in each seed's run."""
        return cls(tuple(seeds), per_problem.mean(axis=1), per_problem, np.zeros(len(seeds)))

    def of_group(self, members: Sequence[bool]) -> "Scores":
        """Of some of the problems."""
        assert self.per_problem is not None
        return Scores.of_problems(self.seeds, self.per_problem[:, np.asarray(members, bool)])


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds, its 95 % interval, and each seed's value. `seeds_known`: the interval covers seeds, too."""

    value: float
    ci95: tuple[float, float]
    by_seed: dict[int, float]
    seeds_known: bool

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


@dataclass(frozen=True)
class Fit:
    """value = intercept + slope * log2(x), the slope with its interval; `off`: the largest distance of a point."""

    slope: Estimate
    intercept: float
    off: float


def combined(weights: Sequence[float], scores: Sequence[Scores]) -> Scores:
    """sum of weights * scores, seed by seed and problem by problem, over the seeds that all of them have."""
    seeds = [seed for seed in scores[0].seeds if all(seed in other.seeds for other in scores)]
    places = [[of.seeds.index(seed) for seed in seeds] for of in scores]
    triples = list(zip(weights, scores, places, strict=True))
    values = sum((w * of.values[at] for w, of, at in triples), np.zeros(len(seeds)))
    errors = np.sqrt(sum(((w * of.errors[at]) ** 2 for w, of, at in triples), np.zeros(len(seeds))))
    per_problem = None
    if all(of.per_problem is not None for of in scores):
        per_problem = np.sum([w * of.per_problem[at] for w, of, at in triples if of.per_problem is not None], axis=0)
    return Scores(tuple(seeds), values, per_problem, errors)


def estimate(scores: Scores, bounds: tuple[float, float] | None = None) -> Estimate:
    """The mean over seeds with its 95 % interval, cut to `bounds`.

    The variance is that of the mean over problems plus that of the mean over seeds (sample variances), the quantile
    Student's with the degrees of freedom of Satterthwaite 1946. With one seed the second part is not known, and is left
    out.
    """
    num_seeds = len(scores.seeds)
    value = float(scores.values.mean())
    parts = []
    if scores.per_problem is not None and scores.per_problem.shape[1] > 1:
        of_problem = scores.per_problem.mean(axis=0)
        parts.append((float(of_problem.var(ddof=1)) / len(of_problem), len(of_problem) - 1.0))
    elif scores.per_problem is None:
        parts.append((float(np.mean(scores.errors**2)), np.inf))  # as if all seeds erred alike: on the same problems
    if num_seeds > 1:
        parts.append((float(scores.values.var(ddof=1)) / num_seeds, num_seeds - 1.0))
    variance = sum(part for part, _ in parts)
    half = 0.0
    if variance > 0:
        freedom = variance**2 / max(sum(part**2 / of for part, of in parts), 1e-300)
        half = float(scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    low, high = value - half, value + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    by_seed = {seed: float(of) for seed, of in zip(scores.seeds, scores.values, strict=True)}
    return Estimate(value, (low, high), by_seed, num_seeds > 1)


def log_fit(x: Sequence[float], scores: Sequence[Scores]) -> Fit | None:
    """The least-squares line through the points over log2(x); None with fewer than three points."""
    if len(set(x)) < 3:
        return None
    logs = np.log2(np.asarray(x, float))
    centred = logs - logs.mean()
    slope = estimate(combined((centred / np.square(centred).sum()).tolist(), scores))
    heights = np.array([of.values.mean() for of in scores])
    intercept = float(heights.mean() - slope.value * logs.mean())
    return Fit(slope, intercept, float(np.abs(heights - intercept - slope.value * logs).max()))
