"""Tasks beside GSM8K and MATH: real SVAMP, and rows in the published layouts of the others, written for these tests."""

import collections
import json
import re

import pytest

from data_pipeline.answers import check_gold
from data_pipeline.settings import UsageError
from data_pipeline.tasks import TASKS, get_task, read_problems

ASDIV = """<Machine-Reading-Corpus-File><ProblemSet>
<Problem ID="nluds-0001" Grade="1"><Body>A farm has seven red hens and two white ones.</Body>
<Question>How many hens are there?</Question><Solution-Type>Addition</Solution-Type>
<Answer>9 (hens)</Answer><Formula>7+2=9</Formula></Problem>
<Problem ID="nluds-0002" Grade="4"><Body>Two ropes are 12 and 30 m long.</Body>
<Question>How long are equal pieces at most, and how many are there?</Question><Solution-Type>GCD</Solution-Type>
<Answer>6 (m); 7 (pieces)</Answer><Formula>12*(30/5)-66=6</Formula></Problem>
<Problem ID="nluds-0003" Grade="2"><Body>Tom is 8 and Eva is 9.</Body><Question>Who is older?</Question>
<Solution-Type>Comparison</Solution-Type><Answer>Eva</Answer></Problem>
</ProblemSet></Machine-Reading-Corpus-File>"""


def value_of(equation):
    """What a SVAMP equation such as ( 8.0 - ( 3.0 + 1.0 ) ) comes to, by Python's own arithmetic."""
    assert re.fullmatch(r"[-+*/(). \d]+", equation)
    return eval(equation)


def test_svamp_as_published(test_data):
    source = str(test_data / "svamp_test.jsonl.gz")
    problems = read_problems("svamp", "test", source)
    assert len(problems) == TASKS["svamp"].splits["test"] == 1000
    for problem in problems:
        check_gold(problem.answer, "number")
        equation, _, result = problem.solution.rpartition(" = ")
        assert result == problem.answer
        if problem.id != "chal-680":  # whose published equation is another
            assert value_of(equation) == float(problem.answer)
    steps = collections.Counter(problem.num_steps for problem in problems)
    assert steps[1] == 762 and steps[2] == 237  # as many as have one and two pairs of brackets
    by_id = {problem.id: problem for problem in problems}
    assert by_id["chal-923"].answer == "198" and by_id["chal-923"].solution == "594 / 3 = 198"
    assert by_id["chal-923"].subject == "Common-Division"


def test_asdiv_as_published(tmp_path):
    (tmp_path / "ASDiv.xml").write_text(ASDIV)
    first, second, third = read_problems("asdiv", "test", str(tmp_path / "ASDiv.xml"))
    assert first.question == "A farm has seven red hens and two white ones. How many hens are there?"
    assert (first.id, first.answer, first.num_steps, first.level) == ("nluds-0001", "9", 1, "1")
    assert (second.answer, second.num_steps, second.subject) == ("6; 7", 3, "GCD")
    assert (third.answer, third.solution, third.num_steps) == ("Eva", "", None)


def test_math500_as_published(write_rows):
    row = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2", "subject": "Algebra",
           "level": 1, "unique_id": "test/algebra/7.json"}  # fmt: skip
    (problem,) = read_problems("math", "math500", write_rows(row))
    assert (problem.id, problem.level, problem.subject, problem.answer) == ("test/algebra/7.json", "1", "Algebra", "2")


def test_college_math_as_published(write_rows):
    row = {"data_source": "a", "question_number": "exercise.1", "question": "Solve $x-1=0$.", "answer": "$x=1$",
           "license": "CC", "data_topic": "college_math.algebra"}  # fmt: skip
    other = row | {"data_source": "b"}  # another book numbers its exercises alike
    # the file, which has JSON lines whatever its name says, holds other benchmarks, too
    foreign = [row | {"data_topic": topic} for topic in ("gsm8k", "MATH.Algebra", "tal", "agieval.gaokao-math-en")]
    problem, second = read_problems("college-math", "test", write_rows(row, other, *foreign, name="full_test.json"))
    assert (problem.id, problem.answer, problem.subject, problem.solution) == ("a/exercise.1", "$x=1$", "algebra", "")
    assert second.id == "b/exercise.1"


def test_the_hungarian_exam_is_asked_and_not_graded(tmp_path):
    (tmp_path / "exam.csv").write_text('Question,Solution\n"Solve x - 1 = 0, and\ncheck.",x = 1\n')
    (problem,) = read_problems("hungarian", "test", str(tmp_path / "exam.csv"))
    assert problem.question == "Solve x - 1 = 0, and\ncheck." and problem.answer == ""
    assert problem.id.startswith("hungarian/test/")
    with pytest.raises(UsageError, match="graded by people"):
        _ = get_task("hungarian").graded_as


def test_puzzles_are_their_own_gold_answers(write_rows):
    row = {"question": "3, 6, 7, 51, 58 -> 4", "solution": "58 - 51 = 7\n6 - 7 = -1\n3 * -1 = -3\n-3 + 7 = 4"}
    (problem,) = read_problems("puzzle", "train", write_rows(row))
    assert problem.answer == problem.question and problem.num_steps == 4
    with pytest.raises(UsageError, match="line 1: the puzzle 'three' must look like"):
        read_problems("puzzle", "train", write_rows(row | {"question": "three"}))


def test_own_rows_with_mathematics_and_their_own_step_counts(write_rows):
    row = {"question": "q", "solution": "one\ntwo", "answer": r"\frac{\pi}{2}"}
    first, second = read_problems("latex", "train", write_rows(row, row | {"num_steps": 7}))
    assert (first.answer, first.num_steps, second.num_steps) == (r"\frac{\pi}{2}", 2, 7)
    with pytest.raises(UsageError, match="the task latex takes any mathematics"):
        read_problems("jsonl", "train", write_rows(row))
    with pytest.raises(UsageError, match="'num_steps' must be a whole number from 0 to 2147483647, got 'many'"):
        read_problems("latex", "train", write_rows(row | {"num_steps": "many"}))
    for steps in (True, 3_000_000_000, -1):
        with pytest.raises(UsageError, match=f"got {steps}"):
            read_problems("latex", "train", write_rows(row | {"num_steps": steps}))


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("svamp", {"Body": "b", "Question": "q", "Answer": "many"}, "'Answer' must be a number, got 'many'"),
        ("svamp", {"Question": "q", "Answer": 1}, "there is no 'Body'; the row has Question, Answer"),
        ("asdiv", {"Body": "b", "Question": "q", "Answer": "(hens)"}, "must be more than a unit"),
        ("college-math", {"question": "q"}, "there is no 'answer'; the row has question"),
        ("hungarian", {"text": "q"}, "there is no 'question' or 'Question'; the row has text"),
    ],
)
def test_a_malformed_row_names_its_line_and_what_is_wrong(write_rows, task, row, said):
    with pytest.raises(UsageError) as caught:
        read_problems(task, "test", write_rows(row))
    assert ", line 1: " in str(caught.value) and said in str(caught.value)


def test_every_task_says_what_it_is(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({}))
    for task in TASKS.values():
        assert task.about and (task.kind is not None or task.evaluation_only)
        split = next(iter(task.splits), "train")
        with pytest.raises(UsageError, match=r"line 1: there is no .*; the row has nothing"):
            read_problems(task.name, split, str(path))
