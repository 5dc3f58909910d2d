"""Whether a checkpoint is damaged, or only cannot be read just now: what is damaged is passed over and set aside."""

import re
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from data_pipeline.cli import RunError, Stopped, first_line, is_disk_full
from data_pipeline.settings import UsageError

T = TypeVar("T")


class DamagedCheckpoint(RunError):
    """A step that cannot be read, lacks a part, or is not bit for bit what was saved."""


# What TensorStore and Orbax begin with where the files are at fault, and not the disk, the network or the rights.
_OF_FILES = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")


def or_damaged(where: str, folder: epath.Path, read: Callable[[], T]) -> T:
    """What `read` returns of the checkpoint that `where` names to people.

    Raises DamagedCheckpoint where files in `folder` are at fault, RunError where the storage is; what says that a
    disk or a memory is full goes through as it is.
    """
    try:
        return read()
    except (UsageError, RunError, Stopped, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for one thing: it cannot be read
        if re.search("out of memory|RESOURCE_EXHAUSTED", str(error), re.IGNORECASE) or is_disk_full(error):
            raise
        cause = _cause(error)
        said = f"{type(cause).__name__}: {first_line(cause)}"
        if _is_of_files(cause) and _can_be_listed(folder):
            raise DamagedCheckpoint(
                f"checkpoint {where} is damaged or incomplete and cannot be read: {said}"
            ) from error
        raise RunError(
            f"checkpoint {where} cannot be read: {said}\nnothing says that it is damaged, and nothing was changed; "
            "run the same command again when the storage works"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """What a bare Exception, in which Orbax wraps others, was raised from."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_of_files(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    status = re.match("([A-Z_]{5,}): ", str(error))
    if status is not None:
        return status[1] in _OF_FILES
    return isinstance(error, ValueError | LookupError | TypeError | AttributeError)


def _can_be_listed(folder: epath.Path) -> bool:
    """Whether the disk answers: that a file does not exist is also what is heard of one that does not."""
    try:
        return any(True for _ in folder.iterdir())
    except FileNotFoundError:
        return True
    except OSError:
        return False
