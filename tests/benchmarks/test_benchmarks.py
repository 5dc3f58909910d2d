"""The benchmarks run, at tiny sizes, and say what they must: the numbers themselves are no test's business."""

import gzip
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import environment, run, write_config

from benchmarks import convert, samplers
from benchmarks.peers import Measurement
from benchmarks.rounds import Contestant, Row, cpu_ratio, measure, ratios
from benchmarks.samplers import Work
from benchmarks.train import BenchmarkSettings, check_losses, contestants_of
from benchmarks.worker import Limits, Worker, WorkerFailed
from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.word_problems import generate_problems
from mathscale_jax.config import ModelConfig

TINY = ("--models", "demo", "--rows", "2", "--context", "64", "--loss-chunk", "32", "--rounds", "2", "--steps", "1")
LIMITS = Limits(seconds=60, cores=None, environment={})


def gsm8k_rows(folder: Path) -> tuple[str, str]:
    """Forty short problems in GSM8K's layout, and a tokenizer for them."""
    lines = [
        json.dumps({"question": f"{a} and {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"})
        for a in range(8)
        for b in range(5)
    ]
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(lines, 310).model)
    return str(folder / "rows.jsonl.gz"), str(folder / "tokenizer.model")


def results(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_conversions_take_memory_that_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Twenty more layers are held neither by an import nor by an export."""
    tokenizer, memory, sizes = gsm8k_rows(tmp_path)[1], {}, []
    for num_layers in (4, 24):
        folder = tmp_path / str(num_layers)
        sizes.append(
            convert.make_checkpoint(folder / "source", convert.config_of(num_layers, 1024, tokenizer), tokenizer)
        )
        for name in ("import", "export"):
            memory[name, num_layers] = convert.run(name, folder)[1]
    grown = sizes[1] - sizes[0]
    assert grown > 400e6
    for name in ("import", "export"):  # what is read and not yet on disk fills up to a constant
        assert memory[name, 24] - memory[name, 4] < 0.5 * grown, memory


@pytest.mark.slow
def test_the_benchmark_of_conversions_measures_each_contestant(tmp_path: Path) -> None:
    tokenizer, out = gsm8k_rows(tmp_path)[1], tmp_path / "out"
    arguments = ["--tokenizer", tokenizer, "--layers", "1,2", "--width", "64", "--rounds", "2", "--pause", "0"]
    done = run("benchmarks.convert", *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    measured = results(out)["measured"]
    assert [row["contestant"] for row in measured][:4] == [
        *("copy of the files", "copy, 16 MB at a time", "import", "export")
    ]
    assert all(len(row["seconds"]) == 2 and row["seconds"][0] > 0 and row["bytes"] > 0 for row in measured)
    assert {row["parameters"] for row in measured} == {
        convert.config_of(depth, 64, tokenizer).num_parameters for depth in (1, 2)
    }


class Sleeper:
    """A contestant whose step takes as long as it says."""

    def __init__(self, seconds: float, fails: str | None = None):
        self._seconds, self._fails = seconds, fails

    def run(self, num_steps: int) -> Measurement:
        if self._fails == "memory":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        if self._fails == "death":
            os._exit(7)
        if self._fails == "time":
            time.sleep(60)
        return Measurement(self._seconds * num_steps, 2 * self._seconds * num_steps, [1.0] * num_steps)

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "num_devices": 1, "peak_flops": None}

    def peak_memory(self) -> int:
        return 2**30


def sleeper(name: str, seconds: float, fails: str | None = None, tokens: int = 10) -> Contestant:
    return Contestant(name, "padded", Sleeper, (seconds, fails), positions=100, tokens=tokens)


def measured(*contestants: Contestant, together: bool = True, limits: Limits = LIMITS) -> list[Row]:
    return measure(contestants, warmup_steps=1, rounds=3, steps=2, together=together, patience=0, limits=limits)


def test_a_variant_that_fails_is_a_row_and_not_the_end() -> None:
    limits = Limits(seconds=2, cores=1, environment={})
    contestants = [sleeper(name, 1.0, name) for name in ("memory", "death", "time")] + [sleeper("well", 0.5)]
    memory, death, late, well = measured(*contestants, together=False, limits=limits)
    assert memory.failure == "out of memory"
    assert death.failure == "its process died (exit code 7)"
    assert late.failure == "over the time limit of 2 s"
    assert well.failure is None and well.step_seconds == [0.5] * 3 and well.peak_memory == 2**30


def test_rates_and_ratios_are_those_computed_by_hand() -> None:
    slow, fast = measured(sleeper("slow", 2.0, tokens=50), sleeper("fast", 0.5, tokens=100))
    assert (slow.positions_per_second, slow.tokens_per_second) == (50, 25)
    assert (fast.positions_per_second, fast.tokens_per_second) == (200, 200)
    assert ratios(fast, slow) == [8.0] * 3
    assert cpu_ratio(fast, slow) == 8.0


def test_the_memory_of_a_step_is_what_the_step_took() -> None:
    """In a process of its own: what other tests give back meanwhile would be taken off."""
    script = """
        import time
        import numpy as np
        from benchmarks.peers import Measurement, _growth_in_a_step
        from benchmarks.worker import anonymous_memory

        class Greedy:
            def run(self, num_steps):
                held = np.ones(64 * 2**20, np.uint8)
                time.sleep(0.3)
                return Measurement(float(held[0]), 0.0, [])

        print(_growth_in_a_step(Greedy(), anonymous_memory()))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 60 * 2**20 < int(done.stdout) < 80 * 2**20


def test_a_worker_says_what_its_contestant_could_not_do() -> None:
    with Worker(Sleeper, (1.0,), LIMITS) as worker:
        assert worker.call("run", 3).seconds == 3.0
        with pytest.raises(WorkerFailed, match="has no attribute 'walk'"):
            worker.call("walk")


def test_contestants_that_compute_something_else_are_not_compared() -> None:
    rows = [Row(sleeper("a", 1), first_losses=[2.0, 1.9]), Row(sleeper("b", 1), first_losses=[2.0, 1.9 * 1.01])]
    check_losses(rows, "bfloat16")
    with pytest.raises(RunError, match=r"a has the losses .* and b .* do not compute the same"):
        check_losses(rows, "float32")


def test_every_combination_of_the_lists_is_a_variant() -> None:
    settings = BenchmarkSettings(models="demo", peers="ours", remat="none,full", scan_unroll="1,3", context=64)
    settings = settings.model_copy(update={"loss_chunk": (32,)})
    names = [contestant.name for contestant in contestants_of(settings, "demo")]
    assert names == [f"ours, remat {r}, scan_unroll {u}" for r in ("none", "full") for u in (1, 3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(models="huge"), "models='huge' is unknown; allowed: small"),
        (dict(layouts="packed"), "layouts=packed needs data"),
        (dict(data="rows.jsonl"), "data and tokenizer go together"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**flags)


def test_a_context_that_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="--context 1024 is longer than demo's max_context=512"):
        contestants_of(BenchmarkSettings(models="demo", context=1024), "demo")


@pytest.mark.slow
def test_packed_against_padded_counts_the_tokens_of_examples(tmp_path: Path) -> None:
    data, tokenizer = gsm8k_rows(tmp_path)
    flags = (*TINY, "--peers", "ours", "--layouts", "padded,packed", "--data", data, "--tokenizer", tokenizer)
    flags = (*flags, "--context", "256")
    done = run("benchmarks.train", *flags, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    padded, packed = results(tmp_path / "out")["rows"]
    assert padded["contestant"] == "ours, padded" and packed["contestant"] == "ours, packed"
    assert padded["positions_per_step"] == packed["positions_per_step"] == 2 * 256
    assert packed["tokens_per_step"] > 3 * padded["tokens_per_step"]
    for row in (padded, packed):
        assert 0 < row["tokens_per_second_per_device"] < row["positions_per_second_per_device"]
    assert len(packed["times_reference"]) == 2


@pytest.mark.slow
@pytest.mark.torch
def test_torch_and_we_train_alike_and_both_have_a_row(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = run("benchmarks.train", *TINY, "--peers", "torch,torch-recompute,ours", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = {row["contestant"]: row for row in results(tmp_path / "out")["rows"]}
    assert set(rows) == {"torch", "torch-recompute", "ours"}
    for row in rows.values():  # three warm-up steps: so the optimizers did the same as well
        np.testing.assert_allclose(row["first_losses"], rows["ours"]["first_losses"], rtol=1e-4)
        assert len(row["step_seconds"]) == 2
        assert row["peak_memory"] is not None  # of so small a model it may be 0: what importing took is used again
    (report,) = (tmp_path / "out").glob("*.md")
    assert all(
        text in report.read_text() for text in ("python -m benchmarks.train", "| torch ", "load average", "torch 2.")
    )


@pytest.mark.slow
def test_the_input_pipeline_is_measured(tmp_path: Path) -> None:
    data, tokenizer = gsm8k_rows(tmp_path)
    command = [sys.executable, "-m", "benchmarks.input_pipeline", "--data", data, "--tokenizer", tokenizer]
    command += ["--rows", "2", "--context", "64", "--steps", "9", "--rate", "10000", "--out", str(tmp_path / "out")]
    environment_here = {**environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment_here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values = results(tmp_path / "out")
    assert values["examples"] == 40 and values["step_seconds"] == pytest.approx(2 * 64 / 10_000)
    assert values["wait_share"] >= 0 and values["positions_per_second"] > 0


@pytest.mark.slow
def test_samplers_draw_the_same_number_of_samples_of_the_same_prompts(tmp_path: Path) -> None:
    sizes = ("--num-problems", "2", "--num-samples", "8", "--prompt-length", "10", "--mean-length", "5")
    limits = ("--max-tokens", "12", "--rounds", "1", "--dtype", "float32")
    result = run("benchmarks.sample", "--preset", "demo", *sizes, *limits, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    measured = results(tmp_path)["measured"]
    assert len(measured) == 2 and not any(of["failed"] for of in measured.values())
    for of in measured.values():
        assert 16 <= of["tokens"][0] <= 16 * 12 and of["seconds"][0] > 0


def test_the_bound_of_a_device_is_what_it_must_read() -> None:
    """LLaMA-2 7B on an H200: 13.2 GB of weights and 256 x 75 tokens of 0.5 MiB in a step, at 4.8 TB/s."""
    config = ModelConfig.model_validate({"preset": "llama2-7b"})
    where = {"device": "NVIDIA H200", "num_devices": 1, "dtype": "bfloat16"}
    bound = samplers.bound(config, where, None, 150, [150] * 256, 256)
    assert bound == pytest.approx(256 * 4.8e12 / (13.21e9 + 0.08e9 + 256 * 75 * 2**19), rel=0.01)
    assert samplers.bound(config, {**where, "device": "cpu"}, None, 150, [150], 256) is None


def test_random_weights_end_a_response_after_the_length_asked_for() -> None:
    config = ModelConfig.model_validate({"preset": "demo"})
    drawn = samplers.Ours(config, Work((tuple(range(3, 23)),), 128, 0.7, 64), "float32", 128, 12, None).run(0)
    assert len(drawn.lengths) == 128
    assert np.mean(drawn.lengths) == pytest.approx(12, rel=0.45)  # five standard errors of a geometric length


@pytest.mark.slow
def test_int8_caches_change_what_a_model_says_by_little(tmp_path: Path) -> None:
    assert run("mathscale_jax.train", "--config", str(write_config(tmp_path)), "num_steps=20").returncode == 0
    sizes = ("--num-problems", "3", "--num-samples", "4", "--num-compared", "2", "--max-tokens", "24")
    where = ("--task", "demo", "--source", str(tmp_path / "data" / "test.jsonl"), "--out", str(tmp_path / "results"))
    checkpoint = ("--checkpoint", str(tmp_path / "run"), "--dtype", "float32")
    result = run("benchmarks.int8_cache", *checkpoint, *sizes, *where)
    assert result.returncode == 0, result.stderr
    compared = results(tmp_path / "results")
    assert 0 < compared["kl"]["max"] < 0.01 and compared["same_argmax"] > 0.9


@pytest.mark.slow
def test_grading_is_measured_beside_math_verify(tmp_path: Path, test_data: Path) -> None:
    sizes = ("--num-problems", "24", "--num-samples", "16", "--num-answers", "8", "--pairs", "60", "--rounds", "1")
    source = ("--task", "math", "--source", str(test_data / "math_test.jsonl.gz"))
    result = run("benchmarks.grade", *source, *sizes, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    values = results(tmp_path)
    assert values["num_samples"] == 24 * 16 and values["job_seconds"] > 0
    _, missed, invented = values["rounds"]["ours"][0]
    assert missed == invented == 0


@pytest.mark.slow
def test_the_benchmark_of_data_makes_every_trained_token_of_an_epoch(tmp_path: Path) -> None:
    data, tokenizer = gsm8k_rows(tmp_path)
    out = tmp_path / "results"
    flags = ["--num-rows", "60", "--context", "256", "--cores", "1", "--rounds", "1", "--out", str(out)]
    run_module("benchmarks.data", "--data", data, "--tokenizer", tokenizer, *flags)
    rows = results(out)["rows"]
    assert [(row["contestant"], row["cache"]) for row in rows] == [
        ("ours", "cold"), ("ours", "cached"), ("ours, mixed", "cached")
    ]  # fmt: skip
    assert rows[0]["made"]["trained"] == rows[1]["made"]["trained"] > 0 and rows[0]["made"]["tokens"] > 60 * 10


@pytest.mark.slow
def test_the_benchmark_of_cleaning_says_how_much_of_what_is_planted_is_found(tmp_path: Path) -> None:
    problems = generate_problems(40, seed=1)
    lines = [json.dumps({"question": p.question, "answer": f"{p.solution}\n#### {p.answer}"}) for p in problems]
    data = str(tmp_path / "rows.jsonl")
    Path(data).write_text("\n".join(lines))
    out = tmp_path / "results"
    against = f"gsm8k:test={data}"
    run_module(
        "benchmarks.clean", "--train", data, "--against", against, "--num-rows", "50", "--num-planted", "3",
        "--out", str(out),
    )  # fmt: skip
    measured = results(out)
    assert (
        measured["recall"]["gsm8k"]["verbatim"] == 1
        and measured["num_rows"] == 50 + 4 * 3
        and measured["memory_gb"] > 0
    )


@pytest.mark.slow
def test_the_benchmark_of_synthesis_measures_both_at_each_concurrency(tmp_path: Path) -> None:
    out = tmp_path / "results"
    run_module(
        "benchmarks.synthesis", "--num-requests", "40", "--concurrency", "2,4", "--rounds", "1", "--out", str(out)
    )
    rows = results(out)["rows"]
    assert [(row["contestant"], row["concurrency"]) for row in rows] == [
        ("openai alone", 2), ("ours", 2), ("openai alone", 4), ("ours", 4)
    ]  # fmt: skip
    assert all(row["requests_per_second"] > 1 for row in rows)


def run_module(module: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
