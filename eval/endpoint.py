"""Samples from an OpenAI-compatible server (vLLM, SGLang, llama.cpp) in place of a checkpoint of ours."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from data_pipeline.cli import RunError, StopSignal, first_line, logger
from data_pipeline.templates import Template
from eval.local import failed
from mathscale_jax.sampler import SamplingSettings

_AT_ONCE = 16  # requests; the server queues what it cannot do at once
_RETRIES = 5  # a quarter of a minute in all
_TOO_LONG = ("context", "too long", "maximum length")  # what servers say of a prompt that does not fit
_SECONDS = 3600.0  # for one request: hundreds of samples, perhaps behind others'


def client_of(url: str) -> openai.OpenAI:
    """A client of a server; its key comes from OPENAI_API_KEY, and servers of one's own take any."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    return openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_SECONDS)


class Endpoint:
    """Draws by the completions API, which takes a prompt as it is: no chat template comes between.

    The key comes from the environment (OPENAI_API_KEY); servers of one's own take any. What is drawn is the server's:
    its seeds are asked for, and no two servers promise the same texts.
    """

    def __init__(self, url: str, model: str, template: Template):
        self.name, self.template = f"{model} at {url}", template
        self.lineage = "an OpenAI-compatible server"
        self.told: dict[str, Any] = {"model": model, "endpoint": url, "template": template.model_dump(mode="json")}
        self._model = model
        self._client = client_of(url)

    def draw(
        self, prompts: dict[str, str], settings: SamplingSettings, one_more: Callable[[int], None]
    ) -> list[list[dict[str, Any]]]:
        """Rows of each prompt's samples; of a prompt that the server refuses (too long, say) those of an error.

        Raises RunError where the server does not answer; Stopped where a signal asks to.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            futures = [pool.submit(self._draw, prompt, settings, one_more) for prompt in prompts.values()]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _draw(self, prompt: str, settings: SamplingSettings, one_more: Callable[[int], None]) -> list[dict[str, Any]]:
        StopSignal.heed()
        extra: dict[str, Any] = {} if settings.top_k is None else {"extra_body": {"top_k": settings.top_k}}
        try:
            answer = self._client.completions.create(
                model=self._model, prompt=prompt, n=settings.num_samples, temperature=settings.temperature,
                top_p=settings.top_p, max_tokens=settings.max_tokens, stop=list(settings.stop) or None,
                seed=settings.seed, logprobs=0, **extra,
            )  # fmt: skip
        except openai.BadRequestError as error:
            if not any(word in str(error).lower() for word in _TOO_LONG):
                raise RunError(f"{self._client.base_url} refuses the request: {first_line(error)}") from error
            logger.warning("recorded as an error: %s", first_line(error))
            return failed(settings, one_more)
        except openai.APIStatusError as error:
            raise RunError(
                f"{self._client.base_url} answers {error.status_code}: {first_line(error)}: does the URL end with "
                f"/v1, as most servers want it, and has it a model {self._model!r}?"
            ) from error
        except openai.OpenAIError as error:
            raise RunError(f"{self._client.base_url} does not answer: {first_line(error)}") from error
        rows = []
        for choice in sorted(answer.choices, key=lambda choice: choice.index):
            told = choice.logprobs.token_logprobs if choice.logprobs is not None else None
            if told is None:
                raise RunError(f"{self._client.base_url} gives no logprobs of its tokens, by which they are counted")
            row: dict[str, Any] = {
                "text": choice.text,
                "num_tokens": len(told),
                # Servers do not tell the end of a text from a stop string.
                "finish_reason": "length" if choice.finish_reason == "length" else "eos",
            }
            if settings.logprobs:
                row["logprob"] = round(sum(logprob or 0.0 for logprob in told), 4)
            one_more(row["num_tokens"])
            rows.append(row)
        if len(rows) != settings.num_samples:
            raise RunError(f"{self._client.base_url} gave {len(rows)} of {settings.num_samples} samples of a prompt")
        return rows
