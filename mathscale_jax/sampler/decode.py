"""Prefill and the decode loop on the device.

One problem at a time: its prompt's keys and values [layers, prompt, kv_heads, head_dim] are shared by its rows,
each row has a cache of its own for the response [layers, rows, kv_heads, response, head_dim], whose length grows
in few sizes with what is written. A step reads both caches and adds to the second; attention is one softmax over
the scores of prompt, response so far, and itself.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathscale_jax import model
from mathscale_jax.attention import attend
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.mesh import constrain
from mathscale_jax.sampler.draw import Draws, next_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """A computed prompt, padded at its end to a length that few compilations serve."""

    key: Float[Array, "layers prompt kv_heads head_dim"]
    value: Float[Array, "layers prompt kv_heads head_dim"]
    length: Int[Array, ""]
    last_logits: Float[Array, " vocab"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a chunk of steps changes. `position` counts the response tokens written so far."""

    position: Int[Array, ""]
    tokens: Int[Array, "rows response"]
    logits: Float[Array, "rows vocab"]
    finished: Bool[Array, " rows"]
    key: Float[Array, "layers rows kv_heads response head_dim"]
    value: Float[Array, "layers rows kv_heads response head_dim"]


@partial(jax.jit, static_argnames=("config", "compute"))
def prefill(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    tokens: Int[Array, " prompt"],
    length: Int[Array, ""],
) -> Prefix:
    """Computes a prompt whose first `length` tokens count."""
    batch = tokens[None]
    positions = jnp.arange(tokens.shape[0])[None]
    segment_ids = (positions < length).astype(jnp.int32)

    def attend_and_keep(query: Array, key: Array, value: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        window = config.sliding_window
        attended = attend(query, key, value, segment_ids, sliding_window=window, backend=compute.attention)
        return attended, (key[0], value[0])

    hidden, (key, value) = model.bind(config, params)(batch, positions, attend_and_keep, compute=compute)
    last = hidden[0, length - 1]
    logits = jnp.einsum("e,ev->v", last, params["output"], preferred_element_type=jnp.float32)
    return Prefix(key, value, length, logits)


@partial(jax.jit, static_argnames=("config", "num_rows", "capacity"))
def start(config: ModelConfig, prefix: Prefix, num_rows: int, capacity: int) -> DecodeState:
    """The state before the first token: every row has the prompt's logits, and room for `capacity` tokens."""
    cache_shape = (config.num_layers, num_rows, config.num_kv_heads, capacity, config.head_dim)
    return DecodeState(
        position=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((num_rows, capacity), jnp.int32),
        logits=jnp.broadcast_to(prefix.last_logits, (num_rows, *prefix.last_logits.shape)),
        finished=jnp.zeros(num_rows, bool),
        key=jnp.zeros(cache_shape, prefix.key.dtype),
        value=jnp.zeros(cache_shape, prefix.value.dtype),
    )


@partial(jax.jit, static_argnames="capacity")
def grow(state: DecodeState, capacity: int) -> DecodeState:
    """The same state with room for `capacity` tokens."""
    more = capacity - state.tokens.shape[1]
    in_cache = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
    return dataclasses.replace(
        state,
        tokens=jnp.pad(state.tokens, ((0, 0), (0, more))),
        key=jnp.pad(state.key, in_cache),
        value=jnp.pad(state.value, in_cache),
    )


@partial(
    jax.jit,
    static_argnames=("config", "compute", "num_steps", "temperature", "top_p", "eos_id", "num_pieces"),
    donate_argnames="state",
)
def decode_chunk(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    prefix: Prefix,
    state: DecodeState,
    problem_key: jax.Array,
    sample_ids: Int[Array, " rows"],
    limit: Int[Array, ""],
    *,
    num_steps: int,
    temperature: float,
    top_p: float,
    eos_id: int,
    num_pieces: int,
) -> DecodeState:
    """At most `num_steps` more tokens in every row, and no more than `limit` in all; fewer where all wrote EOS.

    The state must have room for them. Only the first `num_pieces` tokens of the vocabulary are drawn: what pads it
    stands for no text.
    """
    last_position = jnp.minimum(state.position + num_steps, limit)

    def running(state: DecodeState) -> Array:
        return (state.position < last_position) & ~jnp.all(state.finished)

    def step(state: DecodeState) -> DecodeState:
        positions = jnp.full_like(sample_ids, state.position)
        uniform = Draws.uniform(problem_key, sample_ids, positions)
        drawn = next_tokens(state.logits[:, :num_pieces], uniform, temperature, top_p)
        drawn = jnp.where(state.finished, eos_id, drawn)
        logits, key, value = _forward(config, compute, params, prefix, state, drawn)
        at_cache = (0, 0, 0, state.position, 0)
        return DecodeState(
            position=state.position + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, drawn[:, None], (0, state.position)),
            logits=logits,
            finished=state.finished | (drawn == eos_id),
            # Written for all layers at once, outside the scan over layers: inside, every step would copy the cache.
            key=jax.lax.dynamic_update_slice(state.key, key, at_cache),
            value=jax.lax.dynamic_update_slice(state.value, value, at_cache),
        )

    state = jax.lax.while_loop(running, step, state)
    # Whole on every device: each process of several reads them.
    return dataclasses.replace(state, tokens=constrain(state.tokens), finished=constrain(state.finished))


def _forward(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    prefix: Prefix,
    state: DecodeState,
    tokens: Int[Array, " rows"],
) -> tuple[Array, Array, Array]:
    """Next logits [rows, vocab], and the new keys and values [layers, rows, kv_heads, 1, head_dim]."""
    absolute = prefix.length + state.position
    positions = jnp.full((tokens.shape[0], 1), absolute)
    prompt_positions = jnp.arange(prefix.key.shape[1])
    response_positions = jnp.arange(state.key.shape[3])
    sees_prompt = prompt_positions < prefix.length
    sees_response = response_positions < state.position
    if config.sliding_window is not None:
        sees_prompt &= absolute - prompt_positions < config.sliding_window
        sees_response &= state.position - response_positions < config.sliding_window

    def attend_caches(query: Array, key: Array, value: Array, caches: Any) -> tuple[Array, tuple[Array, Array]]:
        prompt_key, prompt_value, response_key, response_value = caches
        rows, _, num_heads, head_dim = query.shape
        grouped = query.reshape(rows, config.num_kv_heads, num_heads // config.num_kv_heads, head_dim)
        dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
        # One product for all rows against the shared prompt; one per row against its own response.
        to_prompt = dot("rkgd,pkd->rkgp", grouped, prompt_key)
        to_response = dot("rkgd,rksd->rkgs", grouped, response_key)
        to_itself = dot("rkgd,rkd->rkg", grouped, key[:, 0])[..., None]
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.concatenate(
            [
                jnp.where(sees_prompt, to_prompt, lowest),
                jnp.where(sees_response, to_response, lowest),
                to_itself,
            ],
            axis=-1,
        )
        weights = jax.nn.softmax(scores * head_dim**-0.5, axis=-1).astype(value.dtype)
        on_prompt, on_response, on_itself = jnp.split(
            weights, [prompt_key.shape[0], prompt_key.shape[0] + response_key.shape[2]], axis=-1
        )
        attended = (
            jnp.einsum("rkgp,pkd->rkgd", on_prompt, prompt_value)
            + jnp.einsum("rkgs,rksd->rkgd", on_response, response_value)
            + on_itself * value[:, 0, :, None]
        )
        return attended.reshape(query.shape), (key, value)

    caches = (prefix.key, prefix.value, state.key, state.value)
    hidden, (key, value) = model.bind(config, params)(
        tokens[:, None], positions, attend_caches, caches, compute=compute
    )
    logits = jnp.einsum("re,ev->rv", hidden[:, 0], params["output"], preferred_element_type=jnp.float32)
    return logits, key.swapaxes(2, 3), value.swapaxes(2, 3)
