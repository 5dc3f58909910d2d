"""Rows tokenised once: flat arrays of token ids, cached by the hash of everything that determines them."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data_pipeline.files import cache_folder, write_atomically
from data_pipeline.progress import progress
from data_pipeline.tasks import Problem
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer

logger = logging.getLogger("mathscale")
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TokenizedRows:
    """Row i is tokens[offsets[i]:offsets[i + 1]]; its first prompt_lengths[i] tokens are the prompt.

    `ids[i]` names the problem it was made from; rows made otherwise have none.
    """

    tokens: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " rows+1"]
    prompt_lengths: Int[np.ndarray, " rows"]
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @functools.cached_property
    def sha256(self) -> str:
        """Identifies the rows: their tokens, their order, and where each prompt ends."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.prompt_lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def input_lengths(self) -> Int[np.ndarray, " rows"]:
        """Positions a row takes in a batch: one less than its tokens, as the last one is only a target."""
        return np.diff(self.offsets) - 1

    def select(self, rows: Int[np.ndarray, " kept"]) -> "TokenizedRows":
        """The rows with these indices, in this order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        kept = [self.tokens[self.offsets[r] : self.offsets[r + 1]] for r in rows]
        tokens = np.concatenate([self.tokens[:0], *kept])  # the empty piece: no row may be kept
        ids = tuple(self.ids[r] for r in rows) if self.ids else ()
        return TokenizedRows(tokens, offsets, self.prompt_lengths[rows], ids)


def tokenize_cached(
    problems: Sequence[Problem], tokenizer: Tokenizer, template: Template, cache_dir: Path | None = None
) -> TokenizedRows:
    """`tokenize`, read from the cache where these texts, tokenizer and template were tokenised before."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer.sha256} {template.sha256}".encode())
    for problem in problems:
        digest.update(repr((problem.question, problem.solution, problem.answer)).encode())
    path = (cache_dir or cache_folder()) / "tokens" / f"{digest.hexdigest()}.npz"
    if path.exists():
        try:
            with np.load(path) as arrays:
                ids = tuple(problem.id for problem in problems)
                return TokenizedRows(arrays["tokens"], arrays["offsets"], arrays["prompt_lengths"], ids)
        except Exception as error:  # a damaged zip file raises a dozen kinds, depending on the byte
            logger.warning("token cache %s is damaged (%s): tokenising again", path, error)
    rows = tokenize(progress(problems, "tokenising", "rows"), tokenizer, template)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"tokens": rows.tokens, "offsets": rows.offsets, "prompt_lengths": rows.prompt_lengths}
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as error:  # the cache saves time, nothing else
        logger.warning("the tokens cannot be cached: %s", error)
    return rows


def tokenize(problems: Iterable[Problem], tokenizer: Tokenizer, template: Template) -> TokenizedRows:
    """Each problem as BOS, prompt, response, EOS."""
    pieces: list[list[int]] = []
    prompt_lengths: list[int] = []
    ids: list[str] = []
    for problem in problems:
        ids.append(problem.id)
        prompt = tokenizer.encode_prompt(template.render_prompt(problem.question))
        response = tokenizer.encode_response(template.render_response(problem.solution, problem.answer))
        pieces.append(prompt + response)
        prompt_lengths.append(len(prompt))
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    tokens = np.fromiter((t for p in pieces for t in p), np.int32, count=int(offsets[-1]))
    return TokenizedRows(tokens, offsets, np.asarray(prompt_lengths, np.int32), tuple(ids))
