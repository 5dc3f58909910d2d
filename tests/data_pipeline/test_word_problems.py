"""Generated word problems, recomputed by an evaluator of its own."""

import dataclasses
import itertools
import operator
import re

import pytest

from data_pipeline.answers import extract, is_equal
from data_pipeline.templates import Template
from data_pipeline.word_problems import MAX_VALUE, generate_problems, parse_story, solve

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
FACTORS = {"doubles": 2}


@pytest.fixture(scope="module")
def problems():
    return list(generate_problems(2000, seed=0))


def steps_of(problem):
    """(left, operator, right, result) of each line."""
    matches = [STEP.fullmatch(line) for line in problem.solution.split("\n")]
    assert all(matches), problem.solution
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches]


def numbers_told(question):
    """The numbers of the question in order, a verb such as "doubles" as its factor."""
    words = re.findall(r"\d+|[a-z]+", question)
    return [int(word) if word.isdigit() else FACTORS[word] for word in words if word.isdigit() or word in FACTORS]


def test_the_arithmetic_of_each_step_is_right(problems):
    for problem in problems:
        for left, sign, right, result in steps_of(problem):
            assert OPERATORS[sign](left, right) == result, problem


def test_each_step_starts_from_the_last_result_and_the_last_is_the_answer(problems):
    for problem in problems:
        steps = steps_of(problem)
        for before, after in itertools.pairwise(steps):
            assert after[0] == before[3], problem
        assert steps[-1][3] == int(problem.answer)


def test_all_results_are_positive_and_small(problems):
    results = [step[3] for problem in problems for step in steps_of(problem)]
    assert min(results) > 0 and max(results) <= MAX_VALUE
    assert max(results) > MAX_VALUE / 2, "the bound is not met by accident"


@pytest.mark.parametrize("max_value", [20, 99, 999])
def test_a_story_may_hold_larger_numbers_up_to_the_bound(max_value):
    larger = list(generate_problems(600, 0, max_steps=6, max_value=max_value))
    results = [step[3] for problem in larger for step in steps_of(problem)]
    assert min(results) > 0 and 0.9 * max_value < max(results) <= max_value
    told = [number for problem in larger for number in numbers_told(problem.question)]
    assert min(told) == 2 and 0.4 * max_value < max(told) < max_value / 2
    assert all(OPERATORS[sign](left, right) == result for p in larger for left, sign, right, result in steps_of(p))
    assert [solve(problem.question).solution for problem in larger] == [problem.solution for problem in larger]


def test_the_numbers_of_the_question_are_those_of_the_steps(problems):
    for problem in problems:
        steps = steps_of(problem)
        assert numbers_told(problem.question) == [steps[0][0], *(step[2] for step in steps)], problem


def test_verbs_and_signs_agree(problems):
    """A gain adds, a loss takes away and a multiple multiplies, told by words of this test."""
    gains, losses = ("buys", "finds", "gets", "wins"), ("gives", "loses", "sells", "puts")
    signs = dict.fromkeys(gains, "+") | dict.fromkeys(losses, "-") | dict.fromkeys(FACTORS, "*")
    for problem in problems:
        told = [signs[word] for word in re.findall(r"[a-z]+", problem.question) if word in signs]
        assert told == [sign for _, sign, _, _ in steps_of(problem)], problem


def test_steps_are_counted_and_within_bounds(problems):
    assert {problem.num_steps for problem in problems} == {2, 3, 4}
    assert all(problem.num_steps == len(steps_of(problem)) for problem in problems)
    for low, high in ((1, 1), (3, 3), (2, 6)):
        counts = {problem.num_steps for problem in generate_problems(200, 1, min_steps=low, max_steps=high)}
        assert counts == set(range(low, high + 1))


def test_questions_and_ids_are_unique(problems):
    assert len({problem.question for problem in problems}) == len({p.id for p in problems}) == len(problems) == 2000


def test_short_questions_which_are_drawn_twice_now_and_then_are_unique_too():
    short = list(generate_problems(4000, seed=0, min_steps=1, max_steps=1))
    assert len(short) == len({problem.question for problem in short}) == len({p.id for p in short}) == 4000


def test_problems_are_a_function_of_the_seed(problems):
    assert list(generate_problems(2000, seed=0)) == problems
    assert list(generate_problems(50, seed=0)) == problems[:50]
    other = {problem.question for problem in generate_problems(50, seed=1)}
    assert len(other & {problem.question for problem in problems[:50]}) < 5


def test_a_rendered_solution_is_graded_right(problems):
    for problem in problems:
        extracted = extract(Template().render_response(problem.solution, problem.answer), "number")
        assert is_equal(extracted.answer, problem.answer, "number")


def test_a_question_is_read_as_the_story_it_was_written_from(problems):
    for problem in problems:
        story = parse_story(problem.question)
        assert story.question == problem.question
        assert dataclasses.replace(story.problem(), id=problem.id) == problem
        assert dataclasses.replace(solve(f" {problem.question}\n"), id=problem.id) == problem


@pytest.mark.parametrize(
    "question",
    [
        "",
        "Why?",
        "Ann has 3 eggs.",
        "Ann has some eggs. Ann loses 2. How many eggs does Ann have now?",
        "Ann has 3 eggs. Ann eats 2. How many eggs does Ann have now?",
        "Ann has 3 eggs. Ben loses 2. How many eggs does Ann have now?",
        "Ann has 3 eggs. Ann doubles the pens. How many eggs does Ann have now?",
        "Ann has 3 eggs. Ann loses 2. How many pens does Ann have now?",
        "Ann has 3 eggs. Ann loses 2. How many eggs does Ann have now? And then",
    ],
)
def test_a_question_of_another_kind_is_not_read(question):
    assert parse_story(question) is None and solve(question) is None
