"""Files of tensors that torch wrote: left on disk until a tensor is used, and never let run what they hold."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from data_pipeline.cli import first_line
from data_pipeline.settings import UsageError

DOWNLOAD_AGAIN = "download it again"


def load(file: Path) -> dict[str, Any]:
    """The tensors of a file by name. Raises UsageError where it is damaged, or holds anything else."""
    try:
        import pickle

        import torch
    except ImportError as error:
        raise UsageError(f"{file}: reading it needs torch: pip install -c constraints.txt -e '.[torch]'") from error
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if ("Weights only load failed" in str(error) and "Unsupported" in str(error)) or "GLOBAL" in str(error):
            raise UsageError(f"{file} holds more than weights and could run code: it is not loaded") from error
        raise UsageError(f"{file} is truncated or damaged ({first_line(error)}): {DOWNLOAD_AGAIN}") from error
    except Exception as error:  # a changed byte may break any line of the unpickler
        if "mmap can only be used" in str(error):
            raise UsageError(
                f"{file} is in torch's format from before version 1.6, or truncated: load and save it with torch, or "
                f"{DOWNLOAD_AGAIN}"
            ) from error
        raise UsageError(f"{file} is truncated or damaged ({first_line(error)}): {DOWNLOAD_AGAIN}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    ):
        raise UsageError(f"{file} is no dictionary of tensors by name: it is not the weights of a model")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def dtype_of(tensor: Any) -> str:
    """The name of a tensor's dtype, as numpy has it where numpy has it."""
    return str(tensor.dtype).removeprefix("torch.")


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor as it lies on disk: not to be changed."""
    import torch

    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
