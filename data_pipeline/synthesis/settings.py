"""What a synthesis is: seeds, strategy, teacher, limits and budget."""

import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

import pydantic

from data_pipeline.settings import Secret, Settings, UsageError, read_yaml
from data_pipeline.sources import ProblemSet
from data_pipeline.tasks import TASKS

PRICES = "configs/synthesis/prices.yaml"
_COSTLY = ("service_tier", "tools", "functions", "web_search_options", "modalities", "audio", "best_of", "prediction")
BATCH_SHARE = 0.5  # of the price, for what the Batch API does within a day


class Price(Settings):
    """Dollars for a million tokens."""

    input: pydantic.NonNegativeFloat = pydantic.Field(description="of prompts")
    output: pydantic.NonNegativeFloat = pydantic.Field(description="of replies")


class Teacher(Settings):
    """The model that is asked, behind any OpenAI-compatible server. Its key is read from the environment only."""

    model: str = pydantic.Field(description="its name on the server")
    base_url: str = pydantic.Field("https://api.openai.com/v1", description="the server, with /v1 at the end")
    key_variable: str | None = pydantic.Field(
        None, description="environment variable that holds the key; null: OPENAI_API_KEY for OpenAI's own server"
    )
    temperature: float | None = pydantic.Field(
        1.0, ge=0, le=2, description="of the draws (the paper's is 1.0); null: not said"
    )
    top_p: float | None = pydantic.Field(None, gt=0, le=1, description="of the draws; null: not said")
    max_tokens: pydantic.PositiveInt = pydantic.Field(2048, description="longest reply")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = pydantic.Field(
        "max_tokens", description="how the server calls the longest reply: OpenAI's reasoning models want the second"
    )
    json_schema: bool = pydantic.Field(False, description="ask for JSON by a strict schema, where the model has that")
    send_seed: bool = pydantic.Field(True, description="send a seed, which is another one for each request")
    extra: dict[str, Any] = pydantic.Field(
        {}, description="further keys of a request's body, such as {top_k: 20} for vLLM"
    )
    price: Price | None = pydantic.Field(
        None, description=f"dollars for a million tokens; null: the model's in {PRICES}"
    )

    @pydantic.field_validator("base_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must look like https://host/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise Secret("must hold no key, password or query: a key comes from the environment (key_variable)")
        return url.rstrip("/")

    @pydantic.field_validator("key_variable")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise Secret("must be the name of an environment variable, such as MY_KEY, and never the key itself")
        return name

    @pydantic.field_validator("extra")
    @classmethod
    def _is_no_secret(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {
            "model",
            "messages",
            "temperature",
            "top_p",
            "max_tokens",
            "max_completion_tokens",
            "seed",
            "n",
            "stream",
        }
        for name in extra:
            if name in ours | {"response_format"}:
                raise ValueError(f"{name} is a setting of its own, or ours to say")
            if name in _COSTLY:
                raise ValueError(f"{name} changes what a request costs, which teacher.price cannot say")
            if name.startswith("extra_") or name in ("timeout", "api_key", "authorization"):
                raise ValueError(f"{name} is no key of a request's body")
        return extra

    def key(self) -> str:
        """The key, which is never kept. Raises UsageError where it is missing."""
        host = urlsplit(self.base_url).hostname or ""
        variable = self.key_variable
        if variable is None and host in ("localhost", "127.0.0.1", "::1"):
            return "none"
        if variable is None and host != "api.openai.com":
            raise UsageError(
                f"no key for {self.base_url}: say in teacher.key_variable which environment variable holds it "
                "(OpenAI's is not sent elsewhere unasked; a server that wants none takes any)"
            )
        variable = variable or "OPENAI_API_KEY"
        key = os.environ.get(variable, "").strip()
        if not key:
            raise UsageError(f"no key for {self.base_url}: set the environment variable {variable}")
        if not key.isascii():
            raise UsageError(f"the key in the environment variable {variable} holds a character that no key has")
        return key

    def without_key(self, text: str) -> str:
        """`text` without the key, which a server may say again."""
        key = os.environ.get(self.key_variable or "OPENAI_API_KEY", "").strip()
        return text.replace(key, "***") if len(key) > 4 else text

    def prices(self) -> Price:
        """What its tokens cost. Raises UsageError where that is not known."""
        if self.price is not None:
            return self.price
        table = read_yaml(PRICES)
        if self.model not in table:
            raise UsageError(
                f"teacher.model={self.model!r} has no price: say teacher.price={{input: DOLLARS, output: DOLLARS}} for "
                f"a million tokens (0 for a server of your own); {PRICES} knows {', '.join(sorted(table))}"
            )
        return Price.model_validate(table[self.model])


class Limits(Settings):
    """How fast the server is asked, and how often again. None of these changes what comes out."""

    concurrency: pydantic.PositiveInt = pydantic.Field(64, description="requests under way at once")
    requests_per_minute: pydantic.PositiveFloat | None = pydantic.Field(None, description="at most; null: no limit")
    tokens_per_minute: pydantic.PositiveFloat | None = pydantic.Field(
        None, description="at most, counting prompts and the longest replies, as OpenAI does; null: no limit"
    )
    timeout: pydantic.PositiveFloat = pydantic.Field(600.0, description="seconds for one reply")
    retries: pydantic.NonNegativeInt = pydantic.Field(
        8, description="times that a request is sent again after errors of the server or the network"
    )
    longest_wait: pydantic.PositiveFloat = pydantic.Field(120.0, description="seconds between two tries, at most")


class BatchLimits(Settings):
    """The Batch API's limits (OpenAI's as published). None of these changes what comes out."""

    max_requests: int = pydantic.Field(50_000, ge=1, le=50_000, description="requests in a batch")
    max_megabytes: float = pydantic.Field(200.0, gt=0, le=200, description="size of a batch's file")
    max_open: pydantic.PositiveInt = pydantic.Field(8, description="batches under way at once")
    poll_seconds: pydantic.PositiveFloat = pydantic.Field(60.0, description="between two looks")
    count_gone_as_paid: bool = pydantic.Field(
        False, description="a batch that the server finds no more counts as paid, and its requests are asked again"
    )


class SynthesisSettings(Settings):
    """`synthesize --config CONFIG [key=value ...]`: new rows from seeds, by a teacher, within a budget."""

    out: str = pydantic.Field(description="folder of the ledger, the rows, the dataset and the report; on a local disk")
    seeds: ProblemSet = pydantic.Field(description="problems that new ones are made from")
    strategy: str = pydantic.Field(
        "brand_new", description="how: a name in `synthesize --help`, or a YAML file of yours"
    )
    num_items: pydantic.PositiveInt | None = pydantic.Field(
        None, description="tries, over all seeds in turn: raise it later and only what is new is paid; null: one a seed"
    )
    answers: pydantic.PositiveInt = pydantic.Field(
        1, description="answers to each question; more than one: the majority's is kept"
    )
    agreement: float = pydantic.Field(
        0.5, ge=0, le=1, description="share of the answers that the majority must have, where there are several"
    )
    attempts: pydantic.PositiveInt = pydantic.Field(
        2, description="times that a request is asked, where its reply cannot be read"
    )
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="of the order of the seeds, and of masked numbers")
    teacher: Teacher = pydantic.Field(description="the model that is asked")
    limits: Limits = pydantic.Field(Limits(), description="pace of requests")
    transport: Literal["direct", "batch"] = pydantic.Field(
        "direct", description="direct: request by request; batch: OpenAI's Batch API, half the price, within a day"
    )
    batch: BatchLimits = pydantic.Field(BatchLimits(), description="the Batch API's limits")
    budget: pydantic.PositiveFloat = pydantic.Field(
        description="dollars that the requests of this folder may cost in all, as an upper bound that is never passed"
    )
    against: str | None = pydantic.Field(
        None, description="test sets that nothing may be taken from, as TASK:SPLIT=SOURCE, several by commas"
    )
    similarity: float = pydantic.Field(
        0.8, gt=0, le=1, description="Jaccard similarity of n-grams of words from which two questions are one"
    )

    @pydantic.field_validator("out")
    @classmethod
    def _is_local(cls, out: str) -> str:
        if "://" in out:
            raise ValueError(
                "the ledger needs a local disk, which keeps what is written at once; copy the dataset later"
            )
        return out

    @pydantic.field_validator("seeds")
    @classmethod
    def _may_be_used(cls, seeds: ProblemSet) -> ProblemSet:
        seeds.check_licence("seeds")
        if TASKS[seeds.task].kind not in ("number", "latex"):
            raise ValueError(f"task={seeds.task!r}: its answers are neither numbers nor mathematics")
        return seeds

    @property
    def kind(self) -> Literal["number", "latex"]:
        """What answers are."""
        kind = TASKS[self.seeds.task].kind
        return "latex" if kind == "latex" else "number"

    @property
    def rows_task(self) -> str:
        """The task of the rows that come out."""
        return {"number": "jsonl", "latex": "latex"}[self.kind]

    def determining(self) -> dict[str, Any]:
        """The settings that say what a folder's requests are; more items and answers only add to them."""
        whole = self.model_dump(mode="json")
        free = {"out", "num_items", "answers", "agreement", "limits", "transport", "batch", "budget", "against"}
        kept = {key: value for key, value in whole.items() if key not in free | {"similarity", "attempts"}}
        kept["teacher"] = {k: v for k, v in kept["teacher"].items() if k not in ("price", "key_variable")}
        kept["seeds"] = {"task": self.seeds.task, "split": self.seeds.split}
        return kept
