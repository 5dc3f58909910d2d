"""Rows that hold a problem of a test set: verbatim, with other numbers, with other names, or reworded in part."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from data_pipeline.clean.shingles import Shingles, shingles, words

N_GRAM = 3  # words


@dataclasses.dataclass(frozen=True)
class Match:
    """A row, the test problem that it holds, and the share of that problem's n-grams that stand in the row."""

    row: int
    problem: int
    share: float


class TestSets:
    """The questions of test sets, by their n-grams of words in which numbers and names are masked.

    N-grams of more than `max_problems` questions are boilerplate ("how many more does he have") and ignored.
    """

    __test__ = False  # no test case, whatever pytest takes the name for

    def __init__(self, questions: Sequence[str], max_problems: int = 8, n: int = N_GRAM):
        self._n = n
        grams = shingles([words(question, names=True) for question in questions], n)
        problem_of = np.repeat(np.arange(len(questions)), np.diff(grams.offsets))
        unique, inverse, counts = np.unique(grams.hashes, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= max_problems
        order = np.argsort(inverse[telling], kind="stable")
        self._hashes = unique[counts <= max_problems]
        self._problems = problem_of[telling][order]
        self._offsets = np.concatenate([[0], np.cumsum(counts[counts <= max_problems])])
        # Of how many n-grams a problem consists: what is boilerplate does not count.
        self._sizes = np.maximum(1, np.bincount(problem_of[telling], minlength=len(questions)))

    def shingles(self, texts: Iterable[str]) -> Shingles:
        """The n-grams of rows, as `matches` compares them."""
        return shingles([words(text, names=True) for text in texts], self._n)

    def matches(self, rows: Shingles, threshold: float) -> list[Match]:
        """Of each row that holds at least `threshold` of a problem's n-grams, the problem that it holds most of."""
        row_of = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
        place = np.searchsorted(self._hashes, rows.hashes)
        found = np.flatnonzero(
            (place < len(self._hashes)) & (self._hashes[np.minimum(place, len(self._hashes) - 1)] == rows.hashes)
        )
        if not len(found):
            return []
        starts, ends = self._offsets[place[found]], self._offsets[place[found] + 1]
        counts = ends - starts
        problems = self._problems[
            np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        ]
        pairs, times = np.unique(np.repeat(row_of[found], counts) * len(self._sizes) + problems, return_counts=True)
        rows_found, problems_found = pairs // len(self._sizes), pairs % len(self._sizes)
        shares: Float[np.ndarray, " pairs"] = times / self._sizes[problems_found]
        best: dict[int, Match] = {}
        for index in np.flatnonzero(shares >= threshold).tolist():
            match = Match(int(rows_found[index]), int(problems_found[index]), float(shares[index]))
            if match.row not in best or match.share > best[match.row].share:
                best[match.row] = match
        return list(best.values())
