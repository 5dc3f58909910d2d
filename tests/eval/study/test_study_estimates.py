"""Estimates of several seeds against hand computation, scipy and simulation."""

import numpy as np
import pytest
import scipy.stats

from eval.study.estimates import Scores, combined, estimate, log_fit, paired


def test_one_seed_gives_the_t_interval_over_problems() -> None:
    scores = np.array([[0.0, 1.0, 1.0, 0.0, 1.0, 0.5]])
    found = estimate(Scores.of_problems([7], scores))
    low, high = scipy.stats.ttest_1samp(scores[0], 0).confidence_interval(0.95)
    assert found.value == pytest.approx(3.5 / 6)
    assert found.ci95 == pytest.approx((low, high))
    assert found.by_seed == {7: pytest.approx(3.5 / 6)}


def test_values_without_problems_give_the_t_interval_over_seeds() -> None:
    values = np.array([0.31, 0.35, 0.27])
    found = estimate(Scores((0, 1, 2), values, None, np.zeros(3)))
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.ci95 == pytest.approx((low, high))


def test_both_sources_of_chance_add_up_as_computed_by_hand() -> None:
    # Problems: means over seeds 0.5 (x3) and 1.0 (x3), variance 0.075, of the mean 0.0125, 5 degrees of freedom.
    # Seeds: values 0.5 and 1.0, variance 0.125, of the mean 0.0625, 1 degree. Together 0.075, with
    # 0.075² / (0.0125² / 5 + 0.0625² / 1) = 1.4286 degrees.
    scores = Scores.of_problems([0, 1], np.array([[0.0, 1.0] * 3, [1.0, 1.0] * 3]))
    found = estimate(scores)
    half = scipy.stats.t.ppf(0.975, 0.075**2 / (0.0125**2 / 5 + 0.0625**2)) * np.sqrt(0.075)
    assert found.value == 0.75
    assert found.ci95 == pytest.approx((0.75 - half, 0.75 + half), rel=1e-6)
    assert estimate(scores, (0, 1)).ci95 == (0.0, 1.0)


def test_where_nothing_varies_or_problems_are_few_there_is_no_interval_and_no_verdict() -> None:
    assert estimate(Scores.of_problems([0, 1], np.ones((2, 80)))).ci95 is None
    assert estimate(Scores((0,), np.array([0.3]), None, np.zeros(1))).ci95 is None
    few = estimate(Scores.of_problems([0, 1], np.array([[0.5, 0.4, 0.5, 0.6], [0.5, 0.5, 0.5, 0.5]])))
    assert few.ci95 is None and not few.clear and few.value == pytest.approx(0.5)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        problems, seeds = rng.normal(0, 0.3, (1, 60)), rng.normal(0, 0.06, (3, 1))
        found = estimate(Scores.of_problems(range(3), 0.5 + problems + seeds + rng.normal(0, 0.1, (3, 60))))
        held += found.ci95[0] <= 0.5 <= found.ci95[1]
    assert 930 <= held <= 995  # 95 %, and a little more: the noise of samples is in both parts


def test_what_is_hard_for_both_does_not_blur_a_difference() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random((1, 50))
    first = Scores.of_problems([0, 1], hard + rng.normal(0, 0.01, (2, 50)))
    second = Scores.of_problems([0, 1], hard + 0.05 + rng.normal(0, 0.01, (2, 50)))
    found = estimate(combined([1, -1], [second, first]))
    assert paired([first, Scores.of_problems([5], hard)]) is None
    assert found.clear and found.value == pytest.approx(0.05, abs=0.01)
    assert not estimate(combined([1, -1], [first, first])).clear


def test_a_slope_is_numpys_least_squares_and_takes_the_seeds_that_all_points_have() -> None:
    rng = np.random.default_rng(2)
    sizes = [100, 200, 400, 1600]
    scores = [Scores.of_problems([0, 1, 2], rng.random((3, 20)) + 0.1 * place) for place in range(4)]
    scores[1] = Scores.of_problems([0, 2], rng.random((2, 20)))
    fit = log_fit(sizes, scores)
    assert fit is not None and set(fit.slope.by_seed) == {0, 2}
    for seed in (0, 2):
        values = [of.values[of.seeds.index(seed)] for of in scores]
        assert fit.slope.by_seed[seed] == pytest.approx(np.polyfit(np.log2(sizes), values, 1)[0])
    assert log_fit([100, 200], scores[:2]) is None


def test_a_slope_of_values_with_errors_carries_them() -> None:
    # x = 1, 2, 4: logs 0, 1, 2, weights -1/2, 0, 1/2; errors 0.02 at the ends, so sqrt(2) * 0.01.
    scores = [Scores((0,), np.array([v]), None, np.array([0.02])) for v in (0.1, 0.3, 0.4)]
    fit = log_fit([1, 2, 4], scores)
    assert fit is not None and fit.slope.value == pytest.approx(0.15)
    assert fit.slope.ci95[1] - fit.slope.value == pytest.approx(1.959964 * np.sqrt(2) * 0.01, rel=1e-5)
    assert fit.off == pytest.approx(abs(0.3 - (0.8 / 3))) and not fit.straight  # 1.96 * 0.02 * (2/3)^(1/2) = 0.032
    assert fit.last.value == pytest.approx(0.1)


def test_what_levels_off_is_no_line() -> None:
    rng = np.random.default_rng(3)
    scores = [Scores.of_problems([0, 1, 2], v + rng.normal(0, 0.05, (3, 80))) for v in (0.1, 0.5, 0.8, 0.82)]
    fit = log_fit([100, 200, 400, 1600], scores)
    assert fit is not None and not fit.straight and fit.slope.clear
    assert fit.last.value == pytest.approx(0.01, abs=0.01)  # 2 points over two doublings


def test_a_point_without_an_interval_is_off_the_line_where_it_does_not_lie_on_it() -> None:
    scores = [Scores.of_problems([0, 1], np.full((2, 20), value)) for value in (0.0, 1.0, 1.0, 1.0)]
    bent = log_fit([1, 2, 4, 8], scores)
    assert bent is not None and bent.off == pytest.approx(0.4) and not bent.straight
    even = log_fit([1, 2, 4], [Scores.of_problems([0, 1], np.full((2, 20), value)) for value in (0.2, 0.4, 0.6)])
    assert even is not None and even.straight


def test_distances_from_the_line_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(-0.4, 0.4, 60)  # of each problem, the same at every size: no reason to doubt the bend
    scores = [Scores.of_problems([0, 1, 2], v + hard + rng.normal(0, 0.01, (3, 60))) for v in (0.4, 0.5, 0.55)]
    fit = log_fit([100, 200, 400], scores)
    assert fit is not None and fit.off < 0.02 and not fit.straight
    assert estimate(scores[0]).ci95[1] - estimate(scores[0]).ci95[0] > 0.1  # which alone would hold the line


def test_a_group_of_problems_is_theirs_alone() -> None:
    scores = Scores.of_problems([0], np.array([[0.0, 1.0, 0.5]]))
    assert scores.of_group([True, False, True]).values == pytest.approx([0.25])
