"""Hugging Face folders: safetensors read and written tensor by tensor, one stacked leaf at a time."""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from data_pipeline.cli import RunError
from data_pipeline.files import write_json
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError, require_file
from mathscale_jax import model
from mathscale_jax.config import ModelConfig
from mathscale_jax.convert.mapping import Leaf, leaves, model_config_from_hf

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# The size transformers cuts its own shards at.
MAX_SHARD_BYTES = 5 * 1000**3
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DTYPE_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}
# Tensors of older folders that carry no information: frequencies are computed.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


class HfFolder:
    """A folder with config.json and safetensors, checked to hold exactly the tensors of its model.

    Use as a context manager. Raises UsageError where a file is missing, truncated, or of another model.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        config_file = require_file(self.path / "config.json", "config.json of the Hugging Face folder")
        self.config: ModelConfig = model_config_from_hf(_read_json(Path(config_file)), str(config_file))
        self._stack = ExitStack()
        self._files = {name: self._open(name) for name in self._file_names()}
        self._where = {tensor: file for file in self._files.values() for tensor in file.keys()}  # noqa: SIM118
        self._check()

    def __enter__(self) -> "HfFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def dtype(self) -> str:
        """The dtype the weights are stored in. Raises UsageError where they have several, or one we do not know."""
        names = {
            file.get_slice(name).get_dtype() for name, file in self._where.items() if not name.endswith(_IGNORED_SUFFIX)
        }
        if len(names) > 1:
            raise UsageError(f"{self.path}: weights of several dtypes ({', '.join(sorted(names))}): give --dtype")
        (name,) = names
        if name not in _DTYPES:
            raise UsageError(f"{self.path}: weights of dtype {name} are not supported; allowed: {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def read(self, leaf: Leaf, dtype: str) -> np.ndarray:
        """One of our parameters, stacked over layers, in `dtype`."""
        stacked = np.empty((len(leaf.tensors), *leaf.slice_shape), _numpy_dtype(dtype))
        for i, name in enumerate(leaf.tensors):
            stacked[i] = leaf.from_tensor(self._where[name].get_tensor(name))
        return stacked if leaf.is_stacked else stacked[0]

    def _file_names(self) -> Sequence[str]:
        index = self.path / INDEX_FILE
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UsageError(f"{index} has no weight_map: download it again")
            return sorted(set(weight_map.values()))
        if (self.path / SINGLE_FILE).exists():
            return [SINGLE_FILE]
        raise UsageError(
            f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give a folder with safetensors weights"
        )

    def _open(self, name: str) -> Any:
        file = self.path / name
        if not file.exists():
            raise UsageError(f"{file}, which {INDEX_FILE} names, is missing: download it again")
        try:
            return self._stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise UsageError(f"{file} is truncated or damaged ({error}): download it again") from error

    def _check(self) -> None:
        expected = {name: leaf for leaf in leaves(self.config) for name in leaf.tensors}
        found = {name for name in self._where if not name.endswith(_IGNORED_SUFFIX)}
        missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing:
            raise UsageError(f"{self.path}: {len(missing)} tensors of the model are missing, first {missing[0]}")
        if unknown:
            raise UsageError(f"{self.path}: {len(unknown)} tensors are not of this model, first {unknown[0]}")
        for name, leaf in expected.items():
            shape = tuple(self._where[name].get_slice(name).get_shape())
            if shape != leaf.tensor_shape:
                raise UsageError(f"{self.path}: {name} has shape {shape}, config.json makes it {leaf.tensor_shape}")


def import_params(folder: HfFolder, shardings: Any, dtype: str) -> model.Params:
    """All parameters on the devices, read one stacked leaf at a time."""
    params: dict[str, Any] = {}
    every_leaf = list(leaves(folder.config))
    with Progress(len(every_leaf), "importing", "leaves") as bar:
        for leaf in every_leaf:
            sharding = shardings
            for key in leaf.path:
                sharding = sharding[key]
            _put(params, leaf.path, jax.device_put(folder.read(leaf, dtype), sharding))
            bar.update(1, ".".join(leaf.path))
    return params


class SafetensorsWriter:
    """Writes the tensors of a model in any order into shards whose layout is known beforehand.

    safetensors' own writer wants all tensors of a file at once; stacked leaves give one tensor of every layer at
    a time. So each file's header is written first, and every tensor then into its place.
    """

    def __init__(self, directory: Path, shapes: dict[str, tuple[int, ...]], dtype: str):
        """`shapes` in the order in which tensors fill the shards."""
        self._dtype = _numpy_dtype(dtype)
        self._arrays: dict[str, np.ndarray] = {}
        shards = list(_shards(shapes, self._dtype.itemsize))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._create(directory / file, {name: shapes[name] for name in names}, _DTYPE_NAMES[dtype])
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(array.nbytes for array in self._arrays.values())
            write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Puts a tensor into its place."""
        self._arrays[name][...] = tensor

    def close(self) -> None:
        """Flushes every file to disk."""
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]
        self._arrays.clear()

    def _create(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype_name: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            size = int(np.prod(shape)) * self._dtype.itemsize
            header[name] = {
                "dtype": dtype_name,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            _allocate(file.fileno(), start + offset)
        for name, shape in shapes.items():
            place = start + header[name]["data_offsets"][0]
            self._arrays[name] = np.memmap(path, self._dtype, "r+", place, shape)


def _allocate(descriptor: int, size: int) -> None:
    """Takes the disk space now: writing to a mapped file on a full disk would kill the process."""
    import os

    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS has no posix_fallocate
        os.truncate(descriptor, size)


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if names and filled + size > MAX_SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold a JSON object, not {type(tree).__name__}")
    return tree
