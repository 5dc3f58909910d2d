"""`--dry-run`: what a synthesis would ask, what that may cost, and how long it takes, before anything is sent."""

import dataclasses
from collections.abc import Iterable

from data_pipeline.synthesis.ledger import Ledger
from data_pipeline.synthesis.recipe import Item, Needs, Recipe
from data_pipeline.synthesis.requests import NANO, Request, cost_of, make_request
from data_pipeline.synthesis.settings import BATCH_SHARE, Price, SynthesisSettings
from data_pipeline.synthesis.strategies import ANSWER_FIELDS, answer_prompt

# Of a reply, as long as the ledger has too few to say: what such replies to GSM8K's questions take, roughly.
_ASSUMED_TOKENS = {"question": 450, "answer": 250}
_ASSUMED_SECONDS = 10.0
_ENOUGH = 20  # replies in the ledger, to go by them


@dataclasses.dataclass
class StageEstimate:
    """Requests of a stage that are to be sent."""

    stage: str
    requests: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    expected: int = 0  # billionths of a dollar
    at_most: int = 0


@dataclasses.dataclass
class Estimate:
    """Of a whole run. `example` is the first prompt that would be sent."""

    num_items: int
    num_done: int
    stages: list[StageEstimate]
    seconds: float
    by_ledger: bool  # whether replies in the ledger say how long others will be
    spent: int
    example: Request | None

    @property
    def expected(self) -> int:
        """Billionths of a dollar that the run will cost, probably."""
        return sum(stage.expected for stage in self.stages)

    @property
    def at_most(self) -> int:
        """Billionths of a dollar, were every reply as long as it may be."""
        return sum(stage.at_most for stage in self.stages)


def estimate(settings: SynthesisSettings, recipe: Recipe, ledger: Ledger, items: Iterable[Item]) -> Estimate:
    """What is left to ask. A reply that cannot be read is asked for again, which this does not foresee."""
    price = settings.teacher.prices()
    if settings.transport == "batch":
        price = Price(input=price.input * BATCH_SHARE, output=price.output * BATCH_SHARE)
    totals = [row for row in ledger.totals() if row["status"] == "reply"]
    stages = {name: StageEstimate(name) for name in ("question", "answer")}
    lengths, by_ledger = {}, True
    for name in stages:
        of_stage = [row for row in totals if row["stage"] == name]
        count = sum(row["count"] for row in of_stage)
        enough = count >= _ENOUGH
        by_ledger = by_ledger and (enough or (name == "question" and not recipe.asks_question))
        mean = round(sum(row["completion_tokens"] for row in of_stage) / count) if enough else _ASSUMED_TOKENS[name]
        lengths[name] = min(mean, settings.teacher.max_tokens)
    timed = [row for row in totals if row["seconds"] > 0]  # those of batches are not
    count = sum(row["count"] for row in timed)
    latency = sum(row["seconds"] * row["count"] for row in timed) / count if count >= _ENOUGH else _ASSUMED_SECONDS
    num_items = num_done = 0
    example: Request | None = None
    for item in items:
        num_items += 1
        outcome = recipe.advance(item, ledger.reply, ledger.unreadable)
        if not isinstance(outcome, Needs):
            num_done += 1
            continue
        requests = list(outcome.requests)
        if requests[0].stage == "question":  # its answers are about as long to ask for as the seed's
            prompt = answer_prompt(item.seed.question, settings.kind)
            later = make_request(settings.teacher, "answer", prompt, ANSWER_FIELDS, "0")
            requests += [later] * settings.answers
        example = example or requests[0]
        for request in requests:
            stage = stages[request.stage]
            stage.requests += 1
            stage.prompt_tokens += request.expected_prompt_tokens
            stage.reply_tokens += lengths[request.stage]
            stage.expected += cost_of(request.expected_prompt_tokens, lengths[request.stage], price)
            stage.at_most += ledger.may_cost(request, price)
    used = [stage for stage in stages.values() if stage.requests]
    return Estimate(
        num_items, num_done, used, _seconds(settings, used, latency), by_ledger, ledger.account.total, example
    )


def described(found: Estimate, settings: SynthesisSettings) -> str:
    """The estimate for people."""
    teacher = settings.teacher
    lines = [
        f"{found.num_items:,} items, of which {found.num_done:,} are done; {teacher.model} at {teacher.base_url}, "
        f"{settings.transport}",
        "",
        f"{'stage':<10}{'requests':>12}{'prompt tokens':>16}{'reply tokens':>16}{'expected':>14}{'if longest':>14}",
    ]
    lines += [
        f"{stage.stage:<10}{stage.requests:>12,}{stage.prompt_tokens:>16,}{stage.reply_tokens:>16,}"
        f"{dollars(stage.expected):>14}{dollars(stage.at_most):>14}"
        for stage in found.stages
    ]
    if found.example is not None:
        lines += ["", f"The first {found.example.stage} prompt:", ""]
        lines += [f"    {line}" for line in found.example.body["messages"][0]["content"].splitlines()]
    source = "as long as those in the ledger" if found.by_ledger else "assumed to be of usual length"
    lines += [
        "",
        f"Expected: {dollars(found.expected)} (replies are {source}), {dollars(found.at_most)} if each "
        f"request is asked once and every reply is as long as it may be; "
        f"spent or held before: {dollars(found.spent)}; budget: {dollars(round(settings.budget * NANO))}.",
        "Time: "
        + ("within a day a stage (Batch API)." if settings.transport == "batch" else f"{_said(found.seconds)}."),
    ]
    if found.spent + found.expected > settings.budget * NANO:
        lines.append("The budget will be reached before the end: raise it, or lower num_items.")
    lines.append("Nothing was sent.")
    return "\n".join(lines)


def dollars(nano: float) -> str:
    """Billionths of a dollar as dollars."""
    value = nano / NANO
    if value >= 0.1 or value == 0:
        return f"${value:,.2f}"
    return f"${value:.4f}" if value >= 0.001 else f"${value:.6f}"


def _seconds(settings: SynthesisSettings, stages: list[StageEstimate], latency: float) -> float:
    limits = settings.limits
    requests = sum(stage.requests for stage in stages)
    longest = [requests * latency / limits.concurrency]
    if limits.requests_per_minute is not None:
        longest.append(60 * requests / limits.requests_per_minute)
    if limits.tokens_per_minute is not None:
        tokens = sum(stage.prompt_tokens + stage.requests * settings.teacher.max_tokens for stage in stages)
        longest.append(60 * tokens / limits.tokens_per_minute)
    return max(longest)


def _said(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} minutes" if seconds < 7200 else f"about {seconds / 3600:.1f} hours"
