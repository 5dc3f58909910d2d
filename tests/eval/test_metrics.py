"""Each number is checked against a hand computation or an enumeration of every subset."""

import itertools
import math

import numpy as np
import pytest

from eval.metrics import answer_classes, bootstrap_ci95, compute_metrics, majority_at_k, pass_at_k, pass_ratio


def enumerated_pass(verdicts, k):
    subsets = list(itertools.combinations(verdicts, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def enumerated_majority(classes, correct_classes, k):
    total = 0.0
    subsets = list(itertools.combinations(classes, k))
    for subset in subsets:
        votes = [c for c in subset if c >= 0]
        if votes:
            most = max(votes.count(c) for c in votes)
            winners = {c for c in votes if votes.count(c) == most}
            total += len(winners & correct_classes) / len(winners)
    return total / len(subsets)


def random_permutations(count, length, seed=0):
    return np.random.default_rng(seed).permuted(np.tile(np.arange(length), (count, 1)), axis=1)


def compute_small(**changes):
    arguments = {
        "correct": [[True, False, True, False], [False, False, False, False], [True, True, True, True]],
        "classes": [[0, 1, 0, 2], [0, 0, -1, 1], [0, 0, 0, 0]],
        "finish_reasons": [["eos"] * 4, ["eos", "eos", "length", "error"], ["stop"] * 4],
        "groups": {"steps": [2, 3, 2], "level": [None, None, None]},
    }
    return compute_metrics(**(arguments | changes))


@pytest.mark.parametrize("num_correct", range(8))
def test_pass_at_k_equals_enumeration_of_all_subsets(num_correct):
    verdicts = [True] * num_correct + [False] * (7 - num_correct)
    estimated = pass_at_k(np.array([num_correct]), 7, range(1, 8))[0]
    assert estimated == pytest.approx([enumerated_pass(verdicts, k) for k in range(1, 8)], abs=1e-15)


def test_pass_at_k_equals_exact_binomials_at_256_samples():
    counts = [0, 1, 2, 17, 128, 255, 256]
    exact = [[1 - math.comb(256 - c, k) / math.comb(256, k) for k in range(1, 257)] for c in counts]
    np.testing.assert_allclose(pass_at_k(np.array(counts), 256, range(1, 257)), exact, rtol=1e-12, atol=1e-14)


def test_pass_at_k_is_exactly_one_where_a_wrong_subset_cannot_exist_and_exactly_zero_without_a_right_sample():
    values = pass_at_k(np.array([0, 3, 256]), 256, [1, 253, 254, 256])
    assert values[0].tolist() == [0, 0, 0, 0]
    assert values[1, 2:].tolist() == [1, 1] and values[1, 1] < 1
    assert values[2].tolist() == [1, 1, 1, 1]


def test_pass_ratio_equals_pass_at_1():
    counts = np.arange(257)
    np.testing.assert_allclose(pass_ratio(counts, 256), pass_at_k(counts, 256, [1])[:, 0], atol=1e-15)


def test_counts_and_ks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.num_samples = 4"):
        pass_at_k(np.array([5]), 4, [1])
    with pytest.raises(ValueError, match=r"1\.\.4 .* \[0, 5\]"):
        pass_at_k(np.array([2]), 4, [0, 4, 5])


@pytest.mark.parametrize(
    ("classes", "correct_classes"),
    [
        ([0, 0, 0, 1, 1, 2, 2, 2], {0}),  # a tie between a right and a wrong answer at k = n
        ([0, 1, 1, 2, 2, -1, -1, -1], {1}),  # silent samples outnumber each answer
        ([0, 0, 1, 1, 2, 2, 3, 3], {0, 3}),  # two spellings of the right answer in a four-way tie
        ([-1, -1, -1, -1, -1, -1, -1, 0], {0}),  # most subsets hold no vote
    ],
)
def test_majority_vote_equals_enumeration_of_all_subsets(classes, correct_classes):
    ks = list(range(1, 9))
    verdicts = np.array([c in correct_classes for c in range(max(classes) + 1)])
    estimated = majority_at_k(np.array(classes), verdicts, ks, random_permutations(20_000, 8))
    exact = np.array([enumerated_majority(classes, correct_classes, k) for k in ks])
    np.testing.assert_allclose(estimated, exact, atol=5 * 0.5 / math.sqrt(20_000))
    assert estimated[[0, -1]] == pytest.approx(exact[[0, -1]], abs=1e-15)


def test_majority_of_all_samples_shares_a_tie():
    # Two right, two wrong, one silent: the right answer gets half of the win.
    classes, verdicts = np.array([0, 1, 0, 1, -1]), np.array([True, False])
    assert majority_at_k(classes, verdicts, [5], random_permutations(1, 5)) == 0.5


def test_a_vote_without_answers_scores_zero():
    scores = majority_at_k(np.array([-1, -1, -1]), np.zeros(0, bool), [1, 2, 3], random_permutations(4, 3))
    assert scores.tolist() == [0, 0, 0]


def test_answers_are_numbered_in_order_and_none_is_minus_one():
    assert answer_classes(["12", None, "7", "12"]).tolist() == [0, -1, 1, 0]


def test_bootstrap_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random((800, 2)) < [0.3, 0.5]
    intervals = bootstrap_ci95(values.astype(float), seed=0, num_resamples=4000)
    half_width = 1.96 * values.std(axis=0) / math.sqrt(800)
    np.testing.assert_allclose(intervals[:, 0], values.mean(axis=0) - half_width, atol=0.003)
    np.testing.assert_allclose(intervals[:, 1], values.mean(axis=0) + half_width, atol=0.003)


def test_bootstrap_is_reproducible_from_its_seed():
    values = np.random.default_rng(1).random((30, 1))
    assert np.array_equal(bootstrap_ci95(values, seed=3), bootstrap_ci95(values, seed=3))
    assert not np.array_equal(bootstrap_ci95(values, seed=3), bootstrap_ci95(values, seed=4))


def test_compute_metrics_by_hand():
    # c = 2, 0, 4 of 4. Pass@2 of the first problem: 1 - C(2,2)/C(4,2) = 5/6.
    # maj@4: the first problem's right answer leads 2:1:1, the second has none, the third is unanimous.
    metrics = compute_small()
    assert metrics["num_problems"] == 3 and metrics["num_samples"] == 4 and metrics["complete"] is True
    values = {k: entry["value"] for k, entry in metrics["pass_at"].items()}
    assert values == pytest.approx({"1": 6 / 12, "2": (5 / 6 + 1) / 3, "3": 2 / 3, "4": 2 / 3})
    assert metrics["pass_ratio"]["4"]["value"] == pytest.approx(6 / 12)
    assert list(metrics["maj_at"]) == ["1", "2", "4"]
    assert metrics["maj_at"]["1"]["value"] == pytest.approx(6 / 12)
    assert metrics["maj_at"]["4"]["value"] == pytest.approx(2 / 3)
    assert metrics["truncated_fraction"] == pytest.approx(1 / 12)
    low, high = metrics["pass_at"]["4"]["ci95"]
    assert low <= 2 / 3 <= high


def test_groups_hold_their_own_problems_and_are_empty_where_no_problem_has_the_field():
    metrics = compute_small()
    assert metrics["by_level"] == {} and metrics["by_subject"] == {}
    assert list(metrics["by_steps"]) == ["2", "3"]
    two_steps = metrics["by_steps"]["2"]
    assert two_steps["num_problems"] == 2
    assert two_steps["pass_ratio"]["value"] == pytest.approx(6 / 8)
    assert two_steps["pass_at"] == {"4": {"value": 1.0, "ci95": [1.0, 1.0]}}


def test_a_sample_count_that_is_no_power_of_two_gets_its_own_majority_entry():
    metrics = compute_metrics(correct=[[True] * 6], classes=[[0] * 6], finish_reasons=[["eos"] * 6], groups={})
    assert list(metrics["maj_at"]) == ["1", "2", "4", "6"]


def test_samples_without_answers_have_no_vote():
    metrics = compute_metrics(
        correct=[[False] * 2] * 3, classes=[[-1, -1]] * 3, finish_reasons=[["eos"] * 2] * 3, groups={}
    )
    assert metrics["maj_at"]["2"]["value"] == 0.0


def test_a_vote_of_one_is_a_sample():
    rng = np.random.default_rng(5)
    classes = rng.integers(0, 4, (30, 8))
    metrics = compute_metrics(correct=classes == 2, classes=classes, finish_reasons=[["eos"] * 8] * 30, groups={})
    assert metrics["maj_at"]["1"]["value"] == pytest.approx(metrics["pass_at"]["1"]["value"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": [[True] * 4, [False] * 3, [True] * 4]}, r"problem 1 .* has \(3, 4, 4\) samples"),
        ({"finish_reasons": [["eos"] * 4]}, r"got \[3, 3, 1\] rows"),
        ({"correct": [], "classes": [], "finish_reasons": []}, "no problems"),
        ({"groups": {"topic": [1, 1, 1]}}, r"unknown \['topic'\]"),
        ({"groups": {"steps": [1]}}, r"1 values for 3 problems"),
        ({"correct": [[True] * 4, [False, False, True, False], [True] * 4]}, "sample 2 of problem 1 .* no"),
        ({"classes": [[0] * 4] * 3, "correct": [[True, True, False, True]] * 3}, "class 0 is right in some samples"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        compute_small(**changes)


def test_what_is_missing_is_passed_on():
    missing = {"problems": 7}
    assert compute_small(complete=missing)["complete"] == missing
