"""Pass@k, PassRatio and majority vote from graded samples, with 95 % intervals. Arrays in, numbers out.

The three questions they answer, for n samples a problem of which c are right:

- Pass@k: how often is at least one of k samples right? (what the model *can* solve)
- PassRatio@n: how large is the share of right samples? (how *reliably* it solves it; equal to Pass@1)
- maj@k: how often does the most frequent answer of k samples win rightly? (what voting makes of it)
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

NO_ANSWER = -1  # the class of a sample from which no answer could be read
# The standard error of one problem's maj@k is then at most 0.5 / sqrt(200) = 0.035, that of the mean over the
# 1,319 problems of GSM8K's test set 0.001; all of those, 256 samples each, take about a second.
NUM_PERMUTATIONS = 200
NUM_RESAMPLES = 2000  # bootstrap; the ends of a 95 % interval then rest on 50 resamples each


def pass_at_k(
    num_correct: Int[np.ndarray, "problems"], num_samples: int, ks: Sequence[int]
) -> Float[np.ndarray, "problems ks"]:
    """Probability that k of a problem's n samples, drawn without replacement, hold at least one right one.

    Per problem 1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, section
    2.1). At k = n it is min(c, 1), the Pass@N of arXiv 2403.04706. The quotient of the binomials is the
    product of (n-c-j) / (n-j) for j < k, all of its factors in [0, 1], so nothing overflows; it is exactly 0
    where n-c < k and exactly 1 where c = 0.

    Raises:
        ValueError: where a count lies outside 0..n, or a k outside 1..n.
    """
    num_correct = _checked_counts(num_correct, num_samples)
    _check_ks(ks, num_samples)
    drawn_before = np.arange(num_samples)
    wrong_left = np.maximum(num_samples - num_correct[:, None] - drawn_before, 0)
    all_wrong = np.cumprod(wrong_left / (num_samples - drawn_before), axis=1)  # column j: after j+1 draws
    return 1.0 - all_wrong[:, np.asarray(ks, dtype=int) - 1]


def pass_ratio(num_correct: Int[np.ndarray, "problems"], num_samples: int) -> Float[np.ndarray, "problems"]:
    """Share of right samples, c / n per problem; its mean is the PassRatio@N of arXiv 2403.04706.

    Raises:
        ValueError: where a count lies outside 0..n.
    """
    return _checked_counts(num_correct, num_samples) / num_samples


def answer_classes(answers: Sequence[str | None]) -> Int[np.ndarray, "samples"]:
    """Numbers one problem's answers 0, 1, … as they appear; equal strings share a number, None is -1."""
    numbers: dict[str, int] = {}
    return np.array([NO_ANSWER if a is None else numbers.setdefault(a, len(numbers)) for a in answers], int)


def majority_at_k(
    classes: Int[np.ndarray, "samples"],
    class_is_correct: Bool[np.ndarray, "classes"],
    ks: Sequence[int],
    permutations: Int[np.ndarray, "permutations samples"],
) -> Float[np.ndarray, "ks"]:
    """Expected accuracy of the majority vote over k of one problem's n samples (arXiv 2203.11171).

    The k samples are a uniformly random subset without replacement. Samples without an answer (class -1) do
    not vote; tied classes share the win (right tied classes / tied classes); without a vote the score is 0.

    k = 1 and k = n are exact. Between them the expectation is a Monte Carlo mean: the first k entries of each
    permutation are one random subset, so its standard error is at most 0.5 / sqrt(permutations).

    Args:
        classes: the class of each sample's answer, or -1.
        class_is_correct: whether the answer of class i is right, for every class in `classes`.
        ks: subset sizes, each in 1..n.
        permutations: rows are random orders of 0..n-1.

    Raises:
        ValueError: where a k lies outside 1..n, or a class has no entry in `class_is_correct`.
    """
    num_samples, num_classes = len(classes), len(class_is_correct)
    _check_ks(ks, num_samples)
    if classes.min() < NO_ANSWER or classes.max() >= num_classes:
        raise ValueError(
            f"classes must lie in -1..{num_classes - 1} (one verdict each), got {classes.min()}..{classes.max()}"
        )
    scores = np.zeros(len(ks))
    if num_classes == 0:
        return scores
    # Column num_classes of the ballot box collects the samples that do not vote.
    bins = np.where(classes == NO_ANSWER, num_classes, classes)
    shuffled = bins[permutations]
    rows = np.arange(len(permutations))[:, None] * (num_classes + 1)
    votes = np.zeros((len(permutations), num_classes + 1), dtype=np.int64)
    counted = 0
    for column in np.argsort(ks):
        k = ks[column]
        if k == 1:
            scores[column] = np.mean(np.append(class_is_correct, False)[bins])
        elif k == num_samples:
            whole = np.bincount(bins, minlength=num_classes + 1)[None, :num_classes]
            scores[column] = _vote_scores(whole, class_is_correct)[0]
        else:
            ballots = (rows + shuffled[:, counted:k]).ravel()
            votes += np.bincount(ballots, minlength=votes.size).reshape(votes.shape)
            counted = k
            scores[column] = _vote_scores(votes[:, :num_classes], class_is_correct).mean()
    return scores


def _vote_scores(
    votes: Int[np.ndarray, "subsets classes"], class_is_correct: Bool[np.ndarray, "classes"]
) -> Float[np.ndarray, "subsets"]:
    most = votes.max(axis=1)
    tied = votes == most[:, None]
    share_right = (tied @ class_is_correct.astype(float)) / tied.sum(axis=1)
    return np.where(most > 0, share_right, 0.0)


def bootstrap_ci95(
    values: Float[np.ndarray, "problems columns"], seed: int, num_resamples: int = NUM_RESAMPLES
) -> Float[np.ndarray, "columns 2"]:
    """95 % percentile bootstrap intervals [low, high] of the column means, resampling problems (Efron 1979).

    They speak of the choice of problems, not of another training run. Every column sees the same resamples.
    Where all problems agree (all solved, say) the interval has no width: it then promises more than it knows.

    Raises:
        ValueError: without problems.
    """
    if len(values) == 0:
        raise ValueError("no problems to resample: pass at least one")
    means = resamples(len(values), num_resamples, seed) @ values / len(values)
    return np.percentile(means, [2.5, 97.5], axis=0).T


def resamples(num_problems: int, num_resamples: int, seed: int) -> Float[np.ndarray, "resamples problems"]:
    """How often each problem was drawn in a resample, which is all that its mean needs to know."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples).astype(float)


def compute_metrics(
    *,
    correct: Sequence[Sequence[bool]] | Bool[np.ndarray, "problems samples"],
    classes: Sequence[Sequence[int]] | Int[np.ndarray, "problems samples"],
    finish_reasons: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[str | int | None]],
    complete: Literal[True] | Mapping[str, Any] = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The measured part of metrics.json, ready for json.dump: everything but the run's own settings.

    Row i of every argument belongs to the same problem. Problems that miss samples must be left out by the
    caller, who says so in `complete`.

    Args:
        correct: whether each sample is right.
        classes: each sample's answer class within its problem, -1 without an answer (see `answer_classes`).
        finish_reasons: "eos", "length", "stop" or "error" for each sample.
        groups: any of "level", "subject", "steps", each with one value a problem; None leaves a problem out.
        complete: True, or what is missing.
        seed: of the permutations for the vote and of the bootstrap.

    Returns:
        num_problems, num_samples, pass_at (every k up to n), pass_ratio, maj_at (powers of two up to n, and
        n), truncated_fraction, by_level, by_subject, by_steps, complete.

    Raises:
        ValueError: without problems or samples, where problems differ in their number of samples, where the
            arguments differ in length, where a group's name is unknown, where a sample without an answer is
            marked right, or where an answer class is right in one sample and wrong in another.
    """
    num_samples = _common_sample_count(correct, classes, finish_reasons)
    right, class_of = np.asarray(correct, dtype=bool), np.asarray(classes, dtype=int)
    num_problems = len(right)
    answerless = np.argwhere(right & (class_of == NO_ANSWER))
    if len(answerless):
        raise ValueError(
            f"sample {answerless[0, 1]} of problem {answerless[0, 0]} (counted from 0) is marked "
            "right but has no answer (class -1): a right sample must have one"
        )
    pass_ks = range(1, num_samples + 1)
    maj_ks = sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})
    num_correct = right.sum(axis=1)
    pass_values = pass_at_k(num_correct, num_samples, pass_ks)
    ratio_values = pass_ratio(num_correct, num_samples)[:, None]
    maj_values = majorities(class_of, right, maj_ks, seed)
    values = np.concatenate([pass_values, ratio_values, maj_values], axis=1)
    columns = _with_intervals(values, seed)
    metrics: dict[str, Any] = {
        "num_problems": num_problems,
        "num_samples": num_samples,
        "pass_at": {str(k): columns[i] for i, k in enumerate(pass_ks)},
        "pass_ratio": {str(num_samples): columns[num_samples]},
        "maj_at": {str(k): columns[num_samples + 1 + i] for i, k in enumerate(maj_ks)},
        "truncated_fraction": float(np.mean([[r == "length" for r in row] for row in finish_reasons])),
    }
    unknown = set(groups) - {"level", "subject", "steps"}
    if unknown:
        raise ValueError(f"groups has unknown {sorted(unknown)}: allowed are 'level', 'subject' and 'steps'")
    for name in ("level", "subject", "steps"):
        labels = groups.get(name, [None] * num_problems)
        if len(labels) != num_problems:
            raise ValueError(f"groups[{name!r}] has {len(labels)} values for {num_problems} problems")
        metrics[f"by_{name}"] = {
            str(label): _group_metrics(values[[other == label for other in labels]], num_samples, seed)
            for label in sorted({label for label in labels if label is not None})
        }
    metrics["complete"] = complete if complete is True else dict(complete)
    return metrics


def majorities(
    classes: Int[np.ndarray, "problems samples"],
    right: Bool[np.ndarray, "problems samples"],
    ks: Sequence[int],
    seed: int = 0,
) -> Float[np.ndarray, "problems ks"]:
    """`majority_at_k` of each problem. Raises ValueError where a class is right in one sample and wrong in another."""
    # One set of permutations serves all problems: the order of a problem's samples is random already.
    orders = np.tile(np.arange(classes.shape[1]), (NUM_PERMUTATIONS, 1))
    permutations = np.random.default_rng(seed).permuted(orders, axis=1)
    return np.stack(
        [
            majority_at_k(row, _class_is_correct(row, verdicts), ks, permutations)
            for row, verdicts in zip(classes, right, strict=True)
        ]
    )


def _group_metrics(values: Float[np.ndarray, "problems columns"], num_samples: int, seed: int) -> dict[str, Any]:
    passed, ratio = _with_intervals(values[:, [num_samples - 1, num_samples]], seed)
    return {"num_problems": len(values), "pass_ratio": ratio, "pass_at": {str(num_samples): passed}}


def _with_intervals(values: Float[np.ndarray, "problems columns"], seed: int) -> list[dict[str, Any]]:
    return [
        {"value": float(mean), "ci95": [float(low), float(high)]}
        for mean, (low, high) in zip(values.mean(axis=0), bootstrap_ci95(values, seed), strict=True)
    ]


def _class_is_correct(
    classes: Int[np.ndarray, "samples"], right: Bool[np.ndarray, "samples"]
) -> Bool[np.ndarray, "classes"]:
    verdicts = np.zeros(classes.max() + 1, dtype=bool)
    verdicts[classes[right]] = True
    voting = classes != NO_ANSWER
    mixed = verdicts[classes[voting]] != right[voting]
    if mixed.any():
        raise ValueError(f"the answer class {classes[voting][mixed][0]} is right in some samples and wrong in others")
    return verdicts


def _common_sample_count(*arguments: Sequence[Sequence[Any]] | np.ndarray) -> int:
    lengths = [[len(row) for row in argument] for argument in arguments]
    if len({len(rows) for rows in lengths}) != 1:
        raise ValueError(
            "correct, classes and finish_reasons must have one row a problem each, got "
            f"{[len(rows) for rows in lengths]} rows"
        )
    if not lengths[0]:
        raise ValueError("no problems: metrics need at least one problem with all its samples")
    num_samples = lengths[0][0]
    for problem, counts in enumerate(zip(*lengths, strict=True)):
        if set(counts) != {num_samples}:
            raise ValueError(
                f"problem {problem} (counted from 0) has {counts} samples in (correct, classes, "
                f"finish_reasons), the first problem has {num_samples}: pass only problems that have all "
                "their samples, and say in `complete` what is missing"
            )
    if num_samples == 0:
        raise ValueError("no samples: metrics need at least one sample a problem")
    return num_samples


def _checked_counts(num_correct: Int[np.ndarray, "problems"], num_samples: int) -> Int[np.ndarray, "problems"]:
    num_correct = np.asarray(num_correct)
    if num_samples < 1 or np.any(num_correct < 0) or np.any(num_correct > num_samples):
        raise ValueError(f"num_correct must lie in 0..num_samples = {num_samples} >= 1, got {num_correct}")
    return num_correct


def _check_ks(ks: Sequence[int], num_samples: int) -> None:
    outside = [k for k in ks if not 1 <= k <= num_samples]
    if outside:
        raise ValueError(f"ks must lie in 1..{num_samples} (the number of samples), got {outside}")
