"""Running a study: what is done is not done again, what fails does not end the others, what changed is refused."""

import fcntl
import importlib.metadata
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from etils import epath
from small_run import command, environment, run, write_config

from data_pipeline.cli import RunError, StopSignal, flags_of
from data_pipeline.files import locked
from data_pipeline.settings import UsageError
from eval.sample import SampleSettings
from eval.study import cells as cells_module
from eval.study import run as run_module
from eval.study.cells import Place, Stage, places
from eval.study.grid import cells_of
from eval.study.jobs import _tpu, _tpu_name, write_jobs
from eval.study.record import add_time, begin_record, done_stages, mark_done, read_record
from eval.study.run import StudyOptions, check_paths, choose, prepare, study, tell
from eval.study.settings import StudySettings, load_study


def write_study(folder: Path, **changes: Any) -> Path:
    """A study of two sizes of the smallest model there is."""
    base = write_config(folder, num_steps=4, checkpoint={"every": 4})
    tree = {
        "out": str(folder / "study"),
        "title": "Two sizes",
        "scale": "A model that learned nothing.",
        "base": str(base),
        "axes": {"size": {"data.sources.0.count": [10, 20]}},
        "evals": {
            "samples": {
                "task": "demo", "source": str(folder / "data" / "test.jsonl"), "num_samples": 4, "max_tokens": 16,
                "num_problems": 8, "dtype": "float32",
            }
        },
        "report": {"x": "size", "metrics": ["samples:pass_ratio", "samples:pass@4"]},
        **changes,
    }  # fmt: skip
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def settings_of(folder: Path, **changes: Any) -> StudySettings:
    return load_study(str(write_study(folder, **changes)))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Commands that take no time stand in for training and sampling: cell -> words behind `python -m`."""
    words: dict[str, list[str]] = {}

    def of(cell: Any, study: Any) -> list[Stage]:
        own = words.get(cell.name, ["json.tool", "--help"])
        return [Stage("train", "the command", own), Stage("samples", "the command", own)]

    monkeypatch.setattr(cells_module, "stages_of", of)
    monkeypatch.setattr(cells_module, "_result", lambda cell, stage: "")
    monkeypatch.setattr(run_module, "write_study_report", lambda settings, cells, failed: "report.html")
    return words


def test_a_cell_that_fails_is_named_with_its_last_lines_and_the_others_go_on(tmp_path: Path, stages) -> None:
    settings = settings_of(tmp_path, axes={"size": {"data.sources.0.count": [10, 20, 30]}})
    stages["20_seed0"] = ["json.tool", "--no-such-flag"]
    with pytest.raises(RunError) as raised:
        study(settings, StudyOptions(parallel=2))
    assert "1 of 3 cells failed; the others are done" in str(raised.value)
    assert "20_seed0: the command refuses its settings" in str(raised.value)
    assert "unrecognized arguments: --no-such-flag" in str(raised.value)
    assert str(tmp_path / "study/cells/20_seed0/log.txt") in str(raised.value)
    assert [bool(done_stages(cell)) for cell in cells_of(settings)] == [True, False, True]
    assert read_record(cells_of(settings)[1])["spent"]["train"] >= 0
    stages["20_seed0"] = ["json.tool", "--help"]
    stages["10_seed0"] = stages["30_seed0"] = ["json.tool", "--not-run-again"]
    study(settings, StudyOptions())
    assert "done   10_seed0" in tell(settings, StudyOptions())


def test_changed_settings_over_finished_cells_are_refused_before_anything_runs(tmp_path: Path, stages) -> None:
    study(settings_of(tmp_path), StudyOptions())
    for changes, line in (
        ({"train": {"optimizer": {"learning_rate": 0.5}}}, "optimizer.learning_rate: 0.01 -> 0.5"),
        (
            {"evals": {"samples": {"task": "demo", "source": "x", "num_samples": 8}}},
            "evals.samples.num_samples: 4 -> 8",
        ),
    ):
        with pytest.raises(UsageError) as raised:
            study(settings_of(tmp_path, **changes), StudyOptions())
        assert line in str(raised.value) and "holds results of other settings" in str(raised.value)
        assert "choose another out" in str(raised.value)
    more = settings_of(tmp_path, axes={"size": {"data.sources.0.count": [10, 20, 30]}})
    study(more, StudyOptions())  # more cells are no change
    assert tell(more, StudyOptions()).count("done") == 3


def test_what_a_resume_allows_is_refused_over_a_run_that_is_done(tmp_path: Path, stages) -> None:
    (cell, _) = cells_of(settings_of(tmp_path))
    Path(cell.folder).mkdir(parents=True)
    begin_record(cell)
    longer = settings_of(tmp_path, train={"num_steps": 300})
    tell(longer, StudyOptions())  # nothing is trained yet
    evals = {"samples": {**longer.evals["samples"], "num_samples": 8}}
    tell(settings_of(tmp_path, evals=evals), StudyOptions())  # nor drawn
    (Path(cell.folder) / "train" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="num_steps: 4 -> 300"):
        tell(longer, StudyOptions())  # it would go on under another schedule
    mark_done(cell, "train", 1.0)
    with pytest.raises(UsageError, match="num_steps: 4 -> 300"):
        tell(longer, StudyOptions())
    tell(settings_of(tmp_path, train={"log_every": 7, "checkpoint": {"every": 2}}), StudyOptions())


def test_studies_that_share_their_runs_keep_what_the_other_one_measured(tmp_path: Path, stages) -> None:
    shared = str(tmp_path / "shared")
    first = settings_of(tmp_path, cells=shared)
    study(first, StudyOptions())
    other = {"greedy": {**first.evals["samples"], "temperature": 0, "num_samples": 1}}
    report = {"x": "size", "metrics": ["greedy:accuracy"]}
    second = settings_of(tmp_path, out=str(tmp_path / "second"), cells=shared, evals=other, report=report)
    begin_record(cells_of(second)[0])
    changed = {"samples": {**first.evals["samples"], "temperature": 0.2}}
    with pytest.raises(UsageError, match=r"evals\.samples\.temperature: 0\.7 -> 0\.2"):
        study(settings_of(tmp_path, cells=shared, evals=changed), StudyOptions())
    assert read_record(cells_of(second)[0])["settings"]["evals"].keys() == {"samples", "greedy"}


def test_other_data_under_finished_cells_is_refused(tmp_path: Path, stages) -> None:
    settings = settings_of(tmp_path)
    study(settings, StudyOptions())
    with (tmp_path / "data" / "test.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match=r"test\.jsonl: its files are not those that were read"):
        study(settings, StudyOptions())


def test_data_that_was_removed_is_made_again_or_missed_by_its_name(tmp_path: Path, stages) -> None:
    made = tmp_path / "made"
    step = {"makes": f"{made}/test.jsonl", "run": f"data_pipeline prepare demo --out {made} --num-train 9 --num-test 9"}
    evals = {"samples": {"task": "demo", "source": f"{made}/test.jsonl"}}
    settings = settings_of(tmp_path, prepare=[step], evals=evals, report={"x": "size", "metrics": ["samples:pass@1"]})
    study(settings, StudyOptions())
    shutil.rmtree(made)
    assert "make " in tell(settings, StudyOptions())
    study(settings, StudyOptions())
    assert (made / "test.jsonl").exists()
    (made / "test.jsonl").rename(made / "away.jsonl")
    with pytest.raises(UsageError, match=r"test\.jsonl does not exist"):
        study(settings.model_copy(update={"prepare": ()}), StudyOptions())


def test_the_time_of_earlier_tries_counts(tmp_path: Path) -> None:
    (cell, *_) = cells_of(settings_of(tmp_path))
    Path(cell.folder).mkdir(parents=True)
    begin_record(cell)
    add_time(cell, "train", 30.0)
    begin_record(cell)
    add_time(cell, "train", 20.0)
    assert done_stages(cell) == {}
    mark_done(cell, "train", 5.0)
    mark_done(cell, "samples", 7.0)
    assert done_stages(cell) == {"train": 55.0, "samples": 7.0}


def test_a_cell_waits_for_a_command_that_a_killed_study_left_behind(tmp_path: Path, stages) -> None:
    settings = settings_of(tmp_path)
    (cell, _) = cells_of(settings)
    Path(cell.folder).mkdir(parents=True)
    with (Path(cell.folder) / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        orphan = subprocess.Popen(["sleep", "1.5"], pass_fds=[file.fileno()])
    study(settings, StudyOptions(cell=cell.name))
    assert orphan.poll() == 0 and done_stages(cell)


def test_missing_data_is_said_before_anything_runs(tmp_path: Path, stages) -> None:
    settings = settings_of(tmp_path, train={"data.sources": [{"task": "demo", "path": "nowhere.jsonl"}]})
    with pytest.raises(UsageError, match=r"data.sources.0.path=nowhere.jsonl does not exist \(cell 10_seed0\)"):
        study(settings, StudyOptions())
    with pytest.raises(UsageError, match=r"evals.samples.source=gone does not exist"):
        check_paths(cells_of(settings_of(tmp_path, evals={"samples": {"task": "demo", "source": "gone"}})))
    assert not (tmp_path / "study" / "cells").exists()


def test_data_is_made_once_and_other_data_in_its_place_is_refused(tmp_path: Path, stages) -> None:
    made = str(tmp_path / "made")
    step = {"makes": f"{made}/test.jsonl", "run": f"data_pipeline prepare demo --out {made} --num-train 9 --num-test 9"}
    settings = settings_of(tmp_path, prepare=[step])
    (tmp_path / "study").mkdir()
    with StopSignal() as stop:
        prepare(settings, stop)
        assert len(Path(step["makes"]).read_text().splitlines()) == 9
        written = Path(step["makes"]).stat().st_mtime_ns
        prepare(settings, stop)
        assert Path(step["makes"]).stat().st_mtime_ns == written
        elsewhere = settings_of(tmp_path, out=str(tmp_path / "other"), prepare=[step])
        (tmp_path / "other").mkdir()
        prepare(elsewhere, stop)  # another study takes it
        assert Path(step["makes"]).stat().st_mtime_ns == written
        other = settings_of(tmp_path, prepare=[{**step, "run": step["run"].replace("9", "8")}])
        with pytest.raises(UsageError, match=r"was made by another command than prepare\.0 says"):
            prepare(other, stop)
        with pytest.raises(UsageError, match=r"was made by another command than prepare\.0 says"):
            tell(other, StudyOptions())
        with pytest.raises(RunError, match=r"could not be made: prepare\.0 refuses its settings"):
            prepare(settings_of(tmp_path, prepare=[{"makes": "x", "run": "data_pipeline prepare demo"}]), stop)
        with pytest.raises(UsageError, match="its command has not made it"):
            prepare(settings_of(tmp_path, prepare=[{"makes": "x", "run": "json.tool --help"}]), stop)


def test_data_whose_making_was_stopped_is_made_again(tmp_path: Path, stages) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "test.jsonl").write_text("half of it")
    run = f"data_pipeline prepare demo --out {made} --num-train 9 --num-test 9"
    (tmp_path / "study").mkdir()
    with StopSignal() as stop:
        prepare(settings_of(tmp_path, prepare=[{"makes": f"{made}/test.jsonl", "run": run}]), stop)
    assert len((made / "test.jsonl").read_text().splitlines()) == 9


def test_the_teacher_listens_while_data_is_made(tmp_path: Path, stages) -> None:
    (tmp_path / "study").mkdir()
    out = tmp_path / "rows"
    settings = settings_of(
        tmp_path,
        prepare=[{
            "makes": str(out / "dataset"),
            "run": "data_pipeline synthesize --config configs/synthesis/demo.yaml teacher.base_url={teacher} "
            f"out={out} seeds.path={tmp_path / 'data' / 'train.jsonl'} num_items=10 similarity=1",
            "teacher": {"wrong_questions": 0, "wrong_answers": 0},
        }],
    )  # fmt: skip
    with StopSignal() as stop:
        prepare(settings, stop)
    assert (out / "dataset").is_dir()


def test_two_commands_do_not_run_one_study_and_a_job_of_one_cell_waits(tmp_path: Path, stages, monkeypatch) -> None:
    settings = settings_of(tmp_path)
    folder = epath.Path(settings.out)
    folder.mkdir()
    with locked(folder, "out"), pytest.raises(UsageError, match="in use by another run"):
        study(settings, StudyOptions())
    monkeypatch.setattr(run_module, "_PATIENCE", 0.05)
    released, held = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(folder, "out"):
            held.set()
            time.sleep(0.5)
            released.set()

    threading.Thread(target=hold).start()
    assert held.wait(5)
    study(settings, StudyOptions(cell="20_seed0"))
    assert released.is_set()  # it has waited
    assert [bool(done_stages(cell)) for cell in cells_of(settings)] == [False, True]
    assert not (tmp_path / "study" / "study.yaml").exists()  # which is the whole study's


def test_one_cell_or_a_share_of_them_is_chosen(tmp_path: Path) -> None:
    cells = cells_of(settings_of(tmp_path, seeds=[0, 1, 2]))
    assert [cell.name for cell in choose(cells, "20_seed1")] == ["20_seed1"]
    shares = [choose(cells, f"{number}/4") for number in range(4)]
    assert sorted(cell.name for share in shares for cell in share) == sorted(cell.name for cell in cells)
    with pytest.raises(UsageError, match="a cell's name: 10_seed0, 10_seed1"):
        choose(cells, "4/4")
    with pytest.raises(UsageError, match=r"a cell's name: 20_seed1, .*; --dry-run lists all 6"):
        choose(cells, "20_sed1")


def test_a_dry_run_says_how_much_there_is_to_do(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, seeds=[0, 1])
    cells = cells_of(settings)
    assert tell(settings, StudyOptions()).splitlines()[-1] == (
        "To do in 4 cells: 4 x training of 4 steps; 4 x eval 'samples' with 4 samples a problem."
    )
    for cell in cells[:2]:
        Path(cell.folder).mkdir(parents=True)
        begin_record(cell)
        mark_done(cell, "train", 100.0)
    mark_done(cells[0], "samples", 80.0)
    (Path(cells[2].train.output_dir) / "checkpoints" / "2").mkdir(parents=True)  # a run that was stopped
    lines = tell(settings, StudyOptions(parallel=3)).splitlines()
    states = [line for line in lines if "_seed" in line and not line.startswith("absent")]
    assert states[0] == "done   10_seed0 (180 s)"
    assert [line[:6] for line in states[1:]] == ["begun ", "begun ", "to do "]
    assert lines[-2:] == [  # 2 x 100 s and 3 x 80 s, on three places
        "To do in 3 cells: 3 x eval 'samples' with 4 samples a problem; 2 x training of 4 steps.",
        "About 2 minutes at 3 at once, if they take as long as those that are done.",
    ]
    with_errors = load_study(str(tmp_path / "study.yaml"), ["seeds=[0, 1]", "errors=[samples]"])
    for cell in cells:
        Path(cell.folder).mkdir(parents=True, exist_ok=True)
        begin_record(cell)
        mark_done(cell, "train", 100.0)
        mark_done(cell, "samples", 80.0)
    assert tell(with_errors, StudyOptions()).splitlines()[-1] == "To do in 4 cells: 4 x errors of 'samples'."


def test_cells_at_once_share_the_cores_and_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5})
    assert list(places(2, ["0,1", "2,3"])) == [Place(frozenset({0, 1}), "0,1"), Place(frozenset({2, 3}), "2,3")]
    assert list(places(1, [None])) == [Place(None, None)]
    assert [place.cores for place in places(8, [None] * 8)] == [None] * 8


def test_each_cell_becomes_a_job_whose_commands_slurm_sh_takes(tmp_path: Path) -> None:
    evals = {"samples": {**settings_of(tmp_path).evals["samples"], "stop": ["a b", "'"]}}
    settings = settings_of(tmp_path, evals=evals)
    jobs = write_jobs(settings, "slurm", None, ["python", "study.yaml"])
    assert sorted(job.name for job in jobs.iterdir()) == ["10_seed0.sh", "20_seed0.sh"]
    job = tmp_path / "study" / "jobs" / "10_seed0.sh"
    assert subprocess.run(["bash", "-n", job]).returncode == 0
    commands = [line for line in job.read_text().splitlines() if line.startswith("launch/slurm.sh")]
    assert len(commands) == 2
    for line in commands:
        dry = line.replace(" --wait", " --wait --dry-run")
        done = subprocess.run(["bash", "-c", dry], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "sbatch" in done.stderr
    assert (tmp_path / "study" / "cells" / "10_seed0" / "train.yaml").exists()


def test_where_all_is_done_no_job_is_offered(tmp_path: Path, caplog) -> None:
    settings = settings_of(tmp_path)
    for cell in cells_of(settings):
        Path(cell.folder).mkdir(parents=True)
        begin_record(cell)
        mark_done(cell, "train", 1.0)
        mark_done(cell, "samples", 1.0)
    for which, told in ((None, "the 2 cells are done"), ("0/2", "the 1 chosen cells are done")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            jobs = write_jobs(settings, "slurm", which, ["again"])
        said = caplog.text
        assert told in said and "again" in said and "begins one" not in said
        assert not list(jobs.iterdir())


def test_a_tpu_job_wants_its_files_where_they_outlive_it_and_a_name_of_its_own(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    (cell, _) = cells_of(settings)
    with pytest.raises(UsageError, match="name gs:// folders for both"):
        list(_tpu(cell, settings))
    names = {
        _tpu_name(f"real_vs_synthetic-gsm8k_synthetic_{size}_seed{seed}") for size in (940, 7400) for seed in range(3)
    }
    assert len(names) == 6 and max(map(len, names)) <= 40
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) for name in names)


def test_a_second_request_to_stop_does_not_wait_for_a_command_that_saves(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    )
    stop, log = StopSignal(), tmp_path / "log.txt"

    def ask() -> None:
        while not (log.exists() and "\non\n" in log.read_text()):
            time.sleep(0.05)
        stop.exit_code = 130
        time.sleep(1.0)
        stop.at_once = True

    threading.Thread(target=ask, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(cells_module.Interrupted):
        cells_module.run_command([sys.executable, "-c", stubborn], "a command", log, stop, Place())
    assert 1.0 < time.monotonic() - started < 30


@pytest.mark.slow
def test_a_study_goes_on_after_a_stop_and_reports_what_its_cells_measured(tmp_path: Path) -> None:
    config = str(write_study(tmp_path, seeds=[0, 1]))
    first = subprocess.Popen(
        command("eval", "study", "--config", config), env=environment(), stderr=subprocess.PIPE, text=True
    )
    done = tmp_path / "study" / "cells" / "10_seed0" / "cell.json"
    until = time.monotonic() + 120
    while not (done.exists() and json.loads(done.read_text())["done"]):
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75 and "run the same command again" in said
    trained = json.loads(done.read_text())["done"]["train"]
    assert trained["versions"]["jax"] == importlib.metadata.version("jax")

    whole = run("eval", "study", "--config", config, "--parallel", "2")
    assert whole.returncode == 0, whole.stderr
    assert json.loads(done.read_text())["done"]["train"] == trained  # not again
    out = tmp_path / "study"
    told = json.loads((out / "study.json").read_text())
    assert told["complete"] is True and [point["axes"] for point in told["points"]] == [{"size": "10"}, {"size": "20"}]
    for point in told["points"]:
        by_seed = point["metrics"]["samples:pass_ratio"]["by_seed"]
        for seed, value in by_seed.items():
            metrics = json.loads((out / f"cells/{point['axes']['size']}_seed{seed}/samples/metrics.json").read_text())
            assert metrics["pass_ratio"]["4"]["value"] == pytest.approx(value)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "data:image/svg+xml" in page and "<script" not in page
    assert "| 10_seed0 | 4 |" in text and "2 seeds" in text and "every run takes 4 optimizer steps" in text

    again = run("eval", "study", "--config", config)
    assert again.returncode == 0 and "4 of 4 cells are done already" in again.stderr
    refused = run("eval", "study", "--config", config, "train.optimizer.learning_rate=0.5")
    assert refused.returncode == 2 and "optimizer.learning_rate: 0.01 -> 0.5" in refused.stderr


@pytest.mark.slow
def test_what_jobs_elsewhere_have_done_is_found_graded_and_reported(tmp_path: Path) -> None:
    config = write_study(tmp_path, axes={"size": {"data.sources.0.count": [10]}})
    settings = load_study(str(config))
    (cell,) = cells_of(settings)
    write_jobs(settings, "slurm", None, [])
    assert run("mathscale_jax.train", "--config", f"{cell.folder}/train.yaml").returncode == 0
    words = flags_of(cell.evals["samples"], SampleSettings)
    # As on another machine, whose devices are not those of the command that reports.
    elsewhere = environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    drawn = subprocess.run(command("eval", "sample", *words), env=elsewhere, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    trained = Path(cell.folder, "train", "metrics.jsonl").stat().st_mtime_ns
    done = run("eval", "study", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert Path(cell.folder, "train", "metrics.jsonl").stat().st_mtime_ns == trained
    assert json.loads((tmp_path / "study" / "study.json").read_text())["complete"] is True
