"""Losses of sets against transformers-free arithmetic, and a model that has learnt one of them by heart."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import read_model
from small_run import train_here, write_config

from data_pipeline.word_problems import generate_problems
from eval.leakage import LeakageSettings, differences, leakage, make_example_losses, summary
from mathscale_jax.config import ComputeSettings, MeshSettings
from mathscale_jax.mesh import make_mesh


def write_rows(path: Path, problems: list) -> str:
    rows = [{"question": p.question, "solution": p.solution, "answer": p.answer} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_differences_are_of_means_over_tokens() -> None:
    sums = {
        "test": np.array([[10.0, 5], [20.0, 10]]),  # 2 nats a token
        "new": np.array([[30.0, 15], [30.0, 15]]),  # 2
        "train": np.array([[5.0, 10], [10.0, 5]]),  # 1
    }
    told = differences(sums)
    assert {name: entry["value"] for name, entry in told["loss"].items()} == {"test": 2, "new": 2, "train": 1}
    assert told["d1"]["value"] == 0 and told["d2"]["value"] == 1
    assert told["d2"]["ci95"] == [0.0, 1.5]  # train is 0.5 or 2 where one example is drawn twice
    assert "no sign" in summary(told)
    assert "may have been trained on it" in summary(differences({**sums, "new": np.array([[60.0, 15], [61.0, 15]])}))


def test_losses_of_examples_are_those_of_transformers_logits(golden: Path) -> None:
    reference = np.load(golden / "llama_gqa" / "golden.npz")
    tokens, logits = reference["tokens"].astype(np.int32), reference["logits"].astype(np.float64)
    targets = np.roll(tokens, -1, axis=1)
    mask = np.random.default_rng(0).random(tokens.shape) < 0.6
    wanted = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    length = tokens.shape[1]
    batch = {
        "tokens": tokens, "targets": targets, "loss_mask": mask, "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    }  # fmt: skip
    config, params = read_model(golden / "llama_gqa")
    compute = ComputeSettings(dtype="float32", remat="none", loss_chunk=length // 2)
    mesh = make_mesh(MeshSettings())
    with jax.set_mesh(mesh):
        losses = make_example_losses(config, compute, mesh)(params, {k: jnp.asarray(v) for k, v in batch.items()})
    assert length % 2 == 0
    np.testing.assert_allclose(losses[:, 0], (wanted * mask).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(losses[:, 1], mask.sum(1))


def test_intervals_are_those_of_independent_sets() -> None:
    """Against the standard error of a difference of means; all examples have ten tokens."""
    rng = np.random.default_rng(3)
    sums = {
        name: np.stack([rng.normal(mean, 4.0, 400), np.full(400, 10.0)], axis=1)
        for name, mean in (("test", 12.0), ("new", 12.0), ("train", 9.0))
    }
    low, high = differences(sums)["d1"]["ci95"]
    errors = [sums[name][:, 0].std() / 10 / 20 for name in ("test", "new")]
    assert high - low == pytest.approx(2 * 1.96 * np.hypot(*errors), rel=0.08)


@pytest.mark.slow
def test_a_test_set_that_was_trained_on_shows(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    problems = list(generate_problems(288, seed=77))
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", problems[96 * i : 96 * i + 96])
        for i, name in enumerate(("test", "new", "train"))
    }
    train_here(
        config,
        f"data.sources=[{{task: demo, path: {files['test']}}}, {{task: demo, path: {files['train']}}}]",
        "num_steps=150",
    )
    told = leakage(LeakageSettings(checkpoint=str(tmp_path / "run"), dtype="float32", batch_size=1, **files))
    assert told["num_examples"] == {"test": 96, "new": 96, "train": 96}
    assert told["d1"]["ci95"][1] < 0 and "may have been trained on it" in summary(told)
    clean = leakage(
        LeakageSettings(
            checkpoint=str(tmp_path / "run"), dtype="float32", batch_size=1, **{**files, "test": files["new"]}
        )
    )
    assert clean["d1"]["value"] == 0 and clean["d2"]["ci95"][0] > 0 and "no sign" in summary(clean)
