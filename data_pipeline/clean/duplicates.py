"""Rows that say the same as an earlier one: exactly, or nearly (Jaccard similarity of their n-grams of words)."""

from collections import defaultdict
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from data_pipeline.clean.shingles import Shingles, jaccard

_NUM_PERM = 128
_RECALL = 0.99  # of pairs that are just as similar as the threshold
_BUCKET = 64  # rows that a row is compared with for one band: more have it from a text that many rows share
_CHUNK = 10_000  # rows whose sketches are taken out at a time
_SEED = 0
_MIX = np.uint64(0x9E3779B97F4A7C15)


def bands(threshold: float) -> tuple[int, int]:
    """Bands, and rows of each, of a sketch: as many rows as leave a pair at the threshold found with `_RECALL`."""
    for rows in range(_NUM_PERM, 1, -1):
        count = _NUM_PERM // rows
        if 1 - (1 - threshold**rows) ** count >= _RECALL:
            return count, rows
    return _NUM_PERM, 1


def near_duplicates(texts: Shingles, threshold: float) -> dict[int, tuple[int, float]]:
    """By row the earlier row, itself kept, that it repeats, and their similarity, which is `threshold` or more.

    Candidates are found by MinHash and locality-sensitive hashing; the likeliest by their sketches are compared
    exactly. Where a band is that of very many rows, which all begin alike, say, a row is compared with the first of
    them only: time stays bounded, and a repetition is found by its other bands.
    """
    import rensa

    if len(texts) < 2:
        return {}
    count, width = bands(threshold)
    index = rensa.RMinHashLSH(threshold, count * width, count)
    rows = np.flatnonzero(index.query_duplicate_flags_matrix_one_shot(_digests(texts, count * width)))
    # Of those that may repeat another, which are few, the sketches are looked at.
    sketches = np.zeros((len(rows), count * width), np.uint32)
    for start in range(0, len(rows), _CHUNK):
        chunk = texts.select(rows[start : start + _CHUNK])
        sketches[start : start + _CHUNK] = _digests(chunk, count * width).to_rows()
    keys = _band_keys(sketches, count, width)
    repeats: dict[int, tuple[int, float]] = {}
    # The rest meet one after another, and the first of those alike is kept.
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows.tolist()):
        met = [buckets[key] for key in keys[place].tolist()]
        found = _like(place, sorted({other for bucket in met for other in bucket}), rows, sketches, texts, threshold)
        if found is not None:
            repeats[row] = found
            continue
        for bucket in met:
            if len(bucket) < _BUCKET:
                bucket.append(place)
    return repeats


def _digests(texts: Shingles, num_perm: int) -> Any:
    """rensa's matrix of the texts' sketches."""
    import rensa

    return rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.ascontiguousarray(texts.hashes), texts.offsets.astype(np.uint64), num_perm, _SEED
    )


def _like(
    place: int, others: list[int], rows: Int[np.ndarray, " rows"], sketches: UInt[np.ndarray, "rows perms"],
    texts: Shingles, threshold: float,
) -> tuple[int, float] | None:  # fmt: skip
    """The first row among the `others` that a row repeats, and their similarity."""
    if not others:
        return None
    alike = (sketches[others] == sketches[place]).mean(axis=1)
    # What the sketches say of a similarity is off by 0.045 at most times; three times that is allowed for.
    deviation = 3 * np.sqrt(threshold * (1 - threshold) / sketches.shape[1])
    own = texts[int(rows[place])]
    for index in np.flatnonzero(alike >= threshold - deviation).tolist():
        other = int(rows[others[index]])
        similarity = jaccard(own, texts[other])
        if similarity >= threshold:
            return other, similarity
    return None


def _band_keys(sketches: UInt[np.ndarray, "rows perms"], count: int, width: int) -> UInt[np.ndarray, "rows bands"]:
    """One number for each band of each row; that of another band is another."""
    cut = sketches.reshape(len(sketches), count, width).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint64), cut.shape[:2]).copy()
    for column in range(width):
        keys = (keys ^ cut[:, :, column]) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys


def exact_duplicates(digests: Int[np.ndarray, "rows 2"]) -> dict[int, int]:
    """By row the first row with the same digest."""
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    rows = np.arange(len(digests))
    return dict(zip(rows[firsts != rows].tolist(), firsts[firsts != rows].tolist(), strict=True))
