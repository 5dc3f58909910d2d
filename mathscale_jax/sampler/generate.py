"""The sampler: a group of prompts in, all samples of each out."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from data_pipeline.cli import RunError, StopSignal
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Meta
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.sampler import decode
from mathscale_jax.sampler.decode import CacheDtype, Rule
from mathscale_jax.sampler.draw import Draws, SamplingSettings
from mathscale_jax.sampler.placement import bytes_of_vector, decode_mesh, memory_of, placed, token_limit
from mathscale_jax.sampler.schedule import (
    FEWEST_SLOTS,
    SHORTEST_PROMPT,
    STEPS_PER_CHUNK,
    Limits,
    Samples,
    Wave,
    first_waves,
    power_of_two,
    run_waves,
    slots_for,
)
from mathscale_jax.step import param_shardings

ROWS = 256  # decoded at once, where nothing else is asked for
ComputeDtype = Literal["bfloat16", "float32"]
FinishReason = Literal["eos", "length", "stop"]


class PromptTooLong(UsageError):
    """A prompt that leaves no room for a response in the model's context, or has no tokens."""


class Weights(Protocol):
    """What weights come from: a checkpoint, or a published folder."""

    @property
    def meta(self) -> Meta:
        """What they are."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Theirs."""

    def restore_params(self, shardings: Any = None, dtype: str = "float32") -> model.Params:
        """The weights in `dtype`, laid out by `shardings`."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem's prompt as token ids, BOS first. The id keys the random draws."""

    problem_id: str
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class ProblemSamples:
    """All samples of one problem, in order of their ids.

    `tokens[i]` ends with EOS where `finish_reasons[i]` is "eos", and with the token that completes a stop string where
    it is "stop". `logprobs[i]` is of all of them, in nats, under the model at temperature 1.
    """

    problem_id: str
    tokens: list[Int[np.ndarray, " length"]]
    finish_reasons: list[FinishReason]
    logprobs: list[float]


class Sampler:
    """Draws samples from a model.

    `params` may have any dtype and sharding: they are copied in `dtype` to where decoding wants them, on the devices
    they lie on. With `mesh`, of `decode_mesh`, they are there already, and become the sampler's own.
    A group of problems is decoded in the same way whoever asks for it, so its samples are reproducible by (weights,
    prompts, settings, `limits`) on the same kind of device.
    Tokens from `num_pieces` on, which pad a vocabulary, are never drawn. `text` decodes tokens; stop strings need it.
    `rows`, rounded up to a power of two, are decoded at once, with caches for `max_tokens` tokens in all, by default as
    many as there is room for in `memory`, bytes of each device; by default in what is free of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: model.Params,
        *,
        eos_id: int,
        num_pieces: int,
        text: Callable[[list[int]], str] | None = None,
        dtype: ComputeDtype = "bfloat16",
        cache_dtype: CacheDtype | None = None,
        mesh: Mesh | None = None,
        rows: int = ROWS,
        max_tokens: int | None = None,
        memory: float | None = None,
    ):
        self.config, self.eos_id, self.num_pieces, self.text = config, eos_id, num_pieces, text
        self.cache_dtype: CacheDtype = cache_dtype or dtype
        self.compute = ComputeSettings(dtype=dtype, remat="none")
        devices = _devices_of(params) if mesh is None else list(mesh.devices.flat)
        memory = memory or memory_of(devices[0])
        self.mesh = decode_mesh(config, dtype, devices, memory) if mesh is None else mesh
        params = placed(params, config, self.mesh, dtype) if mesh is None else params
        self.params = model.layers_apart(params) if devices[0].platform == "gpu" else params
        split = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if max_tokens is None:
            max_tokens = token_limit(config, self.mesh, dtype, self.cache_dtype, memory)
        prompt_token = bytes_of_vector(config, dtype) / bytes_of_vector(config, self.cache_dtype)
        self.limits = Limits(power_of_two(max(rows, split), split), max_tokens, split, prompt_token)

    @classmethod
    def of(cls, weights: Weights, dtype: ComputeDtype = "bfloat16", **options: Any) -> "Sampler":
        """A sampler with the weights of a checkpoint on all devices, and `options` as they are above."""
        config = weights.meta.model
        memory = memory_of(jax.devices()[0])  # before the weights are there
        mesh = decode_mesh(config, dtype, memory=memory)
        return cls(
            config,
            weights.restore_params(param_shardings(config, mesh), dtype),
            eos_id=weights.tokenizer.eos_id,
            num_pieces=weights.tokenizer.vocab_size,
            text=weights.tokenizer.decode,
            dtype=dtype,
            mesh=mesh,
            memory=memory,
            **options,
        )

    def room(self, prompt: Prompt, settings: SamplingSettings) -> int:
        """Tokens a response to `prompt` may have: `max_tokens`, or what the model's context leaves.

        Raises PromptTooLong where it leaves nothing, or the prompt is empty.
        """
        left = self.config.max_context - len(prompt.tokens)
        if not prompt.tokens or left < 1:
            raise PromptTooLong(
                f"problem {prompt.problem_id!r}: a prompt of {len(prompt.tokens)} tokens; the model's context of "
                f"{self.config.max_context} takes 1 to {self.config.max_context - 1}"
            )
        return min(settings.max_tokens, left)

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        done: Callable[[int], None] = lambda num_tokens: None,
    ) -> list[ProblemSamples]:
        """All samples of a group of problems, in the order of the prompts; `done` is told of each one's tokens.

        Raises PromptTooLong as `room` does, and UsageError where the devices have no room for one sample, before
        anything is drawn; Stopped where a signal asks to.
        """
        if settings.stop and self.text is None:
            raise UsageError("stop strings need a tokenizer")
        if not prompts:
            return []
        group = _Group(self, prompts, settings, done)
        limits = dataclasses.replace(self.limits, longest=max(group.rooms))
        needed = limits.tokens_of((1, limits.split), group.num_prompt, slots_for(limits.longest))
        if needed > limits.tokens:
            raise UsageError(
                f"a sample of up to {limits.longest} tokens behind a prompt of up to {group.num_prompt} needs caches "
                f"for {needed} tokens; beside the weights there is room for {limits.tokens}: lower max_tokens, or take "
                "more or larger devices"
            )
        with jax.set_mesh(self.mesh):
            run_waves(first_waves([group.num_prompt] * len(prompts), settings.num_samples, limits), group, limits)
        return group.collected()


def _devices_of(params: model.Params) -> Sequence[jax.Device]:
    """In the order of their mesh, which that of the sampler must have too; by default all."""
    sharding = jax.tree.leaves(params)[0].sharding
    return list(sharding.mesh.devices.flat) if isinstance(sharding, NamedSharding) else list(sharding.device_set)


def _padded(prompt: Prompt) -> int:
    return max(SHORTEST_PROMPT, power_of_two(len(prompt.tokens)))


@dataclasses.dataclass
class _Sample:
    tokens: Int[np.ndarray, " length"]
    reason: FinishReason
    logprob: float


class _Group:
    """The problems that are decoded together: a schedule.Decoder."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        done: Callable[[int], None],
    ):
        self._sampler, self._prompts, self._settings, self._done = sampler, prompts, settings, done
        self.rooms = [sampler.room(prompt, settings) for prompt in prompts]
        keys = [Draws(settings.seed).problem_key(prompt.problem_id) for prompt in prompts]
        self._draws = [np.asarray(jax.random.key_data(key)) for key in keys]
        self._samples: list[dict[int, _Sample]] = [{} for _ in prompts]
        self.num_prompt = max(map(_padded, prompts))
        self._rule = Rule(
            settings.temperature, settings.top_k, settings.top_p, sampler.eos_id, sampler.num_pieces, settings.logprobs
        )

    def begin(self, samples: Sequence[Samples]) -> Wave:
        split = self._sampler.limits.split
        problems = [problem for problem, _ in samples]
        problems += [problems[0]] * (power_of_two(len(problems)) - len(problems))
        most = max(len(ids) for _, ids in samples)
        sample = np.full((len(problems), power_of_two(most, split if most >= split else 1)), -1, np.int32)
        for line, (_, ids) in enumerate(samples):
            sample[line, : len(ids)] = ids
        tokens = np.zeros((len(problems), self.num_prompt), np.int32)
        for line, problem in enumerate(problems):
            tokens[line, : len(self._prompts[problem].tokens)] = self._prompts[problem].tokens
        prompts, rows, finite = decode.begin(
            self._sampler.config, self._sampler.compute, self._sampler.params, tokens,
            np.asarray([len(self._prompts[problem].tokens) for problem in problems], np.int32),
            np.asarray([self.rooms[problem] for problem in problems], np.int32),
            np.stack([self._draws[problem] for problem in problems]), sample,
            rule=self._rule, cache_dtype=self._sampler.cache_dtype, num_slots=FEWEST_SLOTS,
        )  # fmt: skip
        if not np.asarray(finite).all():
            name = self._prompts[problems[int(np.argmin(finite))]].problem_id
            raise RunError(f"problem {name!r}: the model's logits are not finite: its weights are damaged")
        return Wave(problems, prompts, rows, sample, sample >= 0)

    def advance(self, wave: Wave, fewest: tuple[int, int, int]) -> None:
        StopSignal.heed()
        wave.rows = decode.decode_chunk(
            self._sampler.config, self._sampler.compute, self._sampler.params, wave.prompts, wave.rows,
            tuple(map(np.int32, fewest)), rule=self._rule, num_steps=STEPS_PER_CHUNK,
        )  # fmt: skip
        if self._settings.stop:
            self._end_at_stops(wave)

    def _end_at_stops(self, wave: Wave) -> None:
        tokens, start = np.asarray(wave.rows.tokens), np.asarray(wave.rows.start)
        finished = np.array(wave.rows.finished)
        for line, row in zip(*np.nonzero(~finished), strict=True):
            finished[line, row] = self._stops(tokens[line, row, start[line, row] : wave.clock])
        on_devices = jax.device_put(finished, wave.rows.finished.sharding)
        wave.rows = dataclasses.replace(wave.rows, finished=on_devices)

    def ended(self, problem: int, sample: int, tokens: Int[np.ndarray, " tokens"], logprobs: np.ndarray) -> None:
        ends = np.flatnonzero(tokens == self._sampler.eos_id)
        reason: FinishReason = "length"
        length = min(len(tokens), self.rooms[problem])
        if len(ends) and ends[0] < length:
            reason, length = "eos", int(ends[0]) + 1
        if self._settings.stop and self._stops(tokens[:length]):
            reason = "stop"
            length = bisect.bisect_left(range(length), True, key=lambda n: self._stops(tokens[: n + 1])) + 1
        self._samples[problem][sample] = _Sample(tokens[:length].copy(), reason, float(logprobs[:length].sum()))
        self._done(length)

    def _stops(self, tokens: Int[np.ndarray, " tokens"]) -> bool:
        assert self._sampler.text is not None
        text = self._sampler.text(tokens.tolist())
        return any(stop in text for stop in self._settings.stop)

    def collected(self) -> list[ProblemSamples]:
        """What was drawn, in order."""
        return [
            ProblemSamples(
                prompt.problem_id,
                [samples[i].tokens for i in range(self._settings.num_samples)],
                [samples[i].reason for i in range(self._settings.num_samples)],
                [samples[i].logprob for i in range(self._settings.num_samples)],
            )
            for prompt, samples in zip(self._prompts, self._samples, strict=True)
        ]
