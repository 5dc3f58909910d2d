"""A request by what determines it, and what came back."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from data_pipeline.synthesis.fields import schema
from data_pipeline.synthesis.settings import Price, Teacher

_TOKENS_A_MESSAGE = 32  # more than any chat template puts around one
BELIEVABLE = 10  # times a bound, above which a usage is no usage
_BYTES_A_TOKEN = 4  # of English; for expectations, never for bounds
NANO = 1_000_000_000  # dollars are counted in whole billionths: sums of them are exact

Stage = Literal["question", "answer"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A chat completion of one reply. `sample` tells requests apart whose bodies are the same but for the seed."""

    stage: Stage
    endpoint: str
    body: dict[str, Any]
    sample: str

    @functools.cached_property
    def key(self) -> bytes:
        """32 bytes that everything determines which determines the reply."""
        whole = [self.endpoint, self.body, self.sample]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).digest()

    @functools.cached_property
    def bounds(self) -> "Bounds":
        """No tokenizer makes more tokens than there are bytes. A schema is a part of the prompt."""
        told = [message["content"] for message in self.body["messages"]]
        if "response_format" in self.body:
            told.append(json.dumps(self.body["response_format"]))
        prompt = sum(len(text.encode(errors="replace")) + _TOKENS_A_MESSAGE for text in told)
        return Bounds(prompt, self.body.get("max_tokens") or self.body["max_completion_tokens"])

    @property
    def expected_prompt_tokens(self) -> int:
        """About as many as a tokenizer makes of English."""
        return self.bounds.prompt_tokens // _BYTES_A_TOKEN


class Bounds(NamedTuple):
    """Tokens that a request takes at most."""

    prompt_tokens: int
    reply_tokens: int

    def cost(self, price: Price) -> int:
        """Billionths of a dollar."""
        return cost_of(*self, price)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a teacher wrote, and what it took. `finish_reason` is the server's, or "refusal"."""

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost: int  # billionths of a dollar


def make_request(teacher: Teacher, stage: Stage, prompt: str, labels: Sequence[str], sample: str) -> Request:
    """The request that asks `teacher` with this prompt for these fields."""
    body: dict[str, Any] = {
        "model": teacher.model,
        "messages": [{"role": "user", "content": prompt}],
        teacher.max_tokens_name: teacher.max_tokens,
        **teacher.extra,
    }
    if teacher.temperature is not None:
        body["temperature"] = teacher.temperature
    if teacher.top_p is not None:
        body["top_p"] = teacher.top_p
    if teacher.json_schema:
        body["response_format"] = schema(labels)
    if teacher.send_seed:
        body["seed"] = int.from_bytes(hashlib.sha256(f"{sample} {prompt}".encode(errors="replace")).digest()[:4]) >> 1
    return Request(stage, teacher.base_url, body, sample)


def cost_of(prompt_tokens: int, completion_tokens: int, price: Price) -> int:
    """Billionths of a dollar, rounded up."""
    exact = (prompt_tokens * price.input + completion_tokens * price.output) * (NANO / 1e6)
    return int(exact) + (exact > int(exact))


def read_reply(content: Any, bounds: Bounds, price: Price) -> Reply | None:
    """The reply in what a server answered; None where it holds none, such as a text that is no completion.

    A usage that is missing, or cannot be true, counts as the bounds of the request.
    """
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        return None
    message = choice["message"]
    text, refusal = message.get("content"), message.get("refusal")
    finish_reason = str(choice.get("finish_reason") or "unknown")
    if isinstance(refusal, str) and refusal:
        text, finish_reason = refusal, "refusal"
    elif finish_reason == "content_filter":
        text, finish_reason = text if isinstance(text, str) else "", "refusal"
    if text is None and finish_reason == "length":  # all of it went into thinking
        text = ""
    if not isinstance(text, str) or not (text.strip() or finish_reason in ("refusal", "length")):
        return None
    prompt_tokens, completion_tokens = usage_of(content, bounds)
    return Reply(
        text=as_text(text),
        finish_reason=as_text(finish_reason),
        model=as_text(str(content.get("model") or "")),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=cost_of(prompt_tokens, completion_tokens, price),
    )


def usage_of(content: Any, bounds: Bounds) -> tuple[int, int]:
    """Tokens of prompt and reply that a server says it took; the bounds where it does not say, or cannot have.

    What is somewhat above a bound is counted as it is said: a server's template may be a long one. What a model thought
    and is told in the total only counts as reply.
    """
    prompt = _said(content, "prompt_tokens", bounds.prompt_tokens)
    reply = _said(content, "completion_tokens", bounds.reply_tokens)
    total = _said(content, "total_tokens", sum(bounds))
    by_total = total - prompt if total is not None and prompt is not None else 0
    if reply is not None and by_total <= BELIEVABLE * bounds.reply_tokens:
        reply = max(reply, by_total)
    return bounds.prompt_tokens if prompt is None else prompt, bounds.reply_tokens if reply is None else reply


def told_usage(content: Any, bounds: Bounds) -> tuple[int, int] | None:
    """`usage_of`, where a server says both numbers: of an error nothing is taken for granted."""
    prompt = _said(content, "prompt_tokens", bounds.prompt_tokens)
    reply = _said(content, "completion_tokens", bounds.reply_tokens)
    return None if prompt is None or reply is None else (prompt, reply)


def _said(content: Any, name: str, most: int) -> int | None:
    """A number of a usage; None where it is not said, or cannot be true."""
    usage = content.get("usage") if isinstance(content, dict) else None
    tokens = usage.get(name) if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens <= BELIEVABLE * most else None


def of_the_prompt(said: str) -> bool:
    """Whether a refusal (HTTP 400) is a policy's of this prompt, which would be refused again.

    One for its length is none: a server's context, and what is asked for with max_tokens, may be other ones tomorrow.
    """
    marks = ("content_policy", "content_filter", "responsible_ai")
    return any(mark in said for mark in marks)


def as_text(text: str) -> str:
    """Text that can be written: a reply may name half of a character."""
    return text.encode(errors="replace").decode()
