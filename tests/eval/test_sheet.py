"""An answer sheet for people: every answer once, as text that stays text, and a row to fill in for each."""

import csv
import shutil

import pytest
from etils import epath
from test_report import HOSTILE, MIXED, Page, write_eval

from data_pipeline.settings import UsageError
from eval.__main__ import main
from eval.sheet import write_sheet


def test_every_answer_is_there_to_be_graded(tmp_path):
    write_eval(tmp_path, MIXED, text=f"{HOSTILE} so $x^2$ is {{}}")
    page = Page(write_sheet(epath.Path(tmp_path)).read_text())
    assert page.count("script") == page.count("img") == 0 and page.count("msup") == 12
    assert page.words.count("points, sample") == 12
    with (tmp_path / "sheet.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["points"] for row in rows} == {""}
    assert [int(row["sample_id"]) for row in rows] == [0, 1, 2, 3] * 3


def test_nothing_to_grade_is_said(tmp_path, capsys):
    with pytest.raises(UsageError, match="is not an eval folder"):
        write_sheet(epath.Path(tmp_path))
    write_eval(tmp_path, MIXED)
    shutil.rmtree(tmp_path / "samples")
    with pytest.raises(UsageError, match="has no samples yet"):
        write_sheet(epath.Path(tmp_path))


@pytest.mark.usefixtures("logging_left_as_it_was")
def test_what_people_grade_is_not_run_to_be_graded(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--task", "hungarian", "--checkpoint", "none", "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "graded by people: `python -m eval sheet DIR` prints them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
