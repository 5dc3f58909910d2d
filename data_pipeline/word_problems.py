"""Multi-step word problems with worked steps, generated: data for the demo, for tests and for studies."""

import dataclasses
import random
import re
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

from data_pipeline.problem import Problem

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {friend}", "wins {n} more")
LOSSES = ("gives {n} to {friend}", "loses {n}", "sells {n}", "puts {n} in a box")
# The arithmetic is small enough to be met in full within a few hundred examples, so that what is left to learn
# for a model of half a million weights is reading the story and keeping the chain of steps. `generate_problems` makes
# larger numbers where it is told to.
MIN_NUMBER, MAX_VALUE = 2, 20


def largest_change(max_value: int) -> int:
    """The largest number that a story begins with or tells of, where its values reach to `max_value`."""
    return max_value * 9 // 20


MAX_START = MAX_CHANGE = largest_change(MAX_VALUE)

EventKind = Literal["gain", "loss", "double"]
PHRASES: dict[EventKind, tuple[str, ...]] = {"gain": GAINS, "loss": LOSSES, "double": ("doubles the {item}",)}
SIGNS: dict[EventKind, str] = {"gain": "+", "loss": "-", "double": "*"}


class Event(NamedTuple):
    """What happens in one sentence. `friend` is None where the phrase names none; the number of a double is 2."""

    kind: EventKind
    phrase: str
    number: int
    friend: str | None

    def after(self, value: int) -> int:
        """How many there are after it, where there were `value`."""
        return calculated(value, SIGNS[self.kind], self.number)


class Story(NamedTuple):
    """What a word problem says: who has how many of what at first, and what happens then."""

    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def values(self) -> list[int]:
        """How many there are at first, and after each event."""
        values = [self.start]
        for event in self.events:
            values.append(event.after(values[-1]))
        return values

    def is_within(self, max_value: int = MAX_VALUE) -> bool:
        """Whether every value is one that the generator allows."""
        return all(0 < value <= max_value for value in self.values)

    @property
    def question(self) -> str:
        """The story in sentences, and what is asked."""
        told = (event.phrase.format(n=event.number, friend=event.friend, item=self.item) for event in self.events)
        sentences = [f"{self.name} has {self.start} {self.item}.", *(f"{self.name} {what}." for what in told)]
        return " ".join([*sentences, asking(self.name, self.item)])

    def problem(self, problem_id: str = "") -> Problem:
        """The story as a problem, with one line of its solution for each event."""
        working = Working()
        answer = work_out(self, working)
        return Problem(problem_id, self.question, working.solution, str(answer), num_steps=len(working.lines))


class Working:
    """The lines of a solution, as they are worked out.

    With `slip`, a line's index and a number, the result of that line is off by the number, and what follows goes on
    from it.
    """

    def __init__(self, slip: tuple[int, int] | None = None):
        self.lines: list[str] = []
        self._slip = slip

    @property
    def solution(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)

    def line(self, left: int, sign: str, right: int) -> int:
        """Writes one calculation down, and returns its result."""
        result = calculated(left, sign, right)
        if self._slip is not None and self._slip[0] == len(self.lines):
            result += self._slip[1]
        self.lines.append(f"{left} {sign} {right} = {result}")
        return result


def calculated(left: int, sign: str, right: int) -> int:
    """The result of "+", "-", "*" or "/". Raises ValueError where a division leaves a remainder."""
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/" if left % right == 0:
            return left // right
    raise ValueError(f"{left} {sign} {right} is no whole number")


def work_out(story: Story, working: Working) -> int:
    """How many there are in the end; each event is a line of `working`."""
    value = story.start
    for event in story.events:
        value = working.line(value, SIGNS[event.kind], event.number)
    return value


def generate_problems(
    count: int,
    seed: int,
    min_steps: int = 2,
    max_steps: int = 4,
    *,
    max_value: int = MAX_VALUE,
    rarer: float = 1.0,
    without: Collection[str] = (),
) -> Iterator[Problem]:
    """`count` different problems whose solutions have `min_steps` to `max_steps` lines. Deterministic in `seed`.

    No value is larger than `max_value`. Each number of steps is `rarer` times as rare as the one before. The questions
    in `without` are left out.
    """
    rng = random.Random(seed)
    every = range(min_steps, max_steps + 1)
    shares = [rarer**-steps for steps in every]
    seen = set(without)
    while len(seen) < count + len(without):
        num_steps = rng.randint(min_steps, max_steps) if rarer == 1 else rng.choices(every, shares)[0]
        story = _generate(rng, num_steps, max_value)
        if story.question not in seen:
            problem = story.problem(f"demo/{len(seen) - len(without)}")
            seen.add(problem.question)
            yield problem


def draw_event(rng: random.Random, friend: str, max_change: int = MAX_CHANGE) -> Event:
    """Any event, whether or not what comes of it is within bounds. `friend` is whom it names, if it names someone."""
    number = rng.randint(MIN_NUMBER, max_change)
    kind: EventKind = rng.choice(("gain", "gain", "loss", "loss", "double"))
    if kind == "double":
        return Event(kind, PHRASES[kind][0], 2, None)
    phrase = rng.choice(PHRASES[kind])
    return Event(kind, phrase, number, friend if "{friend}" in phrase else None)


def _generate(rng: random.Random, num_steps: int, max_value: int) -> Story:
    largest = largest_change(max_value)
    name, friend = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    story = Story(name, item, rng.randint(MIN_NUMBER, largest), ())
    while len(story.events) < num_steps:
        longer = story._replace(events=(*story.events, draw_event(rng, friend, largest)))
        if longer.is_within(max_value):
            story = longer
    return story


def solve(question: str) -> Problem | None:
    """The generated problem whose question this is, with its solution; None where it is none of ours."""
    story = parse_story(question)
    return None if story is None else dataclasses.replace(story.problem(), question=question.strip())


def parse_story(question: str) -> Story | None:
    """The story that a question of the generator tells; None where it is none of ours."""
    sentences = split_sentences(question)
    begins = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", sentences[0]) if len(sentences) > 1 else None
    if begins is None or sentences[-1] != asking(begins[1], begins[3]):
        return None
    events = []
    for sentence in sentences[1:-1]:
        event = _parse_event(sentence.removeprefix(f"{begins[1]} ").removesuffix("."), begins[3])
        if event is None:
            return None
        events.append(event)
    return Story(begins[1], begins[3], int(begins[2]), tuple(events))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text of ours, which end with a full stop or a question mark; none where it goes on behind."""
    sentences = re.findall(r"[^.?]+[.?]", text.strip())
    return [sentence.strip() for sentence in sentences] if "".join(sentences) == text.strip() else []


def _parse_event(told: str, item: str) -> Event | None:
    for kind, phrases in PHRASES.items():
        for phrase in phrases:
            pattern = phrase.format(n=r"(?P<number>\d+)", friend=r"(?P<friend>\w+)", item=item)
            if match := re.fullmatch(pattern, told):
                said = match.groupdict()
                return Event(kind, phrase, int(said.get("number", 2)), said.get("friend"))
    return None


def asking(name: str, item: str) -> str:
    """The last sentence of a question."""
    return f"How many {item} does {name} have now?"
