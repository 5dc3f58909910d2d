"""Resampling by steps: exact sizes, caps, the direction of the paper, and shares against their expectation."""

import collections

import numpy as np
import pydantic
import pytest

from data_pipeline.resample import Resample, histogram, merged_bins, resample, resampling_report
from data_pipeline.settings import UsageError

# Steps of a thousand rows, as skewed as GSM8K's.
STEPS = np.repeat([2, 3, 4, 5, 6, 7, 8, 11], [250, 300, 220, 130, 60, 25, 12, 3])


def copies_of(drawn):
    return np.bincount(drawn, minlength=len(STEPS))


@pytest.mark.parametrize("num_rows", [None, 1, 137, 1000, 2500, 4000])
@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 3.0])
def test_as_many_rows_come_out_as_asked_for_and_none_too_often(num_rows, power):
    drawn = resample(STEPS, Resample(power=power, num_rows=num_rows), seed=1)
    assert len(drawn) == (num_rows or 1000)
    assert copies_of(drawn).max() <= 4
    assert (np.diff(drawn) >= 0).all()


def test_every_row_comes_as_often_as_its_weight_says_rounded_down_or_up():
    drawn = resample(STEPS, Resample(power=1.0, min_bin=1), seed=3)
    expected = STEPS * (1000 / STEPS.sum())
    copies = copies_of(drawn)
    assert (copies >= np.floor(expected)).all() and (copies <= np.ceil(expected)).all()


def test_roundings_are_fair():
    """Over seeds each row's mean is its expectation; the standard error of a coin over 400 draws is 0.025."""
    expected = STEPS * (300 / STEPS.sum())
    mean = np.mean([copies_of(resample(STEPS, Resample(num_rows=300, min_bin=1), seed)) for seed in range(400)], axis=0)
    assert np.abs(mean - expected).max() < 5 * 0.025
    assert np.corrcoef(mean, expected)[0, 1] > 0.9


def test_long_solutions_get_a_larger_share_and_equal_weights_change_nothing():
    drawn = resample(STEPS, Resample(), seed=0)
    assert (STEPS[drawn] >= 5).mean() > 1.3 * (STEPS >= 5).mean()
    same = resample(STEPS, Resample(power=0), seed=0)
    report = resampling_report(STEPS, STEPS[same], same)
    assert same.tolist() == list(range(1000)) and report["effective_sample_size"] == 1000
    assert report["before"] == report["after"] == {2: 250, 3: 300, 4: 220, 5: 130, 6: 60, 7: 25, 8: 12, 11: 3}


def test_a_target_is_met_and_the_surplus_of_what_is_capped_goes_to_the_others():
    drawn = resample(STEPS, Resample(mode="target", target={2: 1, 4: 2, 6: 1}, num_rows=400), seed=0)
    assert histogram(STEPS[drawn]) == {2: 100, 4: 200, 6: 100}
    capped = resample(STEPS, Resample(mode="target", target={3: 1, 6: 1}, num_rows=800), seed=0)
    assert histogram(STEPS[capped]) == {3: 560, 6: 240}  # 60 rows of six steps make 240 at most
    with pytest.raises(UsageError, match="make 240 of 500 rows; raise max_repeats"):
        resample(STEPS, Resample(mode="target", target={6: 1}, num_rows=500), seed=0)
    with pytest.raises(UsageError, match="do not make so many"):
        resample(STEPS, Resample(num_rows=4001), seed=0)


def test_rare_numbers_of_steps_are_merged_with_the_next_lower():
    assert histogram(merged_bins(STEPS, 20)) == {2: 250, 3: 300, 4: 220, 5: 130, 6: 60, 7: 40}
    assert histogram(merged_bins(STEPS, 101)) == {2: 250, 3: 300, 4: 220, 5: 230}
    assert histogram(merged_bins(STEPS, 10**6)) == {2: 1000}
    gapped = np.array([1] * 3 + [2] * 50 + [9] * 50 + [-1] * 2)
    assert histogram(merged_bins(gapped, 20)) == {2: 55, 9: 50}  # too few at the bottom, and unknown, join the lowest


def test_the_effective_sample_size_is_kishs():
    drawn = resample(STEPS, Resample(power=2.0), seed=5)
    counts = collections.Counter(drawn.tolist()).values()
    report = resampling_report(STEPS, STEPS[drawn], drawn)
    assert report["effective_sample_size"] == pytest.approx(sum(counts) ** 2 / sum(c * c for c in counts))
    assert report["different_rows"] == len(counts)


def test_a_seed_gives_one_result_and_another_another():
    one, same, other = (resample(STEPS, Resample(), seed).tolist() for seed in (7, 7, 8))
    assert one == same != other


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "target"}, "target belongs to mode=target"),
        ({"target": {2: 1}}, "target belongs to mode=target"),
        ({"mode": "target", "target": {2: 0}}, "greater than 0"),
        ({"mode": "target", "target": {2: -1}}, "greater than 0"),
        ({"max_repeats": 0}, "greater than 0"),
        ({"power": 99}, "less than or equal to 8"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        Resample(**settings)


def test_what_does_not_come_out_as_asked_is_said(caplog):
    steps = np.repeat([2, 4, 6], [500, 400, 30])
    drawn = resample(steps, Resample(mode="target", target={2: 1, 4: 2, 6: 2}), seed=0)
    assert (steps[drawn] == 6).sum() == 120
    assert "come 4 times each (resample.max_repeats) and are still too few (6: 40.0 % asked, 12.9 % had)" in caplog.text
    caplog.clear()
    resample(np.repeat([2, 3, 4], 10), Resample(power=8), seed=0)
    assert "resampling changes nothing" in caplog.text and "resample.min_bin=20" in caplog.text
    caplog.clear()
    resample(steps, Resample(power=1), seed=0)
    assert not caplog.text


def test_steps_that_no_row_has_are_refused():
    with pytest.raises(UsageError, match="no row has 40 steps; there are rows of 2, 4"):
        resample(np.repeat([2, 4], 50), Resample(mode="target", target={2: 1, 40: 1}), seed=0)
