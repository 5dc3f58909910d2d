"""The model computes what transformers computes; packing, remat and unrolling change nothing."""

from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from published import read_model

from data_pipeline.settings import UsageError, validated
from mathscale_jax import model
from mathscale_jax.config import PRESETS, ComputeSettings, ModelConfig

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=64,
)
FLOAT32 = ComputeSettings(dtype="float32", remat="none")


@pytest.fixture(scope="module")
def params() -> model.Params:
    return jax.tree.map(lambda p: p * 4, jax.jit(lambda: model.init(TINY, 0))())


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window"])
def test_logits_equal_those_of_transformers(golden: Path, name: str) -> None:
    reference = np.load(golden / name / "golden.npz")
    config, params = read_model(golden / name)
    ours = model.logits(config, params, jnp.asarray(reference["tokens"], jnp.int32))
    # float32 noise, as large as transformers' own: both orders of summation are as good.
    assert np.abs(ours - reference["logits"]).max() < 4 * reference["float32_error"]
    assert np.abs(reference["logits"]).max() > 1e5 * reference["float32_error"]


def test_the_sliding_window_matters_in_the_golden_checkpoint(golden: Path) -> None:
    """Otherwise the comparison above would say nothing about it."""
    reference = np.load(golden / "mistral_window" / "golden.npz")
    config, params = read_model(golden / "mistral_window")
    window = config.sliding_window
    without = config.model_copy(update={"sliding_window": None})
    logits = np.asarray(model.logits(without, params, jnp.asarray(reference["tokens"], jnp.int32)))
    assert window is not None
    np.testing.assert_allclose(logits[:, :window], reference["logits"][:, :window], atol=1e-3)
    assert np.abs(logits[:, window:] - reference["logits"][:, window:]).max() > 0.1


def test_a_packed_row_gives_each_example_the_logits_it_has_alone(params: model.Params) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 64, (1, 9)), rng.integers(0, 64, (1, 14))
    tokens = np.concatenate([first, second, np.zeros((1, 3), int)], axis=1)
    segments = np.array([[1] * 9 + [2] * 14 + [0] * 3])
    positions = np.array([[*range(9), *range(14), *range(3)]])
    hidden = model.hidden_states(TINY, params, *map(jnp.asarray, (tokens, positions, segments)), FLOAT32)
    packed = np.asarray(hidden @ params["output"])
    np.testing.assert_allclose(packed[:, :9], model.logits(TINY, params, jnp.asarray(first)), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(packed[:, 9:23], model.logits(TINY, params, jnp.asarray(second)), rtol=2e-4, atol=2e-4)


def test_no_token_sees_a_later_one(params: model.Params) -> None:
    tokens = np.arange(20)[None] % 64
    changed = tokens.copy()
    changed[0, 12] += 1
    before, after = (np.asarray(model.logits(TINY, params, jnp.asarray(t))) for t in (tokens, changed))
    assert np.array_equal(before[:, :12], after[:, :12])
    assert not np.array_equal(before[:, 12], after[:, 12])


@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"remat": "save-attention"}, {"scan_unroll": 3}]
)
def test_remat_and_unrolling_change_neither_loss_nor_gradient(params: model.Params, change: dict) -> None:
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 16)))

    def loss(params: model.Params, compute: ComputeSettings) -> jax.Array:
        return jnp.mean(model.logits(TINY, params, tokens, compute) ** 2)

    def loss_and_gradient(compute: ComputeSettings) -> object:
        return jax.jit(lambda params: jax.value_and_grad(loss)(params, compute))(params)

    plain, other = loss_and_gradient(FLOAT32), loss_and_gradient(FLOAT32.model_copy(update=change))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def _products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Matrix products in a program and what it calls, those of batches of matrices left out."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][1] == ((), ())
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                count += _products(getattr(inner, "jaxpr", inner))
    return count


def test_remat_recomputes_the_products_that_its_name_says(params: model.Params) -> None:
    tokens = jnp.zeros((2, 16), int)

    def products(remat: str) -> int:
        compute = ComputeSettings(dtype="float32", remat=remat)
        loss = jax.grad(lambda params: model.logits(TINY, params, tokens, compute).sum())
        return _products(jax.make_jaxpr(loss)(params).jaxpr)

    none, dots, save_attention, full = map(products, ("none", "dots", "save-attention", "full"))
    weights = 6  # query, key, value, output, gate and up; the gradient of down needs none of its own result
    assert full - dots == weights and save_attention - none == weights
    assert dots - none == full - save_attention > 0  # attention's own


def test_bfloat16_is_close_to_float32(params: model.Params) -> None:
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 64, (2, 16)))
    narrow = model.logits(TINY, params, tokens, ComputeSettings(dtype="bfloat16", remat="none"))
    wide = model.logits(TINY, params, tokens)
    assert narrow.dtype == jnp.float32
    assert 0 < float(jnp.abs(narrow - wide).max()) < 0.1 * float(jnp.abs(wide).max())


# Parameter counts from the models' publications (LLaMA-2: 6.74, 13.02 and 68.98 billion; Mistral 7.24).
@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("llama2-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama2-70b", 68.977),
        ("mistral-7b", 7.242),
        ("open-llama-3b", 3.426),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, billions: float) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda x: isinstance(x, model.ParamSpec))
    assert sum(int(np.prod(spec.shape)) for spec in specs) == config.num_parameters
    assert round(config.num_parameters / 1e9, 3) == billions


def test_a_preset_can_be_changed_field_by_field() -> None:
    assert ModelConfig.model_validate({"preset": "llama2-7b", "num_layers": 2}).num_layers == 2
    assert ModelConfig.model_validate({"preset": "llama2-7b"}).num_layers == 32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"preset": "llama3"}, "llama2-7b"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "must be even"),
        ({"num_layer": 2}, "did you mean num_layers?"),
    ],
)
def test_an_impossible_architecture_is_refused(change: dict, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        validated(ModelConfig, {**PRESETS["demo"], **change}, "model")
    assert told in str(refused.value)
