"""The sampler: prompts in, all samples of one problem after another out."""

import dataclasses
from collections.abc import Sequence
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
from mathscale_jax.sampler.schedule import STEPS_PER_CHUNK, Limits, Wave, blocks, run_waves
from mathscale_jax.step import param_shardings

# Prompts are padded to a multiple of this, so that a data set needs few compilations.
PROMPT_MULTIPLE = 64


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
        limits: Limits = Limits(256, 2**20),
    ):
        self.config, self.eos_id, self.num_pieces = config, eos_id, num_pieces
        self.limits = limits
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

    def sample(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[ProblemSamples]:
        """All samples of a group of problems, which are decoded together; in the order of the prompts.

        Raises UsageError as `room` does, before anything is drawn.
        """
        rooms = [self.room(prompt, settings) for prompt in prompts]
        draws = [Draws(settings.seed).problem_key(prompt.problem_id) for prompt in prompts]
        drawn: list[dict[int, Int[np.ndarray, " length"]]] = [{} for _ in prompts]

        def begin(blocks: Sequence[tuple[int, range]]) -> Wave:
            problems = [problem for problem, _ in blocks]
            longest = max(len(prompts[problem].tokens) for problem in problems)
            padded = np.zeros((len(problems), -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE), np.int32)
            sample = np.full((len(problems), max(len(ids) for _, ids in blocks)), -1, np.int32)
            for line, (problem, ids) in enumerate(blocks):
                padded[line, : len(prompts[problem].tokens)] = prompts[problem].tokens
                sample[line, : len(ids)] = ids
            lengths = np.asarray([len(prompts[problem].tokens) for problem in problems], np.int32)
            computed, logits = decode.prefill(
                self.config, self.compute, self.params, padded, lengths,
                np.asarray([rooms[problem] for problem in problems], np.int32),
                jnp.stack([draws[problem] for problem in problems]),
            )  # fmt: skip
            finite = np.asarray(jnp.isfinite(logits).all(-1))
            if not finite.all():
                name = prompts[problems[int(np.argmin(finite))]].problem_id
                raise RunError(f"problem {name!r}: the model's logits are not finite: its weights are damaged")
            rows = decode.start(self.config, computed, logits, sample, STEPS_PER_CHUNK)
            return Wave(problems, computed, rows, sample, sample >= 0)

        def advance(wave: Wave) -> None:
            wave.rows = decode.decode_chunk(
                self.config, self.compute, self.params, wave.prompts, wave.rows,
                num_steps=STEPS_PER_CHUNK, temperature=settings.temperature, top_p=settings.top_p,
                eos_id=self.eos_id, num_pieces=self.num_pieces,
            )  # fmt: skip

        def ended(problem: int, sample: int, written: Int[np.ndarray, " tokens"]) -> None:
            ends = np.flatnonzero(written == self.eos_id)
            drawn[problem][sample] = written[: min(ends[0] + 1 if len(ends) else len(written), rooms[problem])].copy()

        run_waves(blocks(len(prompts), settings.num_samples, self.limits), begin, advance, ended, self.limits)
        return [self._collected(prompt, samples) for prompt, samples in zip(prompts, drawn, strict=True)]

    def _collected(self, prompt: Prompt, samples: dict[int, Int[np.ndarray, " length"]]) -> ProblemSamples:
        rows = [samples[i] for i in range(len(samples))]
        return ProblemSamples(prompt.problem_id, rows, ["eos" if row[-1] == self.eos_id else "length" for row in rows])
