"""Paired comparison: against a hand-computed difference, and the interval against its own promise."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from data_pipeline.settings import UsageError
from eval.compare import as_text, compare


def write_graded(folder: Path, right: list[int], n: int = 4, **changes: object) -> epath.Path:
    """A graded eval folder in which `right` samples of each problem are right."""
    (folder / "grades").mkdir(parents=True)
    ids = [f"p{i}" for i in range(len(right))]
    grades = [
        {"problem_id": pid, "sample_id": i, "answer": "1", "correct": i < count, "vote": "1" if i < count else "2"}
        for pid, count in zip(ids, right, strict=True)
        for i in range(n)
    ]
    problems = [{"problem_id": pid, "question": f"{pid}?", "answer": "1"} for pid in ids]
    for name, rows in (("problems.jsonl", problems), ("grades/part-00000-00000.jsonl", grades)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"complete": True, "grader_version": "2", "num_samples": n, **changes}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return epath.Path(folder)


def test_differences_are_those_of_each_problem_with_itself(tmp_path: Path) -> None:
    a, b = write_graded(tmp_path / "a", [0, 1, 2, 4]), write_graded(tmp_path / "b", [1, 1, 4, 4])
    rows = compare([a, b], str(tmp_path / "out.json"))
    ratio, pass_2, pass_4, vote = rows
    assert [row["metric"] for row in rows] == ["PassRatio", "Pass@2", "Pass@4", "maj@4"]
    # Of 0, 1, 2 and 4 right of 4, a tie is shared: 0, 0, 1/2, 1 against 0, 0, 1, 1.
    assert (vote["first_value"], vote["second_value"]) == (1.5 / 4, 2 / 4)
    assert (ratio["first_value"], ratio["second_value"]) == (7 / 16, 10 / 16)
    # 1 - C(4-c, 2) / C(4, 2): 0, 1/2, 5/6, 1 against 1/2, 1/2, 1, 1.
    assert pass_2["difference"] == pytest.approx((1 / 2 + 1 / 6) / 4)
    assert pass_4["difference"] == pytest.approx(1 / 4)
    assert all(row["ci95"][0] <= row["difference"] <= row["ci95"][1] for row in rows)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    text = as_text(rows)
    assert "PassRatio       43.8%    62.5%   +18.8" in text and "*" not in text


def test_what_both_find_hard_does_not_blur_the_difference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(0, 4, 400)
    better = right + (rng.random(400) < 0.2)
    a, b = write_graded(tmp_path / "a", right.tolist()), write_graded(tmp_path / "b", better.tolist())
    low, high = compare([a, b])[0]["ci95"]
    difference = (better - right) / 4
    standard_error = difference.std() / 20
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert 0 < low < difference.mean() < high and "*" in as_text(compare([a, b]))


def test_numbers_of_samples_may_differ(tmp_path: Path) -> None:
    a, b = write_graded(tmp_path / "a", [2, 2], n=4), write_graded(tmp_path / "b", [1, 1], n=2)
    assert [(row["metric"], row["difference"]) for row in compare([a, b])] == [
        ("PassRatio", 0.0),
        ("Pass@2", pytest.approx(1 - 5 / 6)),
        ("maj@2", pytest.approx(0, abs=0.05)),  # a half each, of the four by random subsets
    ]


def test_a_folder_that_grew_after_it_was_graded_is_not_compared(tmp_path: Path) -> None:
    a, b = write_graded(tmp_path / "a", [1, 2, 3]), write_graded(tmp_path / "b", [1, 2])
    (b / "problems.jsonl").write_text((a / "problems.jsonl").read_text())
    with pytest.raises(UsageError, match="has changed since it was graded"):
        compare([a, b])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = write_graded(tmp_path / "a", [0, 1])
    with pytest.raises(UsageError, match="0 only in the first, 1 only in the second, such as p2"):
        compare([a, write_graded(tmp_path / "more", [0, 1, 2])])
    with pytest.raises(UsageError, match=r"by version 2, .* by 1: `python -m eval grade"):
        compare([a, write_graded(tmp_path / "old", [0, 1], grader_version="1")])
    with pytest.raises(UsageError, match="is not complete"):
        compare([a, write_graded(tmp_path / "part", [0, 1], complete={"missing samples": 3})])
    other = write_graded(tmp_path / "other", [0, 1])
    (tmp_path / "other" / "problems.jsonl").write_text(
        (tmp_path / "a" / "problems.jsonl").read_text().replace("p1?", "q?")
    )
    with pytest.raises(UsageError, match="the same ids with other texts"):
        compare([a, other])
    with pytest.raises(UsageError, match=r"is not an eval folder"):
        compare([a, epath.Path(tmp_path)])
