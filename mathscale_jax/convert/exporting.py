"""Checkpoints as Hugging Face folders: a layer of a matrix in memory at a time."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from etils import epath

from data_pipeline.cli import logger, make_folder
from data_pipeline.files import locked, write_json
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint
from mathscale_jax.checkpoint_lazy import LazyReader
from mathscale_jax.convert.configs import model_config_to_hf
from mathscale_jax.convert.dtypes import DTYPES, cast, numpy_dtype
from mathscale_jax.convert.mapping import Leaf, leaves
from mathscale_jax.convert.peft import write_adapter
from mathscale_jax.convert.sources import check_local
from mathscale_jax.convert.tokenizer_files import TEMPLATE_FILE, write_tokenizer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 1000**3  # the size transformers cuts its own shards at
_WRITTEN_AT_A_TIME = 2**18  # bytes: some systems take many times as long for larger ones, none for these
_DTYPE_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


def export_hf(
    source: str, destination: str, *, dtype: str | None = None, merge: bool = False, base: str | None = None
) -> None:
    """Writes a checkpoint as a folder that transformers loads: safetensors, config.json, tokenizer and prompt template.

    Of a LoRA run it is, with `merge`, the adapted model; without, PEFT's folder of the adapter alone, in float32,
    which says that it belongs to `base`.
    The folder is made under a temporary name beside `destination` and renamed when it is whole.
    Raises UsageError where the destination exists, the checkpoint does not, or an option does not fit it.
    """
    check_local(destination)
    out = Path(destination)
    if out.exists():
        raise UsageError(f"{destination} exists: choose another folder, or remove it")
    checkpoint = open_checkpoint(source)
    adapter_alone = checkpoint.meta.lora is not None and not merge
    if merge and checkpoint.meta.lora is None:
        raise UsageError(f"--merge: {checkpoint.name} holds no adapter: leave it out, and its weights are exported")
    if base is not None and not adapter_alone:
        raise UsageError(f"--base {base}: only an adapter that is exported without --merge names its base")
    if adapter_alone and dtype is not None:
        raise UsageError(f"--dtype {dtype}: an adapter is exported in float32; leave it out, or give --merge")
    partial = out.with_name(f".{out.name}.partial")
    make_folder(epath.Path(partial), "DST")
    with locked(epath.Path(partial), "DST"):
        try:
            for left in partial.iterdir():  # by one that was killed
                if left.name != ".lock":
                    left.unlink()
            if adapter_alone:
                assert checkpoint.meta.base is not None
                write_adapter(partial, checkpoint, base or checkpoint.meta.base.path)
            else:
                _write_model(partial, checkpoint, dtype or checkpoint.stored_dtype())
            meta = checkpoint.meta
            write_tokenizer(partial, checkpoint.tokenizer, meta.companions, meta.model.max_context)
            (partial / TEMPLATE_FILE).write_text(yaml.safe_dump(meta.template.model_dump(), sort_keys=False))
            (partial / ".lock").unlink()
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if adapter_alone and base is None:
        logger.info("to load it by its own name, export its base too, and name that here with --base")
    logger.info("exported %s%s to %s", "the adapter of " if adapter_alone else "", checkpoint.name, destination)


def _write_model(folder: Path, checkpoint: Checkpoint, dtype: str) -> None:
    every_leaf = list(leaves(checkpoint.meta.model))
    shapes = {name: leaf.tensor_shape for leaf in every_leaf for name in leaf.tensors}
    by_name = {leaf.name: leaf for leaf in every_leaf}
    with (
        SafetensorsWriter(folder, shapes, dtype) as writer,
        Progress(writer.num_bytes, "exporting", "bytes") as bar,
    ):

        def write(parameter: str, pieces: Iterator[np.ndarray]) -> None:
            leaf = by_name[parameter]
            tensor: np.ndarray | None = None  # used again for every layer
            for name, ours in zip(leaf.tensors, _slices(leaf, pieces), strict=True):
                tensor = np.empty(leaf.tensor_shape, ours.dtype) if tensor is None else tensor
                leaf.to_tensor(ours, tensor)
                bar.update(writer.write(name, tensor))

        largest_first = sorted(by_name, key=lambda name: -math.prod(by_name[name].spec.shape))
        LazyReader(checkpoint).read(largest_first, write)
    ids = {"bos_token_id": checkpoint.tokenizer.bos_id, "eos_token_id": checkpoint.tokenizer.eos_id}
    padding = checkpoint.meta.companions.get("generation_config.json", {}).get("pad_token_id")
    if padding is not None:
        ids["pad_token_id"] = padding
    write_json(folder / "config.json", {**model_config_to_hf(checkpoint.meta.model, dtype), **ids})
    write_json(folder / "generation_config.json", ids)


def _slices(leaf: Leaf, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """What one published tensor each is made of."""
    if not leaf.is_stacked:
        yield _whole(leaf.slice_shape, pieces)
        return
    for piece in pieces:
        yield from piece


def _whole(shape: tuple[int, ...], pieces: Iterator[np.ndarray]) -> np.ndarray:
    """One array of all pieces, each of which is gone when the next one is there."""
    whole: np.ndarray | None = None
    start = 0
    for piece in pieces:
        whole = np.empty(shape, piece.dtype) if whole is None else whole
        whole[start : start + len(piece)] = piece
        start += len(piece)
    assert whole is not None and start == len(whole)
    return whole


class SafetensorsWriter:
    """Writes the tensors of a model in any order, from any thread, into shards whose layout is known beforehand.

    safetensors' own writer wants all tensors of a file at once; stacked leaves give one tensor of every layer at
    a time. So each file's header is written first, and every tensor then into its place.
    """

    def __init__(self, directory: Path, shapes: dict[str, tuple[int, ...]], dtype: str):
        """`shapes` in the order in which tensors fill the shards."""
        self._dtype = numpy_dtype(dtype)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._sizes = {name: math.prod(shape) * self._dtype.itemsize for name, shape in shapes.items()}
        shards = list(_shards(self._sizes))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._create(directory / file, {name: shapes[name] for name in names}, _DTYPE_NAMES[dtype])
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            write_json(directory / INDEX_FILE, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._sizes.values())

    def write(self, name: str, tensor: np.ndarray) -> int:
        """Puts a tensor into its place, and returns its bytes. Raises UsageError where its dtype cannot hold it."""
        file, place = self._places[name]
        contiguous = np.ascontiguousarray(cast(tensor, self._dtype, name))
        left = memoryview(contiguous.reshape(-1).view(np.uint8).data)
        while left:
            written = os.pwrite(file.fileno(), left[:_WRITTEN_AT_A_TIME], place)
            left, place = left[written:], place + written
        return self._sizes[name]

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Leaves every file on disk; where something went wrong, only closes them."""
        for file in {file for file, _ in self._places.values()}:
            with file:
                if kind is None:
                    os.fsync(file.fileno())

    def _create(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype_name: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            header[name] = {
                "dtype": dtype_name,
                "shape": list(shape),
                "data_offsets": [offset, offset + self._sizes[name]],
            }
            offset += self._sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        file = path.open("wb", buffering=0)
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        _allocate(file.fileno(), start + offset)
        self._places |= {name: (file, start + header[name]["data_offsets"][0]) for name in shapes}


def _allocate(descriptor: int, size: int) -> None:
    """Takes the disk space now: better a full disk at once than at the end."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS has no posix_fallocate
        os.truncate(descriptor, size)


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > MAX_SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names
