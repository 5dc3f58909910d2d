"""The schedule alone, with grids that hold no keys and values: every sample once, and memory within its bound."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mathscale_jax.sampler import schedule
from mathscale_jax.sampler.schedule import FEWEST_SLOTS, STEPS_PER_CHUNK, Limits, Samples, Wave, first_waves, run_waves

PROMPT = 64


class Memory:
    """Slots of all grids that are alive, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


class FakePrompts:
    def __init__(self, count: int):
        self.count, self.num_tokens = count, PROMPT


class FakeRows:
    """What the schedule reads of grid.Rows."""

    def __init__(self, memory: Memory, clock: int, start: np.ndarray, finished: np.ndarray, num_slots: int):
        self.memory, self.clock, self.start, self.finished, self.num_slots = memory, clock, start, finished, num_slots
        memory.add(start.size * num_slots)
        weakref.finalize(self, memory.add, -start.size * num_slots)

    @property
    def tokens(self) -> np.ndarray:
        return np.zeros((*self.start.shape, self.num_slots), np.int8)

    logprobs = tokens


def with_slots(rows: FakeRows, num_slots: int) -> FakeRows:
    assert rows.clock <= num_slots
    return FakeRows(rows.memory, rows.clock, rows.start, rows.finished, num_slots)


def take(prompts: FakePrompts, rows: FakeRows, line: Any, row: Any, unused: Any) -> tuple[FakePrompts, FakeRows]:
    at, unused = (line[:, None], np.maximum(row, 0)), int(unused)
    start = np.maximum(rows.start[at] - unused, 0)
    return FakePrompts(len(line)), FakeRows(
        rows.memory, rows.clock - unused, start, rows.finished[at] | (row < 0), rows.num_slots
    )


def empty(
    prompts: FakePrompts, rows: FakeRows, clock: Any, *, grid: tuple[int, int], num_prompt: int, num_slots: int
) -> tuple[FakePrompts, FakeRows]:
    clock = int(clock)
    return FakePrompts(grid[0]), FakeRows(rows.memory, clock, np.full(grid, clock), np.ones(grid, bool), num_slots)


def put(into: tuple[FakePrompts, FakeRows], prompts: FakePrompts, rows: FakeRows, line: Any) -> Any:
    here = np.s_[int(line) : int(line) + rows.start.shape[0], : rows.start.shape[1]]
    into[1].start[here] = rows.start + into[1].clock - rows.clock
    into[1].finished[here] = rows.finished
    assert rows.clock <= into[1].clock <= into[1].num_slots
    return into


class FakeDecoder:
    """Ends each sample after its length."""

    def __init__(self, lengths: np.ndarray, limits: Limits):
        self.lengths, self.limits, self.memory = lengths, limits, Memory()
        self.got: list[tuple[int, int]] = []
        self.most_slots = 0

    def begin(self, samples: Sequence[Samples]) -> Wave:
        problems = [problem for problem, _ in samples]
        problems += [problems[0]] * (schedule.power_of_two(len(problems)) - len(problems))
        most = schedule.power_of_two(max(len(ids) for _, ids in samples), self.limits.split)
        sample = np.full((len(problems), most), -1)
        for line, (_, ids) in enumerate(samples):
            sample[line, : len(ids)] = ids
        rows = FakeRows(self.memory, 1, np.zeros_like(sample), sample < 0, FEWEST_SLOTS)
        return Wave(problems, FakePrompts(len(problems)), rows, sample, sample >= 0)  # type: ignore[arg-type]

    def advance(self, wave: Wave, fewest: tuple[int, int, int]) -> None:
        rows: Any = wave.rows
        lengths = self.lengths[np.array(wave.problems)[:, None], np.maximum(wave.sample, 0)]
        last = min(rows.clock + STEPS_PER_CHUNK, rows.num_slots)
        assert rows.clock < last
        self.most_slots = max(self.most_slots, rows.num_slots)
        while rows.clock < last:
            left = (~rows.finished).sum(1)
            if (left > 0).sum() <= fewest[0] or left.max() <= fewest[1] or left.sum() <= fewest[2]:
                break
            rows.clock += 1
            rows.finished = rows.finished | (rows.clock - rows.start >= lengths)

    def ended(self, problem: int, sample: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        assert len(tokens) >= self.lengths[problem, sample]
        self.got.append((problem, sample))


def geometric(mean: int, most: int, shape: tuple[int, int]) -> np.ndarray:
    return np.minimum(np.random.default_rng(0).geometric(1 / mean, shape) + 2, most)


@pytest.mark.parametrize(
    ("lengths", "limits"),
    [
        (np.full((2, 256), 2048), Limits(256, 20_000)),
        (np.full((2, 256), 512), Limits(256, 6_000)),
        (geometric(600, 2048, (4, 256)), Limits(256, 40_000)),
        (geometric(150, 512, (8, 256)), Limits(256, 20_000)),
        (geometric(150, 512, (8, 256)), Limits(256, 100_000)),
        (geometric(150, 512, (8, 100)), Limits(256, 20_000, 8)),
        (geometric(40, 300, (50, 3)), Limits(64, 3_000)),
    ],
)
def test_every_sample_ends_once_within_the_memory(
    monkeypatch: pytest.MonkeyPatch, lengths: np.ndarray, limits: Limits
) -> None:
    for function in (with_slots, take, empty, put):
        monkeypatch.setattr(schedule, function.__name__, function)
    limits = dataclasses.replace(limits, longest=int(lengths.max()))
    decoder = FakeDecoder(lengths, limits)
    run_waves(first_waves([PROMPT] * len(lengths), lengths.shape[1], limits), decoder, limits)
    assert sorted(decoder.got) == [(p, s) for p in range(len(lengths)) for s in range(lengths.shape[1])]
    assert decoder.memory.most <= 3.3 * limits.tokens  # what sampler/placement.py keeps free for it
    assert decoder.most_slots == schedule.slots_for(int(lengths.max()))
    assert decoder.memory.now == 0
