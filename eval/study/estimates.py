"""What several seeds on the same problems say: values, differences and slopes with 95 % intervals. Arrays only.

Two things are left to chance in a run: which problems the test set holds, and the seed (weights, order, subset of the
data, samples). Both are part of each interval; the problems are the same for all runs, so that differences are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float

FEWEST = 5  # problems, from which on an interval over them means something


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
    """The mean over seeds, its 95 % interval, and each seed's value.

    No interval (None) where nothing varies, which is no certainty, and of fewer than FEWEST problems.
    """

    value: float
    ci95: tuple[float, float] | None
    by_seed: dict[int, float]

    @property
    def clear(self) -> bool:
        """Whether there is an interval, and it leaves zero out."""
        return self.ci95 is not None and (self.ci95[0] > 0 or self.ci95[1] < 0)


@dataclass(frozen=True)
class Fit:
    """value = intercept + slope * log2(x), the slope with its interval, and how well a line fits.

    `off` is the largest distance of a point from the line, `last` the slope between the last two points.
    `straight`: no point lies clear of the line, by the interval of its distance.
    """

    slope: Estimate
    intercept: float
    off: float
    last: Estimate
    straight: bool


def paired(scores: Sequence[Scores]) -> list[Scores] | None:
    """The scores of those seeds that all of them have; None where there is no such seed."""
    seeds = tuple(seed for seed in scores[0].seeds if all(seed in other.seeds for other in scores))
    if not seeds:
        return None
    places = [[of.seeds.index(seed) for seed in seeds] for of in scores]
    return [
        Scores(seeds, of.values[at], None if of.per_problem is None else of.per_problem[at], of.errors[at])
        for of, at in zip(scores, places, strict=True)
    ]


def combined(weights: Sequence[float], scores: Sequence[Scores]) -> Scores:
    """sum of weights * scores, seed by seed and problem by problem. All must be of the same seeds, see `paired`."""
    pairs = list(zip(weights, scores, strict=True))
    values = np.sum([w * of.values for w, of in pairs], axis=0)
    errors = np.sqrt(np.sum([(w * of.errors) ** 2 for w, of in pairs], axis=0))
    per_problem = None
    if all(of.per_problem is not None for of in scores):
        per_problem = np.sum([w * of.per_problem for w, of in pairs if of.per_problem is not None], axis=0)
    return Scores(scores[0].seeds, values, per_problem, errors)


def estimate(scores: Scores, bounds: tuple[float, float] | None = None) -> Estimate:
    """The mean over seeds with its 95 % interval, cut to `bounds`.

    The variance is that of the mean over problems plus that of the mean over seeds (sample variances), the quantile
    Student's with the degrees of freedom of Satterthwaite 1946. With one seed the second part is not known, and is left
    out.
    """
    num_seeds = len(scores.seeds)
    value = float(scores.values.mean())
    by_seed = {seed: float(of) for seed, of in zip(scores.seeds, scores.values, strict=True)}
    parts = []
    if scores.per_problem is not None:
        if scores.per_problem.shape[1] < FEWEST:
            return Estimate(value, None, by_seed)
        of_problem = scores.per_problem.mean(axis=0)
        parts.append((float(of_problem.var(ddof=1)) / len(of_problem), len(of_problem) - 1.0))
    else:
        parts.append((float(np.mean(scores.errors**2)), np.inf))  # as if all seeds erred alike: on the same problems
    if num_seeds > 1:
        parts.append((float(scores.values.var(ddof=1)) / num_seeds, num_seeds - 1.0))
    variance = sum(part for part, _ in parts)
    if variance < 1e-18:  # nothing varies, but for rounding
        return Estimate(value, None, by_seed)
    freedom = variance**2 / max(sum(part**2 / of for part, of in parts), 1e-300)
    half = float(scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    low, high = value - half, value + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(value, (low, high), by_seed)


def log_fit(x: Sequence[float], scores: Sequence[Scores]) -> Fit | None:
    """The least-squares line through the points over log2(x), of the seeds that all have; None of fewer than three."""
    common = paired(scores) if len(set(x)) > 2 else None
    if common is None:
        return None
    scores = common
    logs = np.log2(np.asarray(x, float))
    centred = logs - logs.mean()
    slope = estimate(combined((centred / np.square(centred).sum()).tolist(), scores))
    heights = np.array([of.values.mean() for of in scores])
    intercept = float(heights.mean() - slope.value * logs.mean())
    off = np.abs(heights - intercept - slope.value * logs)
    order = np.argsort(logs)
    before, after = order[-2:]
    step = 1 / float(logs[after] - logs[before])
    last = estimate(combined([step, -step], [scores[after], scores[before]]))
    # Distances are weighted sums of the points, paired like them. One in which nothing varies is no matter of chance.
    hat = 1 / len(logs) + np.outer(centred, centred) / np.square(centred).sum()
    distances = [estimate(combined(row.tolist(), scores)) for row in np.eye(len(logs)) - hat]
    straight = not any(each.clear or (each.ci95 is None and abs(each.value) > 1e-9) for each in distances)
    return Fit(slope, intercept, float(off.max()), last, straight)
