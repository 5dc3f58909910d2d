"""Which rows are decoded together: waves of samples that begin together, and rest together when few are left.

A decode step reads all weights whatever the number of its rows, so rows should be many; a wave's last samples are
few. So a wave is packed into a smaller grid as its rows end, and laid aside when a quarter of them is left; what was
laid aside goes on together. The schedule is a function of the prompts, the settings and the sampler's limits, never
of time: the same group of problems is drawn in the same way by whoever draws it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from mathscale_jax.sampler import decode

# Decode steps between two looks of the host at the rows.
STEPS_PER_CHUNK = 32
LAID_ASIDE_AT = 1 / 4  # of the rows a wave began with


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is decoded at once: rows, and slots of caches (rows x tokens)."""

    rows: int
    slots: int


@dataclasses.dataclass
class Wave:
    """Rows that are decoded together. `problems[i]` is whose the i-th line of the grid is."""

    problems: list[int]
    prompts: decode.Prompts
    rows: decode.Rows
    sample: Int[np.ndarray, "problems rows"]
    alive: Bool[np.ndarray, "problems rows"]


def blocks(num_problems: int, num_samples: int, limits: Limits) -> list[list[tuple[int, range]]]:
    """The samples of each wave, by problem: as many problems as fill the rows, or a part of one's samples."""
    per_problem = min(num_samples, limits.rows)
    at_once = max(1, limits.rows // per_problem)
    parts = [
        (problem, range(first, min(first + per_problem, num_samples)))
        for problem in range(num_problems)
        for first in range(0, num_samples, per_problem)
    ]
    return [parts[i : i + at_once] for i in range(0, len(parts), at_once)]


def run_waves(
    waves: Sequence[Sequence[tuple[int, range]]],
    begin: Callable[[Sequence[tuple[int, range]]], Wave],
    advance: Callable[[Wave], None],
    ended: Callable[[int, int, Int[np.ndarray, " tokens"]], None],
    limits: Limits,
) -> None:
    """Decodes all waves; tells `ended` of each sample's (problem, sample, tokens as written).

    `begin` computes the prompts of a wave, `advance` decodes a chunk of it.
    """
    aside: list[Wave] = []
    for i, blocks in enumerate(waves):
        aside += _run(begin(blocks), advance, ended, limits, last=i == len(waves) - 1 and not aside)
    while aside:
        # Of like length together: all read the caches as far as the longest reaches.
        aside.sort(key=lambda wave: int(wave.rows.clock))
        chosen = [aside.pop(0)]
        while aside and _fits([*chosen, aside[0]], limits):
            chosen.append(aside.pop(0))
        wave = chosen[0] if len(chosen) == 1 else _join(chosen)
        aside += _run(wave, advance, ended, limits, last=not aside)


def _run(
    wave: Wave,
    advance: Callable[[Wave], None],
    ended: Callable[[int, int, Int[np.ndarray, " tokens"]], None],
    limits: Limits,
    *,
    last: bool,
) -> list[Wave]:
    """Decodes a wave until it is empty, or few of its rows are left and it is not the last; returns what is left."""
    few = 0 if last else int(wave.alive.sum() * LAID_ASIDE_AT)
    left: list[Wave] = []
    while True:
        clock = int(wave.rows.clock)
        if clock + STEPS_PER_CHUNK > wave.rows.num_slots:
            slots = _slots_for(clock + STEPS_PER_CHUNK)
            while wave.alive.size * slots > limits.slots and wave.alive.sum() > 1:
                wave, second = _halves(wave)
                left.append(second)
            wave.rows = decode.with_slots(wave.rows, slots)
        advance(wave)
        finished = np.asarray(wave.rows.finished)
        now = finished & wave.alive
        if now.any():
            tokens, start, clock = np.asarray(wave.rows.tokens), np.asarray(wave.rows.start), int(wave.rows.clock)
            for line, row in zip(*np.nonzero(now), strict=True):
                written = tokens[line, row, start[line, row] : clock]
                ended(wave.problems[line], int(wave.sample[line, row]), written)
            wave.alive &= ~finished
        count = int(wave.alive.sum())
        if count == 0:
            return left
        if count <= few or _size_for(wave.alive) <= wave.alive.size // 2:
            wave = _packed(wave)
        if count <= few:
            return [*left, wave]


def _slots_for(tokens: int) -> int:
    """Few sizes, so few compilations; a step reads at most twice what is written."""
    return max(STEPS_PER_CHUNK, 1 << (tokens - 1).bit_length())


def _grid_for(alive: Bool[np.ndarray, "problems rows"]) -> tuple[int, int]:
    lines, most = int(alive.any(1).sum()), int(alive.sum(1).max())
    return 1 << (lines - 1).bit_length(), 1 << (most - 1).bit_length()


def _size_for(alive: Bool[np.ndarray, "problems rows"]) -> int:
    lines, most = _grid_for(alive)
    return lines * most


def _packed(wave: Wave) -> Wave:
    """The rows that are not finished, in the smallest grid."""
    num_lines, num_rows = _grid_for(wave.alive)
    lines = np.flatnonzero(wave.alive.any(1))
    row = np.full((num_lines, num_rows), -1, np.int32)
    for i, line in enumerate(lines):
        alive = np.flatnonzero(wave.alive[line])
        row[i, : len(alive)] = alive
    line = np.zeros(num_lines, np.int32)
    line[: len(lines)] = lines
    return _taken(wave, line, row)


def _halves(wave: Wave) -> tuple[Wave, Wave]:
    """The unfinished rows in two waves of half the size: of half the problems each, or half the rows of one."""
    wave = _packed(wave)
    num_lines, num_rows = wave.alive.shape
    rows = np.where(wave.alive, np.arange(num_rows, dtype=np.int32), -1)
    if num_lines > 1:
        half = num_lines // 2
        return tuple(  # type: ignore[return-value]
            _taken(wave, np.arange(first, first + half, dtype=np.int32), rows[first : first + half])
            for first in (0, half)
        )
    half = num_rows // 2
    return tuple(  # type: ignore[return-value]
        _taken(wave, np.zeros(1, np.int32), rows[:, first : first + half]) for first in (0, half)
    )


def _taken(wave: Wave, line: Int[np.ndarray, " chosen"], row: Int[np.ndarray, "chosen per_problem"]) -> Wave:
    prompts, rows = decode.take(wave.prompts, wave.rows, line, row)
    at = line[:, None], np.maximum(row, 0)
    return Wave(
        [wave.problems[i] for i in line],
        prompts,
        rows,
        np.where(row < 0, -1, wave.sample[at]),
        (row >= 0) & wave.alive[at],
    )


def _fits(waves: Sequence[Wave], limits: Limits) -> bool:
    lines = sum(len(wave.problems) for wave in waves)
    size = lines * max(wave.alive.shape[1] for wave in waves)
    slots = _slots_for(max(int(wave.rows.clock) for wave in waves) + STEPS_PER_CHUNK)
    return size <= limits.rows and size * slots <= limits.slots


def _join(waves: Sequence[Wave]) -> Wave:
    slots = _slots_for(max(int(wave.rows.clock) for wave in waves) + STEPS_PER_CHUNK)
    prompts, rows = decode.join(tuple((wave.prompts, wave.rows) for wave in waves), slots)
    most = max(wave.alive.shape[1] for wave in waves)

    def filled(grid: np.ndarray, value: int | bool) -> np.ndarray:
        return np.pad(grid, ((0, 0), (0, most - grid.shape[1])), constant_values=value)

    joined = Wave(
        [problem for wave in waves for problem in wave.problems],
        prompts,
        rows,
        np.concatenate([filled(wave.sample, -1) for wave in waves]),
        np.concatenate([filled(wave.alive, False) for wave in waves]),
    )
    return _packed(joined) if _size_for(joined.alive) < joined.alive.size else joined
