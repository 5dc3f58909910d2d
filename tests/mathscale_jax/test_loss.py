"""Chunked cross-entropy equals the plain formula in float64, and so does its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathscale_jax.loss import summed_cross_entropy

RNG = np.random.default_rng(0)
HIDDEN, OUTPUT = RNG.normal(size=(3, 12, 8)), RNG.normal(size=(8, 20)) * 3
TARGETS, MASK = RNG.integers(0, 20, (3, 12)), RNG.random((3, 12)) < 0.4


def reference() -> tuple[float, np.ndarray, np.ndarray]:
    logits = HIDDEN @ OUTPUT
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, TARGETS[..., None], -1)[..., 0]
    gradient_of_logits = (np.exp(log_probabilities) - np.eye(20)[TARGETS]) * MASK[..., None]
    to_output = np.einsum("ble,blv->ev", HIDDEN, gradient_of_logits)
    return -(picked * MASK).sum(), gradient_of_logits @ OUTPUT.T, to_output


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_it_equals_the_plain_formula(chunk: int) -> None:
    def loss(hidden: jax.Array, output: jax.Array) -> jax.Array:
        return summed_cross_entropy(hidden, output, jnp.asarray(TARGETS), jnp.asarray(MASK), chunk)

    arguments = jnp.float32(HIDDEN), jnp.float32(OUTPUT)
    value, (to_hidden, to_output) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arguments)
    expected, expected_to_hidden, expected_to_output = reference()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(loss)(*arguments), expected, rtol=1e-5)  # without a gradient
    np.testing.assert_allclose(to_hidden, expected_to_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_output, expected_to_output, rtol=1e-4, atol=1e-5)


def test_whole_logits_never_exist() -> None:
    vocab, length = 5000, 512
    arguments = (
        jax.ShapeDtypeStruct((2, length, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32),
        jax.ShapeDtypeStruct((2, length), jnp.int32),
        jax.ShapeDtypeStruct((2, length), jnp.bool_),
    )
    compiled = jax.jit(jax.grad(lambda *a: summed_cross_entropy(*a, 32))).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * length * vocab * 4 / 2


def test_a_chunk_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk=5 must divide the length 12"):
        summed_cross_entropy(*map(jnp.asarray, (HIDDEN, OUTPUT, TARGETS, MASK)), 5)
