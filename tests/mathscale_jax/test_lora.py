"""LoRA: what it computes, what it trains, and what its checkpoints hold. Against peft: tests/test_parity.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_run import train_here, write_config

from data_pipeline.settings import UsageError
from mathscale_jax import lora, model
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.config import ComputeSettings, LoraSettings, MeshSettings, ModelConfig
from mathscale_jax.convert.exporting import export_hf
from mathscale_jax.mesh import make_mesh
from mathscale_jax.model import LowRank, project
from mathscale_jax.step import spec_shardings

CONFIG = ModelConfig.model_validate(
    {"preset": "demo", "vocab_size": 64, "num_layers": 2, "hidden_size": 32, "head_dim": 8, "num_kv_heads": 2}
)
EVERYTHING = LoraSettings(
    rank=3, alpha=6, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
COMPUTE = ComputeSettings(dtype="float32", remat="none")


def random_adapter(settings: LoraSettings) -> model.Params:
    """Neither of A and B zero."""
    adapter = lora.init(CONFIG, settings, seed=0)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return treedef.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@jax.jit
def new_params() -> model.Params:
    return model.init(CONFIG, 0)


@jax.jit
def hidden(params: model.Params, adapter: object = None) -> jax.Array:
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 3, 64)
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    return model.hidden_states(CONFIG, params, tokens, positions, jnp.ones_like(tokens), COMPUTE, adapter)


@pytest.mark.parametrize("settings", [EVERYTHING, LoraSettings(targets=("o_proj",))], ids=["all", "o_proj"])
def test_an_adapter_computes_what_its_merged_weights_do(settings: LoraSettings) -> None:
    params, adapter = new_params(), random_adapter(settings)
    apart = hidden(params, lora.low_ranks(adapter, settings))
    merged = hidden(lora.merge_all(params, adapter, settings))
    np.testing.assert_allclose(apart, merged, atol=1e-4 * np.abs(merged).max())
    assert np.abs(apart - hidden(params)).max() > 0.1


def test_merging_adds_alpha_over_rank_times_the_product() -> None:
    rng = np.random.default_rng(0)
    weight, a, b = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 2, 4, 3))
    merged = lora.merge(jnp.float32(weight), jnp.float32(a), jnp.float32(b), LoraSettings(rank=2, alpha=7))
    for layer in range(2):
        expected = weight[layer] + 3.5 * np.einsum("ir,rhd->ihd", a[layer], b[layer])
        np.testing.assert_allclose(merged[layer], expected, rtol=1e-5, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_has_pefts_spread() -> None:
    params, adapter = new_params(), lora.init(CONFIG, EVERYTHING, seed=0)
    np.testing.assert_array_equal(hidden(params, lora.low_ranks(adapter, EVERYTHING)), hidden(params))
    a = np.asarray(adapter["attention"]["query"]["a"])
    assert np.abs(a).max() <= 32**-0.5 and a.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.15)
    assert not np.array_equal(a, adapter["attention"]["value"]["a"])


def test_an_adapter_is_split_over_the_mesh_as_its_matrix_is() -> None:
    mesh = make_mesh(MeshSettings(fsdp=4, tensor=2))
    shardings = spec_shardings(lora.adapter_specs(CONFIG, EVERYTHING), mesh)
    assert shardings["attention"]["query"]["a"].spec == P(None, "fsdp", None)
    assert shardings["attention"]["query"]["b"].spec == P(None, None, "tensor", None)
    assert shardings["attention"]["output"]["a"].spec == P(None, "tensor", None, None)
    assert shardings["attention"]["output"]["b"].spec == P(None, None, "fsdp")
    assert shardings["mlp"]["down"]["a"].spec == P(None, "tensor", None)


def test_dropout_drops_its_share_of_the_inputs_of_a_and_keeps_the_mean() -> None:
    """With W = 0 and A B = 1 the output is the input, dropped or scaled up."""
    x = jnp.ones((1, 100, 500))
    one = jnp.eye(500)
    low_rank = LowRank(one, one, jax.random.key(0), scale=1.0, dropout=0.2)
    dropped = np.asarray(project(x, jnp.zeros((500, 500)), low_rank))
    assert set(np.unique(dropped.round(5))) == {0.0, 1.25}
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=4 * (0.16 / 50_000) ** 0.5)


def test_every_layer_and_matrix_drops_other_inputs() -> None:
    settings = LoraSettings(dropout=0.5)
    low_ranks = lora.low_ranks(lora.init(CONFIG, settings, 0), settings, jax.random.key(0))
    keys = [np.asarray(jax.random.key_data(low_ranks["attention"][name].dropout_key)) for name in ("query", "value")]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4
    without = lora.low_ranks(lora.init(CONFIG, settings, 0), settings)
    assert without["attention"]["query"].dropout_key is None


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_a_lora_run_trains_its_adapter_alone_saves_it_alone_and_goes_on_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mathscale")
    base, tuned, other = tmp_path / "base", tmp_path / "tuned", tmp_path / "other"
    for folder in (base, tuned, other):
        folder.mkdir()
    train_here(write_config(base), "num_steps=16")
    changes = {
        "model": None,
        "init_from": str(base / "run"),
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "num_steps": 24,
        "checkpoint": {"every": 8},
    }
    whole, halved = write_config(tuned, **changes), write_config(other, **changes)
    train_here(whole)
    assert losses(tuned)[-1] < losses(tuned)[0] - 0.02
    # A run that ends at its second checkpoint and is begun again has the same losses, dropout included.
    train_here(halved)
    (other / "run" / "checkpoints" / "24").rename(tmp_path / "away")
    train_here(halved)
    assert f"resuming {other / 'run'} step 16" in caplog.text and losses(other) == losses(tuned)

    step = tuned / "run" / "checkpoints" / "24"
    assert (step / "adapter").exists() and not (step / "params").exists()
    checkpoint, base_checkpoint = open_checkpoint(str(tuned / "run")), open_checkpoint(str(base / "run"))
    adapted, weights = checkpoint.restore_params(), base_checkpoint.restore_params()
    for name, leaf in model.named_leaves(adapted).items():
        changed = not np.array_equal(leaf, model.named_leaves(weights)[name])
        assert changed == (name in ("blocks.attention.query", "blocks.attention.value", "blocks.mlp.down")), name
    # The base goes on; the adapter still belongs to the step it was trained on, and is trained on that.
    train_here(base / "config.yaml", "num_steps=20")
    train_here(whole, "num_steps=28")
    assert open_checkpoint(str(tuned / "run")).meta.base.step == 16
    # An adapter of an adapter is refused, and one whose base is gone.
    twice = write_config(other, **{**changes, "init_from": str(tuned / "run"), "output_dir": str(other / "twice")})
    with pytest.raises(UsageError, match="is an adapter: export it merged"):
        train_here(twice)
    (base / "run").rename(base / "gone")
    with pytest.raises(UsageError, match="is an adapter of"):
        export_hf(str(tuned / "run"), str(tmp_path / "hf"), merge=True)


def test_targets_that_match_nothing_are_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"attn\.c_proj match no matrix of the model; allowed: q_proj, k_proj"):
        LoraSettings(targets=("q_proj", "attn.c_proj"))
    with pytest.raises(ValueError, match="no matrix is named"):
        LoraSettings(targets=())
