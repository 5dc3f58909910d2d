"""The step's loss and update depend on the data alone: not on mesh, accumulation, or packing."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from data_pipeline.loader import Batch, Batches
from data_pipeline.sources import DataSettings, Source
from data_pipeline.tokenized import TokenizedRows, rows_of
from mathscale_jax import model
from mathscale_jax.config import ComputeSettings, MeshSettings, ModelConfig, OptimizerSettings
from mathscale_jax.mesh import make_mesh
from mathscale_jax.optimizer import learning_rate_schedule, make_optimizer
from mathscale_jax.step import init_state, make_train_step, param_shardings, state_shardings, to_devices

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=64,
)
CONTEXT = 64


def make_rows(count: int = 40) -> TokenizedRows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 30, count)
    return rows_of(rng.integers(3, 64, lengths.sum()).astype(np.int32), lengths, rng.integers(1, 5, count))


def make_batches(rows: TokenizedRows, layout: str, batch_size: int, num_epochs: int = 1) -> Batches:
    settings = DataSettings(sources=(Source(task="jsonl", path="-"),), context=CONTEXT, layout=layout)
    return Batches(rows, settings, batch_size=batch_size, seed=0, num_epochs=num_epochs)


def run(
    batches: list[Batch], mesh_settings: MeshSettings, accumulation: int = 1, dtype: str = "float32"
) -> dict[str, Any]:
    """Losses of the steps, and the parameters after them."""
    mesh = make_mesh(mesh_settings)
    schedule = learning_rate_schedule(OptimizerSettings(learning_rate=1e-2), len(batches))
    optimizer = make_optimizer(OptimizerSettings(), schedule)
    shardings = param_shardings(CONFIG, mesh)
    everything = state_shardings(shardings, optimizer, mesh)
    state = init_state(jax.jit(lambda: model.init(CONFIG, 0), out_shardings=shardings)(), optimizer, everything)
    compute = ComputeSettings(dtype=dtype, remat="full", loss_chunk=16)
    step = make_train_step(CONFIG, compute, optimizer, schedule, everything, mesh, accumulation)
    metrics = []
    with jax.set_mesh(mesh):
        for batch in batches:
            state, values = step(state, to_devices(batch, mesh))
            metrics.append(jax.device_get(values))
    return {"losses": [float(m["loss"]) for m in metrics], "metrics": metrics, "state": state}


def uneven_batches() -> list[Batch]:
    batches = make_batches(make_rows(), "packed", 8, num_epochs=3)
    parts = [batches[i] for i in range(3)]
    parts[1]["loss_mask"][:5] = False  # a batch whose parts hold very different numbers of tokens
    return parts


REFERENCE_MESH = MeshSettings(data=8, fsdp=1)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return run(uneven_batches(), REFERENCE_MESH)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=2e-5)
    for x, y in zip(jax.tree.leaves(a["state"].params), jax.tree.leaves(b["state"].params), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-4)


@pytest.mark.parametrize(
    "mesh", [MeshSettings(), MeshSettings(data=2, fsdp=2, tensor=2), MeshSettings(fsdp=4, tensor=2)], ids=str
)
def test_every_mesh_gives_the_same_losses_and_weights(reference: dict[str, Any], mesh: MeshSettings) -> None:
    assert_same(reference, run(uneven_batches(), mesh))


def test_accumulation_equals_one_batch_with_uneven_masks(reference: dict[str, Any]) -> None:
    assert_same(reference, run(uneven_batches(), MeshSettings(data=2, fsdp=2, tensor=2), accumulation=2))


def test_the_first_loss_is_that_of_the_plain_formula(reference: dict[str, Any]) -> None:
    batch = uneven_batches()[0]
    params = jax.jit(lambda: model.init(CONFIG, 0))()
    total, count = 0.0, 0
    plain = jax.jit(partial(model.logits, CONFIG))
    for row in range(8):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            where = batch["segment_ids"][row] == segment
            alone = np.zeros((1, CONTEXT), np.int32)  # no token sees the zeros behind the example
            alone[0, : where.sum()] = batch["tokens"][row, where]
            logits = np.asarray(plain(params, alone), np.float64)[0, : where.sum()]
            nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(where.sum()), batch["targets"][row, where]]
            total += nll[batch["loss_mask"][row, where]].sum()
            count += batch["loss_mask"][row, where].sum()
    assert reference["losses"][0] == pytest.approx(total / count, rel=1e-5)


def test_packed_loss_equals_padded_loss() -> None:
    rows = make_rows(32)
    packed, padded = make_batches(rows, "packed", 16), make_batches(rows, "padded", 32)
    assert len(packed) == len(padded) == 1
    assert_same(run([packed[0]], MeshSettings()), run([padded[0]], MeshSettings()))


def test_tokens_and_examples_are_counted(reference: dict[str, Any]) -> None:
    batch, metrics = uneven_batches()[0], reference["metrics"][0]
    assert metrics["tokens"] == (batch["segment_ids"] > 0).sum()
    assert metrics["examples"] == batch["segment_ids"].max(axis=1).sum()
    assert metrics["loss_tokens"] == batch["loss_mask"].sum()


def test_weights_and_moments_lie_where_the_table_says() -> None:
    state = run(uneven_batches()[:1], MeshSettings(fsdp=4, tensor=2))["state"]
    up = state.params["blocks"]["mlp"]["up"]
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == up.shape]
    assert len(moments) == 4  # first and second moment of up and gate
    for array in [up, *moments]:
        assert array.addressable_shards[0].data.shape == (2, 32 // 4, 64 // 2)


def test_bfloat16_compute_keeps_float32_weights_and_trains() -> None:
    batches = make_batches(make_rows(), "packed", 8, num_epochs=20)
    result = run([batches[i] for i in range(len(batches))], MeshSettings(), dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(result["state"].params))
    assert result["losses"][-1] < result["losses"][0] - 0.5
