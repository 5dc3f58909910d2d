"""Prefill and the decode loop on the device.

What is decoded together is a grid of problems and rows, a row being a sample. A problem's prompt is computed once:
its keys and values [problems, prompt, kv_heads, head_dim] are shared by its rows. Each row has caches of its own for
the response [problems, rows, kv_heads, slots, head_dim]. In every step all rows write into the same slot, the clock's;
where rows of several waves are put together, those with fewer tokens begin at a later slot. Attention is one softmax
over the scores of prompt, response so far, and the token itself.

grid.py says what a grid is made of.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, UInt32

from mathscale_jax import model
from mathscale_jax.attention import attend
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.mesh import LOGICAL_AXES, constrain
from mathscale_jax.sampler.draw import Draws, log_probabilities, next_tokens
from mathscale_jax.sampler.grid import (
    PROMPT_PROBLEMS,
    SLOTS,
    Caches,
    Prompts,
    Rows,
    axes_of_caches,
    axes_of_prompts,
    on_each_device,
    on_mesh,
    readable,
)

CacheDtype = Literal["float32", "bfloat16", "int8"]
_PREFILLED_AT_A_TIME = 8192  # tokens
dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are drawn, and when a response ends."""

    temperature: float
    top_k: int | None
    top_p: float
    eos_id: int
    num_pieces: int  # tokens from here on pad the vocabulary and stand for no text: they are never drawn
    logprobs: bool = False


@partial(jax.jit, static_argnames=("config", "compute", "rule", "cache_dtype", "num_slots"))
def begin(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    tokens: Int[Array, "problems prompt"],
    length: Int[Array, " problems"],
    room: Int[Array, " problems"],
    draws: UInt32[Array, "problems 2"],
    sample: Int[Array, "problems rows"],
    *,
    rule: Rule,
    cache_dtype: CacheDtype,
    num_slots: int,
) -> tuple[Prompts, Rows, Bool[Array, " problems"]]:
    """Computes prompts, of which the first `length` tokens count, and draws each row's first token.

    Says of each problem whether its logits are numbers, too.
    """
    num_problems, num_rows = sample.shape

    def prefill(tokens: Array, length: Array) -> tuple[Array, Any]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = (positions < length[:, None]).astype(jnp.int32)

        def attend_and_keep(query: Array, key: Array, value: Array, _: None) -> tuple[Array, dict[str, Array]]:
            window = config.sliding_window
            attended = attend(query, key, value, segment_ids, sliding_window=window, backend=compute.attention)
            return attended, {"key": key, "value": value}

        hidden, caches = model.forward(config, params, tokens, positions, attend_and_keep, compute=compute)
        return jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0], caches

    at_a_time = max(1, _PREFILLED_AT_A_TIME // tokens.shape[1])
    if num_problems <= at_a_time:
        last, computed = prefill(tokens, length)
    else:
        parts = [
            prefill(tokens[i : i + at_a_time], length[i : i + at_a_time]) for i in range(0, num_problems, at_a_time)
        ]
        last = jnp.concatenate([hidden for hidden, _ in parts])
        computed = jax.tree.map(lambda *xs: jnp.concatenate(xs, PROMPT_PROBLEMS), *[caches for _, caches in parts])
    computed = jax.tree.map(partial(on_mesh, axes_of_prompts(sample.shape)), computed)
    logits = _logits(last, params)
    prompts = Prompts(computed, length, room, draws)

    of_rows = jnp.broadcast_to(logits[:, None], (num_problems, num_rows, logits.shape[-1]))
    first, logprob = _draw(rule, prompts, of_rows, sample, jnp.zeros_like(sample))

    def empty(layer: dict[str, Array]) -> dict[str, Array]:
        made = {}
        for name, like in layer.items():
            shape = *like.shape[:PROMPT_PROBLEMS], *sample.shape, like.shape[-2], num_slots
            made[name] = jnp.zeros((*shape, like.shape[-1]), cache_dtype)
            if cache_dtype == "int8":
                made[f"{name}_scale"] = jnp.zeros((*shape, 1), jnp.float32)
        return made

    caches = _map_layers(empty, computed)
    caches = jax.tree.map(partial(on_mesh, axes_of_caches(sample.shape)), caches)
    at_first = jnp.arange(num_slots) == 0
    rows = Rows(
        clock=jnp.ones((), jnp.int32),
        start=jnp.zeros_like(sample),
        sample=sample,
        tokens=jnp.where(at_first, first[..., None], 0),
        logprobs=jnp.where(at_first, logprob[..., None], 0.0),
        finished=(sample < 0) | (first == rule.eos_id) | (room[:, None] <= 1),
        caches=caches,
    )
    return prompts, readable(rows), constrain(jnp.isfinite(logits).all(-1))


@partial(
    jax.jit,
    static_argnames=("config", "compute", "rule", "num_steps"),
    donate_argnames="rows",
    # Else the CPU's compiler fuses the logits' product with what is drawn from them, into memory that it asks the
    # system for anew in every step: twice the time of both.
    compiler_options={"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
)
def decode_chunk(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    prompts: Prompts,
    rows: Rows,
    fewest: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]],
    *,
    rule: Rule,
    num_steps: int,
) -> Rows:
    """`num_steps` more tokens in every row, or as many as there are slots for.

    A row ends with EOS, or with as many tokens as its problem has room for. The steps end early where no more than
    `fewest` go on: problems, rows of any one problem, rows in all.
    """
    last = jnp.minimum(rows.clock + num_steps, rows.num_slots)

    def running(rows: Rows) -> Array:
        of_problems = jnp.sum(~rows.finished, axis=1)
        left = jnp.sum(of_problems > 0), jnp.max(of_problems), jnp.sum(of_problems)
        return (rows.clock < last) & (left[0] > fewest[0]) & (left[1] > fewest[1]) & (left[2] > fewest[2])

    def step(rows: Rows) -> Rows:
        logits, caches = next_logits(config, compute, params, prompts, rows)
        position = rows.clock - rows.start
        drawn, logprob = _draw(rule, prompts, logits, rows.sample, position)
        drawn = jnp.where(rows.finished, rule.eos_id, drawn)

        def write(array: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(array, new[..., None], rows.clock, 2)

        return dataclasses.replace(
            rows,
            clock=rows.clock + 1,
            tokens=write(rows.tokens, drawn),
            logprobs=write(rows.logprobs, logprob) if rule.logprobs else rows.logprobs,
            finished=rows.finished | (drawn == rule.eos_id) | (position + 1 >= prompts.room[:, None]),
            caches=caches,
        )

    return readable(jax.lax.while_loop(running, step, rows))


def _as_it_lies(cache: Array) -> Array:
    """Keeps XLA's GPU compiler from turning caches into a layout of its own when the loop begins: a copy of all."""
    return with_layout_constraint(cache, Layout(tuple(range(cache.ndim))))


def _draw(
    rule: Rule,
    prompts: Prompts,
    logits: Float[Array, "problems rows vocab"],
    sample: Int[Array, "problems rows"],
    position: Int[Array, "problems rows"],
) -> tuple[Int[Array, "problems rows"], Float[Array, "problems rows"]]:
    """The tokens at `position` of the responses, and their log-probabilities where the rule wants them."""
    # Each device draws for some of the rows, with all of the vocabulary: less to send than a sum over parts of it.
    flat = logits[..., : rule.num_pieces].reshape(-1, rule.num_pieces)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        flat = constrain(flat, tuple(mesh.axis_names) if flat.shape[0] % mesh.size == 0 else None)
    uniform = jax.vmap(Draws.uniform)(Draws.keys(prompts.draws), sample, position).reshape(-1)
    drawn = next_tokens(flat, uniform, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
    logprob = log_probabilities(flat, drawn) if rule.logprobs else jnp.zeros(drawn.shape)
    return drawn.reshape(sample.shape), logprob.reshape(sample.shape)


def next_logits(
    config: ModelConfig, compute: ComputeSettings, params: model.Params, prompts: Prompts, rows: Rows
) -> tuple[Float[Array, "problems rows vocab"], Caches]:
    """The logits after each row's latest token, which lies in slot clock - 1, and the caches with that token."""
    tokens = jax.lax.dynamic_index_in_dim(rows.tokens, rows.clock - 1, 2, keepdims=False)
    num_problems, num_rows = tokens.shape
    grid = num_problems, num_rows, config.num_kv_heads
    slot = rows.clock - 1
    absolute = prompts.length[:, None] + slot - rows.start
    in_prompt, slots = jnp.arange(prompts.num_tokens), jnp.arange(rows.num_slots)
    sees_prompt = in_prompt < prompts.length[:, None, None]
    sees_slots = (slots >= rows.start[..., None]) & (slots < slot)
    if config.sliding_window is not None:
        sees_prompt = sees_prompt & (absolute[..., None] - in_prompt < config.sliding_window)
        sees_slots = sees_slots & (slot - slots < config.sliding_window)
    sees_prompt, sees_slots = sees_prompt[:, :, None, None], sees_slots[:, :, None, None]

    def attend_caches(query: Array, key: Array, value: Array, caches: Any) -> tuple[Array, Caches]:
        prompt, own = caches
        _, _, num_heads, head_dim = query.shape
        grouped = query.reshape(*grid, num_heads // config.num_kv_heads, head_dim)
        new = {"key": key.reshape(*grid, 1, head_dim), "value": value.reshape(*grid, 1, head_dim)}
        # One product for all rows of a problem against its prompt; one per row against its own response.
        to_prompt = dot("nrkgd,npkd->nrkgp", grouped, prompt["key"])
        to_own = dot("nrkgd,nrksd->nrkgs", grouped, own["key"].astype(query.dtype))
        to_itself = dot("nrkgd,nrksd->nrkgs", grouped, new["key"])
        if "key_scale" in own:
            to_own = to_own * own["key_scale"][..., 0][:, :, :, None]
        lowest = jnp.finfo(jnp.float32).min
        scores = [jnp.where(sees_prompt, to_prompt, lowest), jnp.where(sees_slots, to_own, lowest), to_itself]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) * head_dim**-0.5, axis=-1)
        ends = prompts.num_tokens, prompts.num_tokens + rows.num_slots
        on_prompt, on_own, on_itself = jnp.split(weights, ends, axis=-1)
        if "value_scale" in own:
            on_own = on_own * own["value_scale"][..., 0][:, :, :, None]
        attended = (
            dot("nrkgp,npkd->nrkgd", on_prompt.astype(query.dtype), prompt["value"])
            + dot("nrkgs,nrksd->nrkgd", on_own.astype(query.dtype), own["value"].astype(query.dtype))
            + on_itself * new["value"]
        )
        return attended.astype(query.dtype).reshape(query.shape), _in_int8(new) if "key_scale" in own else new

    shape = num_problems * num_rows, 1
    together = list(zip(prompts.caches, rows.caches, strict=True)) if isinstance(rows.caches, tuple) else None
    hidden, new = model.forward(
        config, params, tokens.reshape(shape), absolute.reshape(shape), attend_caches,
        together or (prompts.caches, rows.caches), compute=compute,
    )  # fmt: skip

    def write(cache: Array, new: Array) -> Array:
        written = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, cache.ndim + SLOTS)
        return written if together is None else on_each_device(_as_it_lies, axes_of_caches(tokens.shape), written)

    logits = _logits(hidden[:, 0], params)
    # Written behind the scan over layers: inside, every step would copy what is stacked.
    return logits.reshape(num_problems, num_rows, -1), jax.tree.map(write, rows.caches, new)


def _logits(hidden: Float[Array, "rows embed"], params: model.Params) -> Float[Array, "rows vocab"]:
    logits = dot("re,ev->rv", hidden, params["output"])
    # Where they are made: drawing wants whole rows, and the compiler would gather the matrix for that.
    return on_mesh({0: LOGICAL_AXES["batch"], 1: "tensor"}, logits)


def _in_int8(layer: dict[str, Array]) -> dict[str, Array]:
    """Keys and values as caches in int8 hold them, with a scale for each vector."""
    stored = {}
    for name, array in layer.items():
        largest = jnp.max(jnp.abs(array), axis=-1, keepdims=True).astype(jnp.float32)
        scale = jnp.where(largest > 0, largest, 1.0) / 127
        stored[name] = jnp.round(array.astype(jnp.float32) / scale).astype(jnp.int8)
        stored[f"{name}_scale"] = scale
    return stored


def _map_layers(function: Callable[[dict[str, Array]], dict[str, Array]], caches: Caches) -> Caches:
    return tuple(map(function, caches)) if isinstance(caches, tuple) else function(caches)
