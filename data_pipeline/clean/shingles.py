"""Texts as sets of hashed n-grams of words, so that they are compared by numbers.

Words are small letters without accents and punctuation; signs of arithmetic and LaTeX commands are words, too. Masked,
a number, in digits or in words, is "0", so that problems which differ in their numbers only are alike, and so is a
name, as far as it can be told: a capitalised word that does not begin a sentence, or one that was met as such in the
same text.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data_pipeline.answers.counting import NUMBER_WORDS

_WORD = re.compile(
    r"\\?[^\W\d_]+(?:['’][^\W\d_]+)?|\d(?:[\d,.]*\d)?|[+*/=^<>|!()\[\]]|\\[{}]"
    r"|-(?![^\W\d_])|(?<![^\W\d_])-"  # no hyphen between two letters
)
_SENTENCE_END = re.compile(r"[.!?:]\s*[\"'”’)]*\s*$")
_PRIME = np.uint64(0x9E3779B97F4A7C15)
NUMBER, NAME = "0", "\x01"


@dataclasses.dataclass(frozen=True)
class Shingles:
    """Text i has the distinct hashes[offsets[i]:offsets[i + 1]], in ascending order."""

    hashes: Int[np.ndarray, " hashes"]
    offsets: Int[np.ndarray, " texts+1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> Int[np.ndarray, " hashes"]:
        return self.hashes[self.offsets[text] : self.offsets[text + 1]]

    def select(self, chosen: Int[np.ndarray, " chosen"]) -> "Shingles":
        """Those of these texts, in this order."""
        sizes = np.diff(self.offsets)[chosen]
        starts = np.repeat(self.offsets[chosen] - (np.cumsum(sizes) - sizes), sizes)
        return Shingles(self.hashes[starts + np.arange(int(sizes.sum()))], np.concatenate([[0], np.cumsum(sizes)]))

    @staticmethod
    def join(parts: Sequence["Shingles"]) -> "Shingles":
        """Those of all texts, one part after another."""
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        return Shingles(np.concatenate([part.hashes for part in parts]), np.concatenate([[0], np.cumsum(sizes)]))


def words(text: str) -> tuple[list[str], list[str]]:
    """The words of a text, normalised: with numbers and names masked, and as they are."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in text if not unicodedata.combining(c))
    found = [(match[0], match.start()) for match in _WORD.finditer(text)]
    known = {
        _bare(word)
        for word, at in found
        if word[0].isupper() and len(word) > 1 and not word.isupper() and at and not _begins(text, at)
    }
    plain = [_bare(word) for word, _ in found]
    return [NAME if bare in known else _small(word) for (word, _), bare in zip(found, plain, strict=True)], plain


def shingles(texts: Sequence[Sequence[str]], n: int) -> Shingles:
    """The n-grams of each list of words; of one shorter than n, all of it together."""
    lengths = np.array([len(words) for words in texts], np.int64)
    ids = np.fromiter((_word_hash(word) for words in texts for word in words), np.uint64, count=int(lengths.sum()))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    counts = np.maximum(lengths - n + 1, (lengths > 0).astype(np.int64))
    # The n-gram that begins at each place, as a polynomial of its words; past a text's end nothing is added.
    text_of = np.repeat(np.arange(len(texts)), counts)
    first = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    hashes = np.zeros(len(first), np.uint64)
    last = ends[text_of]
    for k in range(n):
        inside = first + k < last
        step = np.zeros(len(first), np.uint64)
        step[inside] = ids[first[inside] + k]
        hashes = hashes * _PRIME + step
    order = np.lexsort((hashes, text_of))
    hashes, text_of = hashes[order], text_of[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (text_of[1:] != text_of[:-1])
    per_text = np.bincount(text_of[new], minlength=len(texts))
    return Shingles(hashes[new], np.concatenate([[0], np.cumsum(per_text)]))


def jaccard(a: Int[np.ndarray, " hashes"], b: Int[np.ndarray, " hashes"]) -> float:
    """|a ∩ b| / |a ∪ b| of two sets of hashes."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


# The same words come again and again: what they are is looked up.
@functools.lru_cache(maxsize=2**18)
def _small(word: str) -> str:
    small = _bare(word)
    return NUMBER if word[0].isdigit() or small in NUMBER_WORDS else small


@functools.lru_cache(maxsize=2**18)
def _bare(word: str) -> str:
    """Small, and without the ending of a genitive."""
    return re.sub(r"['’]s?$", "", word.lower())


def _begins(text: str, at: int) -> bool:
    """Whether a word begins a sentence."""
    return _SENTENCE_END.search(text, max(0, at - 8), at) is not None or not text[:at].strip()


@functools.lru_cache(maxsize=2**20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")
