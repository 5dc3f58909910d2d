"""Grading a folder: each answer once, by several processes, gone on with after a stop; what is odd is counted."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from small_run import command, environment

from data_pipeline.answers import GRADER_VERSION
from data_pipeline.cli import RunError
from eval.grade import grade

N = 16
GOLDS = ["5", r"\frac{1}{2}", r"\{1,2\}", r"\text{Monday}", "x^2+1", "(1,2)"]
RIGHT = [["5", "5.0", "x=5"], ["0.5", "1/2"], ["1,2", r"\{2,1\}"], ["Monday", r"\text{monday}"], ["1+x^2"], ["(1, 2)"]]
WRONG = ["9^{9^{9}}", "7", r"\frac{1}{3}", "f(x)+1", "Tuesday", "(2,1)", "no idea at all what it is"]


def write_folder(folder: Path, num_problems: int = 40, kind: str = "math") -> dict[str, list[bool]]:
    """An eval folder of MATH with a part file a problem; returns which samples are right."""
    rng = random.Random(0)
    problems, right = [], {}
    (folder / "samples").mkdir(parents=True)
    for index in range(num_problems):
        which = index % len(GOLDS)
        problem = {"problem_id": f"p{index}", "question": "?", "solution": "…", "answer": GOLDS[which]}
        problems.append({**problem, "num_steps": 1 + index % 3, "level": str(1 + index % 5), "subject": "Algebra"})
        verdicts = [rng.random() < 0.4 for _ in range(N)]
        rows = []
        for sample_id, is_right in enumerate(verdicts):
            answer = rng.choice(RIGHT[which] if is_right else WRONG[index > 5 :])
            text = f"We think. The answer is: ${answer}$."
            rows.append(
                {
                    "problem_id": f"p{index}",
                    "sample_id": sample_id,
                    "text": text,
                    "num_tokens": 9,
                    "finish_reason": "eos",
                }
            )
        right[f"p{index}"] = verdicts
        write(folder / "samples" / f"part-{index:05d}-{index:05d}.jsonl", rows)
    write(folder / "problems.jsonl", problems)
    run = {"task": kind, "split": "test", "num_problems": num_problems, "num_samples": N, "temperature": 0.7}
    (folder / "run.json").write_text(json.dumps({**run, "max_tokens": 64, "checkpoint": "c", "hash": "h"}))
    return right


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
def test_every_sample_is_graded_as_it_was_made(tmp_path: Path) -> None:
    right = write_folder(tmp_path)
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    for index, verdicts in enumerate(right.values()):
        rows = read(tmp_path, f"grades/part-{index:05d}-{index:05d}.jsonl")
        assert [row["correct"] for row in rows] == verdicts
        for row in rows:
            # What is no set, tuple or word can only be compared by computing it.
            asked = GOLDS[index % 6] in ("5", r"\frac{1}{2}", "x^2+1")
            assert (row["seconds"] == "killed") == (row["answer"] == "$9^{9^{9}}$" and asked)
    assert metrics["pass_ratio"][str(N)]["value"] == pytest.approx(sum(map(sum, right.values())) / (40 * N))
    assert metrics["killed"] > 0 and metrics["complete"] is True and metrics["grader_version"] == GRADER_VERSION
    assert metrics["rules"] == {"answer_line": 40 * N}
    assert set(metrics["by_level"]) == set("12345") and set(metrics["by_steps"]) == set("123")


@pytest.mark.slow
def test_a_grading_that_was_killed_goes_on_to_the_same_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "whole")
    grade(epath.Path(tmp_path / "whole"))
    write_folder(tmp_path / "killed")
    grades = tmp_path / "killed" / "grades"
    process = subprocess.Popen(
        command("eval", "grade", str(tmp_path / "killed")), env=environment(), stderr=subprocess.DEVNULL
    )
    for _ in range(6000):
        if len(list(grades.glob("part-*"))) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in grades.glob("part-*")}
    assert 3 <= len(finished) < 40
    grade(epath.Path(tmp_path / "killed"))
    for path in sorted((tmp_path / "whole" / "grades").glob("part-*")):
        here, there = read(tmp_path / "killed", f"grades/{path.name}"), read(tmp_path / "whole", f"grades/{path.name}")
        assert [{**row, "seconds": 0} for row in here] == [{**row, "seconds": 0} for row in there]
    assert all((grades / name).stat().st_mtime_ns == when for name, when in finished.items())


def test_other_versions_grades_are_graded_anew(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=2)
    grade(epath.Path(tmp_path))
    part = tmp_path / "grades" / "part-00000-00000.jsonl"
    before = part.read_text()
    part.write_text(before.replace("true", "false"))
    grade(epath.Path(tmp_path))  # kept as it is: this version made it
    assert part.read_text() != before
    (tmp_path / "grades" / "grader.json").write_text('{"grader_version": "1"}')
    grade(epath.Path(tmp_path))
    assert [row["correct"] for row in read(tmp_path, f"grades/{part.name}")] == [
        json.loads(row)["correct"] for row in before.splitlines()
    ]
    part.write_text(before.replace("true", "false"))
    grade(epath.Path(tmp_path), again=True)
    assert "true" in part.read_text()


def test_damaged_grades_are_graded_anew(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=1)
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    part = tmp_path / "grades" / "part-00000-00000.jsonl"
    part.write_text(part.read_text()[:-40])
    assert json.loads(grade(epath.Path(tmp_path)).read_text())["pass_ratio"] == metrics["pass_ratio"]
    assert len(read(tmp_path, f"grades/{part.name}")) == N


def test_what_is_odd_is_counted_and_the_rest_is_graded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, num_problems=3)
    part = tmp_path / "samples" / "part-00001-00001.jsonl"
    lines = part.read_text().splitlines()
    stranger = json.dumps({**json.loads(lines[0]), "problem_id": "stranger"})
    numbers = json.dumps({**json.loads(lines[0]), "text": 7})
    part.write_bytes(
        "\n".join([*lines, lines[3], stranger, "{", "[]", numbers, lines[0][:-20]]).encode() + b"\n\xff\xfe\n"
    )
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    assert metrics["left_out"] == {
        "samples that occur twice": 1,
        "samples of unknown problems": 1,
        "malformed lines": 5,
    }
    assert metrics["num_problems"] == 3 and metrics["complete"] is True
    assert "part-00001-00001.jsonl, line 19" in caplog.text and "5 malformed lines in all" in caplog.text


def test_sample_ids_are_the_numbers_of_samples(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=2)
    part = tmp_path / "samples" / "part-00001-00001.jsonl"
    text = part.read_text()
    for replaced in (-1, N, "true", 7.0):
        part.write_text(text.replace('"sample_id": 3', f'"sample_id": {replaced}'))
        metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
        assert metrics["complete"] == {"problems without all samples": 1, "missing samples": 1}, replaced
        assert sum(metrics["left_out"].values()) == 1
    extra = json.dumps({**json.loads(text.splitlines()[0]), "sample_id": N})
    part.write_text(text + extra + "\n")
    assert json.loads(grade(epath.Path(tmp_path)).read_text())["complete"] is True


def test_what_json_may_hold_and_files_may_not_ends_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=1)
    part = tmp_path / "samples" / "part-00000-00000.jsonl"
    lines = part.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "text": "\\boxed{5\ud800}"})
    part.write_text("\n".join([*lines, "[" * 100_000]) + "\n")
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    assert metrics["complete"] is True and metrics["left_out"] == {"malformed lines": 1}
    before = (tmp_path / "grades" / part.name).read_bytes()
    assert json.loads(grade(epath.Path(tmp_path)).read_text()) == metrics  # kept
    assert (tmp_path / "grades" / part.name).read_bytes() == before
    assert read(tmp_path, f"grades/{part.name}")[2]["answer"] == "5\ud800"


def test_a_corrected_gold_answer_counts(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=2)
    before = json.loads(grade(epath.Path(tmp_path)).read_text())["pass_ratio"][str(N)]["value"]
    rows = read(tmp_path, "problems.jsonl")
    write(tmp_path / "problems.jsonl", [rows[0], {**rows[1], "answer": "123"}])
    after = json.loads(grade(epath.Path(tmp_path)).read_text())["pass_ratio"][str(N)]["value"]
    assert 0 < after < before


@pytest.mark.parametrize(
    ("change", "said"),
    [({"problem_id": "p0"}, "'p0' occurs twice"), ({"answer": 5}, "answer must be a text, not 5")],
)
def test_problems_that_are_none_are_said(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_folder(tmp_path, num_problems=2)
    rows = read(tmp_path, "problems.jsonl")
    write(tmp_path / "problems.jsonl", [rows[0], {**rows[1], **change}])
    with pytest.raises(RunError, match=said):
        grade(epath.Path(tmp_path))


def test_what_a_problem_need_not_have_may_be_missing(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=2)
    needed = ("problem_id", "question", "answer")
    write(tmp_path / "problems.jsonl", [{k: row[k] for k in needed} for row in read(tmp_path, "problems.jsonl")])
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    assert metrics["num_problems"] == 2 and metrics["by_level"] == {} and metrics["step_law"] is None


def test_the_vote_takes_equal_answers_for_one_and_does_not_look_at_the_gold_one(tmp_path: Path) -> None:
    """Three samples say one half in three spellings and are wrong; two say 1. And a word "right" is no verdict."""
    write_folder(tmp_path, num_problems=2)
    problems = read(tmp_path, "problems.jsonl")
    write(tmp_path / "problems.jsonl", [{**problems[0], "answer": "1"}, {**problems[1], "answer": r"\text{isosceles}"}])
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "num_samples": 5}))
    answers = [["1/2", r"\frac12", "0.5", "1", "1.0"], ["isosceles", *[r"\text{right}"] * 4]]
    for index, of_problem in enumerate(answers):
        rows = [
            {"problem_id": f"p{index}", "sample_id": i, "text": rf"\boxed{{{text}}}", "finish_reason": "eos"}
            for i, text in enumerate(of_problem)
        ]
        write(tmp_path / "samples" / f"part-{index:05d}-{index:05d}.jsonl", rows)
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    assert metrics["maj_at"]["5"]["value"] == 0.0
    assert metrics["maj_at"]["1"]["value"] == pytest.approx(metrics["pass_at"]["1"]["value"]) == pytest.approx(0.3)


def test_a_malformed_line_makes_its_problem_incomplete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, num_problems=3)
    part = tmp_path / "samples" / "part-00001-00001.jsonl"
    part.write_text(part.read_text().replace('"text"', '"txet"', 1))
    caplog.set_level("INFO", "mathscale")
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    assert metrics["complete"] == {"problems without all samples": 1, "missing samples": 1}
    assert "UNFINISHED, 2 of 3 problems" in caplog.text and "Pass@" not in caplog.text.rpartition("UNFINISHED")[2]


def test_a_gold_answer_that_is_none_is_said_before_anything_is_graded(tmp_path: Path) -> None:
    write_folder(tmp_path, num_problems=2, kind="jsonl")
    with pytest.raises(RunError, match=r"'p1'.*is not a number"):
        grade(epath.Path(tmp_path))
    assert not (tmp_path / "grades").exists()


def test_one_greedy_sample_is_called_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, num_problems=4)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "num_samples": 1, "temperature": 0.0}))
    for part in (tmp_path / "samples").iterdir():
        part.write_text(part.read_text().splitlines()[0] + "\n")
    caplog.set_level("INFO", "mathscale")
    metrics = json.loads(grade(epath.Path(tmp_path)).read_text())
    assert metrics["greedy_accuracy"] == metrics["pass_ratio"]["1"] and "greedy accuracy" in caplog.text
