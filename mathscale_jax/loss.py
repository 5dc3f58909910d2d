"""Cross-entropy whose logits are never whole."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathscale_jax.mesh import on_own_rows


def summed_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    output: Float[Array, "embed vocab"],
    targets: Int[Array, "batch length"],
    loss_mask: Bool[Array, "batch length"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum over the masked positions of -log p(target), in nats and float32.

    `chunk` positions of every row have logits at a time. Where a gradient is asked for, it is made in the same pass,
    while a chunk's logits exist, so that they are computed once.
    Raises ValueError where `chunk` does not divide the length.
    """
    length = hidden.shape[1]
    if length % chunk:
        raise ValueError(f"chunk={chunk} must divide the length {length}")

    def of_own_rows(tensor_axis: str | None, output: Array, hidden: Array, targets: Array, loss_mask: Array) -> Array:
        if tensor_axis is not None:  # each device has a part of the vocabulary: their gradients of `hidden` add up
            hidden = jax.lax.pcast(hidden, tensor_axis, to="varying")
        return _local_sum(tensor_axis, chunk, output, hidden, targets, loss_mask)

    return on_own_rows(of_own_rows, output, ("embed", "vocab"), hidden, targets, loss_mask, summed=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _local_sum(
    tensor_axis: str | None, chunk: int, output: Array, hidden: Array, targets: Array, loss_mask: Array
) -> Array:
    """The sum over one device's rows; `output` holds its part of the vocabulary, of which `tensor_axis` has all."""

    def add_chunk(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _masked_nll(tensor_axis, output, *part)[0], None

    return jax.lax.scan(add_chunk, _zeros((), targets), _chunks(chunk, hidden, targets, loss_mask))[0]


def _with_gradients(
    tensor_axis: str | None, chunk: int, output: Array, hidden: Array, targets: Array, loss_mask: Array
) -> tuple[Array, tuple[Array, Array]]:
    """The sum, and its gradients to `output`, added up over the chunks in float32, and `hidden`."""

    def add_chunk(totals: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, to_output = totals
        nll, to_logits = _masked_nll(tensor_axis, output, *part)
        to_logits = to_logits.astype(hidden.dtype)
        to_output += jnp.einsum("ble,blv->ev", part[0], to_logits, preferred_element_type=jnp.float32)
        return (total + nll, to_output), jnp.einsum("blv,ev->ble", to_logits, output)

    zeros = _zeros((), targets), _zeros(output.shape, output)
    (total, to_output), to_hidden = jax.lax.scan(add_chunk, zeros, _chunks(chunk, hidden, targets, loss_mask))
    return total, (to_output.astype(output.dtype), jnp.moveaxis(to_hidden, 0, 1).reshape(hidden.shape))


def _scaled(
    tensor_axis: str | None, chunk: int, gradients: tuple[Array, Array], scale: Array
) -> tuple[Array, Array, None, None]:
    to_output, to_hidden = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return to_output, to_hidden, None, None


_local_sum.defvjp(_with_gradients, _scaled)


def _masked_nll(
    tensor_axis: str | None,
    output: Float[Array, "embed vocab"],
    hidden: Float[Array, "batch chunk embed"],
    targets: Int[Array, "batch chunk"],
    mask: Bool[Array, "batch chunk"],
) -> tuple[Float[Array, ""], Float[Array, "batch chunk vocab"]]:
    """The sum of a chunk, and its gradient to the logits: p - 1 at the target, p elsewhere, 0 outside the mask."""
    logits = jnp.einsum("ble,ev->blv", hidden, output, preferred_element_type=jnp.float32)
    first_token = 0 if tensor_axis is None else jax.lax.axis_index(tensor_axis) * logits.shape[-1]
    # A comparison and a sum, as the target is in one device's part of the vocabulary only.
    is_target = first_token + jnp.arange(logits.shape[-1]) == targets[..., None]
    highest = jnp.max(logits, axis=-1)
    if tensor_axis is not None:
        highest = jax.lax.pmax(highest, tensor_axis)
    sums = jnp.stack(
        [
            jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1),
            jnp.sum(jnp.where(is_target, logits, 0), axis=-1),
        ]
    )
    if tensor_axis is not None:
        sums = jax.lax.psum(sums, tensor_axis)
    normaliser = jnp.log(sums[0]) + highest
    nll = jnp.sum(jnp.where(mask, normaliser - sums[1], 0))
    return nll, jnp.where(mask[..., None], jnp.exp(logits - normaliser[..., None]) - is_target, 0)


def _chunks(chunk: int, *arrays: Array) -> Any:
    """Each with a leading axis of chunks: [chunks, batch, chunk, ...]."""

    def split(x: Array) -> Array:
        batch, length = x.shape[:2]
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Float32 zeros for a sum that differs between the devices between which `like` does."""
    return jnp.sum(like[:0], dtype=jnp.float32) + jnp.zeros(shape, jnp.float32)
