"""Attention with one mask contract: causal, within a segment, within the sliding window."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    segment_ids: Int[Array, "batch length"], sliding_window: int | None
) -> Bool[Array, "batch length length"]:
    """Which key (last axis) each query (middle axis) sees.

    Worked example, segment_ids [1, 1, 2, 2, 0] (0 is padding):
        query 0 sees 0;  query 1 sees 0, 1;  query 2 sees 2;  query 3 sees 2, 3;  query 4 sees 4.
    A padded position sees padded positions, so that no softmax runs over nothing; the loss never reads it.
    """
    length = segment_ids.shape[-1]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    mask: Bool[Array, "batch length length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Grouped-query attention; query head h reads key head h // (heads / kv_heads). Softmax in float32."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)
