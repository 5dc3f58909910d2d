"""Rows that hold a problem of a test set: verbatim, with other numbers, with other names, or reworded in part."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipeline.clean.shingles import Shingles, shingles, words

N_GRAM = 3  # words
# With fewer n-grams of its own, a question with masked numbers and names says too little to be told by a part of them.
MIN_TELLING = 10


@dataclasses.dataclass(frozen=True)
class Match:
    """A row, the test problem that it holds, and the share of that problem's n-grams that stand in the row."""

    row: int
    problem: int
    share: float


class Grams(NamedTuple):
    """N-grams of texts, with numbers and names masked, and as they are."""

    masked: Shingles
    plain: Shingles


class TestSets:
    """The questions of test sets, by their n-grams of words.

    Most are told by n-grams in which numbers and names are masked, those left out that stand in more than
    `max_problems` questions, which are boilerplate ("how many more does he have"). A question of which fewer than
    `MIN_TELLING` remain is told by all of its n-grams as they are, every one of which a row must hold.
    """

    __test__ = False  # no test case, whatever pytest takes the name for

    def __init__(self, questions: Sequence[str], max_problems: int = 8, n: int = N_GRAM):
        self._n = n
        grams = self.grams(questions)
        _, inverse, counts = np.unique(grams.masked.hashes, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= max_problems
        problem_of = np.repeat(np.arange(len(questions)), np.diff(grams.masked.offsets))
        is_long = np.bincount(problem_of[telling], minlength=len(questions)) >= MIN_TELLING
        self._long = _Index(grams.masked, telling & is_long[problem_of])
        of_plain = np.repeat(np.arange(len(questions)), np.diff(grams.plain.offsets))
        self._short = _Index(grams.plain, ~is_long[of_plain])

    def grams(self, texts: Iterable[str]) -> Grams:
        """The n-grams of rows, as `matches` compares them."""
        every = [words(text) for text in texts]
        return Grams(
            shingles([masked for masked, _ in every], self._n), shingles([plain for _, plain in every], self._n)
        )

    def matches(self, rows: Grams, threshold: float) -> list[Match]:
        """Of each row that holds at least `threshold` of a problem's n-grams, the problem that it holds most of."""
        best: dict[int, Match] = {}
        for match in [*self._long.matches(rows.masked, threshold), *self._short.matches(rows.plain, 1.0)]:
            if match.row not in best or match.share > best[match.row].share:
                best[match.row] = match
        return list(best.values())


class _Index:
    """Which problems have an n-gram, of those n-grams that are `used`."""

    def __init__(self, grams: Shingles, used: Bool[np.ndarray, " hashes"]):
        problem_of = np.repeat(np.arange(len(grams)), np.diff(grams.offsets))[used]
        self._hashes, inverse, counts = np.unique(grams.hashes[used], return_inverse=True, return_counts=True)
        self._problems: Int[np.ndarray, " uses"] = problem_of[np.argsort(inverse, kind="stable")]
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._sizes = np.bincount(problem_of, minlength=len(grams))

    def matches(self, rows: Shingles, threshold: float) -> list[Match]:
        """Every row and problem of which the row holds at least this share."""
        if not len(self._hashes):
            return []
        row_of = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
        place = np.minimum(np.searchsorted(self._hashes, rows.hashes), len(self._hashes) - 1)
        found = np.flatnonzero(self._hashes[place] == rows.hashes)
        starts, ends = self._offsets[place[found]], self._offsets[place[found] + 1]
        counts = ends - starts
        problems = self._problems[
            np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        ]
        pairs, times = np.unique(np.repeat(row_of[found], counts) * len(self._sizes) + problems, return_counts=True)
        rows_found, problems_found = pairs // len(self._sizes), pairs % len(self._sizes)
        shares: Float[np.ndarray, " pairs"] = times / self._sizes[problems_found]
        return [
            Match(int(rows_found[index]), int(problems_found[index]), float(shares[index]))
            for index in np.flatnonzero(shares >= threshold).tolist()
        ]
