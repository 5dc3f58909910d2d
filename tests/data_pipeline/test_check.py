"""Every training text is graded right against itself, or listed."""

import pytest

from data_pipeline.__main__ import main
from data_pipeline.check import CheckSettings, check
from data_pipeline.settings import UsageError

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "count", "fewest"), [("gsm8k", 7473, 0.999), ("math", 7498, 0.99)])
def test_the_training_sets_are_right_by_themselves(test_data, task, count, fewest):
    checked, wrong = check(task, CheckSettings(source=str(test_data / f"{task}_train.jsonl.gz")))
    assert checked == count and len(wrong) <= (1 - fewest) * count


def test_a_text_that_is_not_right_is_listed(write_rows, tmp_path, capsys):
    row = {"question": "1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}
    path = write_rows(row, row | {"id": "odd", "solution": "The answer is: 3."}, row | {"id": "boxed"})
    # A template that leaves the answer to the solution: the last number counts.
    (tmp_path / "bare.yaml").write_text('prompt: "{question}"\nresponse: "{solution} {answer}?"\n')
    count, wrong = check("jsonl", CheckSettings(source=path))
    # The solution of one announces another answer than its last line has.
    assert count == 3 and [(each.problem.id, each.answer, each.rule) for each in wrong] == [("odd", "3", "answer_line")]
    assert check("jsonl", CheckSettings(source=write_rows(row, name="right.jsonl"))) == (1, [])
    (tmp_path / "first.yaml").write_text('prompt: "{question}"\nresponse: "{answer}. {solution}"\n')
    count, wrong = check("jsonl", CheckSettings(source=path, template=str(tmp_path / "first.yaml")))
    assert [(each.problem.id, each.answer, each.rule) for each in wrong] == [("odd", "3", "answer_line")]
    with pytest.raises(SystemExit) as caught:
        main(["check", "jsonl", "--source", path, "--template", str(tmp_path / "first.yaml")])
    assert caught.value.code == 0
    said = capsys.readouterr().err
    assert "odd: gold '2', read '3' (answer_line)" in said and "2 of 3 texts are graded right (66.67 %)" in said


def test_nothing_to_check_is_said(write_rows):
    with pytest.raises(UsageError, match="no problem was read"):
        check("jsonl", CheckSettings(source=write_rows("")))
