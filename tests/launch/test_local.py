"""Shards of one evaluation on one machine: those that are killed are begun again, and the samples are the same."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_run import environment, run, train_here, write_config

SCRIPT = Path(__file__).parents[2] / "launch" / "local.sh"


def evaluate(folder: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPT), "evaluate", *words], cwd=folder, env=environment() | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_here(write_config(folder, num_steps=2))
    return folder


@pytest.mark.slow
def test_shards_that_are_killed_are_begun_again_and_the_samples_are_those_of_an_undisturbed_job(checkpoint, tmp_path):
    draw = [
        "--task", "demo", "--source", str(checkpoint / "data" / "test.jsonl"), "--checkpoint", str(checkpoint / "run"),
        "--num-samples", "64", "--rows", "8", "--max-tokens", "64", "--dtype", "float32", "--num-problems", "16",
    ]  # fmt: skip
    quiet, out = tmp_path / "quiet", tmp_path / "an eval"
    assert run("eval", "sample", *draw, "--out", str(quiet)).returncode == 0
    job = evaluate(tmp_path, "--shards", "4", "--", *draw, "--out", str(out))
    seed = time.time_ns()
    print("seed of the kills:", seed)
    chance, killed = random.Random(seed), 0
    until = time.monotonic() + 120
    while killed < 2 and job.poll() is None and time.monotonic() < until:
        there = shards_of(str(out))
        if len(there) >= 3 and len(list(out.glob("samples/part-*"))) >= 1 + killed:
            time.sleep(chance.uniform(0, 0.5))
            victim = chance.choice(sorted(there))
            try:
                os.kill(there[victim], signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert killed == 2 and said.count("ended with 137: begun again") == 2
    parts = {part.name: part.read_bytes() for part in (quiet / "samples").iterdir()}
    assert len(parts) == 16 and parts == {part.name: part.read_bytes() for part in (out / "samples").iterdir()}
    assert (out / "report.html").exists() and "UNFINISHED" not in said


def test_wrong_use_is_said_once_a_shard_and_not_tried_again(tmp_path):
    job = evaluate(tmp_path, "--shards", "2", "--", "--task", "nothing", "--checkpoint", "x", "--out", "eval")
    _, said = job.communicate(timeout=120)
    assert job.returncode == 2 and said.count("ended with 2; the end of") == 2 and "begun again" not in said


@pytest.mark.parametrize(
    ("words", "visible", "said"),
    [
        (["--shards", "3", "--", "--out", "x"], "0,1,2,3", "--shards 3 does not divide the 4 GPUs"),
        (["--", "--out", "x"], "", "a number from 1 on"),
        (["--shards", "2", "--", "--task", "demo"], "", "evaluate needs --out DIR"),
        (["--shards", "2", "--", "--out", "x", "--shard", "0/2"], "", "--shard is said by local.sh"),
        (["--task", "demo"], "", "--task is no option of local.sh"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path, words, visible, said):
    job = evaluate(tmp_path, *words, CUDA_VISIBLE_DEVICES=visible)
    assert said in job.communicate(timeout=20)[1] and job.returncode == 2


def test_each_shard_has_its_gpus(tmp_path):
    job = evaluate(tmp_path, "--shards=2", "--dry-run", "--", "--out", "an eval", CUDA_VISIBLE_DEVICES="4,5,6,7")
    said = job.communicate(timeout=20)[1]
    assert job.returncode == 0 and not list(tmp_path.iterdir())
    for number, gpus in (("0", "4,5"), ("1", "6,7")):
        assert f"CUDA_VISIBLE_DEVICES={gpus} python -m eval sample --out an\\ eval --shard {number}/2" in said
