"""Attention in plain JAX that never holds a whole matrix of scores, forward or backward.

A loop over blocks of queries goes over the blocks of keys they can see: no later one, none past the sliding window,
and none before the first example that the queries belong to, so a packed row costs little more than its examples.
The forward pass is the online softmax of FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithm 1); the
backward pass (algorithm 2) computes the weights again from the log-sum-exp that the forward pass kept.

Here an array has one row for each (batch row, key head): queries are [rows, group, length, head_dim] with the `group`
query heads that read one key head, keys and values [rows, length, head_dim].
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

RESIDUALS = "attention"  # the checkpoint name of what a backward pass reads besides query, key and value

LOWEST = float(jnp.finfo(jnp.float32).min)
LAST_SEGMENT = jnp.iinfo(jnp.int32).max
SMALLEST_BLOCK = 128


def attend_xla(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    sliding_window: int | None,
) -> Float[Array, "batch length heads head_dim"]:
    """`attention.attend` on any device. Memory grows with the length, not with its square."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    more = -length % SMALLEST_BLOCK if length > SMALLEST_BLOCK else 0

    def rows_of(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
        x = x.reshape(batch, length + more, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        return x.reshape(batch * num_kv_heads, -1, length + more, head_dim)

    # Padding gets the highest id: ids ascend in a packed row, so the range of a block's ids says what it can share.
    segments = jnp.where(segment_ids == 0, LAST_SEGMENT, segment_ids)
    segments = jnp.pad(segments, ((0, 0), (0, more)), constant_values=LAST_SEGMENT)
    segments = jnp.repeat(segments, num_kv_heads, axis=0)
    attended = _attend(rows_of(query), rows_of(key)[:, 0], rows_of(value)[:, 0], segments, sliding_window)
    attended = attended.reshape(batch, num_heads, length + more, head_dim)[:, :, :length]
    return attended.swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, segments: Array, window: int | None) -> Array:
    return _for_platform(_forward, window, query, key, value, segments)[0]


def _attend_forward(
    query: Array, key: Array, value: Array, segments: Array, window: int | None
) -> tuple[Array, tuple[Array, ...]]:
    attended, log_sum = _for_platform(_forward, window, query, key, value, segments)
    attended, log_sum = checkpoint_name(attended, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return attended, (query, key, value, segments, attended, log_sum)


def _attend_backward(window: int | None, residuals: tuple[Array, ...], d_attended: Array) -> tuple[Any, ...]:
    return *_for_platform(_backward, window, *residuals, d_attended), None


_attend.defvjp(_attend_forward, _attend_backward)


def _for_platform(function: Callable[..., Any], window: int | None, *arrays: Array) -> Any:
    """`function(tile, ...)` with the tile that suits the platform which this is compiled for."""
    _, group, length, _ = arrays[0].shape

    def largest(size: int) -> int:
        if length <= SMALLEST_BLOCK:
            return length
        while length % size:
            size //= 2
        return size

    def all_rows(*arrays: Array) -> Any:
        return function(_Tile(largest(512), largest(512), window), *arrays)

    def row_by_row(*arrays: Array) -> Any:
        # On CPUs, so that the scores of a tile stay in a core's cache: this is what makes it fast there. Long rows
        # have tiles large enough for two cores; in short ones these would hold too many scores that nobody reads.
        queries, keys = (512, 256) if length % 512 == 0 else (256, 128)
        tile = (
            _Tile(largest(queries), largest(keys), window) if group == 1 else _Tile(largest(128), largest(128), window)
        )
        return jax.lax.map(lambda row: jax.tree.map(lambda x: x[0], function(tile, *(x[None] for x in row))), arrays)

    return jax.lax.platform_dependent(*arrays, cpu=row_by_row, default=all_rows)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """`query` by `key` positions, whose scores exist at a time."""

    query: int
    key: int
    window: int | None

    def queries(self, x: Array, block: Array) -> Array:
        """A block of an array [rows, group, length, ...], with the heads of the group one after another."""
        x = jax.lax.dynamic_slice_in_dim(x, block * self.query, self.query, axis=2)
        return x.reshape(x.shape[0], x.shape[1] * self.query, *x.shape[3:])

    def keys(self, x: Array, block: Array, axis: int = 1) -> Array:
        """A block of an array [rows, length, head_dim], or of one with the length on another axis."""
        return jax.lax.dynamic_slice_in_dim(x, block * self.key, self.key, axis)

    def visible(self, segments: Array, query_block: Array, key_block: Array, group: int) -> Array:
        """Which key each query sees, [rows, group * query, key]."""
        query_ids = jax.lax.dynamic_slice_in_dim(segments, query_block * self.query, self.query, axis=1)
        query_at = query_block * self.query + jnp.arange(self.query)
        query_ids, query_at = jnp.tile(query_ids, (1, group))[..., None], jnp.tile(query_at, group)[:, None]
        key_at = key_block * self.key + jnp.arange(self.key)
        mask = (query_ids == self.keys(segments, key_block)[:, None]) & (query_at >= key_at)
        return mask if self.window is None else mask & (query_at - key_at < self.window)

    def key_blocks(self, segments: Array, query_block: Array) -> tuple[Array, Array]:
        """First key block that a query of the block may see, and the one after the last."""
        rows, length = segments.shape
        ids = segments.reshape(rows, length // self.key, self.key)
        query_ids = jax.lax.dynamic_slice_in_dim(segments, query_block * self.query, self.query, axis=1)
        may_share = (ids.min(-1) <= query_ids.max(-1)[:, None]) & (ids.max(-1) >= query_ids.min(-1)[:, None])
        first = jnp.argmax(may_share.any(0))
        if self.window is not None:
            first = jnp.maximum(first, (query_block * self.query - self.window + 1) // self.key)
        return first, (query_block * self.query + self.query - 1) // self.key + 1


def _forward(tile: _Tile, query: Array, key: Array, value: Array, segments: Array) -> tuple[Array, Array]:
    """The attended values, and the logarithm of each query's softmax denominator [rows, group, length]."""
    scale = query.shape[-1] ** -0.5
    rows, group, length, _ = query.shape
    key_t = key.swapaxes(1, 2)

    def attend_block(query_block: Array) -> tuple[Array, Array]:
        queries = tile.queries(query, query_block) * scale

        def add_keys(key_block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            attended, highest, total = carry
            scores = _dot(queries, tile.keys(key_t, key_block, axis=2))
            scores = jnp.where(tile.visible(segments, query_block, key_block, group), scores, LOWEST)
            higher = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            fade = jnp.exp(highest - higher)
            values = _dot(weights.astype(value.dtype), tile.keys(value, key_block))
            return attended * fade[..., None] + values, higher, total * fade + weights.sum(-1)

        nothing = jnp.zeros(queries.shape, jnp.float32)
        start = nothing, jnp.full(queries.shape[:-1], LOWEST), nothing[..., 0]
        # The last block holds the query itself, which takes away whatever a block of hidden keys left before.
        attended, highest, total = jax.lax.fori_loop(*tile.key_blocks(segments, query_block), add_keys, start)
        return (attended / total[..., None]).astype(query.dtype), highest + jnp.log(total)

    attended, log_sum = jax.lax.map(attend_block, jnp.arange(length // tile.query))
    attended = attended.reshape(-1, rows, group, tile.query, query.shape[-1])
    log_sum = log_sum.reshape(-1, rows, group, tile.query)
    return jnp.moveaxis(attended, 0, 2).reshape(query.shape), jnp.moveaxis(log_sum, 0, 2).reshape(query.shape[:-1])


def _backward(
    tile: _Tile,
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    attended: Array,
    log_sum: Array,
    d_attended: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value.

    Scores are [rows, key, query] here: so the larger operand is the left one in two of the three products that read
    them, as a CPU's matrix product packs the right one anew.
    """
    scale = query.shape[-1] ** -0.5
    rows, group, length, head_dim = query.shape
    delta = jnp.einsum("rgqd,rgqd->rgq", attended, d_attended, preferred_element_type=jnp.float32)
    key_t = key.swapaxes(1, 2)

    def add_queries(query_block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_query, d_key, d_value = carry
        queries, d_queries = tile.queries(query, query_block) * scale, tile.queries(d_attended, query_block)
        queries_t, d_queries_t = queries.swapaxes(1, 2), d_queries.swapaxes(1, 2)
        log_sums, deltas = tile.queries(log_sum, query_block)[:, None], tile.queries(delta, query_block)[:, None]

        def add_keys(key_block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_queries_in, d_key, d_value = carry
            scores = _dot(tile.keys(key, key_block), queries_t)
            seen = tile.visible(segments, query_block, key_block, group).swapaxes(1, 2)
            weights = jnp.where(seen, jnp.exp(scores - log_sums), 0)
            d_weights = _dot(tile.keys(value, key_block), d_queries_t)
            d_scores = (weights * (d_weights - deltas)).astype(query.dtype)
            d_queries_in += _dot(tile.keys(key_t, key_block, axis=2), d_scores)
            at_key = (0, key_block * tile.key, 0)
            d_key = _add_at(d_key, _dot(d_scores, queries), at_key)
            d_value = _add_at(d_value, _dot(weights.astype(query.dtype), d_queries), at_key)
            return d_queries_in, d_key, d_value

        start = jnp.zeros(queries_t.shape, jnp.float32), d_key, d_value
        d_queries_in, d_key, d_value = jax.lax.fori_loop(*tile.key_blocks(segments, query_block), add_keys, start)
        d_queries_in = (d_queries_in.swapaxes(1, 2) * scale).astype(query.dtype).reshape(rows, group, -1, head_dim)
        d_query = jax.lax.dynamic_update_slice(d_query, d_queries_in, (0, 0, query_block * tile.query, 0))
        return d_query, d_key, d_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    start = jnp.zeros_like(query), zeros, zeros
    d_query, d_key, d_value = jax.lax.fori_loop(0, length // tile.query, add_queries, start)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _add_at(x: Array, part: Array, at: tuple[Any, ...]) -> Array:
    return jax.lax.dynamic_update_slice(x, jax.lax.dynamic_slice(x, at, part.shape) + part, at)
