"""What can be said of a row by itself, by several processes: is it well-formed, right by itself, in a test set?"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipeline.answers import Kind
from data_pipeline.check import graded_wrong
from data_pipeline.clean.contamination import Match, TestSets
from data_pipeline.clean.shingles import Shingles, shingles
from data_pipeline.problem import Problem
from data_pipeline.templates import Template
from data_pipeline.workers import serve

NEAR_N_GRAM = 3  # words of a row's own n-grams, whose numbers and names count


class Malformed(NamedTuple):
    """A row that is no problem: what is wrong with it, and itself."""

    error: str
    row: dict[str, Any]


Row = Problem | Malformed


class Rules(NamedTuple):
    """What a row is held against."""

    kind: Kind
    min_chars: int
    max_chars: int
    tests: Sequence[Sequence[str]]  # the questions of each test set
    threshold: float  # share of a test question's n-grams that make a row contaminated
    whole: bool  # whether rows are duplicates by question and solution, or by the question alone


@dataclasses.dataclass(frozen=True)
class Examined:
    """Of a chunk of rows: reasons to leave one out, by its place in the chunk; digests and n-grams of all."""

    reasons: dict[int, tuple[str, str]]  # the reason, and what was found
    matches: list[Match]
    digests: Int[np.ndarray, "rows 2"]
    shingles: Shingles


def begin(rules: Rules) -> Callable[[Sequence[Row]], Examined]:
    """What a process does with a chunk of problems, or of rows that are none."""
    tests = TestSets(rules.tests) if rules.tests else None
    template = Template()

    def examine(rows: Sequence[Row]) -> Examined:
        reasons: dict[int, tuple[str, str]] = {}
        texts, questions = [], []
        for place, row in enumerate(rows):
            if isinstance(row, Malformed):
                reasons[place] = ("malformed", row.error)
                texts.append("")
                questions.append("")
                continue
            questions.append(row.question)
            texts.append(f"{row.question}\n{row.solution}" if rules.whole else row.question)
            reason = _reason(row, rules, template)
            if reason is not None:
                reasons[place] = reason
        matches = tests.matches(tests.grams(questions), rules.threshold) if tests is not None else []
        return Examined(reasons, matches, _digests(texts), shingles([_own_words(text) for text in texts], NEAR_N_GRAM))

    return examine


def _reason(problem: Problem, rules: Rules, template: Template) -> tuple[str, str] | None:
    if not problem.solution:
        return "no solution", ""
    for name in ("question", "solution"):
        length = len(getattr(problem, name))
        if not rules.min_chars <= length <= rules.max_chars:
            return f"{name} too {'short' if length < rules.min_chars else 'long'}", f"{length} characters"
    wrong = graded_wrong(problem, rules.kind, template)
    if wrong is not None:
        return "its text is graded wrong", f"gold {problem.answer!r}, read {wrong.answer!r}"
    return None


def _own_words(text: str) -> list[str]:
    """Words with their numbers: two problems that differ in them are two."""
    return text.lower().split()


def _digests(texts: Sequence[str]) -> Int[np.ndarray, "rows 2"]:
    """128 bits of each text, without regard to case and white space."""
    joined = b"".join(
        hashlib.blake2b(" ".join(text.lower().split()).encode(errors="replace"), digest_size=16).digest()
        for text in texts
    )
    return np.frombuffer(joined, np.uint64).reshape(len(texts), 2)


if __name__ == "__main__":
    from data_pipeline.clean.examine import begin  # whose names the other end knows

    serve(begin)
