"""The problems that a report shows, each with a few samples that differ, typeset, and within a size."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data_pipeline.answers import Kind
from eval.files import parts, read_grades, read_problems, read_samples
from eval.typeset import answer, typeset

MAX_BYTES = 15_000_000  # of all problems on the page; of more, those at even steps from hardest to easiest are shown
MAX_PER_VERDICT = 2  # right, and wrong, samples shown for a problem
HEAD_CHARS, TAIL_CHARS = 2000, 600  # kept of a long text; the tail too, because the answer stands there
_MEASURED = 200  # problems that are typeset to see how many find room
_MARKUP_OF_A_PROBLEM = 1500  # bytes of the page around its texts

Sample = dict[str, Any]
Verdicts = dict[int, tuple[bool, str | None]]  # by sample: whether it is right, and its answer


def shown_problems(folder: epath.Path, kind: Kind) -> tuple[list[dict[str, Any]], int]:
    """Graded problems with samples, hardest first, as many as the page has room for; and how many there are."""
    grades: dict[str, Verdicts] = collections.defaultdict(dict)
    for grade in read_grades(folder):
        verdict = (grade["correct"], grade["answer"])
        grades[grade["problem_id"]].setdefault(grade["sample_id"], verdict)  # the first of duplicates wins
    problems = []
    known = read_problems(folder)
    for problem in known:
        verdicts = grades.get(problem["problem_id"])
        if verdicts:
            right, total = sum(correct for correct, _ in verdicts.values()), len(verdicts)
            problems.append({**problem, "right": right, "total": total, "solved": _solved(right, total)})
    problems.sort(key=lambda problem: problem["right"] / problem["total"])
    samples = _chosen_samples(folder, grades, known)
    for problem in problems:
        problem["samples"] = samples.get(problem["problem_id"], [])
    return [_typeset(problems[index], kind) for index in _spread(len(problems), _room(problems, kind))], len(problems)


def _room(problems: Sequence[dict[str, Any]], kind: Kind) -> int:
    """How many problems the page has room for: by the sizes of a sample of them, typeset, and a margin."""
    some = _spread(len(problems), min(len(problems), _MEASURED))
    sizes = [_MARKUP_OF_A_PROBLEM + _typeset_size(_typeset(problems[index], kind)) for index in some]
    return min(len(problems), max(1, int(MAX_BYTES / (1.1 * float(np.mean(sizes)))))) if sizes else 0


def _solved(right: int, total: int) -> str:
    """How often a problem is solved; seldom are the unstable ones, solved by some samples and not by most."""
    if right in (0, total):
        return "always" if right else "never"
    return "seldom" if 2 * right < total else "often"


def shorten(text: str) -> str:
    """The head and the tail of a long text."""
    dropped = len(text) - HEAD_CHARS - TAIL_CHARS
    if dropped <= 0:
        return text
    return f"{text[:HEAD_CHARS]}\n\n[… {dropped:,} characters left out …]\n\n{text[-TAIL_CHARS:]}"


def _spread(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, count).astype(int) if count else np.array([], int)


def _typeset(problem: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The problem with its texts as HTML, and its samples'."""
    return {
        **problem,
        "question": typeset(shorten(problem["question"])),
        "answer": answer(problem["answer"], kind),
        "solution": typeset(shorten(problem["solution"])) if problem.get("solution") else "",
        "samples": [
            {
                **sample,
                "text": typeset(shorten(sample["text"]), sample["answer"]),
                "answer": None if sample["answer"] is None else answer(shorten(sample["answer"]), kind),
            }
            for sample in problem["samples"]
        ],
    }


def _typeset_size(problem: dict[str, Any]) -> int:
    texts = [problem["question"], problem["answer"], problem["solution"]]
    texts += [text for sample in problem["samples"] for text in (sample["text"], sample["answer"] or "")]
    return sum(len(text.encode(errors="replace")) for text in texts)


def _chosen_samples(
    folder: epath.Path, grades: Mapping[str, Verdicts], problems: Sequence[dict[str, Any]]
) -> dict[str, list[Sample]]:
    """The telling samples of every graded problem; no more than a part file's texts are held at once."""
    chosen: dict[str, list[Sample]] = {}
    known = {problem["problem_id"] for problem in problems}
    for part in parts(folder, "samples"):
        of_part: dict[str, dict[int, Sample]] = collections.defaultdict(dict)
        for sample in read_samples(part, known)[0]:
            if sample["sample_id"] in grades.get(sample["problem_id"], {}):
                of_part[sample["problem_id"]][sample["sample_id"]] = sample
        for problem_id, samples in of_part.items():
            before = {sample["sample_id"]: sample for sample in chosen.get(problem_id, [])}
            chosen[problem_id] = _telling_samples({**samples, **before}, grades[problem_id])
    return chosen


def _telling_samples(samples: Mapping[int, Sample], grades: Mapping[int, tuple[bool, str | None]]) -> list[Sample]:
    """Up to two right, then two wrong samples: of different texts, and different answers where there are any;
    the most frequent answers first."""
    chosen: list[Sample] = []
    for wanted in (True, False):
        times = collections.Counter(answer for correct, answer in grades.values() if correct == wanted)
        distinct: dict[str, Sample] = {}
        for sample_id, sample in sorted(samples.items()):
            correct, answer = grades[sample_id]
            if correct == wanted:
                shown = {**sample, "correct": correct, "answer": answer, "times": times[answer]}
                distinct.setdefault(sample["text"].strip(), shown)
        nth: collections.Counter[str | None] = collections.Counter()
        for sample in distinct.values():
            nth[sample["answer"]] += 1
            sample["nth"] = nth[sample["answer"]]
        ranked = sorted(distinct.values(), key=lambda sample: (sample["nth"], -sample["times"]))
        chosen += ranked[:MAX_PER_VERDICT]
    return chosen
