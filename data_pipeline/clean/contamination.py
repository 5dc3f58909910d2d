"""Rows that hold a problem of a test set: verbatim, with other numbers, with other names, or reworded in part."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipeline.clean.duplicates import near_duplicates
from data_pipeline.clean.shingles import Shingles, jaccard, shingles, words

N_GRAM = 3  # words
MAX_PROBLEMS = 8  # of a test set that have an n-gram: in more it is boilerplate ("how many more does he have")
# With fewer n-grams of its own, a question with masked numbers and names says too little to be told by a part of them.
MIN_TELLING = 10
# Such a question is told by this share of its n-grams as they are; by all of them where there are fewer than so many.
SHORT_SHARE, MIN_SHORT = 0.7, 8
# Any question is told by a row of this Jaccard similarity in masked n-grams, unless there are fewer than so many.
SIMILARITY, MIN_SIMILAR = 0.8, 6
_VARIANTS = 0.7  # similarity from which questions of a test set are one when they are counted


@dataclasses.dataclass(frozen=True)
class Match:
    """A row, the test problem that it holds, and how much of the problem's words, as `told` says."""

    row: int
    problem: int
    share: float
    told: str


class Grams(NamedTuple):
    """N-grams of texts, with numbers and names masked, and as they are."""

    masked: Shingles
    plain: Shingles


class TestSets:
    """The questions of test sets, by their n-grams of words; problems are numbered through all sets.

    Most questions are told by n-grams in which numbers and names are masked, without those that are boilerplate of
    their own set, in which variants of a question count as one: what else is named as a test set makes no difference.
    A question of which fewer than `MIN_TELLING` remain is told by its n-grams as they are. Any question is told by a
    row that is nearly it but for numbers and names. One that is nothing but boilerplate is told word by word.
    """

    __test__ = False  # no test case, whatever pytest takes the name for

    def __init__(self, sets: Sequence[Sequence[str]]):
        self._sets = [_TestSet(self.grams(questions)) for questions in sets]
        self._starts = np.cumsum([0, *map(len, sets)]).tolist()

    def grams(self, texts: Iterable[str]) -> Grams:
        """The n-grams of rows, as `matches` compares them."""
        every = [words(text) for text in texts]
        return Grams(shingles([masked for masked, _ in every], N_GRAM), shingles([plain for _, plain in every], N_GRAM))

    def matches(self, rows: Grams, threshold: float) -> list[Match]:
        """Of each row that holds a problem, the problem of which it holds most.

        `threshold` is the share of most problems' n-grams that a row must hold, and the least of the others' rules.
        """
        best: dict[int, Match] = {}
        for start, test_set in zip(self._starts, self._sets, strict=False):
            for match in test_set.matches(rows, threshold):
                if match.row not in best or match.share > best[match.row].share:
                    best[match.row] = dataclasses.replace(match, problem=start + match.problem)
        return list(best.values())


class _TestSet:
    def __init__(self, grams: Grams):
        masked, plain = grams
        problem_of, plain_problem_of = _owners(masked), _owners(plain)
        telling = _num_problems(masked) <= MAX_PROBLEMS
        num_telling = np.bincount(problem_of[telling], minlength=len(masked))
        is_long = num_telling >= MIN_TELLING
        is_whole = (np.diff(plain.offsets) < MIN_SHORT) | (num_telling == 0)
        self._long = _Index(masked, telling & is_long[problem_of])
        self._short = _Index(plain, (~is_long & ~is_whole)[plain_problem_of])
        self._shortest = _Index(plain, (~is_long & is_whole)[plain_problem_of])
        self._similar = _Similar(masked, (np.diff(masked.offsets) >= MIN_SIMILAR) & (num_telling > 0))

    def matches(self, rows: Grams, threshold: float) -> Iterable[Match]:
        yield from self._long.matches(rows.masked, threshold)
        yield from self._short.matches(rows.plain, max(SHORT_SHARE, threshold))
        yield from self._shortest.matches(rows.plain, 1.0)
        yield from self._similar.matches(rows.masked, max(SIMILARITY, threshold))


class _Index:
    """Which problems have an n-gram, of those n-grams that are `used`."""

    def __init__(self, grams: Shingles, used: Bool[np.ndarray, " hashes"]):
        problem_of = _owners(grams)[used]
        self._hashes, inverse, counts = np.unique(grams.hashes[used], return_inverse=True, return_counts=True)
        self._problems: Int[np.ndarray, " uses"] = problem_of[np.argsort(inverse, kind="stable")]
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._sizes = np.bincount(problem_of, minlength=len(grams))

    def matches(self, rows: Shingles, threshold: float) -> list[Match]:
        """Every row and problem of which the row holds at least this share."""
        rows_found, problems_found, shares = self.shares(rows)
        return [
            Match(
                int(rows_found[index]), int(problems_found[index]), float(shares[index]),
                f"{100 * shares[index]:.0f} % of its n-grams",
            )
            for index in np.flatnonzero(shares >= threshold).tolist()
        ]  # fmt: skip

    def shares(
        self, rows: Shingles
    ) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
        """Rows, problems of which they hold an n-gram, and which share of the problem's n-grams they hold."""
        if not len(self._hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        place = np.minimum(np.searchsorted(self._hashes, rows.hashes), len(self._hashes) - 1)
        found = np.flatnonzero(self._hashes[place] == rows.hashes)
        starts, ends = self._offsets[place[found]], self._offsets[place[found] + 1]
        counts = ends - starts
        problems = self._problems[
            np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        ]
        pairs, times = np.unique(
            np.repeat(_owners(rows)[found], counts) * len(self._sizes) + problems, return_counts=True
        )
        rows_found, problems_found = pairs // len(self._sizes), pairs % len(self._sizes)
        return rows_found, problems_found, times / self._sizes[problems_found]


class _Similar:
    """Problems by Jaccard similarity, of those that are `used`.

    A set that is as similar as `SIMILARITY` to one of s n-grams lacks at most a share of 1 - `SIMILARITY` of them: so
    it has one of any s(1 - `SIMILARITY`) + 1 of them. The rarest so many find every row that comes into question.
    """

    def __init__(self, grams: Shingles, used: Bool[np.ndarray, " problems"]):
        self._grams = grams
        self._sizes = sizes = np.diff(grams.offsets)
        order = np.lexsort((_num_uses(grams), _owners(grams)))  # of each problem the rarest first
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(grams.offsets[:-1], sizes)
        needed = np.where(used, np.floor((1 - SIMILARITY) * sizes + 1e-9) + 1, 0)
        self._keys = _Index(grams, rank < np.repeat(needed, sizes))

    def matches(self, rows: Shingles, threshold: float) -> Iterable[Match]:
        """Of each row that is similar to a problem the first that it is similar to."""
        found, problems, _ = self._keys.shares(rows)
        sizes, of_problems = np.diff(rows.offsets)[found], self._sizes[problems]
        may_be = np.minimum(sizes, of_problems) >= threshold * np.maximum(sizes, of_problems)
        done = -1
        for row, problem in zip(found[may_be].tolist(), problems[may_be].tolist(), strict=True):
            if row == done:
                continue
            similarity = jaccard(rows[row], self._grams[problem])
            if similarity >= threshold:
                done = row
                yield Match(row, problem, similarity, f"{100 * similarity:.0f} % alike but for numbers and names")


def _owners(grams: Shingles) -> Int[np.ndarray, " hashes"]:
    """The text that each n-gram is of."""
    return np.repeat(np.arange(len(grams)), np.diff(grams.offsets))


def _num_uses(grams: Shingles) -> Int[np.ndarray, " hashes"]:
    """In how many texts each n-gram stands."""
    _, inverse, counts = np.unique(grams.hashes, return_inverse=True, return_counts=True)
    return counts[inverse]


def _num_problems(grams: Shingles) -> Int[np.ndarray, " hashes"]:
    """In how many problems each n-gram stands, where texts that are nearly the same are one problem."""
    problem = np.arange(len(grams), dtype=np.uint64)
    for text, (like, _) in near_duplicates(grams, _VARIANTS).items():
        problem[text] = like
    uses = np.unique(np.stack([grams.hashes, problem[_owners(grams)]], axis=1), axis=0)
    hashes, counts = np.unique(uses[:, 0], return_counts=True)
    return counts[np.searchsorted(hashes, grams.hashes)]
