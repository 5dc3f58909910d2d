"""A grid of problems and rows, a row being a sample, on the devices: what is in it, and how rows move between grids.

Caches are stacked, with a leading axis of layers, or apart, a tuple with one tree a layer, as the parameters are (see
model.layers_apart); axes are therefore counted from the end. Inside a mesh kv_heads are split over tensor, and rows,
or else problems, over data and fsdp.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from mathscale_jax.mesh import LOGICAL_AXES, constrain

# Of each cache, and of the prompts' keys and values.
PROBLEMS, ROWS, SLOTS = -5, -4, -2
PROMPT_PROBLEMS, PROMPT = -4, -3
# By layer, or stacked: {"key": ..., "value": ...}; of int8 ones with the scales of each [..., slots, 1] besides.
Caches: TypeAlias = PyTree[Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Computed prompts, padded at their ends to a length that few compilations serve.

    `room` is the most tokens that a response may have, `draws` the data of the key of a problem's random draws.
    """

    caches: Caches  # key and value, each [..., problems, prompt, kv_heads, head_dim]
    length: Int[Array, " problems"]
    room: Int[Array, " problems"]
    draws: UInt32[Array, "problems 2"]

    @property
    def num_tokens(self) -> int:
        """Of the padded prompts."""
        return jax.tree.leaves(self.caches)[0].shape[PROMPT]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Everything that a chunk of steps changes, and what does not change of a row.

    `clock` counts the slots with tokens; the response of a row began at slot `start`. The last token is drawn and not
    yet computed: caches hold one slot less. Rows that only fill the grid are finished, with -1 for their sample.
    """

    clock: Int[Array, ""]
    start: Int[Array, "problems rows"]
    sample: Int[Array, "problems rows"]
    tokens: Int[Array, "problems rows slots"]
    logprobs: Float[Array, "problems rows slots"]
    finished: Bool[Array, "problems rows"]
    caches: Caches  # each [..., problems, rows, kv_heads, slots, head_dim or 1]

    @property
    def num_slots(self) -> int:
        """Room, in tokens."""
        return self.tokens.shape[-1]


@partial(jax.jit, static_argnames="num_slots")
def with_slots(rows: Rows, num_slots: int) -> Rows:
    """The same rows with more slots, or fewer of those without tokens."""
    return _map_slots(rows, lambda x, axis: _sized(x, axis, num_slots))


@jax.jit
def take(
    prompts: Prompts,
    rows: Rows,
    problem: Int[Array, " chosen"],
    row: Int[Array, "chosen per_problem"],
    unused: Int[Array, ""],
) -> tuple[Prompts, Rows]:
    """Those problems, and of each those rows; -1 for a row that only fills the grid.

    The first `unused` slots, in which none of them has a token, are left out, and are free at the end.
    """
    at = problem[:, None], jnp.maximum(row, 0)

    def of_cache(cache: Array) -> Array:
        chosen = cache[at] if cache.ndim == -PROBLEMS else cache[:, *at]
        return jnp.roll(chosen, -unused, SLOTS)

    def of_prompt(cache: Array) -> Array:
        return jnp.take(cache, problem, axis=PROMPT_PROBLEMS)

    chosen = dataclasses.replace(
        rows,
        clock=rows.clock - unused,
        start=jnp.maximum(rows.start[at] - unused, 0),
        sample=jnp.where(row < 0, -1, rows.sample[at]),
        tokens=jnp.roll(rows.tokens[at], -unused, -1),
        logprobs=jnp.roll(rows.logprobs[at], -unused, -1),
        finished=rows.finished[at] | (row < 0),
        caches=jax.tree.map(lambda x: on_mesh(axes_of_caches(row.shape), of_cache(x)), rows.caches),
    )
    of_problems = Prompts(
        jax.tree.map(lambda x: on_mesh(axes_of_prompts(row.shape), of_prompt(x)), prompts.caches),
        prompts.length[problem], prompts.room[problem], prompts.draws[problem],
    )  # fmt: skip
    return of_problems, readable(chosen)


@partial(jax.jit, static_argnames=("grid", "num_prompt", "num_slots"))
def empty(
    prompts: Prompts, rows: Rows, clock: Int[Array, ""], *, grid: tuple[int, int], num_prompt: int, num_slots: int
) -> tuple[Prompts, Rows]:
    """A grid of rows that are finished, of the kind of `prompts` and `rows`, for `put`."""

    def sized(x: Array, axes: dict[int, Any], *sizes: tuple[int, int]) -> Array:
        shape = list(x.shape)
        for axis, size in sizes:
            shape[axis] = size
        return on_mesh(axes, jnp.zeros(shape, x.dtype))

    def of_prompt(x: Array) -> Array:
        return sized(x, axes_of_prompts(grid), (PROMPT_PROBLEMS, grid[0]), (PROMPT, num_prompt))

    def of_cache(x: Array) -> Array:
        return sized(x, axes_of_caches(grid), (PROBLEMS, grid[0]), (ROWS, grid[1]), (SLOTS, num_slots))

    return (
        Prompts(
            jax.tree.map(of_prompt, prompts.caches),
            jnp.ones(grid[0], jnp.int32),
            jnp.ones(grid[0], jnp.int32),
            jnp.zeros((grid[0], 2), jnp.uint32),
        ),
        Rows(
            clock=clock,
            start=jnp.broadcast_to(clock, grid),
            sample=jnp.full(grid, -1, jnp.int32),
            tokens=jnp.zeros((*grid, num_slots), jnp.int32),
            logprobs=jnp.zeros((*grid, num_slots), jnp.float32),
            finished=jnp.ones(grid, bool),
            caches=jax.tree.map(of_cache, rows.caches),
        ),
    )


@partial(jax.jit, donate_argnames="into")
def put(into: tuple[Prompts, Rows], prompts: Prompts, rows: Rows, line: Int[Array, ""]) -> tuple[Prompts, Rows]:
    """Puts a grid into a larger one, from its problem `line` on, so that what both wrote last is in one slot."""
    all_prompts, all_rows = into
    later = all_rows.clock - rows.clock

    def put_lines(x: Array, part: Array, axis: int = 0) -> Array:
        first: list[Any] = [0] * x.ndim
        first[axis] = line
        return jax.lax.dynamic_update_slice(x, part, first)

    def put_slots(x: Array, part: Array, axis: int, lines: int) -> Array:
        return put_lines(x, jnp.roll(_sized(part, axis, x.shape[axis]), later, axis), lines)

    return (
        Prompts(
            jax.tree.map(lambda x, part: put_lines(x, part, PROMPT_PROBLEMS), all_prompts.caches, prompts.caches),
            *(put_lines(getattr(all_prompts, name), getattr(prompts, name)) for name in ("length", "room", "draws")),
        ),
        Rows(
            clock=all_rows.clock,
            start=put_lines(all_rows.start, rows.start + later),
            sample=put_lines(all_rows.sample, rows.sample),
            tokens=put_slots(all_rows.tokens, rows.tokens, -1, 0),
            logprobs=put_slots(all_rows.logprobs, rows.logprobs, -1, 0),
            finished=put_lines(all_rows.finished, rows.finished),
            caches=jax.tree.map(lambda x, part: put_slots(x, part, SLOTS, PROBLEMS), all_rows.caches, rows.caches),
        ),
    )


def _map_slots(rows: Rows, change: Callable[[Array, int], Array]) -> Rows:
    """`change(array, axis)` of all that has an axis of slots."""
    return dataclasses.replace(
        rows,
        tokens=change(rows.tokens, -1),
        logprobs=change(rows.logprobs, -1),
        caches=jax.tree.map(lambda x: change(x, SLOTS), rows.caches),
    )


def _sized(x: Array, axis: int, size: int) -> Array:
    """`x` with zeros behind it up to `size` along an axis, or without what is beyond."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis], 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pads)


def axes_of_caches(grid: tuple[int, ...]) -> dict[int, Any]:
    """Of rows' caches, for `on_mesh`."""
    problems, rows = _split_over(grid)
    return {PROBLEMS: problems, ROWS: rows, -3: "tensor"}


def axes_of_prompts(grid: tuple[int, ...]) -> dict[int, Any]:
    """Of prompts' keys and values, for `on_mesh`."""
    return {PROMPT_PROBLEMS: _split_over(grid)[0], -2: "tensor"}


def _split_over(grid: tuple[int, ...]) -> tuple[Any, Any]:
    """The mesh axes of the grid's problems and rows: the rows are split where they can be, else the problems."""
    mesh, axes = jax.sharding.get_abstract_mesh(), LOGICAL_AXES["batch"]
    if mesh.empty:
        return None, None
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if grid[1] % parts == 0:
        return None, axes
    return (axes, None) if grid[0] % parts == 0 else (None, None)


def on_mesh(axes: dict[int, Any], x: Array) -> Array:
    """Pins axes of an array to axes of the mesh, where they can be split evenly; the others are whole."""
    return x if jax.sharding.get_abstract_mesh().empty else constrain(x, *_spec(axes, x))


def on_each_device(function: Callable[[Array], Array], axes: dict[int, Any], x: Array) -> Array:
    """`function` of each device's own part of an array that lies as `on_mesh` puts it."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(x)
    spec = jax.sharding.PartitionSpec(*_spec(axes, x))
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _spec(axes: dict[int, Any], x: Array) -> list[Any]:
    mesh, spec = jax.sharding.get_abstract_mesh(), [None] * x.ndim
    for axis, over in axes.items():
        parts = math.prod(mesh.shape[name] for name in ((over,) if isinstance(over, str) else over or ()))
        if x.shape[axis] % parts == 0:
            spec[axis] = over
    return spec


def readable(rows: Rows) -> Rows:
    """What the host looks at, whole on every device: each process of several reads it."""
    looked_at = ("clock", "start", "tokens", "logprobs", "finished")
    return dataclasses.replace(rows, **{name: constrain(getattr(rows, name)) for name in looked_at})
