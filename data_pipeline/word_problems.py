"""Multi-step word problems with worked steps, generated: data for the demo, for tests and for studies."""

import random
import re
from collections.abc import Iterator

from data_pipeline.problem import Problem

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {friend}", "wins {n} more")
LOSSES = ("gives {n} to {friend}", "loses {n}", "sells {n}", "puts {n} in a box")
# The arithmetic is small enough to be met in full within a few hundred examples, so that what is left to learn
# for a model of half a million weights is reading the story and keeping the chain of steps.
MAX_START, MAX_CHANGE, MAX_VALUE = 9, 9, 20


def generate_problems(count: int, seed: int, min_steps: int = 2, max_steps: int = 4) -> Iterator[Problem]:
    """`count` different problems whose solutions have `min_steps` to `max_steps` lines. Deterministic in `seed`."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        problem = _generate(rng, rng.randint(min_steps, max_steps), index=len(seen))
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _generate(rng: random.Random, num_steps: int, index: int) -> Problem:
    name, friend = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    value = rng.randint(2, MAX_START)
    sentences = [f"{name} has {value} {item}."]
    steps: list[str] = []
    while len(steps) < num_steps:
        n = rng.randint(2, MAX_CHANGE)
        event = rng.choice(("gain", "gain", "loss", "loss", "double"))
        if event == "double":
            phrase, sign, n, result = f"doubles the {item}", "*", 2, value * 2
        elif event == "gain":
            phrase, sign, result = rng.choice(GAINS).format(n=n, friend=friend), "+", value + n
        else:
            phrase, sign, result = rng.choice(LOSSES).format(n=n, friend=friend), "-", value - n
        if not 0 < result <= MAX_VALUE:
            continue
        sentences.append(f"{name} {phrase}.")
        steps.append(f"{value} {sign} {n} = {result}")
        value = result
    sentences.append(f"How many {item} does {name} have now?")
    return Problem(
        id=f"demo/{index}",
        question=" ".join(sentences),
        solution="\n".join(steps),
        answer=str(value),
        num_steps=num_steps,
    )


def solve(question: str) -> Problem | None:
    """The generated problem whose question this is, with its solution; None where it is none of ours."""
    sentences = re.findall(r"[^.?]+[.?]", question.strip())
    if len(sentences) < 2 or "".join(sentences) != question.strip():
        return None
    begins = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", sentences[0].strip())
    if begins is None or sentences[-1].strip() != f"How many {begins[3]} does {begins[1]} have now?":
        return None
    name, value, steps = begins[1], int(begins[2]), []
    for sentence in sentences[1:-1]:
        event = sentence.strip().removeprefix(f"{name} ").removesuffix(".")
        number = re.search(r"\d+", event)
        n = 2 if number is None else int(number[0])
        if event == f"doubles the {begins[3]}":
            sign, result = "*", value * 2
        elif any(re.fullmatch(_pattern(phrase, n), event) for phrase in GAINS):
            sign, result = "+", value + n
        elif any(re.fullmatch(_pattern(phrase, n), event) for phrase in LOSSES):
            sign, result = "-", value - n
        else:
            return None
        steps.append(f"{value} {sign} {n} = {result}")
        value = result
    return Problem("", question.strip(), "\n".join(steps), str(value), num_steps=len(steps))


def _pattern(phrase: str, n: int) -> str:
    return phrase.format(n=n, friend=r"\w+")
