"""Which token comes next: greedy, temperature, top-p, and where the randomness comes from."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int

from data_pipeline.settings import Settings

# Logits divided by less than this overflow float32's exponent, or are greedy in all but name.
MIN_TEMPERATURE = 0.01


class SamplingSettings(Settings):
    """How samples are drawn."""

    num_samples: pydantic.PositiveInt = pydantic.Field(256, description="samples per problem")
    temperature: float = pydantic.Field(0.7, ge=0, allow_inf_nan=False, description="0: greedy, with num_samples 1")
    top_p: float = pydantic.Field(1.0, gt=0, le=1, description="draw from the most probable tokens that hold this mass")
    max_tokens: pydantic.PositiveInt = pydantic.Field(
        512, description="longest response, EOS included; shorter where the model's context ends"
    )
    seed: int = pydantic.Field(0, ge=0, lt=2**32, description="seed of the draws")

    @pydantic.model_validator(mode="after")
    def _greedy_is_one(self) -> "SamplingSettings":
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} is too near 0 for float32; 0 is greedy, else {MIN_TEMPERATURE} or more"
            )
        if self.temperature == 0 and self.num_samples != 1:
            raise ValueError(
                f"temperature=0 is greedy and gives one sample a problem, but num_samples={self.num_samples}: "
                "set num_samples=1, or a temperature"
            )
        return self


@dataclasses.dataclass(frozen=True)
class Draws:
    """Uniform numbers that depend on (seed, problem, sample, position) and on nothing else.

    Neither the batch a sample is computed in, nor its place there, nor the number of devices plays a part.
    """

    seed: int

    def problem_key(self, problem_id: str) -> jax.Array:
        """The key of a problem. threefry is pinned: its bits are the same on every backend."""
        key = jax.random.key(self.seed, impl="threefry2x32")
        for word in np.frombuffer(hashlib.sha256(problem_id.encode()).digest()[:8], ">u4"):
            key = jax.random.fold_in(key, np.uint32(word))
        return key

    @staticmethod
    def uniform(
        problem_key: jax.Array, sample_ids: Int[Array, " rows"], positions: Int[Array, " rows"]
    ) -> Float[Array, " rows"]:
        """One number in [0, 1) per row. `positions` count the tokens of the response from 0."""

        def draw(sample_id: Array, position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(problem_key, sample_id), position))

        return jax.vmap(draw)(sample_ids, positions)


def next_tokens(
    logits: Float[Array, "rows vocab"], uniform: Float[Array, " rows"], temperature: float, top_p: float
) -> Int[Array, " rows"]:
    """The token of each row: the argmax at temperature 0, else the inverse of the cumulative distribution at `uniform`.

    With `top_p` < 1 the distribution is cut to the smallest set of most probable tokens that holds at least
    `top_p` of the mass, and renormalised.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    if top_p == 1:
        return _invert(probabilities, uniform)
    order = jnp.argsort(-probabilities, axis=-1)
    ranked = jnp.take_along_axis(probabilities, order, axis=-1)
    mass_before = jnp.cumsum(ranked, axis=-1) - ranked
    rank = _invert(jnp.where(mass_before < top_p, ranked, 0), uniform)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _invert(weights: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    cumulative = jnp.cumsum(weights, axis=-1)
    # Strictly below the total, so that a token without weight at the end is never drawn.
    target = jnp.minimum(uniform * cumulative[:, -1], jnp.nextafter(cumulative[:, -1], 0))
    return jnp.sum(cumulative <= target[:, None], axis=-1).astype(jnp.int32)
