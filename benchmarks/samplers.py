"""Contestants that draw the same number of samples of the same prompts, each made in a process of its own."""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.sample import group_size
from mathscale_jax import model
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.chips import chip_of
from mathscale_jax.compiled import keep_compiled
from mathscale_jax.config import ModelConfig
from mathscale_jax.sampler import Draws, Prompt, Sampler, SamplingSettings, decode
from mathscale_jax.sampler.grid import with_slots
from mathscale_jax.sampler.placement import bytes_of_vector, decode_mesh, keep_freed_memory, memory_of
from mathscale_jax.sampler.schedule import FEWEST_SLOTS, STEPS_PER_CHUNK, power_of_two, slots_for
from mathscale_jax.step import param_shardings

EOS = 2  # of random weights


@dataclasses.dataclass(frozen=True)
class Work:
    """What all of them do: `num_samples` of each prompt (token ids), at most `max_tokens` long."""

    prompts: tuple[tuple[int, ...], ...]
    num_samples: int
    temperature: float
    max_tokens: int

    def settings(self, seed: int) -> SamplingSettings:
        """Ours."""
        return SamplingSettings(
            num_samples=self.num_samples, temperature=self.temperature, max_tokens=self.max_tokens, seed=seed
        )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The useful tokens of each sample, and the seconds that all took."""

    lengths: list[int]
    seconds: float


def speed(drawn: Drawn) -> float:
    """Useful tokens a second."""
    return sum(drawn.lengths) / drawn.seconds


def bound(
    config: ModelConfig,
    where: Mapping[str, Any],
    kv_cache: Any,
    prompt_length: float,
    lengths: Sequence[int],
    rows: int,
) -> float | None:
    """Useful tokens a second of bfloat16 weights that devices cannot exceed; None where their figures are not known.

    With every row always busy, a step reads all weights but the table of embeddings, one prompt's keys and values,
    and each row's own; or it is bound by its products, 2 FLOPs a weight and token. `where` is what a contestant says
    of itself: that several devices share all of this is the least that each must do.
    """
    chip = chip_of(where["device"])
    if chip is None or where["dtype"] != "bfloat16":
        return None
    vectors = 2 * config.num_layers * config.num_kv_heads
    token, own = (vectors * bytes_of_vector(config, dtype) for dtype in ("bfloat16", kv_cache or "bfloat16"))
    tokens = sum(lengths)
    weights = config.num_parameters - config.vocab_size * config.hidden_size
    steps = tokens / rows
    read = steps * (2 * weights + prompt_length * token) + own * sum(n * n / 2 for n in lengths)
    return where["num_devices"] * tokens / max(read / chip.hbm_bandwidth, 2 * weights * tokens / chip.peak_flops)


class Ours:
    """The sampler as `eval sample` uses it: a group of problems at a time. `rows` are decoded at once."""

    def __init__(self, weights: str | ModelConfig, work: Work, dtype: Any, rows: int, mean_length: float, cache: Any):
        keep_compiled()
        keep_freed_memory()
        self._work = work
        options: dict[str, Any] = {"rows": rows, "cache_dtype": cache}
        if isinstance(weights, str):
            self.sampler = Sampler.of(open_checkpoint(weights), dtype, **options)
        else:
            memory = memory_of(jax.devices()[0])  # before the weights are there
            mesh = decode_mesh(weights, dtype, memory=memory)
            params = random_weights(weights, mesh, dtype, mean_length, work)
            self.sampler = Sampler(
                weights,
                params,
                eos_id=EOS,
                num_pieces=weights.vocab_size,
                dtype=dtype,
                mesh=mesh,
                memory=memory,
                **options,
            )

    def describe(self) -> dict[str, Any]:
        """Where it runs."""
        device = jax.devices()[0]
        mesh = self.sampler.mesh
        told = {"device": device.device_kind, "num_devices": mesh.size, "mesh": dict(mesh.shape)}
        return told | {"dtype": self.sampler.compute.dtype}

    def run(self, seed: int) -> Drawn:
        """All samples of all prompts."""
        prompts = [Prompt(str(i), list(tokens)) for i, tokens in enumerate(self._work.prompts)]
        group = group_size(self.sampler.limits.rows, self._work.num_samples)
        lengths: list[int] = []
        started = time.perf_counter()
        for first in range(0, len(prompts), group):
            for result in self.sampler.sample(prompts[first : first + group], self._work.settings(seed)):
                lengths += map(len, result.tokens)
        return Drawn(lengths, time.perf_counter() - started)


class Plain(Ours):
    """The same sampler without its two ideas: each row has a prompt of its own, and rows that end stay to the end."""

    def run(self, seed: int) -> Drawn:
        """All samples of all prompts, `rows` at a time."""
        sampler, work = self.sampler, self._work
        rule = decode.Rule(work.temperature, None, 1.0, sampler.eos_id, sampler.num_pieces)
        every = [(i, sample) for i in range(len(work.prompts)) for sample in range(work.num_samples)]
        num_prompt = max(64, power_of_two(max(map(len, work.prompts))))
        keys = [np.asarray(jax.random.key_data(Draws(seed).problem_key(str(i)))) for i in range(len(work.prompts))]
        lengths: list[int] = []
        started = time.perf_counter()
        with jax.set_mesh(sampler.mesh):
            for first in range(0, len(every), sampler.limits.rows):
                some = every[first : first + sampler.limits.rows]
                tokens = np.zeros((len(some), num_prompt), np.int32)
                for line, (problem, _) in enumerate(some):
                    tokens[line, : len(work.prompts[problem])] = work.prompts[problem]
                prompts, rows, _ = decode.begin(
                    sampler.config, sampler.compute, sampler.params, tokens,
                    np.asarray([len(work.prompts[problem]) for problem, _ in some], np.int32),
                    np.full(len(some), work.max_tokens, np.int32), np.stack([keys[problem] for problem, _ in some]),
                    np.asarray([[sample] for _, sample in some], np.int32),
                    rule=rule, cache_dtype=sampler.cache_dtype, num_slots=FEWEST_SLOTS,
                )  # fmt: skip
                while not np.asarray(rows.finished).all():
                    if int(rows.clock) + STEPS_PER_CHUNK > rows.num_slots:
                        rows = with_slots(rows, slots_for(int(rows.clock) + STEPS_PER_CHUNK))
                    rows = decode.decode_chunk(
                        sampler.config, sampler.compute, sampler.params, prompts, rows, (0, 0, 0), rule=rule,
                        num_steps=STEPS_PER_CHUNK,
                    )  # fmt: skip
                lengths += useful(np.asarray(rows.tokens)[:, 0], sampler.eos_id, work.max_tokens)
        return Drawn(lengths, time.perf_counter() - started)


class Transformers:
    """generate with num_return_sequences, prompt after prompt."""

    def __init__(self, folder: str, work: Work, dtype: str, threads: int | None):
        import torch
        import transformers

        if threads is not None:
            torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._work = work
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = loaded.to(self._device).eval()
        self._eos = self._model.config.eos_token_id

    def describe(self) -> dict[str, Any]:
        """Where it runs."""
        return {"device": self._device}

    def run(self, seed: int) -> Drawn:
        """All samples of all prompts."""
        import torch

        torch.manual_seed(seed)
        lengths: list[int] = []
        started = time.perf_counter()
        for prompt in self._work.prompts:
            tokens = torch.tensor([prompt], device=self._device)
            drawn = self._model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=self._work.temperature,
                top_k=0, top_p=1.0, max_new_tokens=self._work.max_tokens, pad_token_id=self._eos,
                num_return_sequences=self._work.num_samples,
            )  # fmt: skip
            lengths += useful(drawn[:, len(prompt) :].cpu().numpy(), self._eos, self._work.max_tokens)
        return Drawn(lengths, time.perf_counter() - started)


class CTranslate2:
    """ctranslate2's generator: an engine in C++ that drops what has ended from its batch."""

    def __init__(self, folder: str, work: Work, dtype: str, threads: int | None):
        import ctranslate2
        import transformers

        converted = f"{folder}-ct2"
        if not Path(converted).exists():
            ctranslate2.converters.TransformersConverter(folder).convert(converted, quantization=dtype)
        self._work = work
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._prompts = [tokenizer.convert_ids_to_tokens(list(prompt)) for prompt in work.prompts]
        self._seed = ctranslate2.set_random_seed
        self._generator = ctranslate2.Generator(
            converted, device="auto", compute_type=dtype, intra_threads=threads or os.cpu_count() or 1
        )

    def describe(self) -> dict[str, Any]:
        """Where it runs."""
        return {"device": self._generator.device}

    def run(self, seed: int) -> Drawn:
        """All samples of all prompts."""
        self._seed(seed)
        lengths: list[int] = []
        started = time.perf_counter()
        for prompt in self._prompts:
            (result,) = self._generator.generate_batch(
                [prompt], max_length=self._work.max_tokens, sampling_topk=0,
                sampling_temperature=self._work.temperature, num_hypotheses=self._work.num_samples,
                include_prompt_in_result=False,
            )  # fmt: skip
            # EOS is left out of what ends with it.
            lengths += [min(len(ids) + 1, self._work.max_tokens) for ids in result.sequences_ids]
        return Drawn(lengths, time.perf_counter() - started)


def useful(tokens: np.ndarray, eos: int, most: int) -> list[int]:
    """Of each row the tokens up to and including EOS."""
    ended = (tokens == eos).any(1)
    return np.where(ended, (tokens == eos).argmax(1) + 1, min(most, tokens.shape[1])).tolist()


def random_weights(config: ModelConfig, mesh: Any, dtype: str, mean_length: float, work: Work) -> model.Params:
    """Weights of no meaning under which every token is the last one with the chance 1 / `mean_length`.

    The first coordinate of every embedding is large, so that it is nearly the same in all last hidden states; the
    column of EOS reads it, and the other columns leave it alone.
    """
    shardings = param_shardings(config, mesh)

    def make() -> model.Params:
        params = model.init(config, 0)
        params["embedding"] = params["embedding"].at[:, 0].set(2.0)
        params["output"] = (0.1 * params["output"]).at[0].set(0).at[:, EOS].set(0)
        return model.cast(params, dtype)

    params = jax.jit(make, out_shardings=shardings)()
    tokens = jnp.asarray([work.prompts[0]])
    with_first = {**params, "output": jnp.zeros_like(params["output"]).at[0, EOS].set(1)}
    first = float(jax.jit(model.logits, static_argnums=0)(config, with_first, tokens)[0, -1, EOS])
    logit = work.temperature * math.log(config.vocab_size / mean_length) / first
    output = jax.jit(lambda x: x.at[0, EOS].set(logit), out_shardings=shardings["output"])(params["output"])
    return {**params, "output": output}


def export_for_peers(checkpoint: str, folder: Path) -> str:
    """The checkpoint as the peers read it."""
    from mathscale_jax.convert.exporting import export_hf

    export_hf(checkpoint, str(folder / "hf"))
    return str(folder / "hf")


def prompts_of_problems(checkpoint: str, questions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of the questions in the checkpoint's template."""
    opened = open_checkpoint(checkpoint)
    return tuple(
        tuple(opened.tokenizer.encode_prompt(opened.meta.template.render_prompt(question))) for question in questions
    )
