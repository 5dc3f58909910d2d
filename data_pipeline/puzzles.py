"""`prepare puzzle`: arithmetic puzzles with worked solutions (arXiv 2406.02100), as many as wanted, and test sets.

A puzzle gives numbers and a target: "3, 6, 7, 51, 58 -> 4". Its solution uses every number once, in a chain of binary
operations that ends at the target, one a line: "58 - 51 = 7". The paper publishes neither its ranges nor how it made
them; these are settings, and what they are here is written down beside the rows.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, Literal, NamedTuple

import pydantic
from etils import epath

from data_pipeline.cli import StopSignal, logger, make_folder
from data_pipeline.files import damage_named, json_line, write_atomically, write_json
from data_pipeline.progress import Progress
from data_pipeline.settings import Settings, UsageError, differences
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.workers import in_processes, serve

ROWS_A_BLOCK = 10_000  # drawn by a generator of their own, so that any number of processes makes the same rows
BLOCKS_A_FILE = 100
_FOR_THE_TOKENIZER = 2000  # puzzles that it is trained on
_MOST_TRIES = 10_000  # for one puzzle, before its settings are said to allow none
Split = Literal["train", "test", "test_numerical", "test_form"]


class PuzzleData(Settings):
    """`prepare puzzle`: training puzzles and three test sets: alike, with larger numbers, and of another form."""

    out: str = pydantic.Field(description="folder for train/, test/, test_numerical/ and test_form/")
    num_train: int = pydantic.Field(1_000_000, ge=0, le=1_000_000_000, description="training puzzles")
    num_test: int = pydantic.Field(1000, ge=1, le=100_000, description="puzzles of each test set")
    numbers: int = pydantic.Field(5, ge=2, le=20, description="how many numbers a puzzle gives")
    numbers_form: int = pydantic.Field(6, ge=2, le=20, description="how many in test_form")
    largest: int = pydantic.Field(60, ge=1, le=10**6, description="numbers are from 1 to this")
    largest_numerical: int = pydantic.Field(100, ge=1, le=10**6, description="in test_numerical, where one is larger")
    largest_target: int = pydantic.Field(100, ge=1, le=10**6, description="targets are from 1 to this")
    largest_result: int = pydantic.Field(1000, ge=1, le=10**9, description="size of results on the way, at most")
    vocab_size: int | None = pydantic.Field(
        None, ge=270, description="pieces of a tokenizer.model for training from scratch; none: no tokenizer"
    )
    seed: int = pydantic.Field(0, ge=0, lt=2**63, description="of the generator")
    processes: pydantic.PositiveInt | None = pydantic.Field(None, description="that make rows; none: one a CPU")

    @pydantic.model_validator(mode="after")
    def _differ(self) -> "PuzzleData":
        if self.largest_numerical <= self.largest:
            raise ValueError(f"largest_numerical={self.largest_numerical} must be above largest={self.largest}")
        if self.numbers_form == self.numbers:
            raise ValueError(f"numbers_form={self.numbers_form} must differ from numbers={self.numbers}")
        return self


class Puzzle(NamedTuple):
    """Numbers in the order of the question, the target, and the steps that lead there."""

    numbers: tuple[int, ...]
    target: int
    steps: tuple[str, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """The same for puzzles that differ in the order of their numbers only."""
        return (*sorted(self.numbers), self.target)

    def row(self, puzzle_id: str) -> dict[str, str]:
        """As a row of the task `puzzle`."""
        question = f"{', '.join(map(str, self.numbers))} -> {self.target}"
        return {"id": puzzle_id, "question": question, "solution": "\n".join(self.steps)}


def draw(rng: random.Random, settings: PuzzleData, split: Split) -> Puzzle:
    """A puzzle of a split. Raises UsageError where the settings allow none."""
    count = settings.numbers_form if split == "test_form" else settings.numbers
    largest = settings.largest_numerical if split == "test_numerical" else settings.largest
    for _ in range(_MOST_TRIES):
        numbers = [1 + int(rng.random() * largest) for _ in range(count)]
        if split == "test_numerical" and max(numbers) <= settings.largest:
            continue
        steps = _chain(rng, numbers, settings)
        if steps is not None:
            return Puzzle(tuple(numbers), steps[0], tuple(steps[1]))
    raise UsageError(
        f"numbers={count} up to {largest} lead to no target from 1 to largest_target={settings.largest_target} in "
        f"{_MOST_TRIES} tries: raise largest_target or largest_result"
    )


def _chain(rng: random.Random, numbers: list[int], settings: PuzzleData) -> tuple[int, list[str]] | None:
    """Target and steps; None where they lead out of bounds. Only divisions without a remainder are drawn."""
    there, steps, chance = list(numbers), [], rng.random  # several times faster than randrange, and as good for few
    while len(there) > 1:
        left = there.pop(int(chance() * len(there)))
        right = there.pop(int(chance() * len(there)))
        divides = right != 0 and left % right == 0
        sign = "+-*/"[int(chance() * (4 if divides else 3))]
        if sign == "+":
            result = left + right
        elif sign == "-":
            result = left - right
        else:
            result = left * right if sign == "*" else left // right
        if abs(result) > settings.largest_result:
            return None
        steps.append(f"{left} {sign} {right} = {result}")
        there.append(result)
    return (there[0], steps) if 1 <= there[0] <= settings.largest_target else None


def held_out(settings: PuzzleData, split: Split, others: set[tuple[int, ...]]) -> list[Puzzle]:
    """The puzzles of a test set, all different, and none of `others`. Deterministic."""
    rng = random.Random(f"{settings.seed} {split}")
    puzzles: list[Puzzle] = []
    tries = 0
    while len(puzzles) < settings.num_test:
        puzzle = draw(rng, settings, split)
        tries += 1
        if puzzle.key not in others:
            others.add(puzzle.key)
            puzzles.append(puzzle)
        elif tries > 100 * settings.num_test:
            raise UsageError(f"num_test={settings.num_test}: there are not so many different puzzles: raise largest")
    return puzzles


def block(settings: PuzzleData, number: int, tests: set[tuple[int, ...]]) -> bytes:
    """The training rows of a block, none of which is a test puzzle, as JSON Lines. Deterministic."""
    rng = random.Random(f"{settings.seed} train {number}")
    first = number * ROWS_A_BLOCK
    lines = []
    for index in range(first, min(first + ROWS_A_BLOCK, settings.num_train)):
        drawn = (draw(rng, settings, "train") for _ in range(_MOST_TRIES))
        puzzle = next((puzzle for puzzle in drawn if puzzle.key not in tests), None)
        if puzzle is None:
            raise UsageError(f"num_test={settings.num_test}: the test sets hold all puzzles that there are: lower it")
        lines.append(json_line(puzzle.row(f"train/{index}")))
    return ("\n".join(lines) + "\n").encode()


def prepare_puzzles(settings: PuzzleData) -> None:
    """Writes test, test_numerical and test_form, then train in files of a million rows.

    Deterministic in the settings, whatever the number of processes. The same command goes on where it was stopped:
    files that are there are whole. Raises UsageError where the folder holds puzzles of other settings.
    """
    out = epath.Path(settings.out)
    make_folder(out, "out")
    _open(out, settings)
    tests: set[tuple[int, ...]] = set()
    splits: tuple[Split, ...] = ("test", "test_numerical", "test_form")
    for split in splits:
        rows = [puzzle.row(f"{split}/{index}") for index, puzzle in enumerate(held_out(settings, split, tests))]
        make_folder(out / split, "out")
        write_atomically(out / split / "rows.jsonl", partial(_write, lines=[json_line(row) for row in rows]))
    if settings.vocab_size is not None:
        rng = random.Random(f"{settings.seed} tokenizer")
        rows = [draw(rng, settings, "train").row("") for _ in range(_FOR_THE_TOKENIZER)]
        model = train_tokenizer((f"{row['question']}\n{row['solution']}" for row in rows), settings.vocab_size).model
        write_atomically(out / "tokenizer.model", lambda file: file.write(model))
    make_folder(out / "train", "out")
    num_blocks = -(-settings.num_train // ROWS_A_BLOCK)
    files = {
        out / "train" / f"rows-{first // BLOCKS_A_FILE:05d}.jsonl": range(first, min(first + BLOCKS_A_FILE, num_blocks))
        for first in range(0, num_blocks, BLOCKS_A_FILE)
    }
    done = sum(len(blocks) for path, blocks in files.items() if path.exists())
    todo = {path: blocks for path, blocks in files.items() if not path.exists()}
    made = _blocks(settings, tests, [number for blocks in todo.values() for number in blocks])
    with (
        StopSignal(),
        Progress(settings.num_train, "puzzles", "rows", min(done * ROWS_A_BLOCK, settings.num_train)) as bar,
    ):
        for path, blocks in todo.items():
            write_atomically(path, partial(_write_blocks, made=made, count=len(blocks), bar=bar))
    logger.info("wrote %s puzzles, and 3 x %s test puzzles, to %s", f"{settings.num_train:,}", settings.num_test, out)


def _open(out: epath.Path, settings: PuzzleData) -> None:
    """Says what the folder is of, or checks that it is of the same."""
    file = out / "puzzles.json"
    told = settings.model_dump(mode="json", exclude={"out", "processes"})
    if file.exists():
        with damage_named(file, "choose another out"):
            before = json.loads(file.read_text())
        if changed := differences(before, told):
            raise UsageError(f"out={out} holds other puzzles:\n  " + "\n  ".join(changed) + "\nchoose another out")
    write_json(file, told)


def _blocks(settings: PuzzleData, tests: set[tuple[int, ...]], numbers: list[int]) -> Iterator[bytes]:
    """The blocks of these numbers, in order."""
    processes = min(settings.processes or len(os.sched_getaffinity(0)), len(numbers))
    if processes < 2:
        return (block(settings, number, tests) for number in numbers)
    return in_processes("data_pipeline.puzzles", (settings, tests), numbers, processes)


def _write(file: BinaryIO, lines: list[str]) -> None:
    file.write(("\n".join(lines) + "\n").encode())


def _write_blocks(file: BinaryIO, made: Iterator[bytes], count: int, bar: Progress) -> None:
    for _ in range(count):
        StopSignal.heed()
        content = next(made)
        file.write(content)
        bar.update(content.count(b"\n"))


if __name__ == "__main__":  # a process of `_blocks`

    def _begin(first: tuple[PuzzleData, set[tuple[int, ...]]]) -> Callable[[int], bytes]:
        settings, tests = first
        return lambda number: block(settings, number, tests)

    serve(_begin)
