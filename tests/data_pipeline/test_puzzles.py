"""Generated puzzles: right by a verifier of its own; the same in any number of processes; apart from the test sets."""

import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from small_run import command, environment

from data_pipeline.answers.puzzle import solves
from data_pipeline.puzzles import PuzzleData, draw, prepare_puzzles
from data_pipeline.settings import UsageError
from data_pipeline.tasks import read_problems
from data_pipeline.tokenizer import Tokenizer


def rows_of(folder: Path, split: str) -> list[dict]:
    files = sorted((folder / split).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def numbers_of(row: dict) -> tuple[list[int], int]:
    given, _, target = row["question"].partition(" -> ")
    return [int(number) for number in given.split(", ")], int(target)


def is_solved(row: dict) -> bool:
    """Worked out here, by Python's own arithmetic, and not by the grader."""
    numbers, target = numbers_of(row)
    there, value = Counter(numbers), None
    for line in row["solution"].splitlines():
        left, sign, right, result = re.fullmatch(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)", line).groups()
        there.subtract([int(left), int(right)])
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: a / b}[sign](
            int(left), int(right)
        )
        if value != int(result) or min(there.values()) < 0:
            return False
        there[int(result)] += 1
    return value == target and sum(there.values()) == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("puzzles")
    prepare_puzzles(PuzzleData(out=str(out), num_train=25_000, num_test=200, processes=2))
    return out


def test_every_puzzle_is_solved_by_its_steps_and_graded_so(made: Path) -> None:
    for split, count in (("train", 25_000), ("test", 200), ("test_numerical", 200), ("test_form", 200)):
        rows = rows_of(made, split)
        assert len(rows) == count and len({row["id"] for row in rows}) == count
        assert all(map(is_solved, rows))
        assert all(solves(row["solution"], row["question"]) for row in rows[:500])
        numbers = [numbers_of(row)[0] for row in rows]
        assert {len(of) for of in numbers} == ({6} if split == "test_form" else {5})
        assert all((max(of) > 60) == (split == "test_numerical") and max(of) <= 100 and min(of) >= 1 for of in numbers)
        assert all(1 <= numbers_of(row)[1] <= 100 for row in rows)


def test_no_test_puzzle_is_in_training_in_any_order(made: Path) -> None:
    def key(row: dict) -> tuple:
        numbers, target = numbers_of(row)
        return (*sorted(numbers), target)

    tests = [key(row) for split in ("test", "test_numerical", "test_form") for row in rows_of(made, split)]
    assert len(set(tests)) == 600 and not set(tests) & {key(row) for row in rows_of(made, "train")}


def test_test_puzzles_are_kept_out_where_they_are_met(tmp_path: Path) -> None:
    """With five numbers from 1 to 3 every test puzzle would be met in training, were it not left out."""
    settings = {"largest": 3, "largest_numerical": 4, "largest_target": 9, "num_test": 20, "num_train": 20_000}
    prepare_puzzles(PuzzleData(out=str(tmp_path), **settings))
    asked = {row["question"] for row in rows_of(tmp_path, "train")}
    assert len(asked) > 200
    rng, left_out = random.Random(0), set()
    for row in rows_of(tmp_path, "test"):
        numbers, target = numbers_of(row)
        for _ in range(50):
            rng.shuffle(numbers)
            left_out.add(f"{', '.join(map(str, numbers))} -> {target}")
    assert not left_out & asked


def test_any_number_of_processes_makes_the_same_rows(made: Path, tmp_path: Path) -> None:
    prepare_puzzles(PuzzleData(out=str(tmp_path), num_train=25_000, num_test=200, processes=1))
    for split in ("train", "test", "test_numerical", "test_form"):
        assert rows_of(tmp_path, split) == rows_of(made, split)
    prepare_puzzles(PuzzleData(out=str(tmp_path / "other"), num_train=500, num_test=200, seed=1))
    assert rows_of(tmp_path / "other", "train")[0] != rows_of(made, "train")[0]


def test_signs_and_places_are_drawn_evenly(made: Path) -> None:
    signs = Counter(line.split()[1] for row in rows_of(made, "train") for line in row["solution"].splitlines())
    assert set(signs) == set("+-*/") and min(signs.values()) > 0.02 * sum(signs.values())
    # The smallest number stands at each of five places alike: chi-square.
    distinct = [numbers_of(row)[0] for row in rows_of(made, "train")]
    places = Counter(of.index(min(of)) for of in distinct if of.count(min(of)) == 1)
    expected = sum(places.values()) / 5
    assert sum((places[place] - expected) ** 2 / expected for place in range(5)) < 23.5  # p = 1e-4


def test_a_training_run_reads_each_split(made: Path) -> None:
    assert len(read_problems("puzzle", "test", str(made))) == 200
    assert read_problems("puzzle", "test_form", str(made))[0].id == "test_form/0"
    assert len(read_problems("puzzle", "train", str(made))) == 25_000


def test_a_stop_leaves_whole_files_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = ("prepare", "puzzle", "--out", str(tmp_path), "--num-train", "3000000", "--num-test", "10")
    process = subprocess.Popen(command("data_pipeline", *words), env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list((tmp_path / "train").glob(".rows*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command again" in said
    assert not list((tmp_path / "train").iterdir()), "nothing that looks whole"


def test_a_tokenizer_for_training_from_scratch_reads_every_puzzle(tmp_path: Path) -> None:
    prepare_puzzles(PuzzleData(out=str(tmp_path), num_train=100, num_test=50, vocab_size=280))
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer.model"))
    assert tokenizer.vocab_size == 280
    for row in rows_of(tmp_path, "train"):
        tokens = tokenizer.encode_prompt(row["question"])
        assert tokenizer.decode(tokens) == row["question"]
        assert not any(tokenizer.piece(token).startswith("<0x") for token in tokens), "no character is left to bytes"
    # Digits stand alone, so a number is as many tokens as it has digits.
    assert len(tokenizer.encode_prompt("1234")) - len(tokenizer.encode_prompt("1")) == 3


def test_what_cannot_be_meant_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds other puzzles:\n  seed: 0 -> 1"):
        prepare_puzzles(PuzzleData(out=str(made), num_train=25_000, num_test=200, seed=1))
    with pytest.raises(ValueError, match="largest_numerical=60 must be above"):
        PuzzleData(out="x", largest_numerical=60)
    with pytest.raises(ValueError, match="numbers_form=5 must differ"):
        PuzzleData(out="x", numbers_form=5)
    with pytest.raises(UsageError, match="there are not so many different puzzles"):
        prepare_puzzles(PuzzleData(out=str(tmp_path), numbers=2, largest=1, largest_numerical=2, num_test=50))
    with pytest.raises(UsageError, match="the test sets hold all puzzles that there are"):
        prepare_puzzles(PuzzleData(out=str(tmp_path / "all"), numbers=2, largest=1, largest_numerical=9, num_test=2))
    with pytest.raises(UsageError, match="lead to no target"):
        draw(random.Random(0), PuzzleData(out="x", largest=10**5, largest_numerical=10**6, largest_result=1), "train")
