"""The sampler: prompts in, all samples of one problem after another out."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from mathscale_jax import model
from mathscale_jax.checkpoint import Checkpoint
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.mesh import largest_mesh
from mathscale_jax.sampler import decode
from mathscale_jax.sampler.draw import Draws, SamplingSettings
from mathscale_jax.step import param_shardings

# Prompts are padded to a multiple of this, so that a data set needs few compilations.
PROMPT_MULTIPLE = 64
# Decode steps between two looks of the host at the rows.
STEPS_PER_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem's prompt as token ids, BOS first. The id keys the random draws."""

    problem_id: str
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class ProblemSamples:
    """All samples of one problem, in order of their ids.

    `tokens[i]` ends with EOS where `finish_reasons[i]` is "eos".
    """

    problem_id: str
    tokens: list[Int[np.ndarray, " length"]]
    finish_reasons: list[Literal["eos", "length"]]


class Sampler:
    """Draws samples from a model.

    `params` may have any dtype and sharding; they are cast to `dtype` once. A problem is decoded in the same way
    whoever asks for it and whatever other problems are asked for, so its samples are reproducible by
    (weights, prompt, settings) on the same kind of device.
    Tokens from `num_pieces` on, which pad a vocabulary, are never drawn.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: model.Params,
        *,
        eos_id: int,
        num_pieces: int,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ):
        self.config, self.eos_id, self.num_pieces = config, eos_id, num_pieces
        self.compute = ComputeSettings(dtype=dtype, remat="none")
        self.params = jax.jit(model.cast, static_argnums=1)(params, dtype)

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> "Sampler":
        """A sampler with the weights of a checkpoint, split over as many devices as divide them."""
        config = checkpoint.meta.model
        shardings = param_shardings(config, largest_mesh(config))
        return cls(
            config,
            checkpoint.restore_params(shardings, dtype),
            eos_id=checkpoint.tokenizer.eos_id,
            num_pieces=checkpoint.tokenizer.vocab_size,
            dtype=dtype,
        )

    def room(self, prompt: Prompt, settings: SamplingSettings) -> int:
        """Tokens a response to `prompt` may have: `max_tokens`, or what the model's context leaves.

        Raises UsageError where it leaves nothing, or the prompt is empty.
        """
        left = self.config.max_context - len(prompt.tokens)
        if not prompt.tokens or left < 1:
            raise UsageError(
                f"problem {prompt.problem_id!r}: a prompt of {len(prompt.tokens)} tokens; the model's context of "
                f"{self.config.max_context} takes 1 to {self.config.max_context - 1}"
            )
        return min(settings.max_tokens, left)

    def sample(self, prompts: Iterable[Prompt], settings: SamplingSettings) -> Iterator[ProblemSamples]:
        """Yields the samples of each prompt, in the order of the prompts. Raises UsageError as `room` does."""
        for prompt in prompts:
            yield self._sample_problem(prompt, settings, self.room(prompt, settings))

    def _sample_problem(self, prompt: Prompt, settings: SamplingSettings, room: int) -> ProblemSamples:
        padded_length = -(-len(prompt.tokens) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        padded = np.zeros(padded_length, np.int32)
        padded[: len(prompt.tokens)] = prompt.tokens
        prefix = decode.prefill(self.config, self.compute, self.params, padded, np.int32(len(prompt.tokens)))
        if not bool(jnp.isfinite(prefix.last_logits).all()):
            raise RunError(f"problem {prompt.problem_id!r}: the model's logits are not finite: its weights are damaged")
        capacity = STEPS_PER_CHUNK
        state = decode.start(self.config, prefix, settings.num_samples, capacity)
        problem_key = Draws(settings.seed).problem_key(prompt.problem_id)
        sample_ids = jnp.arange(settings.num_samples)
        while int(state.position) < room and not bool(state.finished.all()):
            if int(state.position) + STEPS_PER_CHUNK > capacity:
                capacity *= 2  # few sizes, so few compilations; a step reads at most twice what is written
                state = decode.grow(state, capacity)
            state = decode.decode_chunk(
                self.config,
                self.compute,
                self.params,
                prefix,
                state,
                problem_key,
                sample_ids,
                np.int32(room),
                num_steps=STEPS_PER_CHUNK,
                temperature=settings.temperature,
                top_p=settings.top_p,
                eos_id=self.eos_id,
                num_pieces=self.num_pieces,
            )
        return self._collect(prompt, np.asarray(state.tokens), int(state.position))

    def _collect(self, prompt: Prompt, tokens: Int[np.ndarray, "rows response"], written: int) -> ProblemSamples:
        rows: list[Int[np.ndarray, " length"]] = []
        reasons: list[Literal["eos", "length"]] = []
        for row in tokens[:, :written]:
            ends = np.flatnonzero(row == self.eos_id)
            rows.append(row[: ends[0] + 1] if len(ends) else row)
            reasons.append("eos" if len(ends) else "length")
        return ProblemSamples(prompt.problem_id, rows, reasons)
