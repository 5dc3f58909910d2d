"""The step law of arXiv 2403.04706 (section 4.3): a solution of s steps is right if each of its steps is.

accuracy = accuracy_step ^ s, where s is the number of steps in the gold solution. Arrays in, numbers out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eval.metrics import NUM_RESAMPLES, bootstrap_ci95, resamples

FEWEST_PROBLEMS = 5  # of a number of steps, to be a point: in GSM8K's test set those are 2 to 8
FIRST_POINTS = 4  # of the second fit, which is drawn beyond them


def step_law(
    num_steps: Int[np.ndarray, "problems"], accuracy: Float[np.ndarray, "problems"], seed: int = 0
) -> dict[str, Any] | None:
    """The law fitted to all points, and to the first four, with 95 % bootstrap intervals over problems.

    `accuracy` is each problem's share of right samples. A point is a number of steps that at least five problems have;
    the fit minimises the squared error over problems, so that points of many problems weigh more (the paper does not
    say how it fitted). None with fewer than two points.
    """
    counts = {int(s): int(np.sum(num_steps == s)) for s in np.unique(num_steps) if s > 0}
    steps = np.array([s for s, count in counts.items() if count >= FEWEST_PROBLEMS])
    if len(steps) < 2:
        return None
    of_step = (num_steps[:, None] == steps).astype(float)  # problems x points
    points = []
    for column, s in enumerate(steps):
        values = accuracy[of_step[:, column] > 0][:, None]
        low, high = bootstrap_ci95(values, seed)[0]
        points.append(
            {
                "steps": int(s),
                "num_problems": len(values),
                "value": float(values.mean()),
                "ci95": [float(low), float(high)],
            }
        )
    times_drawn = np.concatenate([np.ones((1, len(accuracy))), resamples(len(accuracy), NUM_RESAMPLES, seed)])
    problems = times_drawn @ of_step
    means = (times_drawn * accuracy) @ of_step / np.maximum(problems, 1)
    law: dict[str, Any] = {"points": points}
    for name, upto in (("all", len(steps)), ("first_four", FIRST_POINTS)):
        fitted = fit(steps[:upto], means[:, :upto], problems[:, :upto])
        low, high = np.percentile(fitted[1:], [2.5, 97.5])
        law[name] = {
            "accuracy_step": float(fitted[0]),
            "ci95": [float(low), float(high)],
            "points": min(upto, len(steps)),
        }
    return law


def fit(
    steps: Int[np.ndarray, "points"],
    accuracy: Float[np.ndarray, "*fits points"],
    weights: Float[np.ndarray, "*fits points"],
) -> Float[np.ndarray, "*fits"]:
    """accuracy_step of each fit: what minimises the sum of weights * (accuracy - accuracy_step ^ steps)^2."""

    def error(base: np.ndarray) -> np.ndarray:
        return np.sum(weights * (accuracy - base[..., None] ** steps) ** 2, axis=-1)

    grid = np.linspace(0, 1, 101)
    best = np.argmin(np.stack([error(np.full(accuracy.shape[:-1], base)) for base in grid]), axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, 100)]
    for _ in range(60):  # between its neighbours on the grid there is one minimum: thirds close in on it
        third = (high - low) / 3
        left = error(low + third) < error(high - third)
        low, high = np.where(left, low, low + third), np.where(left, high - third, high)
    return (low + high) / 2


def predicted_accuracy(accuracy_step: float, problems_of_steps: dict[int, int]) -> float:
    """What the law says of a whole test set, given how many of its problems have each number of steps."""
    total = sum(problems_of_steps.values())
    return sum(count * accuracy_step**steps for steps, count in problems_of_steps.items()) / total


def as_arrays(num_steps: Sequence[int | None], accuracy: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both, without the problems whose steps are not known."""
    known = [(s, a) for s, a in zip(num_steps, accuracy, strict=True) if s is not None]
    return np.array([s for s, _ in known], int), np.array([a for _, a in known], float)
