"""AdamW, clipping and the schedule against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathscale_jax.config import OptimizerSettings
from mathscale_jax.optimizer import learning_rate_schedule, make_optimizer, round_stochastically


def test_warmup_is_four_percent_then_cosine_to_zero() -> None:
    schedule = learning_rate_schedule(OptimizerSettings(learning_rate=1.0), num_steps=100)
    assert [round(float(schedule(s)), 6) for s in (0, 1, 2, 3, 4)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert float(schedule(4 + 48)) == pytest.approx(0.5)
    assert float(schedule(4 + 24)) == pytest.approx((1 + np.cos(np.pi / 4)) / 2)
    assert 0 < float(schedule(99)) < 0.001
    assert float(schedule(100)) == pytest.approx(0, abs=1e-7)


def test_the_cosine_ends_at_the_final_fraction() -> None:
    schedule = learning_rate_schedule(OptimizerSettings(learning_rate=2.0, final_fraction=0.1, warmup_fraction=0), 10)
    assert float(schedule(0)) == pytest.approx(2.0)
    assert float(schedule(10)) == pytest.approx(0.2)


def test_three_steps_equal_adamw_written_out() -> None:
    settings = OptimizerSettings(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, clip_norm=2.0)
    rate = 0.05
    optimizer = make_optimizer(settings, lambda _: jnp.float32(rate))
    params = {"matrix": jnp.array([1.0, -2.0]), "norm": {"scale": jnp.array([3.0])}}
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    ours = np.array([1.0, -2.0, 3.0])
    m, v = np.zeros(3), np.zeros(3)
    for t in range(1, 4):
        g = rng.normal(size=3) * 4
        gradients = {"matrix": jnp.float32(g[:2]), "norm": {"scale": jnp.float32(g[2:])}}
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        clipped = g * min(1, 2.0 / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * clipped, 0.9 * v + 0.1 * clipped**2
        decay = np.array([0.1, 0.1, 0.0])  # norms are not decayed
        ours = ours - rate * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + decay * ours)
    theirs = np.concatenate([params["matrix"], params["norm"]["scale"]])
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_stochastic_rounding_keeps_the_mean_and_gives_only_the_two_neighbours() -> None:
    spacing = 2.0**-7  # of bfloat16 between 1 and 2
    x = jnp.full(40_000, 1 + 0.3 * spacing)
    rounded = np.asarray(round_stochastically(x, jax.random.key(0)).astype(jnp.float32))
    assert set(np.unique(rounded)) == {1.0, 1 + spacing}
    share = (rounded > 1).mean()
    assert share == pytest.approx(0.3, abs=4 * (0.21 / 40_000) ** 0.5)
    exact = jnp.array([0.0, -2.5, 1e-30, jnp.inf], jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(round_stochastically(exact, jax.random.key(1)).astype(jnp.float32), exact)


def test_a_bfloat16_state_follows_the_float32_one() -> None:
    """A second moment that grows by a thousandth a step: rounded to the nearest it would never leave zero's scale."""
    wide = make_optimizer(OptimizerSettings(clip_norm=None), lambda _: jnp.float32(1e-3))
    narrow = make_optimizer(OptimizerSettings(clip_norm=None, state_dtype="bfloat16"), lambda _: jnp.float32(1e-3))
    params = {"matrix": jnp.zeros(2000)}
    states = [wide.init(params), narrow.init(params)]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim) for state in states]
    assert sizes[1] == sizes[0] / 2
    rng = np.random.default_rng(0)

    @jax.jit
    def update(gradients, states):
        updates = [o.update(gradients, s, params) for o, s in zip((wide, narrow), states, strict=True)]
        return [u for u, _ in updates], [s for _, s in updates]

    for _ in range(1500):
        gradients = {"matrix": jnp.float32(1 + 0.1 * rng.normal(size=2000))}
        updates, states = update(gradients, states)
    second_moments = [
        next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(s) if "nu" in jax.tree_util.keystr(path))
        for s in states
    ]
    wide_mean, narrow_mean = (float(m.astype(jnp.float32).mean()) for m in second_moments)
    assert narrow_mean == pytest.approx(wide_mean, rel=0.005)
    np.testing.assert_allclose(updates[1]["matrix"].mean(), updates[0]["matrix"].mean(), rtol=0.01)
