"""Cross-entropy whose logits are never whole."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathscale_jax.mesh import constrain


def summed_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    output: Float[Array, "embed vocab"],
    targets: Int[Array, "batch length"],
    loss_mask: Bool[Array, "batch length"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum over the masked positions of -log p(target), in nats and float32.

    `chunk` positions of every row have logits at a time, in the backward pass too, where they are computed
    again. Raises ValueError where `chunk` does not divide the length.
    """
    batch, length, _ = hidden.shape
    output = constrain(output, None, "tensor")  # gathered over fsdp once, not for every chunk
    if length % chunk:
        raise ValueError(f"chunk={chunk} must divide the length {length}")

    def chunks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add_chunk(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, mask = part
        logits = jnp.einsum("ble,ev->blv", hidden, output, preferred_element_type=jnp.float32)
        logits = constrain(logits, ("data", "fsdp"), None, "tensor")
        # A comparison and a sum, as a gather along a vocabulary that is split would collect all of it.
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        target_logits = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - target_logits
        return total + jnp.sum(jnp.where(mask, nll, 0)), None

    total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), (chunks(hidden), chunks(targets), chunks(loss_mask)))
    return total
