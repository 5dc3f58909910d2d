"""Rows tokenised once: flat arrays of token ids, by several processes, cached by the hash of what they are made of."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from data_pipeline.files import cache_folder, write_atomically
from data_pipeline.problem import Problem
from data_pipeline.progress import Progress
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.workers import in_processes, serve

logger = logging.getLogger("mathscale")
FORMAT_VERSION = 2
UNKNOWN_STEPS = -1
_CHUNK = 1000  # problems that a process is given at a time
_ROWS_A_PROCESS = 20_000  # fewer are not worth one, which takes a second to start
_MAX_ID = 120  # bytes of an id that are kept

Texts = tuple[str, str, str]  # question, solution, answer
Pieces = tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]


@dataclasses.dataclass(frozen=True)
class TokenizedRows:
    """Row i is tokens[starts[i]:starts[i] + lengths[i]]; its first prompt_lengths[i] tokens are the prompt.

    A row may be there several times, and need not be there in the order of `tokens`. `num_steps` is that of its
    solution, or -1; `sources` counts the datasets that were joined; `ids` are names of problems, as UTF-8.
    """

    tokens: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " rows"]
    lengths: Int[np.ndarray, " rows"]
    prompt_lengths: Int[np.ndarray, " rows"]
    num_steps: Int[np.ndarray, " rows"]
    ids: np.ndarray
    sources: Int[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Int[np.ndarray, " length"]:
        """The tokens of a row."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = self.starts[row]
        return self.tokens[start : start + self.lengths[row]]

    def name(self, row: int) -> str:
        """The id of the problem that a row was made from."""
        return self.ids[row].decode(errors="replace")

    @functools.cached_property
    def sha256(self) -> str:
        """Identifies the rows: their tokens, their order, and where each prompt ends."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.starts, self.lengths, self.prompt_lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def input_lengths(self) -> Int[np.ndarray, " rows"]:
        """Positions a row takes in a batch: one less than its tokens, as the last one is only a target."""
        return self.lengths - 1

    def select(self, rows: Int[np.ndarray, " kept"]) -> "TokenizedRows":
        """The rows with these indices, in this order; an index may come several times."""
        per_row = ("starts", "lengths", "prompt_lengths", "num_steps", "ids", "sources")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in per_row})

    @staticmethod
    def join(parts: Sequence["TokenizedRows"]) -> "TokenizedRows":
        """The rows of several datasets, one after another; `sources` says which is which."""
        begins = np.cumsum([0, *(len(part.tokens) for part in parts)])[:-1]
        every = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(TokenizedRows)
        }
        every["starts"] = np.concatenate([part.starts + begin for part, begin in zip(parts, begins, strict=True)])
        every["sources"] = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
        return TokenizedRows(**every)


def rows_of(
    tokens: Int[np.ndarray, " tokens"],
    lengths: Int[np.ndarray, " rows"],
    prompt_lengths: Int[np.ndarray, " rows"],
    num_steps: Sequence[int | None] | None = None,
    ids: Sequence[str] | None = None,
) -> TokenizedRows:
    """Rows that lie one behind another in `tokens`."""
    count = len(lengths)
    steps = [UNKNOWN_STEPS if s is None else s for s in num_steps or [None] * count]
    names = [name.encode(errors="replace")[:_MAX_ID] for name in ids or [""] * count]
    ends = np.cumsum(lengths, dtype=np.int64)
    return TokenizedRows(
        tokens=tokens,
        starts=ends - lengths,
        lengths=np.asarray(lengths, np.int32),
        prompt_lengths=np.asarray(prompt_lengths, np.int32),
        num_steps=np.asarray(steps, np.int32),
        ids=np.asarray(names, np.dtype("S") if names else "S1"),
        sources=np.zeros(count, np.int16),
    )


def tokenize_cached(
    problems: Callable[[], Iterable[Problem]],
    fingerprint: str,
    tokenizer: Tokenizer,
    template: Template,
    cache_dir: Path | None = None,
) -> TokenizedRows:
    """`tokenize`, or what it gave before for the same `fingerprint` of the problems, tokenizer and template.

    `problems` is called only where they have to be read.
    """
    key = hashlib.sha256(f"{FORMAT_VERSION} {fingerprint} {tokenizer.sha256} {template.sha256}".encode()).hexdigest()
    path = (cache_dir or cache_folder()) / "tokens" / f"{key}.npz"
    if path.exists():
        try:
            with np.load(path) as arrays:
                return TokenizedRows(**{name: arrays[name] for name in arrays.files})
        except Exception as error:  # a damaged zip file raises a dozen kinds, depending on the byte
            logger.warning("token cache %s is damaged (%s): tokenising again", path, error)
    rows = tokenize(problems(), tokenizer, template)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as error:  # the cache saves time, nothing else
        logger.warning("the tokens cannot be cached: %s", error)
    return rows


def tokenize(
    problems: Iterable[Problem], tokenizer: Tokenizer, template: Template, num_processes: int | None = None
) -> TokenizedRows:
    """Each problem as BOS, prompt, response, EOS. By default as many processes as there are cores, of many problems."""
    ids: list[str] = []
    steps: list[int | None] = []

    def chunks() -> Iterator[list[Texts]]:
        remaining = iter(problems)
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            ids.extend(problem.id for problem in chunk)
            steps.extend(problem.num_steps for problem in chunk)
            yield [(problem.question, problem.solution, problem.answer) for problem in chunk]

    begun = chunks()
    first = list(itertools.islice(begun, _ROWS_A_PROCESS // _CHUNK))
    processes = len(os.sched_getaffinity(0)) if num_processes is None else num_processes
    if processes > 1 and (num_processes or len(first) * _CHUNK >= _ROWS_A_PROCESS):
        made = in_processes(__name__, (tokenizer.model, template), itertools.chain(first, begun), processes)
    else:
        made = map(functools.partial(_pieces, tokenizer, template), itertools.chain(first, begun))
    with Progress(None, "tokenising", "rows") as bar:
        parts: list[Pieces] = []
        for part in made:
            parts.append(part)
            bar.update(len(part[1]))
    empty = (np.zeros(0, _token_dtype(tokenizer)), np.zeros(0, np.int32), np.zeros(0, np.int32))
    tokens, lengths, prompt_lengths = (np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
    return rows_of(tokens, lengths, prompt_lengths, steps, ids)


def _pieces(tokenizer: Tokenizer, template: Template, texts: Sequence[Texts]) -> Pieces:
    pieces: list[int] = []
    lengths, prompt_lengths = [], []
    for question, solution, answer in texts:
        prompt = tokenizer.encode_prompt(template.render_prompt(question))
        response = tokenizer.encode_response(template.render_response(solution, answer))
        pieces += prompt
        pieces += response
        lengths.append(len(prompt) + len(response))
        prompt_lengths.append(len(prompt))
    return (
        np.asarray(pieces, _token_dtype(tokenizer)),
        np.asarray(lengths, np.int32),
        np.asarray(prompt_lengths, np.int32),
    )


def _token_dtype(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32


def begin(first: tuple[bytes, Template]) -> Callable[[Sequence[Texts]], Pieces]:
    """What a process does: given the tokenizer and the template, it tokenises chunks of texts."""
    model, template = first
    return functools.partial(_pieces, Tokenizer(model), template)


if __name__ == "__main__":
    from data_pipeline.tokenized import begin  # whose names the other end knows

    serve(begin)
