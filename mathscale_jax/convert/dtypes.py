"""The dtypes that weights are published and written in."""

import ml_dtypes
import numpy as np

from data_pipeline.settings import UsageError

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and ours


def numpy_dtype(name: str) -> np.dtype:
    """Of one of our names."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """`array` in another dtype. Raises UsageError, which names `what`, where float16 cannot hold its values."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # found below
        out = array.astype(dtype)
    if dtype == np.float16:
        beyond = array[np.isinf(out) & np.isfinite(array)].astype(np.float32)
        if beyond.size:
            raise UsageError(
                f"{what}: float16 ends at 65504 and cannot hold {beyond.size} of its values (up to "
                f"{np.abs(beyond).max():.3g}): give --dtype bfloat16 or float32"
            )
    return out
