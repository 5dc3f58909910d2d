"""From a seed to a row: which requests it takes, as a pure function of the replies that are there."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipeline.answers import Votes, extract, is_equal
from data_pipeline.problem import Problem
from data_pipeline.synthesis.fields import find_fields, last_question
from data_pipeline.synthesis.final_answer import check_answer
from data_pipeline.synthesis.requests import Reply, Request, Stage, make_request
from data_pipeline.synthesis.settings import SynthesisSettings
from data_pipeline.synthesis.strategies import ANSWER_FIELDS, Strategy, answer_prompt, masked
from data_pipeline.tasks.base import count_lines
from data_pipeline.tasks.math import count_sentences


@dataclasses.dataclass(frozen=True)
class Item:
    """The `variation`-th try, from 0, to make a row of a seed."""

    seed: Problem
    variation: int


@dataclasses.dataclass(frozen=True)
class Needs:
    """Requests whose replies are missing; they may be asked at once."""

    requests: tuple[Request, ...]


@dataclasses.dataclass(frozen=True)
class Lost:
    """An item of which no row comes: at which stage, why, and the text that shows it."""

    stage: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Made:
    """A row."""

    problem: Problem


Outcome = Needs | Lost | Made
# The reply to a request, None where there is none yet, or how often it was answered with nothing.
Replies = Callable[[Request], Reply | None]


def items(seeds: Sequence[Problem], count: int, random_seed: int) -> Iterator[Item]:
    """`count` items: every seed once in a random order, then every seed again. More items begin with the same ones.

    The order of a seed depends on it alone, so that more seeds leave the others' tries what they were.
    """
    order = sorted(seeds, key=lambda seed: random.Random(f"{random_seed} {seed.id}").random())
    rounds = (Item(seed, variation) for variation in itertools.count() for seed in order)
    return itertools.islice(rounds, count)


class Recipe:
    """What is done with every item of a synthesis."""

    def __init__(self, settings: SynthesisSettings, strategy: Strategy):
        self._settings, self._strategy, self._kind = settings, strategy, settings.kind
        self._digest = strategy.digest(settings.kind)
        self._placeholders = strategy.placeholders(settings.kind)

    @property
    def asks_question(self) -> bool:
        """Whether questions take a call."""
        return self._strategy.asks

    def advance(self, item: Item, reply: Replies, unreadable: Callable[[Request], int]) -> Outcome:
        """What becomes of an item, or what it needs next. Deterministic."""
        hidden = masked(item.seed, item.variation, self._settings.seed) if self._strategy.mask else None
        if self._strategy.mask and hidden is None:
            return Lost("seed", "has no number to ask for", item.seed.question)
        prompt = self._strategy.question_prompt(item.seed, hidden, self._kind)
        taken: list[tuple[Request, Reply]] = []
        question, again = prompt, 0
        if self._strategy.asks:
            asked = self._asked("question", prompt, f"{item.variation}", reply, unreadable, self._question)
            if isinstance(asked, Needs | Lost):
                return asked
            question, again = asked.content, asked.attempt
            taken.append((asked.request, asked.reply))
        expected = None
        if self._strategy.expects is not None:
            expected = item.seed.answer if hidden is None else hidden.value
        return self._answered(item, question, expected, taken, again, reply, unreadable)

    def _answered(
        self, item: Item, question: str, expected: str | None, taken: list[tuple[Request, Reply]], again: int,
        reply: Replies, unreadable: Callable[[Request], int],
    ) -> Outcome:  # fmt: skip
        """The outcome of an item whose question is there."""
        count = self._settings.answers
        prompt = answer_prompt(question, self._kind)
        # Other tries of a seed may ask its own question, too: their answers are other samples.
        prefix = f"{item.variation}." if self._strategy.keeps_question else ""
        every = [
            self._asked("answer", prompt, f"{prefix}{place}", reply, unreadable, self._solved) for place in range(count)
        ]
        needs = [request for asked in every if isinstance(asked, Needs) for request in asked.requests]
        if needs:
            return Needs(tuple(needs))
        found = [asked for asked in every if isinstance(asked, _Read)]
        if not found:
            return next(asked for asked in every if isinstance(asked, Lost))
        votes = Votes(self._kind)
        voted = [votes.of(asked.content[1]) for asked in found]
        (winner, most), *others = Counter(voted).most_common(2)
        tied = bool(others) and others[0][1] == most
        if count > 1 and (most < self._settings.agreement * count or tied):
            said = ", ".join(dict.fromkeys(asked.content[1] for asked in found))
            reason = "answers disagree" if others else "too few answers can be read"
            return Lost("answer", reason, f"{question}\n\n{said}")
        chosen = next(asked for asked, vote in zip(found, voted, strict=True) if vote == winner)
        solution, answer = chosen.content
        if expected is not None and not (equal := is_equal(answer, expected, self._kind)):
            reason = "is not the known one" if equal is False else "cannot be compared with the known one"
            return Lost("answer", reason, f"{question}\n\n{answer}, where it is {expected}")
        taken += [(asked.request, asked.reply) for asked in found]
        lineage = {
            "seed": item.seed.id,
            "variation": item.variation,
            "strategy": self._settings.strategy,
            "prompts": self._digest,
            "model": chosen.reply.model or self._settings.teacher.model,
            "endpoint": chosen.request.endpoint,
            "settings": {
                key: value for key, value in chosen.request.body.items() if key not in ("model", "messages", "seed")
            },
            "attempts": [again + 1, chosen.attempt + 1],
            "votes": [most, count],
            "prompt_tokens": sum(reply.prompt_tokens for _, reply in taken),
            "completion_tokens": sum(reply.completion_tokens for _, reply in taken),
            "dollars": sum(reply.cost for _, reply in taken) / 1e9,
            "requests": [request.key.hex()[:16] for request, _ in taken],
        }
        problem = Problem(
            id=f"{self._settings.strategy.rpartition('/')[2].removesuffix('.yaml')}/{item.seed.id}/{item.variation}",
            question=question,
            solution=solution,
            answer=answer,
            num_steps=count_sentences(solution) if self._kind == "latex" else count_lines(solution),
            level=item.seed.level,
            subject=item.seed.subject,
            lineage=json.dumps(lineage),
        )
        return Made(problem)

    def _asked(
        self, stage: Stage, prompt: str, sample: str, reply: Replies, unreadable: Callable[[Request], int],
        read: Callable[[str], Any],
    ) -> "_Read | Needs | Lost":  # fmt: skip
        """What `read` finds in a reply; one that cannot be read is asked for again, another sample, some times."""
        labels = self._strategy.question_fields if stage == "question" else ANSWER_FIELDS
        lost = Lost(stage, "gave no reply")
        for attempt in range(self._settings.attempts):
            which = sample if attempt == 0 else f"{sample} again {attempt}"
            request = make_request(self._settings.teacher, stage, prompt, labels, which)
            found = reply(request)
            if found is None:
                if unreadable(request):
                    continue
                return Needs((request,))
            if found.finish_reason in ("length", "refusal"):  # it would be cut, or refused, again: paid for nothing
                return Lost(stage, {"length": "was cut", "refusal": "was refused"}[found.finish_reason], found.text)
            content = read(found.text.rpartition("</think>")[2])  # what a reasoning model thinks aloud is no reply
            if not isinstance(content, _Unread):
                return _Read(content, request, found, attempt)
            lost = Lost(stage, content.reason, found.text)
        return lost

    def _question(self, text: str) -> "str | _Unread":
        labels = self._strategy.question_fields
        question = last_question(find_fields(text, labels), labels)
        return _Unread("has no question") if question is None or question in self._placeholders else question

    def _solved(self, text: str) -> "tuple[str, str] | _Unread":
        """Solution and final answer."""
        fields = find_fields(text, ANSWER_FIELDS)
        if ANSWER_FIELDS[0] not in fields:
            return _Unread("has no solution")
        solution = fields[ANSWER_FIELDS[0]]
        said = fields.get(ANSWER_FIELDS[1])
        # What is told as an answer is read as one: "$72.00 dollars" and "**72**" are; the solution's last is, without.
        answer = extract(solution if said is None else f"The answer is: {said}", self._kind).answer
        if answer is None:
            return _Unread("has no final answer")
        try:
            check_answer(answer, self._kind)
        except ValueError:
            return _Unread(f"ends in no {'number' if self._kind == 'number' else 'mathematics'}")
        return solution, answer


@dataclasses.dataclass(frozen=True)
class _Read:
    """What was found in a reply."""

    content: Any
    request: Request
    reply: Reply
    attempt: int


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Why nothing was."""

    reason: str
