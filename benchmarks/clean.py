"""python -m benchmarks.clean: does cleaning find what is planted, at what speed, and in how much memory?

    python -m benchmarks.clean --train gsm8k_train.jsonl.gz --against gsm8k:test=gsm8k_test.jsonl.gz
    python -m benchmarks.clean --train gsm8k_train.jsonl.gz --num-rows 1000000 \
        --against gsm8k:test=gsm8k_test.jsonl.gz,svamp:test=svamp_test.jsonl.gz,math:test=math_test.jsonl.gz

Rows are training problems whose words were exchanged at random, so that none of them is a test problem; among them lie
questions of each test set as they are ("verbatim"), with other numbers ("renumbered"), with other names ("renamed"),
and with one word of six exchanged for another and two sentences swapped ("reworded"). Recall is the share of each kind
that is removed for being in a test set; precision the share of what is removed for it that was planted.
"""

import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from benchmarks.flags import settings_and_command
from benchmarks.report import environment, table, write_results
from benchmarks.worker import run_watched
from data_pipeline.clean.job import named_problems
from data_pipeline.cli import logger, run_command
from data_pipeline.settings import Settings
from data_pipeline.tasks import Problem, read_problems


class CleanBenchmark(Settings):
    """What is measured."""

    train: str = pydantic.Field(description="GSM8K's training file")
    against: str = pydantic.Field(description="test sets, as clean takes them: TASK:SPLIT=SOURCE, several by commas")
    num_rows: pydantic.PositiveInt = pydantic.Field(100_000, description="rows beside the planted ones")
    num_planted: pydantic.PositiveInt = pydantic.Field(300, description="questions planted of each test set and kind")
    exchanged: float = pydantic.Field(0.35, gt=0, lt=1, description="share of words exchanged in the rows")
    seed: pydantic.NonNegativeInt = pydantic.Field(0, description="of all that is random")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


def renumbered(text: str, words: Sequence[str], rng: random.Random) -> str:
    """Every number another one."""
    return re.sub(r"\d+", lambda match: str(int(match[0]) + rng.randint(1, 9)), text)


def renamed(text: str, words: Sequence[str], rng: random.Random) -> str:
    """Every word that is written large within a sentence, wherever it stands, another name."""
    inner = {m[0] for m in re.finditer(r"(?<=[a-z,] )[A-Z][a-z]+\b", text)}
    names = {name: rng.choice(["Quentin", "Zelda", "Ottilie", "Xaver", "Wanda", "Igor"]) for name in sorted(inner)}
    return re.sub(r"\b[A-Z][a-z]+\b", lambda match: names.get(match[0], match[0]), text)


def reworded(text: str, words: Sequence[str], rng: random.Random) -> str:
    """One word of six another one, and the first two sentences swapped."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    if len(sentences) > 2:
        sentences[0], sentences[1] = sentences[1], sentences[0]
    return exchanged(" ".join(sentences), words, rng, 1 / 6)


def exchanged(text: str, words: Sequence[str], rng: random.Random, share: float) -> str:
    """Each word with this probability another one."""
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())


KINDS: dict[str, Callable[[str, Sequence[str], random.Random], str]] = {
    "verbatim": lambda text, words, rng: text,
    "renumbered": renumbered,
    "renamed": renamed,
    "reworded": reworded,
}


def write_rows(
    path: Path, train: Sequence[Problem], tests: Mapping[str, Sequence[Problem]], settings: CleanBenchmark
) -> None:
    """The rows, the planted ones at random places, each named by its test set and its kind."""
    rng = random.Random(settings.seed)
    words = [word for problem in train for word in problem.question.split() if word.isalpha() and len(word) > 3]
    planted = [
        (name, kind, problem)
        for name, test in tests.items()
        for kind in KINDS
        for problem in rng.sample(list(test), min(len(test), settings.num_planted))
    ]
    rng.shuffle(planted)
    places = sorted(rng.sample(range(settings.num_rows), min(settings.num_rows, len(planted))))
    with path.open("w", encoding="utf-8") as file:
        for number in range(settings.num_rows):
            base = rng.choice(train)
            question = exchanged(base.question, words, rng, settings.exchanged)
            solution = f"{base.solution}\nIn all {rng.randrange(10**9)}."
            _write(file, f"row-{number}", question, solution, base.answer)
            if places and places[0] == number and planted:
                places.pop(0)
                name, kind, problem = planted.pop()
                question = KINDS[kind](problem.question, words, rng)
                _write(file, f"{name}/{kind}-{number}", question, f"{problem.solution}\nSo.", problem.answer)


def _write(file: Any, name: str, question: str, solution: str, answer: str) -> None:
    file.write(json.dumps({"id": name, "question": question, "solution": solution, "answer": answer}) + "\n")


def clean_all(source: Path, against: str, out: Path) -> tuple[float, float]:
    """Seconds that the command takes, and the anonymous memory of its processes together at its highest, in GB."""
    command = [sys.executable, "-m", "data_pipeline", "clean", "--task", "latex", "--source", str(source)]
    _, seconds, memory = run_watched([*command, "--out", str(out), "--against", against])
    return seconds, memory / 1e9


def benchmark(settings: CleanBenchmark, command: str) -> None:
    """Measures, prints, and writes the results."""
    where = environment("cpu", os.getloadavg()[0])
    train = read_problems("gsm8k", "train", settings.train)
    tests = {spec[0]: read_problems(*spec) for spec in named_problems("against", settings.against)}
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "rows.jsonl", Path(scratch) / "out"
        write_rows(source, train, tests, settings)
        with source.open() as file:
            there = Counter(json.loads(line)["id"].partition("-")[0] for line in file)
        seconds, memory = clean_all(source, settings.against, out)
        with (out / "removed.jsonl").open() as file:
            removed = [json.loads(line) for line in file]
    caught = Counter(line["id"].partition("-")[0] for line in removed if line["reason"] == "in a test set")
    recall = {
        name: {kind: caught[f"{name}/{kind}"] / there[f"{name}/{kind}"] for kind in KINDS if there[f"{name}/{kind}"]}
        for name in tests
    }
    planted = {name: sum(there[f"{name}/{kind}"] for kind in KINDS) for name in tests}
    precision = 1 - caught["row"] / max(1, sum(caught.values()))
    num_rows = sum(there.values())
    body = "\n\n".join(
        [
            table(
                ["test set", "planted", *KINDS],
                [
                    [name, str(planted[name]), *(f"{100 * of[kind]:.1f} %" if kind in of else "" for kind in KINDS)]
                    for name, of in recall.items()
                ],
            ),
            f"{caught['row']:,} of {there['row']:,} other rows ({100 * caught['row'] / there['row']:.2f} %) were taken "
            "for test questions, to which some of the problems that they were made from are alike: precision "
            f"{100 * precision:.1f} %",
            table(
                ["rows", "seconds", "rows/s", "memory, GB"],
                [[f"{num_rows:,}", f"{seconds:.0f}", f"{num_rows / seconds:,.0f}", f"{memory:.2f}"]],
            ),
        ]
    )
    print(body, flush=True)
    if settings.out is not None:
        values = {
            "settings": settings.model_dump(exclude={"out"}), "recall": recall, "precision": precision,
            "seconds": seconds, "memory_gb": memory, "num_rows": num_rows,
        }  # fmt: skip
        logger.info("wrote %s", write_results(settings.out, f"clean {num_rows // 1000}k", where, command, body, values))


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.clean", __doc__, CleanBenchmark, argv))


if __name__ == "__main__":
    run_command(_main)
