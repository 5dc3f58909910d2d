"""Calculation errors: by hand, none in the gold solutions of GSM8K, and those that are planted in them."""

import random
import re

import numpy as np
import pytest
import scipy.stats

from eval.errors import equations, error_types, examine, share, steps_of, wilson


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ("3 * 4 = 12", [True]),
        ("3 * 4 = 13", [False]),
        ("She has 3 * 4 = 12 apples.", [True]),
        ("She has 3*4=<<3*4=12>>12 apples.", [True]),
        ("So 5 + $2 = $7.", [True]),
        ("In all $1,200 + $300 = $1,500.", [True]),
        ("In all $1,200 + $300 = $1,400.", [False]),
        ("2 + 3 = 5 = 10 / 2", [True, True]),
        ("2 + 3 = 6 and 6 / 2 = 3", [False, True]),
        ("10 / 3 = 3.33", [True]),
        ("10 / 3 = 3.34", [True]),  # rounded up
        ("10 / 3 = 3.4", [True]),
        ("10 / 3 = 3.6", [False]),
        ("10 / 3 = 3", [True]),
        ("10 / 3 = 4", [True]),
        ("10 / 3 = 5", [False]),
        ("20% * 50 = 10", [True]),
        ("50 * 20 / 100 = 10", [True]),
        ("1/4 = 25%", [True]),
        ("5 * 20% = 100", [False]),
        ("50 * 2% = 100", [False]),
        ("100 - 99.5 = 1", [False]),
        ("7 * 0.1 = 0", [False]),
        ("24 - 4 = 20 - 4 = 16", [True, True]),  # goes on from its result
        ("24 - 4 = 20 - 4 = 15", [True, False]),
        ("24 - 4 = 21 - 4 = 17", [False, True]),
        ("24 - 4 = 20 - 4", [False]),
        ("5 x 3 = 15", [True]),
        ("5 × 3 ÷ 15 = 1", [True]),
        (r"$\frac{1}{2} \cdot 10 = 5$", [True]),
        (r"$\frac{1}{2} \cdot 10 = 6$", [False]),
        ("(2 + 3) * 4 = 20", [True]),
        ("-3 + 5 = 2", [True]),
        # Nothing is read where words or letters take part.
        ("2 apples * 3 = 6", []),
        ("x * 3 = 12", []),
        ("2x + 3 = 7", []),
        ("the total = 15", []),
        ("x = 5", []),
        ("3 + y = 5 + 3", []),
        ("", []),
        ("=" * 100, []),
        ("9^9^9^9 = 5", []),
    ],
)  # fmt: skip
def test_the_equations_of_a_step(step, found):
    assert [equation.holds for equation in equations(step)] == found


def test_steps_are_lines_or_sentences_before_the_answer():
    assert steps_of("1 + 1 = 2\n\n2 + 2 = 4\nThe answer is: 4.") == ["1 + 1 = 2", "2 + 2 = 4"]
    assert steps_of("He has 1 + 1 = 2. She has 3.\n#### 3\n\nQuestion: what?\n1 + 1 = 3") == [
        "He has 1 + 1 = 2.",
        "She has 3.",
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_solutions_of_gsm8k_hold(split, request):
    """A few of them are wrong, or drop a unit or a remainder: 0.5 % of their equations at most."""
    false, total = [], 0
    for problem in request.getfixturevalue(f"gsm8k_{split}"):
        for step in steps_of(problem.solution):
            for equation in equations(step):
                total += 1
                if not equation.holds:
                    false.append((equation.left, equation.right, step))
    assert total > 1.5 * len(request.getfixturevalue(f"gsm8k_{split}"))
    assert len(false) <= 0.005 * total, false[:40]


def test_planted_calculation_errors_are_found_where_they_stand(gsm8k_test):
    rng = random.Random(0)
    found = planted = 0
    for problem in gsm8k_test:
        lines = problem.solution.split("\n")
        places = [i for i, line in enumerate(lines) if equations(line)]
        if not places or examine(problem.solution).first_false is not None:
            continue
        place = rng.choice(places)
        changed = re.sub(r"=\s*\$?(\d+)", lambda match: f"= {int(match[1]) + 7}", lines[place], count=1)
        if changed == lines[place]:
            continue
        planted += 1
        found += examine("\n".join([*lines[:place], changed, *lines[place + 1 :]])).first_false == place
    assert planted > 800 and found >= 0.9 * planted


def test_types_and_positions_of_wrong_solutions():
    right_steps = "1 + 1 = 2\n2 + 2 = 4"
    examined = [
        examine(text)
        for text in (f"{right_steps}\n4 + 1 = 6\n6 + 1 = 7", "1 + 1 = 3\n3 + 1 = 4", right_steps, "No idea.")
    ]
    assert [each.error for each in examined] == ["calculation", "calculation", "reasoning", None]
    told = error_types(examined, ["a", "b", "c", "d"])
    assert told == {
        "num_wrong": 4, "calculation": 2, "reasoning": 1, "not_checkable": 1, "first_false_position": (2 / 4 + 0) / 2,
        "shares": {
            "calculation": share([(True, "a"), (True, "b"), (False, "c")]),
            "reasoning": share([(False, "a"), (False, "b"), (True, "c")]),
        },
    }  # fmt: skip
    assert error_types([], [])["first_false_position"] is None and share([]) is None


def test_wilsons_interval_is_scipys():
    found = scipy.stats.binomtest(6, 20).proportion_ci(0.95, method="wilson")
    assert wilson(0.3, 20) == pytest.approx((found.low, found.high))
    assert wilson(0.0, 7)[0] == 0.0 and wilson(1.0, 7)[1] == 1.0


def test_solutions_of_one_problem_are_no_more_witnesses_than_the_problem():
    """Of n problems each with 50 solutions of one kind, the interval is that of n solutions, but for n / (n - 1)."""
    kinds = [True] * 6 + [False] * 14
    alone = share([(kind, str(problem)) for problem, kind in enumerate(kinds)])
    often = share([(kind, str(problem)) for problem, kind in enumerate(kinds) for _ in range(50)])
    assert alone["value"] == often["value"] == 0.3
    assert alone["ci95"] == pytest.approx(list(wilson(0.3, 19)))
    assert often["ci95"] == pytest.approx(list(wilson(0.3, 19)))
    same = share([(True, str(problem)) for problem in range(4) for _ in range(100)])
    assert same["ci95"] == pytest.approx(list(wilson(1.0, 4)))


def test_intervals_of_shares_hold_the_truth_where_problems_differ():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        rates = rng.beta(0.6, 1.4, 60)  # mean 0.3
        found = [(bool(hit), str(p)) for p, rate in enumerate(rates) for hit in rng.random(30) < rate]
        low, high = share(found)["ci95"]
        held += low <= 0.3 <= high
    assert 460 <= held <= 490
