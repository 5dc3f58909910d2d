"""Samples from weights on this machine's devices: a checkpoint's, or a published folder's as it is."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from data_pipeline.cli import logger
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint
from mathscale_jax.checksums import fingerprint
from mathscale_jax.compiled import keep_compiled
from mathscale_jax.convert.published import Published, is_published
from mathscale_jax.sampler import ProblemSamples, Prompt, PromptTooLong, Sampler, SamplingSettings
from mathscale_jax.sampler.placement import keep_freed_memory

Row = dict[str, Any]  # text, num_tokens, finish_reason, perhaps logprob


class Local:
    """Draws with our sampler. `cache_tokens` is what a job that is gone on with, or shared, planned with."""

    def __init__(
        self,
        path: str,
        *,
        dtype: Literal["bfloat16", "float32"],
        kv_cache: Literal["int8"] | None,
        rows: int,
        cache_tokens: int | None,
    ):
        keep_compiled()
        keep_freed_memory()
        weights: Published | Checkpoint = Published(path) if is_published(path) else open_checkpoint(path)
        self.name, self.lineage, self.template = weights.name, weights.meta.lineage, weights.meta.template
        self._tokenizer = weights.tokenizer
        logger.info("loading %s as %s", self.name, dtype)
        self._sampler = Sampler.of(weights, dtype, cache_dtype=kv_cache, rows=rows, max_tokens=cache_tokens)
        self.told = {
            "weights": fingerprint(self._sampler.params),
            "model": weights.meta.model.model_dump(mode="json"),
            "template": self.template.model_dump(mode="json"),
            "tokenizer_sha256": weights.meta.tokenizer_sha256,
            "dtype": dtype,
            "kv_cache": kv_cache,
            # The shapes that are computed with, as rows are: products round by them.
            "cache_tokens": self._sampler.limits.tokens,
            # Other hardware, or another version of jax, may round otherwise and so draw other texts.
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
        }

    def draw(
        self, prompts: dict[str, str], settings: SamplingSettings, one_more: Callable[[int], None]
    ) -> list[list[Row]]:
        """Rows of each prompt's samples, by problem id; of a prompt that has no room for a response those of an error.

        `one_more` is told of each sample's tokens. Raises Stopped where a signal asks to.
        """
        able: list[Prompt] = []
        for problem_id, text in prompts.items():
            prompt = Prompt(problem_id, self._tokenizer.encode_prompt(text))
            try:
                self._sampler.room(prompt, settings)
                able.append(prompt)
            except PromptTooLong as error:
                logger.warning("%s: recorded as an error", error)
        drawn = self._sampler.sample(able, settings, one_more) if able else []
        by_id = {samples.problem_id: list(self._rows(samples, settings)) for samples in drawn}
        return [by_id[problem_id] if problem_id in by_id else failed(settings, one_more) for problem_id in prompts]

    def _rows(self, drawn: ProblemSamples, settings: SamplingSettings) -> Iterator[Row]:
        every = zip(drawn.tokens, drawn.finish_reasons, drawn.logprobs, strict=True)
        for tokens, reason, logprob in every:
            text = self._tokenizer.decode(tokens.tolist())
            if reason == "stop":
                text = text[: min(text.index(stop) for stop in settings.stop if stop in text)]
            row = {"text": text, "num_tokens": len(tokens), "finish_reason": reason}
            yield {**row, "logprob": round(logprob, 4)} if settings.logprobs else row


def failed(settings: SamplingSettings, one_more: Callable[[int], None]) -> list[Row]:
    """The rows of a problem that cannot be sampled."""
    for _ in range(settings.num_samples):
        one_more(0)
    return [{"text": "", "num_tokens": 0, "finish_reason": "error"}] * settings.num_samples
