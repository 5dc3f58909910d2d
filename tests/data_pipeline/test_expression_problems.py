"""Generated expressions, evaluated by Python itself and held against their worked steps."""

import ast
import itertools
import re
from collections import Counter

import pytest

from data_pipeline.answers import extract, is_equal
from data_pipeline.expression_problems import ASKING, generate_expressions
from data_pipeline.settings import UsageError
from data_pipeline.templates import Template
from data_pipeline.word_problems import MAX_VALUE, solve

STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def problems():
    return list(generate_expressions(2000, seed=0))


def expression(problem):
    """The text between the dollar signs, as Python writes it."""
    (inside,) = re.findall(r"\$(.+?)\$", problem.question)
    python = inside.replace(r"\cdot", "*")
    assert re.fullmatch(r"[\d+*() -]+", python), problem
    return python


def steps_of(problem):
    """(left, sign, right, result) of each line."""
    matches = [STEP.fullmatch(line) for line in problem.solution.split("\n")]
    assert all(matches), problem.solution
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches]


def test_the_answer_is_what_the_expression_is_worth(problems):
    for problem in problems:
        assert str(eval(expression(problem))) == problem.answer, problem


def test_each_step_is_right_and_goes_on_from_the_one_before(problems):
    for problem in problems:
        steps = steps_of(problem)
        for left, sign, right, result in steps:
            assert eval(f"{left} {sign} {right}") == result, problem
        for before, after in itertools.pairwise(steps):
            assert after[0] == before[3], problem
        assert str(steps[-1][3]) == problem.answer


def test_the_steps_take_the_numbers_and_signs_in_the_order_of_the_expression(problems):
    for problem in problems:
        steps = steps_of(problem)
        told = re.findall(r"\d+|[-+*]", expression(problem))
        assert told == [str(steps[0][0]), *(text for _, sign, right, _ in steps for text in (sign, str(right)))]


def test_parentheses_stand_only_where_they_are_needed(problems):
    """Without any one pair, Python reads another expression: its numbers in another order of operations."""
    pairs = 0
    for problem in problems:
        text = expression(problem)
        for opened in (place.start() for place in re.finditer(r"\(", text)):
            depth = list(itertools.accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in text[opened:]))
            closed = opened + depth.index(0)
            without = text[:opened] + text[opened + 1 : closed] + text[closed + 1 :]
            assert ast.dump(ast.parse(without)) != ast.dump(ast.parse(text)), problem
            pairs += 1
    assert pairs > 500
    assert any(expression(problem).startswith("((") for problem in problems), "and they are nested"


def test_all_values_are_positive_and_small(problems):
    numbers = [
        number for problem in problems for left, _, right, result in steps_of(problem) for number in (left, result)
    ]
    assert min(numbers) == 1 and max(numbers) == MAX_VALUE
    assert {right for problem in problems for _, _, right, _ in steps_of(problem)} == set(range(2, 10))


def test_all_signs_and_all_wordings_come(problems):
    signs = Counter(sign for problem in problems for _, sign, _, _ in steps_of(problem))
    assert set(signs) == set("+-*") and min(signs.values()) > 1000
    wordings = Counter(re.sub(r"\$.+\$", "${}$", problem.question) for problem in problems)
    assert set(wordings) == set(ASKING) and min(wordings.values()) > 400


def test_steps_are_counted_and_within_bounds(problems):
    assert {problem.num_steps for problem in problems} == {2, 3, 4}
    assert all(problem.num_steps == len(steps_of(problem)) for problem in problems)
    for low, high in ((1, 1), (3, 3), (2, 6)):
        counts = {problem.num_steps for problem in generate_expressions(80, 1, min_steps=low, max_steps=high)}
        assert counts == set(range(low, high + 1))


def test_no_expression_comes_twice_in_whatever_words(problems):
    assert len({expression(problem) for problem in problems}) == len({p.id for p in problems}) == len(problems) == 2000


def test_more_expressions_than_there_are_is_said():
    # One operation: 8 numbers at first, each of 2 to 9 behind each sign, the result from 1 to 20; counted here.
    there = sum(
        1 <= eval(f"{left} {sign} {right}") <= MAX_VALUE
        for left in range(2, 10)
        for sign in "+-*"
        for right in range(2, 10)
    )
    assert len(list(generate_expressions(there, 0, 1, 1))) == there
    with pytest.raises(
        UsageError, match=rf"there are {there} different expressions of 1 to 1 .* {there + 1} were asked"
    ):
        list(generate_expressions(there + 1, 0, 1, 1))


def test_problems_are_a_function_of_the_seed(problems):
    assert list(generate_expressions(2000, seed=0)) == problems
    assert list(generate_expressions(50, seed=0)) == problems[:50]
    assert list(generate_expressions(50, seed=1)) != problems[:50]


def test_a_rendered_solution_is_graded_right_and_an_expression_is_no_story(problems):
    for problem in problems:
        extracted = extract(Template().render_response(problem.solution, problem.answer), "number")
        assert is_equal(extracted.answer, problem.answer, "number")
        assert solve(problem.question) is None
