"""Variants of a generated word problem: what a teacher does who is asked to change a question, or to ask it backwards.

Each takes a story within the generator's bounds and keeps it there. All are deterministic in `rng`.
"""

import random
import re
from typing import NamedTuple

from data_pipeline.word_problems import (
    ITEMS,
    MAX_CHANGE,
    MAX_START,
    MAX_VALUE,
    MIN_NUMBER,
    NAMES,
    PHRASES,
    SIGNS,
    Event,
    Story,
    Working,
    asking,
    draw_event,
    parse_story,
    split_sentences,
)

_UNDOING = {"gain": "-", "loss": "+", "double": "/"}


def add_event(story: Story, rng: random.Random) -> Story:
    """The story with one more event, at any place; so the answer is another one."""
    friend, largest = _friend(story, rng), max(MAX_VALUE, *story.values)
    while True:  # some change always fits at the end: a gain of 2 while there is room, a loss of 2 from 3 on
        place = rng.randint(0, len(story.events))
        longer = story._replace(events=(*story.events[:place], draw_event(rng, friend), *story.events[place:]))
        if longer.is_within(largest):
            return longer


def change_numbers(story: Story, rng: random.Random) -> Story:
    """The same sentences with other numbers, of the generator's default range, and another answer.

    Where no numbers lead to another answer they are drawn without that condition, and may be the same.
    """
    *_, answer = story.values
    ends = set(range(1, MAX_VALUE + 1))
    return _draw_numbers(story, rng, ends - {answer}) or _draw_numbers(story, rng, ends) or story


def _draw_numbers(story: Story, rng: random.Random, ends: set[int]) -> Story | None:
    """Other numbers that lead to one of `ends`, within bounds; None where there are none."""
    # From the end to the beginning: the values from which the rest of the story can be told. Drawing among them, no
    # try is lost, however rare the numbers are that fit.
    allowed = [ends]
    for event in reversed(story.events):
        allowed.insert(0, {v for v in range(1, MAX_VALUE + 1) if any(e.after(v) in allowed[0] for e in _others(event))})
    starts = [value for value in range(MIN_NUMBER, MAX_START + 1) if value in allowed[0]]
    if not starts:
        return None
    start = value = rng.choice(starts)
    events = []
    for event, then in zip(story.events, allowed[1:], strict=True):
        events.append(rng.choice([other for other in _others(event) if other.after(value) in then]))
        value = events[-1].after(value)
    return story._replace(start=start, events=tuple(events))


def _others(event: Event) -> list[Event]:
    """The event with every number that it may have."""
    if event.kind == "double":
        return [event]
    return [event._replace(number=number) for number in range(MIN_NUMBER, MAX_CHANGE + 1)]


def change_background(story: Story, rng: random.Random) -> Story:
    """Other people, another thing, and other phrases that say the same kinds of events; the numbers stay."""
    known = (story.name, _friend(story, rng))
    name, friend = rng.sample([name for name in NAMES if name not in known], 2)
    item = rng.choice([item for item in ITEMS if item != story.item])
    return Story(name, item, story.start, tuple(_told_otherwise(event, friend, rng) for event in story.events))


def rephrase(story: Story, rng: random.Random) -> Story:
    """Each gain and loss said by another phrase; everything else, and so the answer, stays. A double has one phrase."""
    friend = _friend(story, rng)
    return story._replace(events=tuple(_told_otherwise(event, friend, rng) for event in story.events))


def _told_otherwise(event: Event, friend: str, rng: random.Random) -> Event:
    others = [phrase for phrase in PHRASES[event.kind] if phrase != event.phrase]
    if not others:
        return event
    phrase = rng.choice(others)
    return event._replace(phrase=phrase, friend=friend if "{friend}" in phrase else None)


def _friend(story: Story, rng: random.Random) -> str:
    """The friend whom the story names, or else anyone but its hero."""
    named = [event.friend for event in story.events if event.friend is not None]
    return named[0] if named else rng.choice([name for name in NAMES if name != story.name])


class MaskedStory(NamedTuple):
    """A story of which one number is unknown and the answer known.

    `place` is 0 where the unknown number is how many there are at first, else the event's, counted from 1. In `story`
    the unknown number is 0.
    """

    story: Story
    place: int
    answer: int


def read_masked(question: str, answer: str) -> MaskedStory | None:
    """A question with x in place of a number, and its answer; None where it is none of ours."""
    story = parse_story(re.sub(r"\bx\b", "0", question))
    if story is None or not answer.isdecimal():
        return None
    numbers = [story.start, *(event.number for event in story.events)]
    return MaskedStory(story, numbers.index(0), int(answer)) if numbers.count(0) == 1 else None


def state_answer(question: str, answer: str, last: str) -> str | None:
    """A masked question with its answer as a statement, and `last`, which asks for x; None where it is none of ours."""
    masked = read_masked(question, answer)
    if masked is None:
        return None
    statement = f"{masked.story.name} has {answer} {masked.story.item} now."
    return " ".join([*split_sentences(question)[:-1], statement, last])


def read_statement(text: str) -> MaskedStory | None:
    """What `state_answer` writes; None where it is none."""
    sentences = split_sentences(text)
    stated = re.fullmatch(r"(\w+) has (\d+) (\w+) now\.", sentences[-2]) if len(sentences) > 2 else None
    if stated is None or not re.search(r"\bx\?$", sentences[-1]):
        return None
    return read_masked(" ".join([*sentences[:-2], asking(stated[1], stated[3])]), stated[2])


def find_masked(masked: MaskedStory, working: Working) -> int | None:
    """The unknown number: the steps before it are taken, those after it undone, each a line of `working`.

    None where no whole number leads to the answer.
    """
    story, place, value = masked
    try:
        before = story.start
        for event in story.events[: max(place - 1, 0)]:
            before = working.line(before, SIGNS[event.kind], event.number)
        for event in reversed(story.events[place:]):
            value = working.line(value, _UNDOING[event.kind], event.number)
    except ValueError:  # half of an odd number
        return None
    if place == 0:
        return value
    gains = story.events[place - 1].kind == "gain"
    return working.line(value, "-", before) if gains else working.line(before, "-", value)
