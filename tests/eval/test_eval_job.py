"""The batch job from a checkpoint to metrics.json: whole files, exact resume, honest numbers."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from small_run import command, environment, run, write_config

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from eval.files import gaps, what_is_missing
from eval.grade import grade, is_correct
from eval.report import write_report
from eval.sample import SampleSettings, sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = run("mathscale_jax.train", "--config", str(write_config(folder)), "num_steps=4")
    assert result.returncode == 0, result.stderr
    return folder


NUM_PROBLEMS = 6


def settings(trained: Path, out: Path, **changes: Any) -> SampleSettings:
    plain = dict(
        checkpoint=str(trained / "run"),
        task="demo",
        source=str(trained / "data" / "test.jsonl"),
        out=str(out),
        num_problems=NUM_PROBLEMS,
        num_samples=8,
        max_tokens=24,
        dtype="float32",
        rows=1,  # so that a group is a problem
    )
    return SampleSettings(**{**plain, **changes})


@pytest.fixture(scope="module")
def sampled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sampled")
    sample(settings(trained, out))
    return out


@pytest.fixture
def folder(sampled: Path, tmp_path: Path) -> Iterator[epath.Path]:
    """A copy of the samples that a test may change."""
    shutil.copytree(sampled, tmp_path / "eval")
    yield epath.Path(tmp_path / "eval")


def read(folder: epath.Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_problem_has_one_part_file_with_all_its_samples(folder: epath.Path) -> None:
    problems = read(folder, "problems.jsonl")
    assert len(problems) == NUM_PROBLEMS
    for index, problem in enumerate(problems):
        rows = read(folder, f"samples/part-{index:05d}-{index:05d}.jsonl")
        assert [row["sample_id"] for row in rows] == list(range(8))
        assert {row["problem_id"] for row in rows} == {problem["problem_id"]}
        assert all(1 <= row["num_tokens"] <= 24 and row["finish_reason"] in ("eos", "length") for row in rows)


@pytest.mark.slow
def test_a_job_killed_with_sigkill_ends_with_the_files_of_an_undisturbed_one(
    trained: Path, sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    out = tmp_path / "killed"
    arguments = ["sample", "--checkpoint", str(trained / "run"), "--task", "demo", "--dtype", "float32"]
    arguments += [
        "--source",
        str(trained / "data" / "test.jsonl"),
        "--out",
        str(out),
        "--num-samples",
        "8",
        "--max-tokens",
        "24",
        "--rows",
        "2",
    ]
    undisturbed = tmp_path / "undisturbed"
    whole = [str(undisturbed) if a == str(out) else a for a in arguments]
    assert run("eval", *whole).returncode == 0
    process = subprocess.Popen(command("eval", *arguments), env=environment(), stderr=subprocess.DEVNULL)
    for _ in range(3000):
        if len(list((out / "samples").glob("part-*"))) >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in (out / "samples").glob("part-*")}
    assert 2 <= len(finished) < 10
    compiled = {path.name for path in programs.iterdir()}
    again = run("eval", *arguments)
    assert again.returncode == 0, again.stderr
    # Everything it needed was compiled before, and kept.
    assert compiled and compiled == {path.name for path in programs.iterdir()}
    names = [f"part-{first:05d}-{first + 1:05d}.jsonl" for first in range(0, 20, 2)]
    # A file that SIGKILL met while it was written stays under a hidden name, which nothing reads.
    assert sorted(path.name for path in (out / "samples").glob("[!.]*")) == names
    for name in names:
        assert (out / "samples" / name).read_bytes() == (undisturbed / "samples" / name).read_bytes()
    for name, written in finished.items():
        assert (out / "samples" / name).stat().st_mtime_ns == written  # nothing was drawn twice


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"seed": 1}, {"num_samples": 9}, {"max_tokens": 20}])
def test_a_folder_of_other_samples_is_refused(trained: Path, folder: epath.Path, change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(UsageError, match=rf"another run:\n  {key}: .* -> "):
        sample(settings(trained, Path(folder), **change))


def test_fewer_problems_than_the_folder_holds_are_refused(trained: Path, folder: epath.Path) -> None:
    with pytest.raises(UsageError, match=f"{NUM_PROBLEMS} problems already, the first 3 among them: ask for as many"):
        sample(settings(trained, Path(folder), num_problems=3))


def test_other_weights_under_the_same_name_are_refused(trained: Path, folder: epath.Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(trained / "data", tmp_path / "data")
    assert run("mathscale_jax.train", "--config", str(write_config(tmp_path)), "num_steps=4", "seed=3").returncode == 0
    with pytest.raises(UsageError, match="weights: "):
        sample(settings(tmp_path, Path(folder), source=str(trained / "data" / "test.jsonl")))


def test_a_prompt_beyond_the_context_is_recorded_and_the_job_goes_on(trained: Path, tmp_path: Path) -> None:
    rows = [{"question": "many words " * 500, "solution": "1 + 1 = 2", "answer": "2"}]
    rows.append({"question": "Ann has 2 books.", "solution": "1 + 1 = 2", "answer": "2"})
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = sample(settings(trained, tmp_path / "out", task="jsonl", source=str(source)))
    assert {row["finish_reason"] for row in read(out, "samples/part-00000-00000.jsonl")} == {"error"}
    assert {row["finish_reason"] for row in read(out, "samples/part-00001-00001.jsonl")} <= {"eos", "length"}
    metrics = json.loads(grade(out).read_text())
    assert metrics["num_problems"] == 2


def rewrite_texts(folder: epath.Path, right_per_problem: list[int]) -> None:
    """Replaces the texts: the first samples of problem i are right, the others are wrong in different ways."""
    for index, (problem, right) in enumerate(zip(read(folder, "problems.jsonl"), right_per_problem, strict=True)):
        rows = read(folder, f"samples/part-{index:05d}-{index:05d}.jsonl")
        for row in rows:
            answer = problem["answer"] if row["sample_id"] < right else str(1000 + row["sample_id"])
            row["text"] = f"1 + 1 = 2\nThe answer is: {answer}."
        (folder / "samples" / f"part-{index:05d}-{index:05d}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def test_metrics_are_those_of_the_texts(folder: epath.Path) -> None:
    rewrite_texts(folder, [0, 1, 2, 4, 8, 0])
    metrics = json.loads(grade(folder).read_text())
    assert metrics["pass_ratio"]["8"]["value"] == pytest.approx(15 / 48)
    assert metrics["pass_at"]["1"]["value"] == pytest.approx(15 / 48)
    assert metrics["pass_at"]["8"]["value"] == pytest.approx(4 / 6)
    # 1 - C(6, 2) / C(8, 2) = 13/28 of the pairs hold one of two right samples; 7/28, 22/28 likewise.
    assert metrics["pass_at"]["2"]["value"] == pytest.approx((7 / 28 + 13 / 28 + 22 / 28 + 1) / 6)
    # Two equal right answers beat six different wrong ones; one right among seven wrong shares an eightfold tie.
    assert metrics["maj_at"]["8"]["value"] == pytest.approx((1 / 8 + 1 + 1 + 1) / 6)
    assert metrics["complete"] is True and metrics["grader_version"]
    assert {(g["answer"] is not None, g["rule"]) for g in read(folder, "grades/part-00003-00003.jsonl")} == {
        (True, "answer_line")
    }


def test_missing_samples_are_said_and_do_not_count(folder: epath.Path) -> None:
    rewrite_texts(folder, [8, 8, 0, 0, 0, 0])
    (folder / "samples" / "part-00005-00005.jsonl").unlink()
    part = folder / "samples" / "part-00004-00004.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:3]))
    metrics = json.loads(grade(folder).read_text())
    assert metrics["num_problems"] == 4
    assert metrics["complete"] == {"problems without all samples": 2, "missing samples": 5 + 8}
    assert metrics["pass_ratio"]["8"]["value"] == pytest.approx(0.5)
    assert "Pass@8" not in write_report(folder).read_text()


def test_a_report_says_what_is_missing_while_shards_are_under_way(folder: epath.Path) -> None:
    (folder / "metrics.json").unlink(missing_ok=True)
    away = [folder / "samples" / f"part-0000{i}-0000{i}.jsonl" for i in (1, 2, 4)]
    texts = [part.read_text() for part in away]
    for part in away:
        part.unlink()
    told = run("eval", "report", str(folder))
    assert told.returncode == 0 and "error" not in told.stderr
    assert "3 of 6 problems have their samples; missing: 1 to 2, 4 to 4; the newest file is" in told.stderr
    grade(folder)
    for part, text in zip(away, texts, strict=True):
        part.write_text(text)
    told = run("eval", "report", "--complete", str(folder))
    assert told.returncode == 1 and (folder / "report.html").exists()
    assert "all samples are there; 3 of 6 files are not graded yet" in told.stderr
    grade(folder)
    assert what_is_missing(folder) is None
    (folder / "metrics.json").unlink()
    told = run("eval", "report", str(folder))
    assert told.returncode == 2 and "nothing is graded yet" in told.stderr


def test_duplicates_and_unknown_problems_are_named_and_left_out(
    folder: epath.Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite_texts(folder, [8, 0, 0, 0, 0, 0])
    part = folder / "samples" / "part-00001-00001.jsonl"
    again = {
        **read(folder, "samples/part-00001-00001.jsonl")[0],
        "text": "The answer is: " + read(folder, "problems.jsonl")[1]["answer"],
    }
    stranger = {**again, "problem_id": "stranger"}
    part.write_text(part.read_text() + json.dumps(again) + "\n" + json.dumps(stranger) + "\n")
    metrics = json.loads(grade(folder).read_text())
    assert metrics["pass_ratio"]["8"]["value"] == pytest.approx(1 / 6)
    assert "occurs twice" in caplog.text and "'stranger' is not in problems.jsonl" in caplog.text


def test_damage_is_said(folder: epath.Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an eval folder"):
        grade(epath.Path(tmp_path))
    (folder / "samples" / "part-00002-00002.jsonl").write_text('{"problem_id": "x", ')
    metrics = json.loads(grade(folder).read_text())
    assert metrics["left_out"] == {"malformed lines": 1} and metrics["complete"]["missing samples"] == 8
    shutil.rmtree(folder / "samples")
    with pytest.raises(RunError, match="no problem has all its 8 samples"):
        grade(folder)


def test_is_correct_compares_final_answers() -> None:
    assert is_correct("3 + 4 = 7\nThe answer is: 7.", "7")
    assert not is_correct("The answer is: 70.", "7")
    assert not is_correct("I do not know.", "7")
    assert is_correct(r"It is $\frac{14}{2}$.", "7", "latex")
    with pytest.raises(ValueError, match="kind='poem'"):
        is_correct("7", "7", "poem")  # type: ignore[arg-type]


def test_more_problems_go_on_from_the_first_ones(trained: Path, sampled: Path, folder: epath.Path) -> None:
    before = {part.name: part.read_bytes() for part in (folder / "samples").iterdir()}
    sample(settings(trained, Path(folder), num_problems=8))
    after = {part.name: part.read_bytes() for part in (folder / "samples").iterdir()}
    assert len(before) == 6 and len(after) == 8 and before.items() <= after.items()
    assert json.loads(grade(folder).read_text())["num_problems"] == 8


def test_more_problems_are_gone_on_with_where_a_job_ended_between_two_files(
    trained: Path, sampled: Path, folder: epath.Path, tmp_path: Path
) -> None:
    sample(settings(trained, tmp_path / "grown", num_problems=8))
    problems = (tmp_path / "grown" / "problems.jsonl").read_bytes()
    (folder / "problems.jsonl").write_bytes(problems)  # and run.json still says 6
    sample(settings(trained, Path(folder)))
    assert len(read(folder, "problems.jsonl")) == 6
    (folder / "problems.jsonl").write_bytes(problems)
    sample(settings(trained, Path(folder), num_problems=8))
    assert json.loads(grade(folder).read_text())["num_problems"] == 8


@pytest.mark.parametrize(
    ("covered", "left"), [(set(), [range(8)]), ({0, 1, 2}, [range(3, 8)]), ({3, 4}, [range(3), range(5, 8)])]
)
def test_no_problem_of_a_group_is_drawn_twice(covered: set[int], left: list[range]) -> None:
    assert list(gaps(range(8), covered)) == left


def test_a_sample_in_two_files_counts_once(folder: epath.Path) -> None:
    shutil.copy(folder / "samples" / "part-00001-00001.jsonl", folder / "samples" / "part-00001-00002.jsonl")
    metrics = json.loads(grade(folder).read_text())
    assert metrics["num_problems"] == 6 and metrics["complete"] is True


def test_a_device_too_small_ends_the_job_and_leaves_no_samples(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mathscale_jax.sampler.generate.memory_of", lambda device: 1.0)
    with pytest.raises(UsageError, match="there is room for 0"):
        sample(settings(trained, tmp_path / "out"))
    assert not list((tmp_path / "out" / "samples").iterdir())


def test_samples_without_a_run_file_are_not_adopted(trained: Path, folder: epath.Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(UsageError, match="that says of what"):
        sample(settings(trained, Path(folder)))


@pytest.mark.parametrize("name", ["run.json", "problems.jsonl"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'{"problem_id": "demo/40"}\n', b"[1"])
def test_a_damaged_file_is_named(folder: epath.Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    if name == "run.json" and content.startswith(b"{"):
        return  # whole JSON of another kind: nothing says it is damaged
    with pytest.raises(RunError, match=f"{name} is damaged"):
        grade(folder)


def test_a_report_before_the_grades_says_what_to_do(folder: epath.Path) -> None:
    with pytest.raises(UsageError, match="run `python -m eval grade"):
        write_report(folder)
