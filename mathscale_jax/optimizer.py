"""AdamW behind gradient clipping, with linear warmup and cosine decay (schedule: arXiv 2403.04706)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from mathscale_jax.config import OptimizerSettings


def learning_rate_schedule(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate; the first step of the warmup is not zero, the last step ends the cosine."""
    warmup_steps = round(settings.warmup_fraction * num_steps)
    peak = settings.learning_rate
    cosine = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1), alpha=settings.final_fraction)
    if not warmup_steps:
        return cosine
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The transformation of clipped gradients into updates; norm weights are not decayed."""
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)
    adamw = optax.adamw(
        schedule,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=_is_decayed,
    )
    return optax.chain(clip, adamw if settings.state_dtype == "float32" else _with_bfloat16_state(adamw))


class NarrowState(NamedTuple):
    """The wrapped optimizer's state in bfloat16, and the number of updates so far, which seeds the rounding."""

    updates: jax.Array
    inner: optax.OptState


def _with_bfloat16_state(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computing in float32, with its float32 arrays kept in bfloat16 between steps.

    They are rounded up or down at random, in proportion to the distance. To the nearest, a second moment would
    stand still: with beta2 = 0.999 it moves by less than half of bfloat16's last place in most steps.
    """

    def init(params: optax.Params) -> NarrowState:
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_moment(x) else x, inner.init(params))
        return NarrowState(jnp.zeros((), jnp.int32), narrow)

    def update(updates: optax.Updates, state: NarrowState, params: optax.Params | None = None) -> Any:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_moment(x) else x, state.inner)
        updates, wide = inner.update(updates, wide, params)
        key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), state.updates)
        leaves, treedef = jax.tree.flatten(wide)
        narrow = [
            round_stochastically(x, jax.random.fold_in(key, i)) if _is_moment(x) else x for i, x in enumerate(leaves)
        ]
        return updates, NarrowState(state.updates + 1, jax.tree.unflatten(treedef, narrow))

    return optax.GradientTransformation(init, update)


def _is_moment(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def round_stochastically(x: Float[Array, "*shape"], key: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Float32 to bfloat16: up or down such that the expected value is `x`."""
    # bfloat16 is the upper half of a float32: a random lower half carries into it as often as it should.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _is_decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
