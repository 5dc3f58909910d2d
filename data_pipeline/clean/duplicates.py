"""Rows that say the same as an earlier one: exactly, or nearly (Jaccard similarity of their n-grams of words)."""

import numpy as np
from jaxtyping import Int

from data_pipeline.clean.shingles import Shingles, jaccard

# Twenty-one bands of six: a pair as similar as 0.8 is found with probability 0.998, one of 0.5 is compared in vain in
# 28 cases of a hundred.
_NUM_PERM, _NUM_BANDS = 126, 21
_SEED = 0


def near_duplicates(texts: Shingles, threshold: float) -> dict[int, int]:
    """By row the earlier row, itself kept, that it repeats: one whose n-grams are at least as similar as `threshold`.

    Candidates are found by MinHash and locality-sensitive hashing, then compared exactly.
    """
    import rensa

    if len(texts) < 2:
        return {}
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.ascontiguousarray(texts.hashes), texts.offsets.astype(np.uint64), _NUM_PERM, _SEED
    )
    flags = rensa.RMinHashLSH(threshold, _NUM_PERM, _NUM_BANDS).query_duplicate_flags_matrix_one_shot(matrix)
    repeats: dict[int, int] = {}
    # Few are left; these meet one after another, and the first of those alike is kept.
    index = rensa.RMinHashLSH(threshold, _NUM_PERM, _NUM_BANDS)
    for row in np.flatnonzero(flags).tolist():
        own = texts[row]
        sketch = rensa.RMinHash(_NUM_PERM, _SEED)
        sketch.update([str(value) for value in own.tolist()])
        found = next((other for other in sorted(index.query(sketch)) if jaccard(own, texts[other]) >= threshold), None)
        if found is None:
            index.insert(row, sketch)
        else:
            repeats[row] = found
    return repeats


def exact_duplicates(digests: Int[np.ndarray, "rows 2"]) -> dict[int, int]:
    """By row the first row with the same digest."""
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    rows = np.arange(len(digests))
    return dict(zip(rows[firsts != rows].tolist(), firsts[firsts != rows].tolist(), strict=True))
