"""Files written whole: a reader sees the old content or the new, never a part."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError

# JSON escapes control characters, but not these three, at which str.splitlines and others break a line.
_LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})


def cache_folder() -> Path:
    """What is kept between commands: $XDG_CACHE_HOME/mathscale_jax, by default ~/.cache/mathscale_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mathscale_jax"


def write_atomically(path: Path | epath.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` on a temporary file beside `path`, flushes it to disk, and renames it.

    On an object store, where an upload is atomic already, the content is uploaded in one piece.
    """
    if "://" in str(path):
        with tempfile.TemporaryFile() as buffer:
            write(buffer)
            buffer.seek(0)
            epath.Path(path).write_bytes(buffer.read())
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: epath.Path, what: str) -> Iterator[None]:
    """Keeps other processes from the same `folder` meanwhile; the lock goes with the process, however it ends.

    Raises UsageError, which names `what`, where another one has it. An object store has no locks: nothing is done.
    """
    if "://" in str(folder):
        yield
        return
    with (Path(folder) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{what}={folder} is in use by another run: wait for it, or choose another") from error
        except OSError:  # a disk without locks
            pass
        yield


def write_text(path: Path | epath.Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path | epath.Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path | epath.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically; whatever a reader takes for the end of a line, it is one a row."""
    write_text(path, "".join(json_line(row) + "\n" for row in rows))


def json_line(row: dict[str, Any]) -> str:
    """One JSON object as a line, without its end."""
    line = json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name and UTF-8 cannot
        return json.dumps(row)
    return line


def read_json_lines(path: Path | epath.Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that `write_json_lines` wrote."""
    for line in epath.Path(path).read_text().split("\n"):
        if line:
            yield json.loads(line)


@contextlib.contextmanager
def damage_named(file: epath.Path, advice: str) -> Iterator[None]:
    """Turns what reading a damaged `file` raises into a RunError that names it and says what to do."""
    try:
        yield
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:  # UnicodeDecodeError is a ValueError
        raise RunError(f"{file} is damaged ({type(error).__name__}: {error}): {advice}") from error
