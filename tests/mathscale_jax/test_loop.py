"""What the training loop watches and writes beside the weights: validation, samples, telemetry, profile, watchdog."""

import json
import math
import struct
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from small_run import NUM_STEPS, run, train_here, write_config

from data_pipeline.cli import RunError
from data_pipeline.loader import Batches
from data_pipeline.settings import load_settings
from data_pipeline.sources import DataSettings, load_epoch, load_rows
from data_pipeline.tasks import read_problems
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import lora, model
from mathscale_jax import train as training
from mathscale_jax.checkpoint import open_checkpoint, steps_in
from mathscale_jax.config import LoraSettings, ModelConfig, TrainSettings
from mathscale_jax.telemetry import MetricsLog, Throughput, Watchdog, flops_per_token

TRAIN = "mathscale_jax.train"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything switched on, on eight devices."""
    folder = tmp_path_factory.mktemp("watched")
    test = {"task": "demo", "path": str(folder / "data" / "test.jsonl")}
    config = write_config(
        folder,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        accumulation_steps=2,
        validation={"sources": [test], "every": 8},
        samples={"source": test, "every": 24, "num_problems": 3, "num_samples": 2, "max_tokens": 20},
        checkpoint={"every": 12, "keep": 1, "keep_every": 24, "keep_best": 1},
        tensorboard=True,
        profile={"first_step": 5, "num_steps": 2},
        log_every=4,
    )
    result = run(TRAIN, "--config", str(config), devices=8)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_tokens_are_counted_by_dataset_and_what_came_of_each_is_kept(tmp_path: Path) -> None:
    config = write_config(tmp_path, num_steps=6, log_every=2, tensorboard=True)
    files = [tmp_path / "data" / f"{name}.jsonl" for name in ("train", "test")]
    sources = ", ".join(f"{{task: demo, path: {file}, weight: {i + 1}}}" for i, file in enumerate(files))
    train_here(config, f"data.sources=[{sources}]", "data.sources.1.name=mine", "batch_size=8")
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [(source["label"], source["num_read"], source["num_examples"]) for source in kept] == [
        (str(files[0]), 40, 10), ("mine", 20, 20),
    ]  # fmt: skip
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    settings = load_settings(TrainSettings, str(tmp_path / "run" / "config.yaml"))
    epoch = load_epoch(settings.data, Tokenizer.load(str(tmp_path / "data" / "tokenizer.model")), Template())
    batches = Batches(epoch.rows, settings.data, batch_size=8, seed=settings.seed, num_steps=6)
    of_step = [sum((batches[step]["segment_ids"][row] > 0).sum() for row in range(8)) for step in range(6)]
    told = [row["source_tokens"] for row in rows]
    assert [set(of_line) for of_line in told] == [{str(files[0]), "mine"}] * 3
    assert [sum(of_line.values()) for of_line in told] == [sum(of_step[i : i + 2]) for i in (0, 2, 4)]
    assert sum(of_line["mine"] for of_line in told) > sum(of_line[str(files[0])] for of_line in told)


@pytest.mark.slow
def test_the_validation_loss_is_the_mean_over_every_token_of_every_example(watched: Path) -> None:
    """Recomputed example by example in float64 from the plain logits of the saved weights."""
    checkpoint = open_checkpoint(str(watched / "run"))
    source = {"task": "demo", "path": str(watched / "data" / "test.jsonl")}
    settings = DataSettings(sources=(source,), context=256, cache_dir=str(watched / "cache"))
    rows = load_rows(settings, checkpoint.tokenizer, checkpoint.meta.template)
    params = checkpoint.restore_params()
    total = count = 0.0
    plain = jax.jit(partial(model.logits, checkpoint.meta.model))
    for i in range(len(rows)):
        tokens = rows[i]
        alone = np.zeros((1, 256), np.int32)  # no token sees the zeros behind the example
        alone[0, : len(tokens)] = tokens
        logits = np.asarray(plain(params, alone), np.float64)[0, : len(tokens) - 1]
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]
        total += nll[rows.prompt_lengths[i] - 1 :].sum()
        count += len(tokens) - rows.prompt_lengths[i]
    (told,) = (
        line["validation_loss"]
        for line in read_metrics(watched)
        if line.get("step") == NUM_STEPS and "validation_loss" in line
    )
    assert told == pytest.approx(total / count, rel=1e-4)
    assert checkpoint.meta.validation_loss == told


@pytest.mark.slow
def test_validation_runs_at_its_steps_and_at_every_checkpoint(watched: Path) -> None:
    steps = [line["step"] for line in read_metrics(watched) if "validation_loss" in line]
    assert steps == [8, 12, 16, 24, 32, 36, 40, 48]


@pytest.mark.slow
def test_the_newest_the_best_and_every_nth_checkpoint_are_kept(watched: Path) -> None:
    losses = {line["step"]: line["validation_loss"] for line in read_metrics(watched) if "validation_loss" in line}
    best = min((12, 24, 36, 48), key=lambda step: losses[step])
    assert set(steps_in(epath.Path(watched / "run" / "checkpoints"))) == {24, 48, best}
    assert open_checkpoint(f"{watched / 'run'}@best").step == best
    assert open_checkpoint(f"{watched / 'run'}@24").step == 24


@pytest.mark.slow
def test_sampled_texts_are_written_with_their_answers_and_the_accuracy_logged(watched: Path) -> None:
    problems = read_problems("demo", "test", str(watched / "data" / "test.jsonl"))[:3]
    for step in (24, 48):
        rows = [
            json.loads(line) for line in (watched / "run" / "samples" / f"step-{step}.jsonl").read_text().splitlines()
        ]
        assert [(r["problem_id"], r["sample_id"]) for r in rows] == [(p.id, i) for p in problems for i in range(2)]
        assert all(row["gold"] == problems[i // 2].answer for i, row in enumerate(rows))
        (told,) = (
            line["sample_accuracy"]
            for line in read_metrics(watched)
            if line["step"] == step and "sample_accuracy" in line
        )
        assert told == np.mean([row["correct"] for row in rows])


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_metrics_log(watched: Path) -> None:
    from tensorboardX.proto import event_pb2

    (file,) = (watched / "run" / "tensorboard").glob("events.*")
    raw, scalars = file.read_bytes(), {}
    while raw:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", raw[:8])
        event = event_pb2.Event.FromString(raw[12 : 12 + length])
        raw = raw[16 + length :]
        for value in event.summary.value:
            scalars[value.tag, event.step] = value.simple_value
    for line in read_metrics(watched):
        for name in ("loss", "validation_loss", "sample_accuracy", "tokens_per_second"):
            if line.get(name) is not None:
                assert scalars[name, line["step"]] == pytest.approx(line[name], rel=1e-6)


@pytest.mark.slow
def test_the_profile_window_is_recorded(watched: Path) -> None:
    assert list((watched / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_the_time_of_a_step_is_split_into_its_parts(watched: Path) -> None:
    lines = [line for line in read_metrics(watched) if "loss" in line and line["step"] > 4]
    for line in lines:
        assert line["step_s"] == pytest.approx(line["data_wait_s"] + line["compute_s"])
        assert line["tokens_per_second"] == pytest.approx(8 * line["tokens_per_second_per_device"])
        assert line["mfu"] is None  # nobody publishes the peak of a CPU
    assert sum(line["checkpoint_s"] for line in lines) > 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_the_ids_of_its_batch(tmp_path: Path) -> None:
    config = write_config(tmp_path, optimizer={"learning_rate": 1e30, "clip_norm": None, "warmup_fraction": 0})
    settings = load_settings(TrainSettings, str(config), ["mesh.fsdp=8"])
    with pytest.raises(RunError, match=r"the ids of its examples are in .*not-finite-step-\d+\.json"):
        training.train(settings)
    (file,) = (tmp_path / "run").glob("not-finite-step-*.json")
    told = json.loads(file.read_text())
    assert not math.isfinite(told["loss"] + told["grad_norm"])
    # The batch of that step, decoded: its questions are those of the problems named.
    problems = {p.id: p for p in read_problems("demo", "train", str(tmp_path / "data" / "train.jsonl"))}
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer.model")
    rows = load_rows(settings.data, tokenizer, Template())
    batch = Batches(rows, settings.data, batch_size=8, seed=0, num_steps=NUM_STEPS)[told["step"] - 1]
    texts = [
        tokenizer.decode(batch["tokens"][row][batch["segment_ids"][row] == segment].tolist())
        for row in range(8)
        for segment in range(1, batch["segment_ids"][row].max() + 1)
    ]
    assert len(texts) == len(told["examples"])
    assert all(problems[name].question in text for name, text in zip(told["examples"], texts, strict=True))


@pytest.mark.slow
def test_a_step_that_does_not_end_has_its_stacks_printed(tmp_path: Path) -> None:
    # The first step compiles, which takes longer than the 0.06 s allowed here.
    result = run(TRAIN, "--config", str(write_config(tmp_path)), "watchdog_minutes=0.001", "num_steps=2")
    assert result.returncode == 0
    assert "no step has ended for 0.001 minutes" in result.stderr
    assert "thread MainThread:" in result.stderr and "in train" in result.stderr


def test_the_watchdog_is_quiet_while_steps_end(capfd: pytest.CaptureFixture[str]) -> None:
    with Watchdog(minutes=0.4 / 60) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.alive()
    time.sleep(0.6)
    with Watchdog(None) as watchdog:
        watchdog.alive()
    assert capfd.readouterr().err == ""


def test_rates_are_tokens_over_the_time_of_steps_without_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    config = ModelConfig.model_validate({"preset": "demo"})
    throughput = Throughput(config, context=256)
    throughput._peak = 1e9  # as if the device's peak were known
    now += 1000  # compilation
    throughput.reset()
    for _ in range(4):
        with throughput.spending("data_wait"):
            now += 0.5
        now += 1.5
        throughput.add(tokens=800, positions=1000)
    with throughput.spending("checkpoint"):
        now += 30
    rates = throughput.read()
    assert rates["tokens_per_second"] == pytest.approx(4 * 800 / 8)
    assert (rates["step_s"], rates["data_wait_s"], rates["compute_s"]) == pytest.approx((2.0, 0.5, 1.5))
    assert rates["checkpoint_s"] == pytest.approx(7.5)
    assert rates["mfu"] == pytest.approx(4000 * flops_per_token(config, 256) / 8 / (1e9 * 8))
    assert set(throughput.read().values()) == {None}


def test_flops_of_llama_2_7b_at_2048_are_those_counted_by_hand() -> None:
    # 6 x 6.738 G weights + 12 x 32 layers x 4096 wide x 2048 positions
    config = ModelConfig.model_validate({"preset": "llama2-7b"})
    attention = 12 * 32 * 4096 * 2048
    assert flops_per_token(config, 2048) == pytest.approx(6 * 6.738e9 + attention, rel=1e-3)
    # Mistral sees 4096 positions back, however long the row: 12 x 32 layers x 4096 wide x 4096 positions.
    mistral = ModelConfig.model_validate({"preset": "mistral-7b"})
    assert flops_per_token(mistral, 32_768) == pytest.approx(6 * 7.242e9 + 12 * 32 * 4096 * 4096, rel=1e-3)
    # An adapter of rank 8 on queries and values: 32 layers x 2 matrices x (4096 + 4096) x 8 weights; the frozen
    # ones are multiplied forward and for the gradient of the activations, 2 FLOPs each.
    settings = LoraSettings(rank=8, targets=("q_proj", "v_proj"))
    assert lora.num_parameters(config, settings) == 32 * 2 * 8192 * 8
    told = flops_per_token(config, 2048, lora.num_parameters(config, settings))
    assert told == pytest.approx(4 * 6.738e9 + 6 * 32 * 2 * 8192 * 8 + attention, rel=1e-3)


def test_metrics_after_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    log = MetricsLog(epath.Path(tmp_path), 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    MetricsLog(epath.Path(tmp_path), 2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
