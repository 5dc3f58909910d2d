"""Checkpoints piece by piece, in the host's memory: a model never has to fit into it, nor onto the devices.

What is written is the step that checkpoint_writer.py writes of arrays on devices, checksums included, and either is
read.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils

from data_pipeline.cli import RunError
from data_pipeline.files import write_atomically
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import lora
from mathscale_jax.checkpoint import TOKENIZER_FILE, Checkpoint, Meta, absolute, chunks
from mathscale_jax.checksums import aligned_empty, host_checksum
from mathscale_jax.damage import DamagedCheckpoint, or_damaged
from mathscale_jax.processes import all_or_none, is_primary

# Pieces on their way at a time: as many as there are cores, but no more than half the largest array, or this many
# bytes, or one. Each is in memory up to three times: as it was read, as it is written, and on its way to the disk.
_BYTES_UNDER_WAY = 2**28
_SECONDS_BETWEEN_LOOKS = 0.3  # for a request to stop, and for what went wrong on another process
_SECONDS_TO_END = 60  # for writers that were asked to stop
_WEEK = 7 * 24 * 3600


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of which `read(i, into)` fills `into` with the i-th of equal ranges along axis 0, from any thread.

    `pieces` says for people where each of them comes from.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[str, ...]
    read: Callable[[int, np.ndarray], None]

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Of each range."""
        return self.shape[0] // len(self.pieces), *self.shape[1:]

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece."""
        return self.size * self.dtype.itemsize // len(self.pieces)


def write_lazily(
    directory: epath.Path,
    step: int,
    arrays: Mapping[str, LazyArray],
    meta: Meta,
    tokenizer: Tokenizer,
    wrote: Callable[[int], None],
) -> None:
    """Writes `arrays` (dotted names) as the parameters of a step that appears when all of it is on disk.

    Every process of a run calls it and writes its share of the pieces; `wrote` is told the bytes of each, from any
    thread. What `read` raises ends the writing and is raised here, and so is UsageError where values are NaN or
    infinite, with every piece that holds some, and Stopped; nothing that looks whole is left then. Call it inside a
    StopSignal: Orbax's threads wait for ever for one that an exception took out of its midst.
    """
    directory = absolute(directory)
    work = _Work(arrays, wrote)
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(
            use_compression=False,  # zstd takes longer than a disk, and saves a fifth of bfloat16 weights
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler(work))),
        ),
        "meta": _LaterJson(),
    }
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        async_options=ocp.options.AsyncOptions(timeout_secs=_WEEK),  # for which processes wait for each other
    )
    tree: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
    manager = ocp.CheckpointManager(directory, item_handlers=handlers, options=options)
    try:
        params = ocp.args.PyTreeSave(dict(arrays), save_args={name: chunks(name) for name in arrays})
        if not manager.save(step, args=ocp.args.Composite(params=params, meta=_LaterJsonSave(tree))):
            raise RunError(
                f"step {step} was not written: {directory} holds a folder of a later step; remove what is not yours"
            )
        while not _on_all_processes(work.ended):
            with all_or_none():
                work.wait(_SECONDS_BETWEEN_LOOKS)
        with all_or_none():
            work.check_finite()
        sums = _of_all_processes(work.sums)
        tree.set_result(dataclasses.replace(meta, checksums={"params": sums}).to_json())
        with all_or_none():
            if is_primary():
                write_atomically(directory / TOKENIZER_FILE, lambda file: file.write(tokenizer.model))
        manager.wait_until_finished()
    except BaseException as error:
        work.stopped = True
        if not tree.done():
            tree.set_exception(RunError(f"not written: {error}"))
        raise
    finally:
        _close(manager, failed=work.stopped)
        if work.stopped:
            work.idle.wait(_SECONDS_TO_END)
            if is_primary():
                _remove_unfinished(directory, step)


def _close(manager: ocp.CheckpointManager, *, failed: bool) -> None:
    try:
        manager.close()
    except Exception:
        if not failed:
            raise


def _remove_unfinished(directory: epath.Path, step: int) -> None:
    """It would not be taken for whole, but takes as much room. Tries again while other processes still write."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            for unfinished in directory.glob(f"{step}.orbax*"):
                unfinished.rmtree(missing_ok=True)
            time.sleep(0.1)
            if not list(directory.glob(f"{step}.orbax*")):
                return
        time.sleep(0.2)


class LazyReader:
    """Reads the parameters of a checkpoint piece by piece; an adapter is added to the ones it belongs to."""

    def __init__(self, checkpoint: Checkpoint):
        self._adapter: dict[str, dict[str, np.ndarray]] = {}
        self._lora = checkpoint.meta.lora
        if self._lora is not None:
            adapter = jax.device_get(checkpoint.restore_adapter())
            matrices = lora.adapted_matrices(self._lora)
            self._adapter = {name: adapter[module][matrix] for name, (module, matrix) in matrices.items()}
        self._stored = checkpoint if self._lora is None else checkpoint.open_base()

    def read(self, names: Sequence[str], use: Callable[[str, Iterator[np.ndarray]], None]) -> None:
        """Gives `use` each parameter with its `pieces`, as many at a time as there are cores, each in a thread.

        What one of them raises, or the main thread, ends them all and is raised here.
        """
        stopped = threading.Event()

        def until_stopped(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for piece in pieces:
                yield piece
                if stopped.is_set():
                    raise RunError("stopped")

        sizes = [self._chunk_bytes(name) for name in names]
        half = max(sizes, key=lambda size: size[1])[1] // 2
        with concurrent.futures.ThreadPoolExecutor(_at_once(max(size[0] for size in sizes), half)) as pool:
            futures = [pool.submit(use, name, until_stopped(self.pieces(name))) for name in names]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The parameter `name` in ranges along axis 0, as they lie on disk: a layer each, or more.

        Each is there until the next one is asked for. Raises DamagedCheckpoint, after the last one, where its bits are
        not those that were saved.
        """
        start = 0
        for piece in self._checked(name):
            stop = start + len(piece)
            if name in self._adapter and self._lora is not None:
                low_rank = self._adapter[name]
                piece = np.asarray(_merge(piece, low_rank["a"][start:stop], low_rank["b"][start:stop], self._lora))
            yield piece
            start = stop

    def _open(self, name: str) -> Any:
        where, folder = self._stored.name, self._stored.folder
        # Both of a disk and of an object store: the folder as a URL.
        url = str(folder / "params") if "://" in str(folder) else f"file://{folder / 'params'}"
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{url}/", "path": f"{name}/"}}
        return or_damaged(where, folder, lambda: tensorstore.open(spec, open=True, read=True).result())

    def _chunk_bytes(self, name: str) -> tuple[int, int]:
        """Bytes of what is read at a time of a parameter, and of all of it."""
        store = self._open(name)
        row = store.dtype.numpy_dtype.itemsize * math.prod(store.shape[1:])
        return row * store.chunk_layout.read_chunk.shape[0], row * store.shape[0]

    def _checked(self, name: str) -> Iterator[np.ndarray]:
        where, folder = self._stored.name, self._stored.folder
        store = self._open(name)
        rows: int = store.chunk_layout.read_chunk.shape[0]
        size, total = int(np.prod(store.shape[1:])), 0
        scratch: np.ndarray | None = None
        for start in range(0, store.shape[0], rows):
            stored = or_damaged(where, folder, partial(_read_range, store, start, min(start + rows, store.shape[0])))
            if scratch is None:
                scratch = aligned_empty(stored.shape, stored.dtype)
            piece = scratch[: len(stored)]
            piece[...] = stored
            total += host_checksum(piece, start * size)[0]
            yield piece
        if total % 2**32 != self._stored.meta.checksums["params"][name]:
            raise DamagedCheckpoint(f"checkpoint {where} is damaged: the bits of its params {name} have changed")


def _at_once(piece: int, half: int) -> int:
    return max(1, min(os.cpu_count() or 1, max(_BYTES_UNDER_WAY, half) // max(piece, 1)))


def _read_range(store: Any, start: int, stop: int) -> np.ndarray:
    return np.asarray(store[start:stop].read().result())


_merge = jax.jit(lora.merge, static_argnums=3)


class _Work:
    """This process's share of the pieces: which they are, what they add up to, and whether all are written."""

    def __init__(self, arrays: Mapping[str, LazyArray], wrote: Callable[[int], None]):
        self.wrote = wrote
        self.sums = dict.fromkeys(sorted(arrays), 0)
        self.not_finite: dict[str, int] = {}  # by piece
        self.stopped = False
        self._left = len(arrays)
        self._error: BaseException | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.idle = threading.Event()  # nothing is being written
        self.idle.set()
        piece = max(array.piece_bytes for array in arrays.values())
        half = max(array.piece_bytes * len(array.pieces) for array in arrays.values()) // 2
        self.at_once = _at_once(piece, half)
        self._scratch_bytes = piece
        self._scratch: list[np.ndarray] = []

    @contextlib.contextmanager
    def scratch(self, array: LazyArray) -> Iterator[np.ndarray]:
        """Memory for a piece of `array`, which is used again: new memory costs more than what is done with it."""
        buffer = self._scratch.pop() if self._scratch else aligned_empty((self._scratch_bytes,), np.dtype(np.uint8))
        yield buffer[: array.piece_bytes].view(array.dtype).reshape(array.piece_shape)
        self._scratch.append(buffer)

    def add(self, name: str, piece: str, checksum: int, not_finite: int) -> None:
        with self._lock:
            self.sums[name] = (self.sums[name] + checksum) % 2**32
            if not_finite:
                self.not_finite[piece] = not_finite

    def check_finite(self) -> None:
        if self.not_finite:
            listed = "\n  ".join(f"{piece}: {count}" for piece, count in sorted(self.not_finite.items()))
            raise UsageError(f"NaN or infinite values, by tensor:\n  {listed}\nnothing is kept")

    def end_array(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if error is not None:
                self.stopped = True
            if self._left == 0 or error is not None:
                self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether this process has written its share."""
        return self._ended.is_set() and self._error is None

    def wait(self, seconds: float) -> None:
        """For the end, but not longer. Raises what has ended the writing."""
        self._ended.wait(seconds)
        if self._error is not None:
            raise self._error


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays piece by piece as arrays like any other: they are read with Orbax's own handlers."""

    def __init__(self, work: _Work):
        super().__init__()
        self._work = work

    async def serialize(
        self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Starts writing; one future stands for all."""
        every = self._write_all(values, infos, args or [ocp.SaveArgs()] * len(values))
        return [ocp.future.CommitFutureAwaitingContractedSignals(every, name="lazy_arrays", timeout_secs=_WEEK)]

    async def _write_all(self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any]) -> None:
        limit = asyncio.Semaphore(self._work.at_once)
        self._work.idle.clear()
        ends = await asyncio.gather(
            *(self._write(i, *each, limit) for i, each in enumerate(zip(values, infos, args, strict=True))),
            return_exceptions=True,  # all of them end before any is told of
        )
        self._work.idle.set()
        for end in ends:
            if end is not None:
                raise end

    async def _write(self, number: int, array: LazyArray, info: Any, arg: Any, limit: asyncio.Semaphore) -> None:
        try:
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info, info.is_ocdbt_checkpoint, array.shape, array.shape, array.dtype, jax.process_index(), arg=arg
            )
            store = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)
            rows = array.shape[0] // len(array.pieces)
            for i in range(len(array.pieces)):
                if (number + i) % jax.process_count() == jax.process_index():
                    async with limit:
                        await self._write_piece(store[i * rows : (i + 1) * rows], info.name, array, i)
            self._work.end_array()
        except BaseException as error:
            self._work.end_array(error)
            raise

    async def _write_piece(self, place: Any, name: str, array: LazyArray, i: int) -> None:
        if self._work.stopped:
            raise RunError("stopped")
        with self._work.scratch(array) as piece:
            await asyncio.to_thread(array.read, i, piece)
            self._work.add(name, array.pieces[i], *await asyncio.to_thread(host_checksum, piece, i * piece.size))
            await place.write(piece, can_reference_source_data_indefinitely=True)  # not longer than until it is written
        self._work.wrote(piece.nbytes)


class _LaterJson(ocp.JsonCheckpointHandler):
    """Writes JSON that is known when everything else has been read: of a concurrent.futures.Future."""

    async def async_save(self, directory: epath.Path, item: Any = None, args: Any = None) -> Any:
        async def write() -> None:
            (known,) = await super(_LaterJson, self).async_save(
                directory, args=ocp.args.JsonSave(await asyncio.to_thread(args.item.result))
            )
            await asyncio.to_thread(known.result)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="later_json", timeout_secs=_WEEK)]


@ocp.args.register_with_handler(_LaterJson, for_save=True, for_restore=True)
@dataclasses.dataclass
class _LaterJsonSave(ocp.args.CheckpointArgs):
    item: concurrent.futures.Future[dict[str, Any]]


def _on_all_processes(ended: bool) -> bool:
    return ended if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(ended))))


def _of_all_processes(sums: dict[str, int]) -> dict[str, int]:
    if jax.process_count() == 1:
        return sums
    ours = np.asarray([sums[name] for name in sums], np.uint32)
    everyones = np.asarray(multihost_utils.process_allgather(ours)).astype(np.uint64).sum(axis=0) % 2**32
    return dict(zip(sums, map(int, everyones), strict=True))
