"""The pack plan against naive packers and exhaustive search."""

import math

import numpy as np
import pytest

from data_pipeline.packing import pack, pad

CONTEXT = 64


def length_sets():
    """Many kinds of row lengths for a context of 64."""
    rng = np.random.default_rng(0)
    sets = [[64], [1], [64] * 5, [1] * 200, [33] * 9, [32] * 9, list(range(1, 65)), [63, 1, 62, 2, 61, 3]]
    sets += [[54, 52, 10, 9, 3]]  # two full bins, but three where the emptiest bin is taken first
    sets += [rng.integers(1, high, rng.integers(1, 120)).tolist() for high in (5, 20, 33, 65) for _ in range(8)]
    return sets


SETS = length_sets()


def decreasing_fit(lengths, context, best):
    """Bins of first (or best) fit decreasing, found by looking at every bin."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i]) if best else fitting[0]] -= length
        else:
            rooms.append(context - length)
    return len(rooms)


def fewest_bins(lengths, context):
    """The optimum, by trying every placement."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for i in range(len(rooms)):
            if rooms[i] >= lengths[index]:
                place(index + 1, [*rooms[:i], rooms[i] - lengths[index], *rooms[i + 1 :]])
        place(index + 1, [*rooms, context - lengths[index]])

    place(0, [])
    return best


def members(plan):
    return [plan[i].tolist() for i in range(len(plan))]


@pytest.mark.parametrize("lengths", SETS, ids=range(len(SETS)))
def test_each_row_is_in_exactly_one_bin_and_no_bin_is_over_the_context(lengths):
    for seed, epoch in ((0, 0), (3, 1)):
        bins = members(pack(np.array(lengths), CONTEXT, seed, epoch))
        assert sorted(row for bin_ in bins for row in bin_) == list(range(len(lengths)))
        assert all(bin_ for bin_ in bins)
        assert max(sum(lengths[row] for row in bin_) for bin_ in bins) <= CONTEXT


@pytest.mark.parametrize("lengths", SETS, ids=range(len(SETS)))
def test_bins_are_as_many_as_best_fit_decreasing_makes_whatever_the_seed_and_epoch(lengths):
    expected = decreasing_fit(lengths, CONTEXT, best=True)
    for seed, epoch in ((0, 0), (0, 1), (0, 99), (1, 0), (12345, 7)):
        assert len(pack(np.array(lengths), CONTEXT, seed, epoch)) == expected
    assert expected <= decreasing_fit(lengths, CONTEXT, best=False)


def test_bins_are_within_the_proven_bound_of_the_optimum():
    rng = np.random.default_rng(1)
    for _ in range(60):
        lengths = rng.integers(1, 40, rng.integers(1, 9))
        fewest = fewest_bins(lengths.tolist(), CONTEXT)
        # Johnson 1974 for best fit decreasing, with Dosa's 6/9 of 2007: 11/9 of the optimum and 6/9.
        assert fewest <= len(pack(lengths, CONTEXT, 0, 0)) <= math.floor((11 * fewest + 6) / 9)


@pytest.mark.parametrize("plan_of", [lambda s, e: pack(np.full(60, 9), CONTEXT, s, e), lambda s, e: pad(60, s, e)])
def test_a_plan_is_a_function_of_its_arguments_and_another_epoch_or_seed_differs(plan_of):
    plan = members(plan_of(5, 2))
    np.random.default_rng().random()
    assert members(plan_of(5, 2)) == plan
    assert members(plan_of(5, 3)) != plan
    assert members(plan_of(6, 2)) != plan
    assert members(plan_of(2, 5)) != plan


def test_another_epoch_puts_other_rows_together():
    lengths = np.full(60, 9)
    together = [{frozenset(bin_) for bin_ in members(pack(lengths, CONTEXT, 0, epoch))} for epoch in range(2)]
    assert len(together[0] & together[1]) < len(together[0]) / 2


def test_order_within_a_bin_does_not_follow_length():
    lengths = np.array([40, 20] * 100)
    long_first = [lengths[bin_[0]] == 40 for bin_ in members(pack(lengths, CONTEXT, 0, 0)) if len(bin_) == 2]
    assert 0.3 < np.mean(long_first) < 0.7


def test_padded_bins_hold_one_row_each_in_random_order():
    bins = members(pad(50, 0, 0))
    assert sorted(bins) == [[row] for row in range(50)]
    assert bins != sorted(bins)


def test_no_rows_make_no_bins():
    assert len(pack(np.zeros(0, np.int64), CONTEXT, 0, 0)) == 0
    assert len(pad(0, 0, 0)) == 0


@pytest.mark.parametrize("lengths", [[65], [1, 64, 65], [0], [3, 0, 3], [-1]])
def test_a_row_that_is_empty_or_longer_than_the_context_is_an_error(lengths):
    with pytest.raises(ValueError, match=f"must be 1 to 64, got {min(lengths)} to {max(lengths)}"):
        pack(np.array(lengths), CONTEXT, 0, 0)


def test_gsm8k_fills_98_percent_of_its_bins_and_needs_no_more_than_first_fit_decreasing(gsm8k_rows):
    lengths = gsm8k_rows.input_lengths
    plan = pack(lengths, 2048, seed=0, epoch=0)
    assert lengths.sum() / (len(plan) * 2048) >= 0.98
    assert len(plan) <= decreasing_fit(lengths.tolist(), 2048, best=False)
    assert sorted(plan.rows.tolist()) == list(range(7473))
    assert np.add.reduceat(lengths[plan.rows], plan.offsets[:-1]).max() <= 2048
