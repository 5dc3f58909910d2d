"""Variants of word problems, held against what this test reads in their texts with words of its own."""

import random
import re
from collections import Counter

import pytest

from data_pipeline.word_problem_variants import (
    add_event,
    change_background,
    change_numbers,
    find_masked,
    read_masked,
    read_statement,
    rephrase,
    state_answer,
)
from data_pipeline.word_problems import MAX_VALUE, Working, generate_problems, parse_story, solve

SIGNS = {"buys": "+", "finds": "+", "gets": "+", "wins": "+", "gives": "-", "loses": "-", "sells": "-", "puts": "-"}
LAST = "What is the value of the unknown x?"


@pytest.fixture(scope="module")
def problems():
    """Short ones, and longer ones than the generator's own, for every length leaves other numbers free."""
    return [*generate_problems(400, 3, 1, 5), *generate_problems(50, 4, 8, 8)]


def told(question):
    """The events of a question as (sign, number), and the value at first."""
    first, *events, _ = re.findall(r"[^.?]+[.?]", question)
    read = []
    for sentence in events:
        verb = sentence.split()[1]
        read.append(("*", 2) if verb == "doubles" else (SIGNS[verb], int(re.search(r"\d+", sentence)[0])))
    return int(re.search(r"\d+", first)[0]), read


def values(question):
    value, events = told(question)
    found = [value]
    for sign, number in events:
        found.append({"+": found[-1] + number, "-": found[-1] - number, "*": found[-1] * number}[sign])
    return found


def varied(problems, change):
    """Each question and its variant, whose values are within bounds and which is what the generator could say."""
    pairs = []
    for index, problem in enumerate(problems):
        story = change(parse_story(problem.question), random.Random(index))
        question = story.question
        assert all(0 < value <= MAX_VALUE for value in values(question)), question
        assert solve(question).answer == str(values(question)[-1])
        assert change(parse_story(problem.question), random.Random(index)).question == question, "a function of rng"
        pairs.append((problem.question, question))
    return pairs


def without_numbers(question):
    return re.sub(r"\d+", "#", question)


def test_an_added_constraint_is_one_more_sentence_at_any_place_and_changes_the_answer(problems):
    places = Counter()
    for before, after in varied(problems, add_event):
        old, new = (re.findall(r"[^.?]+[.?]", text) for text in (before, after))
        assert len(new) == len(old) + 1
        place = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
        assert old == new[:place] + new[place + 1 :]
        assert values(before)[-1] != values(after)[-1]
        assert len(solve(after).solution.splitlines()) == len(told(before)[1]) + 1
        places[place] += 1
    assert len(places) > 5


def test_changed_numbers_keep_every_word_and_change_the_answer_where_any_do(problems):
    same = 0
    for before, after in varied(problems, change_numbers):
        assert without_numbers(before) == without_numbers(after)
        start, events = told(after)
        assert 2 <= start <= 9 and all(2 <= number <= 9 for _, number in events)
        same += values(before)[-1] == values(after)[-1]
    assert same < 10
    told_numbers = {told(after)[0] for _, after in varied(problems, change_numbers)}
    assert told_numbers == set(range(2, 10))


def test_a_story_that_has_no_other_numbers_keeps_its_own():
    only = "Ann has 9 eggs. " + "Ann loses 2. " * 4 + "How many eggs does Ann have now?"
    assert change_numbers(parse_story(only), random.Random(0)).question == only
    # Other numbers, but the answer is 16 whatever they are: four times the double of 1.
    ends_in_one = "Ann has 7 eggs. " + "Ann loses 2. " * 3 + "Ann doubles the eggs. " * 4
    story = parse_story(ends_in_one + "How many eggs does Ann have now?")
    assert story.values[-1] == 16
    assert {change_numbers(story, random.Random(i)).values[-1] for i in range(20)} == {16}
    assert {change_numbers(story, random.Random(i)).start for i in range(20)} == {7, 8, 9}


def test_another_background_has_other_words_everywhere_and_the_same_numbers_and_answer(problems):
    for before, after in varied(problems, change_background):
        assert told(before) == told(after)
        names = [set(re.findall(r"\b[A-Z][a-z]+\b", text)) - {"How"} for text in (before, after)]
        assert not names[0] & names[1]
        items = [re.search(r"How many (\w+) does", text)[1] for text in (before, after)]
        assert items[0] != items[1] and items[0] not in after
        for old, new in zip(before.split(".")[1:-1], after.split(".")[1:-1], strict=True):
            assert old.split()[1] != new.split()[1] or old.split()[1] == "doubles"


def test_another_background_and_other_numbers_go_together(problems):
    for before, after in varied(problems, lambda story, rng: change_background(change_numbers(story, rng), rng)):
        assert [sign for sign, _ in told(before)[1]] == [sign for sign, _ in told(after)[1]]
        assert before.split()[0] != after.split()[0]


def test_a_rephrased_question_keeps_people_things_numbers_and_answer(problems):
    for before, after in varied(problems, rephrase):
        assert told(before) == told(after)
        assert before.split(".")[0] == after.split(".")[0] and before.split(".")[-1] == after.split(".")[-1]
        changed = [old != new for old, new in zip(before.split(".")[1:-1], after.split(".")[1:-1], strict=True)]
        assert changed == ["doubles" not in sentence for sentence in before.split(".")[1:-1]]


def masked_questions(problems):
    """Every number of each question in turn: the question with x, its answer, and the number."""
    for problem in problems:
        for place in re.finditer(r"\d+", problem.question):
            masked = problem.question[: place.start()] + "x" + problem.question[place.end() :]
            yield problem, masked, int(place[0])


def test_a_masked_number_is_found_and_every_line_is_right(problems):
    for problem, question, number in masked_questions(problems):
        working = Working()
        found = find_masked(read_masked(question, problem.answer), working)
        assert found == number
        # The number put into the original question gives the answer again.
        assert str(values(question.replace("x", str(found)))[-1]) == problem.answer
        for line in working.lines:
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
            left, right, result = int(left), int(right), int(result)
            assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign] == result
        assert working.lines[-1].endswith(f" = {number}")
        assert len(working.lines) == problem.num_steps


def test_a_statement_says_the_answer_and_is_read_back(problems):
    for problem, question, number in masked_questions(problems[:100]):
        text = state_answer(question, problem.answer, LAST)
        item = re.search(r"How many (\w+) does", question)[1]
        assert text == f"{question.rpartition('. ')[0]}. {question.split()[0]} has {problem.answer} {item} now. {LAST}"
        assert find_masked(read_statement(text), Working()) == number
        assert read_statement(question) is None and solve(text) is None and solve(question) is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Why x?", "3"),
        ("Ann has 3 eggs. Ann loses 2. How many eggs does Ann have now?", "1"),
        ("Ann has x eggs. Ann loses x. How many eggs does Ann have now?", "1"),
        ("Ann has x eggs. Ann loses 2. How many eggs does Ann have now?", "one"),
        ("Ann has x eggs. Ann eats 2. How many eggs does Ann have now?", "1"),
    ],
)
def test_what_is_no_masked_question_of_ours_is_none(question, answer):
    assert read_masked(question, answer) is None and state_answer(question, answer, LAST) is None


def test_half_of_an_odd_number_is_no_whole_number():
    question = "Ann has x eggs. Ann doubles the eggs. How many eggs does Ann have now?"
    assert find_masked(read_masked(question, "7"), Working()) is None
    assert find_masked(read_masked(question, "8"), Working()) == 4


def test_a_slip_goes_through_all_that_follows():
    story = parse_story("Ann has 3 eggs. Ann buys 4 more. Ann doubles the eggs. How many eggs does Ann have now?")
    masked = read_masked("Ann has x eggs. Ann doubles the eggs. Ann loses 4. How many eggs does Ann have now?", "6")
    working = Working(slip=(0, 2))
    assert find_masked(masked, working) == 6 and working.lines == ["6 + 4 = 12", "12 / 2 = 6"]
    assert story.problem().solution == "3 + 4 = 7\n7 * 2 = 14"


def test_stories_of_larger_numbers_are_varied_as_well():
    beyond = 0
    for index, problem in enumerate(generate_problems(100, 5, 1, 6, max_value=99)):
        before = values(problem.question)
        beyond += max(before) > MAX_VALUE
        story, rng = parse_story(problem.question), random.Random(index)
        longer = values(add_event(story, rng).question)
        assert len(longer) == len(before) + 1 and min(longer) > 0 and max(longer) <= max(MAX_VALUE, *before)
        assert values(change_background(story, rng).question) == before
        small = change_numbers(story, rng).question
        assert without_numbers(small) == without_numbers(problem.question)
        assert all(0 < value <= MAX_VALUE for value in values(small))
    assert beyond > 50
