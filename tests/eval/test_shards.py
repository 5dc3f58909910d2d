"""Shards of one evaluation on one machine: those that are killed are begun again, and the samples are the same."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_run import command, environment, run, train_here, write_config

from data_pipeline.settings import UsageError
from eval.shards import gpus_of_shards


def shards_of(out: str) -> dict[str, int]:
    """The processes that draw for an eval folder, by their shards."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if out in words and "--shard" in words:
            found[words[words.index("--shard") + 1]] = int(process.name)
    return found


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is drawn, of a model that learned nothing."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(write_config(folder, num_steps=2))
    return [
        "--task", "demo", "--source", str(folder / "data" / "test.jsonl"), "--checkpoint", str(folder / "run"),
        "--num-samples", "64", "--rows", "8", "--max-tokens", "64", "--dtype", "float32", "--num-problems", "16",
    ]  # fmt: skip


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("eval", "run", *words), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_shards_that_are_killed_are_begun_again_and_the_samples_are_those_of_an_undisturbed_job(draw, tmp_path):
    quiet, out = tmp_path / "quiet", tmp_path / "an eval"
    assert run("eval", "sample", *draw, "--out", str(quiet)).returncode == 0
    job = start("--shards", "4", *draw, "--out", str(out))
    seed = time.time_ns()
    print("seed of the kills:", seed)
    chance, killed = random.Random(seed), 0
    until = time.monotonic() + 120
    while killed < 2 and job.poll() is None and time.monotonic() < until:
        there = shards_of(str(out))
        if len(there) >= 3 and len(list(out.glob("samples/part-*"))) >= 1 + killed:
            time.sleep(chance.uniform(0, 0.5))
            try:
                os.kill(there[chance.choice(sorted(there))], signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert killed == 2 and said.count("was killed by signal 9: begun again (") == 2
    parts = {part.name: part.read_bytes() for part in (quiet / "samples").iterdir()}
    # A kill may leave the beginning of a file behind, under a hidden name that nothing reads.
    assert len(parts) == 16 and parts == {part.name: part.read_bytes() for part in (out / "samples").glob("part-*")}
    assert (out / "report.html").exists() and "UNFINISHED" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_ends_every_shard_and_the_next_run_goes_on(draw, tmp_path, number, code):
    out = tmp_path / "eval"
    job = start("--shards", "2", *draw, "--out", str(out))
    wait_for(lambda: len(list(out.glob("samples/part-*"))) >= 2)
    (os.killpg if number == signal.SIGINT else os.kill)(job.pid, number)  # Ctrl-C reaches all, a SIGTERM one
    _, said = job.communicate(timeout=120)
    assert job.returncode == code and not shards_of(str(out))
    assert said.strip().endswith("stopped: what is drawn is kept; run the same command again")
    before = {part: part.stat().st_mtime_ns for part in out.glob("samples/part-*")}
    assert 2 <= len(before) < 16
    assert run("eval", "run", "--shards", "2", *draw, "--out", str(out)).returncode == 0
    assert all(part.stat().st_mtime_ns == time_ns for part, time_ns in before.items())


def test_wrong_use_is_said_once_and_not_tried_again(tmp_path):
    ended = run(
        "eval", "run", "--shards", "3", "--task", "demo", "--checkpoint", "nowhere", "--out", str(tmp_path / "x")
    )
    assert ended.returncode == 2 and ended.stderr.count("error:") == 1 and "begun again" not in ended.stderr
    ended = run("eval", "run", "--shard", "0/2", "--task", "demo", "--checkpoint", "x", "--out", "y")
    assert ended.returncode == 2 and "`eval sample` draws it" in ended.stderr


def test_each_shard_has_gpus_of_its_own():
    assert gpus_of_shards({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2) == ["4,5", "6,7"]
    assert gpus_of_shards({"CUDA_VISIBLE_DEVICES": ""}, 2) == [None, None]
    with pytest.raises(UsageError, match=r"--shards 3 does not share the 4 GPUs here evenly; these do: \[1, 2, 4\]"):
        gpus_of_shards({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3)
