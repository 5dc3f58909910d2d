"""python -m benchmarks.int8_cache: what keys and values in int8 change in what a model says.

    python -m benchmarks.int8_cache --checkpoint runs/demo/train --task demo --source runs/demo/data/test.jsonl \\
        --dtype float32

The same samples are drawn with caches in the dtype of the weights and in int8, and graded. Along the texts of the
former, token by token, the two next-token distributions are compared: KL(plain || int8), and the most probable token.
Draws are the same in both, so the difference of their metrics is of each problem with itself.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int

from benchmarks.flags import settings_and_command
from benchmarks.report import environment, table, write_results
from data_pipeline.cli import logger, run_command
from data_pipeline.settings import Settings
from data_pipeline.tasks import TASKS, Problem, read_problems
from eval.grade import is_correct
from eval.metrics import bootstrap_ci95
from mathscale_jax import model
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.sampler import Draws, ProblemSamples, Prompt, Sampler, SamplingSettings, decode
from mathscale_jax.sampler.grid import Prompts, Rows
from mathscale_jax.sampler.schedule import SHORTEST_PROMPT, power_of_two, slots_for


class Int8Settings(Settings):
    """What is compared."""

    checkpoint: str = pydantic.Field(description="weights to draw from")
    task: str = pydantic.Field("gsm8k", description=f"one of {', '.join(TASKS)}")
    source: str = pydantic.Field(description="file of its problems; the first ones are taken")
    num_problems: pydantic.PositiveInt = pydantic.Field(60, description="problems that are sampled and graded")
    num_samples: pydantic.PositiveInt = pydantic.Field(64, description="samples a problem")
    num_compared: pydantic.PositiveInt = pydantic.Field(16, description="of them, whose distributions are compared")
    temperature: pydantic.PositiveFloat = pydantic.Field(0.7, description="of the draws")
    max_tokens: pydantic.PositiveInt = pydantic.Field(512, description="longest response")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("bfloat16", description="of weights, activations, caches")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


def compare(settings: Int8Settings, command: str) -> None:
    """Draws, compares, prints, and writes the results."""
    load = os.getloadavg()[0]
    checkpoint = open_checkpoint(settings.checkpoint)
    template = checkpoint.meta.template
    problems = read_problems(settings.task, "test", settings.source)[: settings.num_problems]
    prompts = [
        Prompt(problem.id, checkpoint.tokenizer.encode_prompt(template.render_prompt(problem.question)))
        for problem in problems
    ]
    wanted = SamplingSettings(
        num_samples=settings.num_samples, temperature=settings.temperature, max_tokens=settings.max_tokens
    )
    sampler = Sampler.of(checkpoint, settings.dtype)
    logger.info("drawing with caches in %s", settings.dtype)
    plain = sampler.sample(prompts, wanted)
    logger.info("comparing next-token distributions along %d texts", len(prompts) * settings.num_compared)
    positions = np.concatenate(list(_positions(sampler, prompts, plain, settings.num_compared)))
    logger.info("drawing with caches in int8")
    sampler.cache_dtype = "int8"
    int8 = sampler.sample(prompts, wanted)

    right = np.stack([_right(checkpoint.tokenizer.decode, problems, drawn) for drawn in (plain, int8)])
    same = np.mean([
        np.array_equal(a, b) for x, y in zip(plain, int8, strict=True) for a, b in zip(x.tokens, y.tokens, strict=True)
    ])  # fmt: skip
    kl, agrees = positions.T
    rows = [
        _row("PassRatio", right.mean(-1)),
        _row(f"Pass@{settings.num_samples}", right.max(-1)),
    ]
    body = (
        f"{len(problems)} problems of {settings.task} x {settings.num_samples} samples at temperature "
        f"{settings.temperature:g}, in {settings.dtype}\n\n"
        f"- KL(plain || int8) of {len(kl):,} next-token distributions: mean {kl.mean():.2e}, 99th percentile "
        f"{np.percentile(kl, 99):.2e}, largest {kl.max():.2e} nats\n"
        f"- the most probable token is the same in {100 * agrees.mean():.2f} % of them\n"
        f"- {100 * same:.1f} % of the samples are the same to the last token\n\n"
        + table(["", f"caches in {settings.dtype}", "in int8", "difference, 95 % of the bootstrap"], rows)
    )
    print(body, flush=True)
    if settings.out is not None:
        values = {
            "settings": settings.model_dump(exclude={"out"}),
            "kl": {
                "mean": float(kl.mean()),
                "p99": float(np.percentile(kl, 99)),
                "max": float(kl.max()),
                "positions": len(kl),
            },
            "same_argmax": float(agrees.mean()),
            "same_samples": float(same),
            "pass_ratio": right.mean((1, 2)).tolist(),
            "pass_at_n": right.max(-1).mean(-1).tolist(),
        }
        where = environment(jax.devices()[0].device_kind, load)
        subject = f"int8-cache-{settings.task}"
        logger.info("wrote %s", write_results(settings.out, subject, where, command, body, values))


def _positions(
    sampler: Sampler, prompts: Sequence[Prompt], drawn: Sequence[ProblemSamples], num_compared: int
) -> Iterator[Float[np.ndarray, "positions 2"]]:
    """KL and whether the argmax is the same, at each token of the first `num_compared` texts of each problem."""
    longest = max(len(tokens) for samples in drawn for tokens in samples.tokens[:num_compared])
    num_prompt = max(SHORTEST_PROMPT, power_of_two(max(len(prompt.tokens) for prompt in prompts)))
    for prompt, samples in zip(prompts, drawn, strict=True):
        texts = np.full((len(samples.tokens[:num_compared]), longest), sampler.eos_id, np.int32)
        for row, tokens in zip(texts, samples.tokens, strict=False):
            row[: len(tokens)] = tokens
        plain, int8 = (
            _begun(sampler, prompt, num_prompt, texts, cache_dtype) for cache_dtype in (sampler.cache_dtype, "int8")
        )
        lengths = np.array([len(tokens) for tokens in samples.tokens[:num_compared]])
        for position in range(int(lengths.max()) - 1):
            token = texts[None, :, position]
            *told, plain, int8 = _forced(sampler.config, sampler.compute, sampler.params, plain, int8, token)
            yield np.stack(told, -1)[0, lengths > position + 1]


def _begun(
    sampler: Sampler, prompt: Prompt, num_prompt: int, texts: Int[np.ndarray, "rows tokens"], cache_dtype: Any
) -> tuple[Prompts, Rows]:
    tokens = np.zeros((1, num_prompt), np.int32)
    tokens[0, : len(prompt.tokens)] = prompt.tokens
    key = np.asarray(jax.random.key_data(Draws(0).problem_key(prompt.problem_id)))
    with jax.set_mesh(sampler.mesh):
        prompts, rows, _ = decode.begin(
            sampler.config, sampler.compute, sampler.params, tokens, np.array([len(prompt.tokens)], np.int32),
            np.array([texts.shape[1]], np.int32), key[None], np.arange(len(texts), dtype=np.int32)[None],
            rule=decode.Rule(1.0, None, 1.0, sampler.eos_id, sampler.num_pieces), cache_dtype=cache_dtype,
            num_slots=slots_for(texts.shape[1]),
        )  # fmt: skip
    return prompts, rows


@partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("plain", "int8"))
def _forced(
    config: ModelConfig,
    compute: ComputeSettings,
    params: model.Params,
    plain: tuple[Prompts, Rows],
    int8: tuple[Prompts, Rows],
    token: Int[Array, "1 rows"],
) -> tuple[Float[Array, "1 rows"], Array, tuple[Prompts, Rows], tuple[Prompts, Rows]]:
    """Both with `token` as the latest one: KL of what comes next, whether the argmax agrees, and both after it."""

    def step(prompts: Prompts, rows: Rows) -> tuple[Array, tuple[Prompts, Rows]]:
        tokens = jax.lax.dynamic_update_slice_in_dim(rows.tokens, token[..., None], rows.clock - 1, 2)
        rows = dataclasses.replace(rows, tokens=tokens)
        logits, caches = decode.next_logits(config, compute, params, prompts, rows)
        return jax.nn.log_softmax(logits), (prompts, dataclasses.replace(rows, clock=rows.clock + 1, caches=caches))

    (p, plain), (q, int8) = step(*plain), step(*int8)
    agrees = jnp.argmax(p, -1) == jnp.argmax(q, -1)
    kl = jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), -1), 0)  # below 0 it is rounding
    return kl, agrees.astype(jnp.float32), plain, int8


def _right(text: Any, problems: Sequence[Problem], drawn: Sequence[ProblemSamples]) -> np.ndarray:
    return np.array([
        [float(is_correct(text(tokens.tolist()), problem.answer)) for tokens in samples.tokens]
        for problem, samples in zip(problems, drawn, strict=True)
    ])  # fmt: skip


def _row(name: str, values: Float[np.ndarray, "2 problems"]) -> list[str]:
    (low, high), mean = 100 * bootstrap_ci95((values[1] - values[0])[:, None], seed=0)[0], 100 * values.mean(-1)
    return [name, f"{mean[0]:.2f} %", f"{mean[1]:.2f} %", f"{mean[1] - mean[0]:+.2f} ({low:+.2f} to {high:+.2f})"]


def _main(argv: Sequence[str] | None) -> None:
    compare(*settings_and_command("benchmarks.int8_cache", __doc__, Int8Settings, argv))


if __name__ == "__main__":
    run_command(_main)
