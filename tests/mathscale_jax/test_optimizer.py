"""AdamW, clipping and the schedule against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathscale_jax.config import OptimizerSettings
from mathscale_jax.optimizer import learning_rate_schedule, make_optimizer


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
