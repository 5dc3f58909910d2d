"""The Slurm scripts on a real Slurm of one node, which this starts: jobs are pre-empted, begun again, and go on."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, is_installed
from small_run import environment, write_config

LAUNCH = Path(__file__).parents[2] / "launch"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not is_installed(), reason="make test-slurm installs slurm-wlm and munge; it needs root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as made:
        made.environment |= environment(devices=2)
        yield made


def submit(cluster: Cluster, folder: Path, *words: str) -> list[str]:
    """The numbers of the jobs that slurm.sh submits."""
    told = cluster.run(str(LAUNCH / "slurm.sh"), *words, cwd=folder, check=False)
    assert told.returncode == 0, told.stderr
    return re.findall(r"^job (\d+)", told.stdout, re.MULTILINE)


def metrics(run: Path) -> list[tuple[int, float, float]]:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while not any(at >= step for at, _, _ in metrics(run)):
        assert time.monotonic() < until, f"{run} did not come to step {step}"
        time.sleep(0.05)


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.run("scontrol", "show", "job", job).stdout.split("Restarts=")[1].split()[0])


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Two runs of two processes each: one undisturbed, one pre-empted twice; and the log of the second."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder, mesh={"data": 2, "fsdp": 2}, checkpoint={"every": 10, "keep": 3}, num_steps=60)
    tasks = ("train", "--ntasks=2", "--ntasks-per-node=2", "--", "--config", str(config))
    (quiet,) = submit(cluster, folder, *tasks, "output_dir=quiet")
    assert cluster.wait(quiet, 200) == "COMPLETED", (folder / f"runs/slurm/train-{quiet}.log").read_text()
    (taken,) = submit(cluster, folder, *tasks, "output_dir=taken run")
    wait_for_step(folder / "taken run", 12)
    cluster.run("scontrol", "requeue", taken)  # what Slurm does to a job that it pre-empts
    wait_for_step(folder / "taken run", 32)
    cluster.run("scancel", "--signal=TERM", taken)  # what it does three minutes before the time limit
    assert cluster.wait(taken, 200) == "COMPLETED", (folder / f"runs/slurm/train-{taken}.log").read_text()
    assert restarts(cluster, taken) == 2
    return folder / "quiet", folder / "taken run", (folder / f"runs/slurm/train-{taken}.log").read_text()


def test_a_run_that_was_pre_empted_twice_has_the_losses_of_an_undisturbed_one(trained: tuple[Path, Path, str]) -> None:
    quiet, taken, log = trained
    assert len(metrics(quiet)) == 60 and metrics(taken) == metrics(quiet)
    assert [int(n) for n in re.findall(r"begun again (\d+) times", log)] == [0, 1, 2], "one log tells of all of it"


def test_an_evaluation_in_shards_is_graded_when_they_have_ended(
    cluster: Cluster, trained: tuple[Path, Path, str]
) -> None:
    folder = trained[0].parent
    source = ("--task", "demo", "--source", str(folder / "data" / "test.jsonl"), "--checkpoint", str(trained[0]))
    rest = ("--num-samples", "8", "--num-problems", "6", "--rows", "8", "--max-tokens", "8", "--dtype", "float32")
    jobs = submit(cluster, folder, "evaluate", "--shards", "2", "--wait", "--", *source, "--out", "eval", *rest)
    assert len(jobs) == 2 and cluster.state(jobs[1]) == "COMPLETED"
    found = json.loads((folder / "eval" / "metrics.json").read_text())
    assert found["complete"] is True and found["num_problems"] == 6
    assert (folder / "eval" / "report.html").exists()
    logs = "".join(file.read_text() for file in (folder / "runs" / "slurm").glob("sample-*.log"))
    assert "--shard 0/2" in logs and "--shard 1/2" in logs


def test_a_shard_that_is_missing_fails_the_job_that_grades(cluster: Cluster, trained: tuple[Path, Path, str]) -> None:
    folder = trained[0].parent
    source = ("--task", "demo", "--source", str(folder / "data" / "test.jsonl"), "--checkpoint", str(trained[0]))
    rest = ("--num-samples", "8", "--num-problems", "16", "--rows", "8", "--max-tokens", "8", "--dtype", "float32")
    shards, grade = submit(cluster, folder, "evaluate", "--shards", "2", "--", *source, "--out", "part", *rest)
    cluster.run("scancel", f"{shards}_0")
    assert cluster.wait(grade, 120) == "FAILED" and not restarts(cluster, grade)
    log = (folder / f"runs/slurm/grade-{grade}.log").read_text()
    assert "8 of 16 problems have their samples; missing: 0 to 7" in log and (folder / "part" / "report.html").exists()


def test_a_command_that_fails_is_not_begun_again(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--config", "configs/demo.yaml", "data.tokenizer=nowhere.model", "output_dir=run")
    (job,) = submit(cluster, tmp_path, "train", "--", *words)
    assert cluster.wait(job, 60) == "FAILED" and restarts(cluster, job) == 0
    assert "nowhere.model" in (tmp_path / f"runs/slurm/train-{job}.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--", "--config", "nowhere.yaml"), "config file 'nowhere.yaml' does not exist"),
        (("train", "--", "--config", "configs/demo.yaml", "output_dri=x"), "did you mean output_dir?"),
        (("train", "--shards", "2", "--", "--config", "configs/demo.yaml"), "--shards is for evaluate"),
        (("evaluate", "--shards", "2", "--", "--taks", "demo"), "--task"),
        (
            ("evaluate", "--shards", "2", "--", "--task", "demo", "--out", "y", "--checkpoint", "x"),
            "name it with --source",
        ),
        (("evaluate", "--shards"), "needs the options of the command behind --"),
        (("evaluate", "--", "--task", "gsm8k", "--checkpoint", "x", "--out", "y"), "say how many jobs"),
    ],
)
def test_wrong_settings_are_said_before_anything_is_queued(
    cluster: Cluster, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    told = cluster.run(str(LAUNCH / "slurm.sh"), *words, cwd=tmp_path, check=False)
    assert told.returncode == 2 and said in told.stderr and "job" not in told.stdout
