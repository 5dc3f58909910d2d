"""Which rows are decoded together: waves of samples that begin together, and rest together when few are left.

A decode step reads all weights whatever the number of its rows, so rows should be many; a wave's last samples are
few. So a wave is packed into the next smaller grid as soon as its rows fit, and laid aside when a quarter of them is
left; what was laid aside goes on together. The schedule is a function of the prompts, the settings and the limits,
never of time: the same group of problems is drawn in the same way by whoever draws it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int

from mathscale_jax.sampler.grid import Prompts, Rows, empty, put, take, with_slots

# Decode steps between two looks of the host at the rows, unless enough of them end before.
STEPS_PER_CHUNK = 32
FEWEST_SLOTS, SHORTEST_PROMPT = 64, 64
LAID_ASIDE_AT = 1 / 4  # of the rows a wave began with

Samples = tuple[int, range]  # a problem, and which of its samples


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is decoded at once: rows, and tokens in caches, prompts counted once a problem.

    Twice as many tokens may be laid aside besides, or be on their way from one grid into another. The rows of a
    problem are a multiple of `split`, the number of devices that share them. A token of a prompt counts as
    `prompt_token`: more than one, where only responses are stored in fewer bytes. No response has more than `longest`
    tokens.
    """

    rows: int
    tokens: int
    split: int = 1
    prompt_token: float = 1.0
    longest: int = 0

    def tokens_of(self, grid: Sequence[int], prompt: int, slots: int) -> int:
        """The tokens that the caches of a grid count as."""
        return grid[0] * (math.ceil(self.prompt_token * prompt) + grid[1] * slots)

    def take(self, grid: Sequence[int], prompt: int, slots: int) -> bool:
        """Whether a grid may be decoded: it fits, and will outgrow the caches, and be halved, no more than twice."""
        at_last = grid[0] * grid[1] * slots_for(self.longest)
        return self.tokens_of(grid, prompt, slots) <= self.tokens and at_last <= 4 * self.tokens


@dataclasses.dataclass
class Wave:
    """Rows that are decoded together. `problems[i]` is whose the i-th line of the grid is."""

    problems: list[int]
    prompts: Prompts
    rows: Rows
    sample: Int[np.ndarray, "problems rows"]
    alive: Bool[np.ndarray, "problems rows"]

    @property
    def clock(self) -> int:
        """Slots with tokens."""
        return int(self.rows.clock)


class Decoder(Protocol):
    """What is done with waves on the devices and with samples that have ended."""

    def begin(self, samples: Sequence[Samples]) -> Wave:
        """A wave with the first token of each sample."""

    def advance(self, wave: Wave, fewest: tuple[int, int, int]) -> None:
        """`STEPS_PER_CHUNK` more tokens of each, or fewer: until `fewest` problems, rows of one, or rows, are left.

        Its `rows` say which have finished.
        """

    def ended(self, problem: int, sample: int, tokens: Int[np.ndarray, " tokens"], logprobs: np.ndarray) -> None:
        """A sample has all its tokens, and perhaps some more behind its end."""


def power_of_two(number: int, multiple: int = 1) -> int:
    """The smallest power of two, times `multiple`, that is not below a number."""
    return multiple * (1 << (-(-number // multiple) - 1).bit_length())


def size_for(number: int, multiple: int = 1) -> int:
    """Of rows and slots, the size that holds a number: a power of two, or three quarters of one from 64 on.

    Every size is compiled anew, and what is beyond the number is computed for nothing: a sixth on average.
    """
    size = power_of_two(number, multiple)
    return size * 3 // 4 if size >= max(64, 4 * multiple) and number <= size * 3 // 4 else size


def slots_for(tokens: int) -> int:
    """A step reads as far as these."""
    return max(FEWEST_SLOTS, size_for(tokens))


def first_waves(prompts: Sequence[int], num_samples: int, limits: Limits) -> list[list[Samples]]:
    """The samples of each wave, by problem: as many problems as fill the limits, or a part of one's samples.

    `prompts` are their lengths, padded.
    """
    longest = max(prompts)
    per_problem = power_of_two(min(num_samples, limits.rows), limits.split)
    while per_problem > limits.split and not limits.take((1, per_problem), longest, FEWEST_SLOTS):
        per_problem //= 2
    at_once = 1
    while 2 * at_once * per_problem <= limits.rows and limits.take((2 * at_once, per_problem), longest, FEWEST_SLOTS):
        at_once *= 2
    parts = [
        (problem, range(first, min(first + per_problem, num_samples)))
        for problem in range(len(prompts))
        for first in range(0, num_samples, per_problem)
    ]
    return [parts[i : i + at_once] for i in range(0, len(parts), at_once)]


def run_waves(waves: Sequence[Sequence[Samples]], decoder: Decoder, limits: Limits) -> None:
    """Decodes all samples of all waves."""
    aside: list[Wave] = []
    for i, samples in enumerate(waves):
        aside += _run(decoder.begin(samples), decoder, limits, last=i == len(waves) - 1 and not aside)
        while sum(_tokens(wave, limits) for wave in aside) > limits.tokens // 2:
            aside += _run(_together(aside, limits), decoder, limits, last=False)
    while aside:
        # No name holds a wave while it runs: what it is packed from is free at once.
        aside += _run(_together(aside, limits), decoder, limits, last=not aside)


def _tokens(wave: Wave, limits: Limits) -> int:
    return limits.tokens_of(wave.alive.shape, wave.prompts.num_tokens, wave.rows.num_slots)


def _together(aside: list[Wave], limits: Limits) -> Wave:
    """Takes those out of `aside` that may go on in one grid, of like length: all read as far as the longest reaches.

    The longest first: they end, and free their caches, before others grow.
    """
    aside.sort(key=lambda wave: -wave.clock)
    chosen = [aside.pop(0)]
    while aside and _fit([*chosen, aside[0]], limits):
        chosen.append(aside.pop(0))
    return chosen[0] if len(chosen) == 1 else _joined(chosen, limits)


def _run(wave: Wave, decoder: Decoder, limits: Limits, *, last: bool) -> list[Wave]:
    """Decodes a wave until it is empty, or few of its rows are left and it is not the last; returns what is left."""
    few = 0 if last else int(wave.alive.sum() * LAID_ASIDE_AT)
    left: list[Wave] = []
    while True:
        wave = _without_finished(wave, decoder, limits)
        count = int(wave.alive.sum())
        if count == 0:
            return left
        if count <= few:
            return [*left, _from_its_start(wave, limits)]
        if wave.clock + STEPS_PER_CHUNK > wave.rows.num_slots:
            wave = _from_its_start(wave, limits)
        if _soon(wave.clock, limits) > wave.rows.num_slots:
            slots = slots_for(_soon(wave.clock, limits))
            while (
                limits.tokens_of(wave.alive.shape, wave.prompts.num_tokens, slots) > limits.tokens
                and wave.alive.sum() > 1
            ):
                wave, second = _halves(wave, limits)
                left.append(second)
            wave.rows = with_slots(wave.rows, slots)
        decoder.advance(wave, (*_next_smaller(wave.alive.shape, limits), few))


def _next_smaller(grid: Sequence[int], limits: Limits) -> tuple[int, int]:
    """How many problems, or rows of a problem, fit into a smaller grid."""
    of_rows = grid[1] - 1
    while of_rows and _num_rows(of_rows, grid, limits) >= grid[1]:
        of_rows -= 1
    return grid[0] // 2, of_rows


def _num_rows(most: int, grid: Sequence[int], limits: Limits) -> int:
    return size_for(most, limits.split if grid[1] % limits.split == 0 else 1)


def _without_finished(wave: Wave, decoder: Decoder, limits: Limits) -> Wave:
    """Hands over what has ended; packs the others where they fit into a smaller grid."""
    now = np.asarray(wave.rows.finished) & wave.alive
    if now.any():
        start, clock = np.asarray(wave.rows.start), wave.clock
        tokens, logprobs = np.asarray(wave.rows.tokens), np.asarray(wave.rows.logprobs)
        for line, row in zip(*np.nonzero(now), strict=True):
            written = slice(start[line, row], clock)
            decoder.ended(
                wave.problems[line], int(wave.sample[line, row]), tokens[line, row, written],
                logprobs[line, row, written],
            )  # fmt: skip
        wave.alive &= ~now
    if wave.alive.any() and np.prod(_grid_for(wave.alive, limits)) < wave.alive.size:
        return _packed(wave, limits)
    return wave


def _grid_for(alive: Bool[np.ndarray, "problems rows"], limits: Limits) -> tuple[int, int]:
    lines, most = int(alive.any(1).sum()), int(alive.sum(1).max())
    return power_of_two(lines), _num_rows(most, alive.shape, limits)


def _packed(wave: Wave, limits: Limits) -> Wave:
    """The rows that are not finished, in the smallest grid."""
    num_lines, num_rows = _grid_for(wave.alive, limits)
    lines = np.flatnonzero(wave.alive.any(1))
    row = np.full((num_lines, num_rows), -1, np.int32)
    for i, line in enumerate(lines):
        alive = np.flatnonzero(wave.alive[line])
        row[i, : len(alive)] = alive
    chosen = np.zeros(num_lines, np.int32)
    chosen[: len(lines)] = lines
    return _taken(wave, chosen, row)


def _soon(clock: int, limits: Limits) -> int:
    """How many slots the next chunk needs where the longest row began at the first."""
    return min(clock + STEPS_PER_CHUNK, limits.longest)


def _from_its_start(wave: Wave, limits: Limits) -> Wave:
    """Without the slots before the first token of its longest row: where longer ones ended."""
    if not _unused(wave):
        return wave
    wave = _packed(wave, limits)
    slots = slots_for(_soon(wave.clock, limits))
    return dataclasses.replace(wave, rows=with_slots(wave.rows, slots)) if slots < wave.rows.num_slots else wave


def _unused(wave: Wave) -> int:
    return int(np.asarray(wave.rows.start)[wave.alive].min())


def _halves(wave: Wave, limits: Limits) -> tuple[Wave, Wave]:
    """The rows that are not finished in two waves: of half the problems each, or of half the rows of one."""
    lines = np.flatnonzero(wave.alive.any(1))
    first = np.zeros_like(wave.alive)
    if len(lines) > 1:
        first[lines[: len(lines) // 2]] = True
    else:
        alive = np.flatnonzero(wave.alive[lines[0]])
        first[lines[0], alive[: len(alive) // 2]] = True
    return tuple(  # type: ignore[return-value]
        _packed(dataclasses.replace(wave, alive=wave.alive & half), limits) for half in (first, ~first)
    )


def _taken(wave: Wave, line: Int[np.ndarray, " chosen"], row: Int[np.ndarray, "chosen per_problem"]) -> Wave:
    prompts, rows = take(wave.prompts, wave.rows, line, row, np.int32(_unused(wave)))
    at = line[:, None], np.maximum(row, 0)
    return Wave(
        [wave.problems[i] for i in line],
        prompts,
        rows,
        np.where(row < 0, -1, wave.sample[at]),
        (row >= 0) & wave.alive[at],
    )


def _fit(waves: Sequence[Wave], limits: Limits) -> bool:
    lines, most = sum(len(wave.problems) for wave in waves), max(wave.alive.shape[1] for wave in waves)
    grid = power_of_two(lines), most
    prompt = max(wave.prompts.num_tokens for wave in waves)
    slots = slots_for(_soon(max(wave.clock for wave in waves), limits))
    return grid[0] * grid[1] <= limits.rows and limits.take(grid, prompt, slots)


def _joined(waves: Sequence[Wave], limits: Limits) -> Wave:
    lines, most = sum(len(wave.problems) for wave in waves), max(wave.alive.shape[1] for wave in waves)
    clock, grid = max(wave.clock for wave in waves), (power_of_two(lines), most)
    one = empty(
        waves[0].prompts, waves[0].rows, np.int32(clock), grid=grid,
        num_prompt=max(wave.prompts.num_tokens for wave in waves), num_slots=slots_for(_soon(clock, limits)),
    )  # fmt: skip
    problems: list[int] = []
    sample, alive = np.full(grid, -1, np.int32), np.zeros(grid, bool)
    for wave in waves:
        first = len(problems)
        one = put(one, wave.prompts, wave.rows, np.int32(first))
        problems += wave.problems
        here = np.s_[first : len(problems), : wave.alive.shape[1]]
        sample[here], alive[here] = wave.sample, wave.alive
    prompts, rows = one
    return Wave([*problems, *[problems[0]] * (grid[0] - lines)], prompts, rows, sample, alive)
