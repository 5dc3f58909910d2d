"""Attention by fused kernels of others, under the contract of `attention.attend`.

Pallas is imported where it is used: it takes a second, and most commands never need it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathscale_jax.attention_xla import RESIDUALS

INTERPRET = False  # tests set it, to run the Pallas kernels on a CPU


def splash_tiling(length: int) -> tuple[int, int]:
    """The length that splash pads a row to, and the queries and keys in one of its blocks, which divides it."""
    padded = length + -length % (128 if length <= 1024 else 512)
    return padded, padded if padded <= 1024 else 1024 if padded % 1024 == 0 else 512


def attend_splash(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    sliding_window: int | None,
) -> Float[Array, "batch length heads head_dim"]:
    """The splash attention kernel for TPUs: skips what no mask lets through, and reads grouped heads as they are.

    Any head_dim: the compiler pads it to lanes by itself.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, num_heads, head_dim = query.shape
    padded, block = splash_tiling(length)
    more = padded - length
    # The fused backward kernel computes the weights once instead of twice, but holds a gradient of the queries for
    # each block of keys.
    fused = padded <= 4 * block
    compute = 512 if block % 512 == 0 else block
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    mask = (
        splash.CausalMask((padded, padded))
        if sliding_window is None or sliding_window >= length
        else splash.LocalMask((padded, padded), (sliding_window - 1, 0), 0)
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=INTERPRET,
    )
    heads_first = (_pad_length(x, more).swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value))
    ids = jnp.pad(segment_ids, ((0, 0), (0, more)))
    attended = jax.vmap(kernel)(*heads_first, splash.SegmentIds(ids, ids))
    return attended.swapaxes(1, 2)[:, :length]


def attend_pallas(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    sliding_window: int | None,
) -> Float[Array, "batch length heads head_dim"]:
    """The attention kernel for GPUs that comes with Pallas. Keys and values are repeated for grouped queries.

    It has no sliding window: `attention.choose_backend` refuses one that is shorter than the row.
    """
    from jax.experimental.pallas.ops.gpu import attention as pallas

    _, length, num_heads, head_dim = query.shape
    assert sliding_window is None or sliding_window >= length
    more = -length % 128
    # A block of queries and two of keys and values have to fit a multiprocessor's shared memory.
    size = 128 if query.dtype.itemsize == 2 else 64
    blocks = pallas.BlockSizes(
        block_q=size, block_k=size, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32
    )
    group = num_heads // key.shape[2]
    attended = pallas.mha(
        _pad_length(query, more),
        _pad_length(jnp.repeat(key, group, axis=2), more),
        _pad_length(jnp.repeat(value, group, axis=2), more),
        jnp.pad(segment_ids, ((0, 0), (0, more))),
        sm_scale=head_dim**-0.5,
        causal=True,
        block_sizes=blocks,
        interpret=INTERPRET,
    )
    return attended[:, :length]


def attend_cudnn(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    sliding_window: int | None,
) -> Float[Array, "batch length heads head_dim"]:
    """cuDNN's attention, for rows of one example with the padding behind it, which no token sees then.

    jax hands it no segment ids. `attention.choose_backend` refuses it for packed rows; should one come all the same,
    everything is NaN rather than mixed up.
    """
    head_dim = query.shape[-1]
    more = ((0, 0), (0, 0), (0, 0), (0, -head_dim % 8))
    attended = jax.nn.dot_product_attention(
        *(jnp.pad(x, more) for x in (query, key, value)),
        scale=head_dim**-0.5,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )
    one_example = jnp.all((segment_ids == segment_ids[:, :1]) | (segment_ids == 0))
    return jnp.where(one_example, attended[..., :head_dim], jnp.nan)


def _pad_length(x: Array, more: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
