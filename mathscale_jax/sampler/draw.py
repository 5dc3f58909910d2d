"""Which token comes next: greedy, temperature, top-k, top-p, and where the randomness comes from."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int, UInt32

from data_pipeline.settings import Settings

# Logits divided by less than this overflow float32's exponent, or are greedy in all but name.
MIN_TEMPERATURE = 0.01
_BITS_OF_ONE = 0x3F800000  # 1.0 in float32
_IMPLEMENTATION = "threefry2x32"
_BLOCK = 128  # tokens


def _strings(value: Any) -> Any:
    """A list of strings as the command line gives it."""
    if isinstance(value, str):
        return json.loads(value) if value.startswith("[") else [value]
    return value


StopStrings = Annotated[tuple[Annotated[str, pydantic.Field(min_length=1)], ...], pydantic.BeforeValidator(_strings)]


class SamplingSettings(Settings):
    """How samples are drawn."""

    num_samples: pydantic.PositiveInt = pydantic.Field(256, description="samples per problem")
    temperature: float = pydantic.Field(0.7, ge=0, allow_inf_nan=False, description="0: greedy, with num_samples 1")
    top_p: float = pydantic.Field(1.0, gt=0, le=1, description="draw from the most probable tokens that hold this mass")
    top_k: pydantic.PositiveInt | None = pydantic.Field(
        None, description="draw from this many of the most probable tokens; none: from all"
    )
    stop: StopStrings = pydantic.Field(
        (), description="a response ends before the first of these strings; one, or a JSON list"
    )
    logprobs: bool = pydantic.Field(
        False, description="record each sample's log-probability under the model, at temperature 1"
    )
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
        key = jax.random.key(self.seed, impl=_IMPLEMENTATION)
        for word in np.frombuffer(hashlib.sha256(problem_id.encode()).digest()[:8], ">u4"):
            key = jax.random.fold_in(key, np.uint32(word))
        return key

    @staticmethod
    def keys(data: UInt32[Array, "problems 2"]) -> jax.Array:
        """The keys with these data."""
        return jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)

    @staticmethod
    def uniform(
        problem_key: jax.Array, sample_ids: Int[Array, " rows"], positions: Int[Array, " rows"]
    ) -> Float[Array, " rows"]:
        """One number in [0, 1) per row. `positions` count the tokens of the response from 0."""

        def draw(sample_id: Array, position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(problem_key, sample_id), position))

        return jax.vmap(draw)(sample_ids, positions)


def next_tokens(
    logits: Float[Array, "rows vocab"],
    uniform: Float[Array, " rows"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, " rows"]:
    """The token of each row: the argmax at temperature 0, else the inverse of the cumulative distribution at `uniform`.

    With `top_k` the distribution is cut to the k most probable tokens and renormalised; with `top_p` < 1 it is then
    cut to the smallest set of most probable tokens that holds at least `top_p` of the mass. Tokens as probable as the
    least probable of a set are in it, too.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)
    if top_k is not None and top_k < weights.shape[-1]:
        counts = jnp.full(weights.shape[:1], top_k, jnp.float32)
        weights = _most_probable(weights, lambda kept: jnp.sum(kept > 0, axis=-1, dtype=jnp.float32), counts)
    if top_p < 1:
        weights = _most_probable(weights, lambda kept: jnp.sum(kept, axis=-1), top_p * jnp.sum(weights, axis=-1))
    return _invert(weights, uniform)


def _most_probable(
    weights: Float[Array, "rows vocab"], measure: Callable[[Array], Array], wanted: Float[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """The smallest sets of largest weights whose `measure` is at least `wanted`; 0 elsewhere.

    The least weight of a set is found by bisection, which a TPU does many times as fast as it sorts. Floats that are
    not negative are ordered as their bits are, so 30 halvings find it exactly.
    """

    def halve(_: int, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = (low + high) // 2
        enough = measure(_at_least(weights, middle)) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(wanted.shape, jnp.int32)
    high = jnp.full(wanted.shape, _BITS_OF_ONE + 1, jnp.int32)  # no weight is above 1
    return _at_least(weights, jax.lax.fori_loop(0, _BITS_OF_ONE.bit_length(), halve, (low, high))[0])


def _at_least(weights: Array, bits: Int[Array, " rows"]) -> Array:
    return jnp.where(weights >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None], weights, 0)


def _invert(weights: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The first token up to which the weights add up to more than `uniform` of their sum.

    First the block of the vocabulary that it lies in, then its place there: the running sum over all of it would take
    longer than everything else.
    """
    blocks = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % _BLOCK))).reshape(weights.shape[0], -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    # Strictly below the total, so that a token without weight at the end is never drawn.
    target = jnp.minimum(uniform * ends[:, -1], jnp.nextafter(ends[:, -1], 0))[:, None]
    block = jnp.sum(ends <= target, axis=-1, keepdims=True)
    before = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (1, 0))), block, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    place = jnp.sum(jnp.cumsum(inside, axis=-1) <= target - before, axis=-1, keepdims=True)
    last = jnp.max(jnp.where(inside > 0, jnp.arange(_BLOCK), 0), axis=-1, keepdims=True)  # where rounding passes it
    return (block * _BLOCK + jnp.minimum(place, last))[:, 0].astype(jnp.int32)


def log_probabilities(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Of each row's token, in nats, under the model itself: at temperature 1 and of all tokens."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
