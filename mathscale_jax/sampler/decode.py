"""Prefill and the decode loop on the device.

What is decoded together is a grid of problems and rows, a row being a sample. A problem's prompt is computed once:
its keys and values [layers, problems, prompt, kv_heads, head_dim] are shared by its rows. Each row has a cache of its
own for the response [layers, problems, rows, kv_heads, slots, head_dim]. In every step all rows write into the same
slot, the state's clock; where rows of several waves are put together, those with fewer tokens begin at a later slot.
Attention is one softmax over the scores of prompt, response so far, and the token itself.
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
class Prompts:
    """Computed prompts, padded at their ends to a length that few compilations serve.

    `room` is the most tokens that a response may have, `draws` the key of a problem's random draws.
    """

    key: Float[Array, "layers problems prompt kv_heads head_dim"]
    value: Float[Array, "layers problems prompt kv_heads head_dim"]
    length: Int[Array, " problems"]
    room: Int[Array, " problems"]
    draws: Array  # keys [problems]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Everything that a chunk of steps changes, and what does not change of a row.

    `clock` counts the slots that are written; the response of a row began at slot `start`. Rows that only fill the
    grid are finished, with -1 for their sample.
    """

    clock: Int[Array, ""]
    start: Int[Array, "problems rows"]
    sample: Int[Array, "problems rows"]
    tokens: Int[Array, "problems rows slots"]
    logits: Float[Array, "problems rows vocab"]
    logprob: Float[Array, "problems rows"]
    finished: Bool[Array, "problems rows"]
    key: Float[Array, "layers problems rows kv_heads slots head_dim"]
    value: Float[Array, "layers problems rows kv_heads slots head_dim"]

    @property
    def num_slots(self) -> int:
        """Room of the caches, in tokens."""
        return self.tokens.shape[-1]


@partial(jax.jit, static_argnames=("config", "compute"))
def prefill(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    tokens: Int[Array, "problems prompt"],
    length: Int[Array, " problems"],
    room: Int[Array, " problems"],
    draws: Array,
) -> tuple[Prompts, Float[Array, "problems vocab"]]:
    """Computes prompts, of which the first `length` tokens count; the logits after their last ones."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < length[:, None]).astype(jnp.int32)

    def attend_and_keep(query: Array, key: Array, value: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        window = config.sliding_window
        attended = attend(query, key, value, segment_ids, sliding_window=window, backend=compute.attention)
        return attended, (key, value)

    hidden, (key, value) = model.bind(config, params)(tokens, positions, attend_and_keep, compute=compute)
    last = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0]
    logits = jnp.einsum("pe,ev->pv", last, params["output"], preferred_element_type=jnp.float32)
    return Prompts(key, value, length, room, draws), logits


@partial(jax.jit, static_argnames=("config", "num_slots"))
def start(
    config: ModelConfig,
    prompts: Prompts,
    last_logits: Float[Array, "problems vocab"],
    sample: Int[Array, "problems rows"],
    num_slots: int,
) -> Rows:
    """Rows before their first token: each has its prompt's logits, and room for `num_slots` tokens."""
    shape = sample.shape
    cache = (config.num_layers, *shape, config.num_kv_heads, num_slots, config.head_dim)
    return Rows(
        clock=jnp.zeros((), jnp.int32),
        start=jnp.zeros(shape, jnp.int32),
        sample=sample,
        tokens=jnp.zeros((*shape, num_slots), jnp.int32),
        logits=jnp.broadcast_to(last_logits[:, None], (*shape, last_logits.shape[-1])),
        logprob=jnp.zeros(shape, jnp.float32),
        finished=sample < 0,
        key=jnp.zeros(cache, prompts.key.dtype),
        value=jnp.zeros(cache, prompts.value.dtype),
    )


@partial(jax.jit, static_argnames="num_slots")
def with_slots(rows: Rows, num_slots: int) -> Rows:
    """The same rows with caches of `num_slots`."""
    more = num_slots - rows.num_slots
    return _map_caches(rows, lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]))


@jax.jit
def take(
    prompts: Prompts, rows: Rows, problem: Int[Array, " chosen"], row: Int[Array, "chosen per_problem"]
) -> tuple[Prompts, Rows]:
    """Those problems, and of each those rows; -1 for a row that only fills the grid."""
    at = problem[:, None], jnp.maximum(row, 0)

    def of_rows(x: Array) -> Array:
        return x[at]

    chosen = Rows(
        clock=rows.clock,
        start=of_rows(rows.start),
        sample=jnp.where(row < 0, -1, of_rows(rows.sample)),
        tokens=of_rows(rows.tokens),
        logits=of_rows(rows.logits),
        logprob=of_rows(rows.logprob),
        finished=of_rows(rows.finished) | (row < 0),
        key=rows.key[:, *at],
        value=rows.value[:, *at],
    )
    of_problem = Prompts(
        prompts.key[:, problem], prompts.value[:, problem], prompts.length[problem], prompts.room[problem],
        prompts.draws[problem],
    )  # fmt: skip
    return of_problem, chosen


@partial(jax.jit, static_argnames="num_slots")
def join(parts: tuple[tuple[Prompts, Rows], ...], num_slots: int) -> tuple[Prompts, Rows]:
    """All problems of several parts in one grid, with caches of `num_slots`; what they wrote last is in one slot."""
    longest_prompt = max(prompts.key.shape[2] for prompts, _ in parts)
    most_rows = max(rows.start.shape[1] for _, rows in parts)
    clock = jnp.max(jnp.stack([rows.clock for _, rows in parts]))
    moved = []
    for prompts, rows in parts:
        later = clock - rows.clock
        more_rows, more_prompt = most_rows - rows.start.shape[1], longest_prompt - prompts.key.shape[2]

        def into_slots(x: Array, axis: int, later: Array = later) -> Array:
            shape = (*x.shape[:axis], num_slots, *x.shape[axis + 1 :])
            return jax.lax.dynamic_update_slice_in_dim(jnp.zeros(shape, x.dtype), x, later, axis)

        def filled(x: Array, axis: int, more: int, value: Any = 0) -> Array:
            pads = [(0, more if i == axis else 0) for i in range(x.ndim)]
            return jnp.pad(x, pads, constant_values=value)

        rows = _map_caches(rows, into_slots)
        rows = Rows(
            clock=clock,
            start=filled(rows.start + later, 1, more_rows),
            sample=filled(rows.sample, 1, more_rows, -1),
            tokens=filled(rows.tokens, 1, more_rows),
            logits=filled(rows.logits, 1, more_rows),
            logprob=filled(rows.logprob, 1, more_rows),
            finished=filled(rows.finished, 1, more_rows, True),
            key=filled(rows.key, 2, more_rows),
            value=filled(rows.value, 2, more_rows),
        )
        prompts = dataclasses.replace(
            prompts, key=filled(prompts.key, 2, more_prompt), value=filled(prompts.value, 2, more_prompt)
        )
        moved.append((prompts, rows))
    together = Rows(
        clock=clock,
        **{
            field.name: jnp.concatenate(
                [getattr(rows, field.name) for _, rows in moved], axis=1 if field.name in ("key", "value") else 0
            )
            for field in dataclasses.fields(Rows)
            if field.name != "clock"
        },
    )
    of_all = Prompts(
        key=jnp.concatenate([prompts.key for prompts, _ in moved], axis=1),
        value=jnp.concatenate([prompts.value for prompts, _ in moved], axis=1),
        **{
            name: jnp.concatenate([getattr(prompts, name) for prompts, _ in moved])
            for name in ("length", "room", "draws")
        },
    )
    return of_all, together


def _map_caches(rows: Rows, change: Any) -> Rows:
    """`change(array, axis)` of all that has an axis of slots."""
    return dataclasses.replace(
        rows, tokens=change(rows.tokens, 2), key=change(rows.key, 4), value=change(rows.value, 4)
    )


@partial(
    jax.jit,
    static_argnames=("config", "compute", "num_steps", "temperature", "top_p", "eos_id", "num_pieces"),
    donate_argnames="rows",
)
def decode_chunk(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    prompts: Prompts,
    rows: Rows,
    *,
    num_steps: int,
    temperature: float,
    top_p: float,
    eos_id: int,
    num_pieces: int,
) -> Rows:
    """`num_steps` more tokens in every row, and fewer where all have ended; the caches must have room for them.

    A row ends with EOS, or with as many tokens as its problem has room for. Only the first `num_pieces` tokens of the
    vocabulary are drawn: what pads it stands for no text.
    """
    last = rows.clock + num_steps

    def running(rows: Rows) -> Array:
        return (rows.clock < last) & ~jnp.all(rows.finished)

    def step(rows: Rows) -> Rows:
        position = rows.clock - rows.start
        uniform = jax.vmap(Draws.uniform)(prompts.draws, rows.sample, position)
        logits = rows.logits[..., :num_pieces]
        drawn = next_tokens(logits.reshape(-1, num_pieces), uniform.reshape(-1), temperature, top_p)
        drawn = jnp.where(rows.finished, eos_id, drawn.reshape(uniform.shape))
        logits, key, value = _forward(config, compute, params, prompts, rows, drawn)

        def write(cache: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(cache, new, rows.clock, axis)

        return dataclasses.replace(
            rows,
            clock=rows.clock + 1,
            tokens=write(rows.tokens, drawn[..., None], 2),
            logits=logits,
            finished=rows.finished | (drawn == eos_id) | (position + 1 >= prompts.room[:, None]),
            # Written for all layers at once, outside the scan over layers: inside, every step would copy the cache.
            key=write(rows.key, key, 4),
            value=write(rows.value, value, 4),
        )

    rows = jax.lax.while_loop(running, step, rows)
    # Whole on every device: each process of several reads them.
    return dataclasses.replace(rows, tokens=constrain(rows.tokens), finished=constrain(rows.finished))


def _forward(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    prompts: Prompts,
    rows: Rows,
    tokens: Int[Array, "problems rows"],
) -> tuple[Array, Array, Array]:
    """Next logits, and the new keys and values [layers, problems, rows, kv_heads, 1, head_dim]."""
    num_problems, num_rows = tokens.shape
    count = num_problems * num_rows
    absolute = prompts.length[:, None] + rows.clock - rows.start
    in_prompt = jnp.arange(prompts.key.shape[2])
    slots = jnp.arange(rows.num_slots)
    sees_prompt = jnp.broadcast_to(
        in_prompt < prompts.length[:, None, None], (num_problems, num_rows, in_prompt.shape[0])
    )
    sees_slots = (slots >= rows.start[..., None]) & (slots < rows.clock)
    if config.sliding_window is not None:
        sees_prompt &= absolute[..., None] - in_prompt < config.sliding_window
        sees_slots &= rows.clock - slots < config.sliding_window
    sees_prompt, sees_slots = sees_prompt[:, :, None, None], sees_slots[:, :, None, None]

    def attend_caches(query: Array, key: Array, value: Array, caches: Any) -> tuple[Array, tuple[Array, Array]]:
        prompt_key, prompt_value, own_key, own_value = caches
        _, _, num_heads, head_dim = query.shape
        grid = (num_problems, num_rows, config.num_kv_heads)
        grouped = query.reshape(*grid, num_heads // config.num_kv_heads, head_dim)
        key, value = key.reshape(*grid, head_dim), value.reshape(*grid, head_dim)
        dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
        # One product for all rows of a problem against its prompt; one per row against its own response.
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.concatenate(
            [
                jnp.where(sees_prompt, dot("nrkgd,npkd->nrkgp", grouped, prompt_key), lowest),
                jnp.where(sees_slots, dot("nrkgd,nrksd->nrkgs", grouped, own_key), lowest),
                dot("nrkgd,nrkd->nrkg", grouped, key)[..., None],
            ],
            axis=-1,
        )
        weights = jax.nn.softmax(scores * head_dim**-0.5, axis=-1).astype(value.dtype)
        end_of_prompt, end_of_own = prompt_key.shape[1], prompt_key.shape[1] + own_key.shape[3]
        on_prompt, on_own, on_itself = jnp.split(weights, [end_of_prompt, end_of_own], axis=-1)
        attended = (
            jnp.einsum("nrkgp,npkd->nrkgd", on_prompt, prompt_value)
            + jnp.einsum("nrkgs,nrksd->nrkgd", on_own, own_value)
            + on_itself * value[..., None, :]
        )
        return attended.reshape(query.shape), (key, value)

    caches = (prompts.key, prompts.value, rows.key, rows.value)
    hidden, (key, value) = model.bind(config, params)(
        tokens.reshape(count, 1), absolute.reshape(count, 1), attend_caches, caches, compute=compute
    )
    logits = jnp.einsum("re,ev->rv", hidden[:, 0], params["output"], preferred_element_type=jnp.float32)
    return logits.reshape(num_problems, num_rows, -1), key[..., None, :], value[..., None, :]
