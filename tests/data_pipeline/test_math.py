"""The MATH task against the public file's own figures, and rows that are not whole."""

import statistics
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.settings import UsageError
from data_pipeline.tasks import read_problems
from data_pipeline.tasks.math import count_sentences

ROW = {"problem": "What is $1+1$?", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{2}$."}


def test_the_public_rows(test_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = read_problems("math", "test", str(test_data / "math_test.jsonl.gz"))
    train = read_problems("math", "train", str(test_data / "math_train.jsonl.gz"))
    assert (len(test), len(train)) == (5000, 7498)
    assert caplog.text.count("has no answer in a \\boxed{}") == 2
    # As published: 7 subjects; five levels in the test set.
    assert len({problem.subject for problem in test}) == 7
    assert set(Counter(problem.level for problem in test)) == set("12345")
    by_level = {level: statistics.mean(p.num_steps for p in train if p.level == level) for level in "12345"}
    assert sorted(by_level, key=lambda level: by_level[level]) == list("12345")
    assert by_level["1"] == pytest.approx(2.07, abs=0.005) and by_level["5"] == pytest.approx(5.13, abs=0.005)


@pytest.mark.parametrize(
    ("solution", "count"),
    [
        (r"It is $\boxed{2}$.", 1),
        ("One. Two. Three.", 3),
        ("One is $1.5$. Two is 2.5 of it.", 2),
        ("One.\n\nTwo", 2),
        ("[asy] draw(a. b. c. ); [/asy] One.", 1),
        (r"So \[x = 1. y = 2.\] That is all.", 1),  # a displayed formula is a word of its sentence
        (r"\begin{align*} a &= 1. \\ b &= 2. \end{align*}", 1),
        ("", 1),
    ],
)
def test_steps_are_sentences(solution: str, count: int) -> None:
    assert count_sentences(solution) == count


def test_an_answer_is_the_last_box(write_rows) -> None:
    rows = [
        {**ROW, "solution": r"\boxed{1} or rather \boxed{\frac{1}{2}}."},
        {**ROW, "problem": "b", "solution": r"\fbox{7}"},
        {**ROW, "problem": "c", "level": "Level ?", "id": "algebra/3"},
    ]
    problems = read_problems("math", "test", write_rows(*rows))
    assert [problem.answer for problem in problems] == [r"\frac{1}{2}", "7", "2"]
    assert [problem.level for problem in problems] == ["2", "2", None]
    assert problems[2].id == "algebra/3" and problems[0].id.startswith("math/test/")


def test_what_is_missing_is_said(write_rows) -> None:
    with pytest.raises(UsageError, match="line 1: there is no 'problem'; the row has solution"):
        read_problems("math", "test", write_rows({"solution": r"\boxed{1}"}))
    with pytest.raises(UsageError, match="math is read from a file of rows"):
        read_problems("math", "test", None)
