"""Counts and weights: nested subsets, exact shares, repeats that are even."""

import collections
import itertools

import numpy as np
import pytest

from data_pipeline.mixture import mixed_counts, nested_subset, repeated
from data_pipeline.settings import UsageError


def test_smaller_subsets_lie_within_larger_ones():
    sizes = (1, 940, 1880, 3750, 7473)
    subsets = [set(nested_subset(7473, size, seed=4).tolist()) for size in sizes]
    assert [len(subset) for subset in subsets] == list(sizes)
    assert all(small < large for small, large in itertools.pairwise(subsets))
    assert set(nested_subset(7473, 940, seed=5).tolist()) != subsets[1]
    with pytest.raises(ValueError, match="count=8000 of 7473 rows"):
        nested_subset(7473, 8000, seed=4)


def test_a_subset_of_some_rows_is_that_of_all_without_the_others():
    """What is too long for one context does not change which of the others are drawn first."""
    some = np.flatnonzero(np.arange(1000) % 10)
    assert set(nested_subset(1000, 90, seed=1, among=some)) < set(nested_subset(1000, 130, seed=1))
    assert set(nested_subset(1000, 900, seed=1, among=some)) == set(some.tolist())
    with pytest.raises(ValueError, match="count=901 of 900 rows"):
        nested_subset(1000, 901, seed=1, among=some)


def test_every_row_is_as_likely():
    times = np.sum([np.bincount(nested_subset(50, 10, seed), minlength=50) for seed in range(2000)], axis=0)
    # Chi-square of 2000 draws of 10 of 50: 49 degrees of freedom, scaled by (1 - 10 / 50); 99.9 % lie under 86.
    assert np.square(times - 400).sum() / 400 / 0.8 < 86


@pytest.mark.parametrize(
    ("available", "weights", "total", "counts"),
    [
        ([100, 100], [1, 1], None, [100, 100]),
        ([100, 300], [1, 1], None, [100, 100]),
        ([100, 300], [1, 3], None, [100, 300]),
        ([100, 300], [1, 2], None, [100, 200]),
        ([100, 300], [1, 1], 500, [250, 250]),
        ([10, 10, 10], [1, 1, 1], 10, [4, 3, 3]),
        ([7, 7], [0.5, 1.5], 8, [2, 6]),
    ],
)
def test_shares_are_exact(available, weights, total, counts):
    assert mixed_counts(available, weights, total) == counts


def test_a_dataset_that_would_have_no_row_is_refused():
    with pytest.raises(
        UsageError, match="the weights 1, 1000 leave a dataset without a row in an epoch of 10 examples"
    ):
        mixed_counts([100, 100], [1, 1000], 10)


def test_repeats_are_even():
    rows = np.array([5, 6, 7, 8])
    times = collections.Counter(repeated(rows, 11, seed=0).tolist())
    assert set(times) == {5, 6, 7, 8} and sorted(times.values()) == [2, 3, 3, 3]
    assert repeated(rows, 4, seed=0).tolist() == [5, 6, 7, 8]
    assert len(set(repeated(rows, 3, seed=0).tolist())) == 3
