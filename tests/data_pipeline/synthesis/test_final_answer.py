"""What a teacher gives as an answer must be one. Against all answers of MATH, and texts written by hand."""

import pytest

from data_pipeline.synthesis.final_answer import check_answer
from data_pipeline.tasks import read_problems


@pytest.mark.slow
def test_every_answer_of_math_is_one(test_data):
    for split in ("train", "test"):
        for problem in read_problems("math", split, str(test_data / f"math_{split}.jsonl.gz")):
            check_answer(problem.answer, "latex")


@pytest.mark.parametrize(
    "answer",
    [
        r"\frac{1}{2}", r"\frac12", r"\dfrac{\sqrt{2}}3", r"\frac \pi 4", r"\{1, 2\}", r"x = 2 or x = 3",
        "no real solution", "there is no solution", "HH, HT, TH, TT", "Alice, Bob, Carol, Dave, Eve", "2 sin x cos x",
        "x is any real number", "all real numbers except 3", "Monday", r"\text{the line that is the bisector of both}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\left(0, \frac{1}{2}\right]", r"(-\infty, 3] \cup [4, \infty)", r"12\% \text{ of all that there is}", "$5$",
        r"\begin{cases} x & \text{if } x > 0 \\ \begin{matrix} 1 \end{matrix} \end{cases}", "a, b, c, d, e",
    ],
)  # fmt: skip
def test_mathematics_is_an_answer(answer):
    check_answer(answer, "latex")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("I am not sure about this, sorry.", "sentence"),
        ("there is no solution to that", "sentence"),
        (r"x = 2, since the other root is negative", "sentence"),
        (r"\frac{1}{", "braces"),
        (r"1}{2", "braces"),
        (r"\frac{1}", "fraction"),
        (r"\frac", "fraction"),
        (r"\left(1, 2", "left"),
        (r"1, 2\right)\left(", "left"),
        (r"\begin{pmatrix} 1 \end{bmatrix}", "begin"),
        (r"\begin{pmatrix} 1", "begin"),
        ("", "empty"),
    ],
)
def test_a_sentence_or_a_part_of_a_formula_is_none(answer, said):
    with pytest.raises(ValueError, match=said):
        check_answer(answer, "latex")


def test_a_number_is_one():
    check_answer("1,234.5", "number")
    with pytest.raises(ValueError, match="not a number"):
        check_answer("about 5 or so", "number")
