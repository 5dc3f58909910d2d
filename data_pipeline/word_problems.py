"""Multi-step word problems with worked steps, generated: data for the demo, for tests and for studies."""

import random
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
