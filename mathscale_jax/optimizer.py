"""AdamW behind gradient clipping, with linear warmup and cosine decay (schedule: arXiv 2403.04706)."""

from typing import Any

import jax
import optax

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
    return optax.chain(clip, adamw)


def _is_decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
