"""Published weights as people have them: safetensors, PyTorch's .bin, Meta's consolidated.*.pth, read tensor by tensor.

Nothing of a file is in memory before a tensor of it is read, and no file can make this program run code.
"""

import abc
import json
import mmap
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from data_pipeline.cli import RunError, first_line
from data_pipeline.settings import UsageError
from mathscale_jax.checkpoint import TOKENIZER_FILE
from mathscale_jax.config import ModelConfig
from mathscale_jax.convert import torch_files
from mathscale_jax.convert.configs import model_config_from_hf, model_config_from_meta
from mathscale_jax.convert.dtypes import DTYPES, numpy_dtype
from mathscale_jax.convert.mapping import HF, META, Layout, leaves
from mathscale_jax.convert.tokenizer_files import COMPANIONS, TEMPLATE_FILE
from mathscale_jax.convert.torch_files import DOWNLOAD_AGAIN

_UNREAD = ("*.gguf", "consolidated.safetensors")


class Source:
    """Opened weights of a model this program knows: exactly its tensors, in the shapes that its config gives them.

    `layout` says how they are named and laid out, `shapes` and `dtypes` what they are, `config` the architecture,
    `companions` the small files beside them by name. `read` gives one whole tensor in its dtype.
    """

    path: Path
    layout: Layout
    kind: str  # for people
    config: ModelConfig
    companions: dict[str, Any]

    def __init__(self, path: Path):
        self.path = path
        self.companions = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._readers: dict[str, Callable[[], np.ndarray]] = {}

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it lies on disk where that is possible: not to be changed, and read when it is used.

        A file that is cut short meanwhile ends the process by SIGBUS, as any that is mapped.
        """
        return self._readers[name]()

    @property
    def dtype(self) -> str:
        """The dtype of the weights. Raises UsageError where they have several."""
        names = sorted(set(self.dtypes.values()))
        if len(names) > 1:
            raise UsageError(f"{self.path}: weights of several dtypes ({', '.join(names)}): give --dtype")
        return names[0]

    def _add(self, name: str, shape: Sequence[int], dtype: str, read: Callable[[], np.ndarray]) -> None:
        if name.endswith(self.layout.ignored):
            return
        if name in self.shapes:
            raise UsageError(f"{self.path}: {name} is in two files: {DOWNLOAD_AGAIN}")
        if dtype not in DTYPES.values():
            allowed = ", ".join(DTYPES.values())
            raise UsageError(f"{self.path}: {name} has dtype {dtype}, which is not supported; allowed: {allowed}")
        self.shapes[name], self.dtypes[name], self._readers[name] = tuple(shape), dtype, read

    def _check(self, hint: str = "") -> None:
        """Raises UsageError where the tensors are not those of `config`."""
        if self.config.num_layers > len(self.shapes):  # before a name is made for each
            raise UsageError(
                f"{self.path}: its config says {self.config.num_layers} layers, more than there are tensors{hint}"
            )
        expected = {name: leaf.tensor_shape for leaf in leaves(self.config, self.layout) for name in leaf.tensors}
        missing, unknown = sorted(expected.keys() - self.shapes.keys()), sorted(self.shapes.keys() - expected.keys())
        if missing:
            raise UsageError(f"{self.path}: {len(missing)} tensors of the model are missing, first {missing[0]}{hint}")
        if unknown:
            raise UsageError(f"{self.path}: {len(unknown)} tensors are not of this model, first {unknown[0]}")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UsageError(
                    f"{self.path}: {name} has shape {self.shapes[name]}, its config makes it {shape}{hint}"
                )


def open_source(path: str, max_context: int | None = None) -> Source:
    """Opens a folder of weights, whatever its format. `max_context` is for Meta's, which do not say it.

    Raises UsageError where a file is missing, truncated, holds code, or is of another model.
    """
    if max_context is not None and max_context < 1:
        raise UsageError(f"--max-context {max_context}: must be a number of tokens, 1 or more")
    folder = Path(path)
    unread = sorted(file.name for pattern in _UNREAD for file in folder.glob(pattern))
    also = f" (formats like that of {unread[0]} are not read)" if unread else ""
    published = [kind for kind in (_Safetensors, _Bin) if any((folder / name).exists() for name in kind.files())]
    # A folder that holds both is Hugging Face's, with the original files beside.
    if not published and ((folder / "params.json").exists() or list(folder.glob("consolidated.*.pth"))):
        return _Meta(folder, max_context)
    if max_context is not None:
        raise UsageError(f"--max-context {max_context}: only for Meta's weights; the config.json of {path} says it")
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{path} has neither config.json (Hugging Face) nor params.json (Meta): give the folder that holds the "
            f"weights and one of them{also}"
        )
    if not published:
        names = ", ".join(name for kind in (_Safetensors, _Bin) for name in kind.files())
        shards = sorted(file.name for kind in (_Safetensors, _Bin) for file in folder.glob(kind.patterns()[-1]))
        if shards:
            raise UsageError(f"{path} holds {shards[0]}, but no index of its files: {DOWNLOAD_AGAIN}")
        raise UsageError(f"{path} holds no weights: none of {names}{also}")
    return published[0](folder)


class _HuggingFace(Source, abc.ABC):
    """What both of Hugging Face's formats share: config.json, companions, one file or an index of many."""

    layout = HF
    single: str
    index: str

    def __init__(self, path: Path):
        super().__init__(path)
        config_file = path / "config.json"
        self.config = model_config_from_hf(read_json(config_file), str(config_file))
        self.companions = {name: _read_companion(path / name) for name in COMPANIONS if (path / name).exists()}
        for name in self._file_names():
            if not (path / name).is_file():
                raise UsageError(f"{path / name}, which {self.index} names, is missing: {DOWNLOAD_AGAIN}")
            self._open(path / name)
        self._check()

    @classmethod
    def files(cls) -> tuple[str, str]:
        """Either of which is there where weights of this kind are."""
        return cls.single, cls.index

    @classmethod
    def patterns(cls) -> tuple[str, ...]:
        """Of the names of all its files."""
        stem, _, suffix = cls.single.rpartition(".")
        return (*cls.files(), f"{stem}-*.{suffix}")

    def _file_names(self) -> Sequence[str]:
        index = self.path / self.index
        if (self.path / self.single).exists():  # it comes first where both are there, as in transformers
            return [self.single]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UsageError(f"{index} has no weight_map: {DOWNLOAD_AGAIN}")
        names = weight_map.values()
        if not weight_map or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UsageError(f"{index}: its weight_map must name files of the same folder: {DOWNLOAD_AGAIN}")
        return sorted(set(names))

    @abc.abstractmethod
    def _open(self, file: Path) -> None:
        """Adds the tensors of one file."""


class _Safetensors(_HuggingFace):
    kind = "Hugging Face safetensors"
    single, index = "model.safetensors", "model.safetensors.index.json"

    def _open(self, file: Path) -> None:
        try:
            with safetensors.safe_open(file, framework="numpy"):
                pass  # it checks the header: every tensor lies inside the file, and has its bytes for itself
        except safetensors.SafetensorError as error:
            raise UsageError(f"{file} is truncated or damaged ({error}): {DOWNLOAD_AGAIN}") from error
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:begin])
        for name, tensor in header.items():
            if name != "__metadata__":
                dtype = DTYPES.get(tensor["dtype"], tensor["dtype"])
                first, last = (begin + offset for offset in tensor["data_offsets"])
                self._add(name, tensor["shape"], dtype, partial(_view, mapped, first, last, dtype, tensor["shape"]))


def _view(file: mmap.mmap, first: int, last: int, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if hasattr(mmap, "MADV_WILLNEED"):  # ask the disk for all of it at once
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        file.madvise(mmap.MADV_WILLNEED, page, last - page)
    typed = numpy_dtype(dtype)
    return np.frombuffer(file, typed, (last - first) // typed.itemsize, first).reshape(shape)


class _Bin(_HuggingFace):
    kind = "Hugging Face .bin"
    single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def _open(self, file: Path) -> None:
        for name, tensor in torch_files.load(file).items():
            self._add(name, tensor.shape, torch_files.dtype_of(tensor), partial(torch_files.to_numpy, tensor))


class _Meta(Source):
    """params.json and consolidated.00.pth onwards: every tensor cut in as many parts as there are files."""

    layout = META
    kind = "Meta .pth"
    # Cut along their inputs, the other matrices along their outputs; norms are whole in every file.
    _cut_by_input = ("attention.wo.weight", "feed_forward.w2.weight")

    def __init__(self, path: Path, max_context: int | None):
        super().__init__(path)
        params_file = path / "params.json"
        if not params_file.exists():
            raise UsageError(f"{params_file} is missing: it says what model the consolidated.*.pth are of")
        params = read_json(params_file)
        files = sorted(path.glob("consolidated.*.pth"))
        if not files and (path / "consolidated.safetensors").exists():
            raise UsageError(
                f"{path}: consolidated.safetensors is not read: take the same model's Hugging Face files, with "
                "config.json"
            )
        wanted = [path / f"consolidated.{i:02d}.pth" for i in range(max(len(files), 1))]
        if files != wanted:
            lost = next(file for file in wanted if file not in files)
            raise UsageError(f"{lost} is missing: {DOWNLOAD_AGAIN}")
        parts = [torch_files.load(file) for file in files]
        for file, part in zip(files, parts, strict=True):
            if part.keys() != parts[0].keys():
                other = sorted(part.keys() ^ parts[0].keys())[0]
                raise UsageError(f"{file} and {files[0].name} do not hold the same tensors, first {other}")
        for name in parts[0]:
            self._join(name, dict(zip(files, (part[name] for part in parts), strict=True)), params.get("dim"))
        self.config = model_config_from_meta(params, self.shapes, str(params_file), max_context)
        self._check(f"; {len(files)} file(s) consolidated.*.pth were found: is one missing?")

    def _join(self, name: str, parts: dict[Path, Any], width: Any) -> None:
        first, *others = parts.values()
        shape = list(first.shape)
        axis = None
        if len(shape) > 1 and others:
            axis = 1 if name.endswith(self._cut_by_input) else 0
            if name == "tok_embeddings.weight" and shape[1] != width:  # by its width in LLaMA-2, by its rows since
                axis = 1
        for file, part in parts.items():
            if not _fits(part, first, axis):
                raise UsageError(
                    f"{file}: its part of {name} does not go with that of the first file: {DOWNLOAD_AGAIN}"
                )
        if axis is not None:
            shape[axis] = sum(part.shape[axis] for part in parts.values())

        def read() -> np.ndarray:
            if axis is None:
                return torch_files.to_numpy(first)
            return np.concatenate([torch_files.to_numpy(part) for part in parts.values()], axis)

        self._add(name, shape, torch_files.dtype_of(first), read)


def _fits(part: Any, first: Any, axis: int | None) -> bool:
    """Whether two tensors are parts of one that was cut along `axis`; where it was not cut, whether they are it."""
    if part.dtype != first.dtype or part.ndim != first.ndim:
        return False
    if axis is None:
        same = torch_files.to_numpy(part), torch_files.to_numpy(first)
        return part is first or (part.shape == first.shape and same[0].tobytes() == same[1].tobytes())
    return all(part.shape[i] == first.shape[i] for i in range(first.ndim) if i != axis)


def _read_companion(file: Path) -> Any:
    if file.suffix == ".json":
        return read_json(file)
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read: {error}") from error


def check_local(path: str) -> None:
    """Raises UsageError where a folder of published weights is said to lie in an object store."""
    if "://" in path:
        raise UsageError(f"{path}: published weights are read and written on a local disk; copy them from or to there")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file. Raises UsageError where it is none, RunError where it cannot be read."""
    try:
        tree = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold a JSON object, not {type(tree).__name__}")
    return tree


def fetch(name: str) -> str:
    """`name` where it is a local folder; else the folder that a model of this name on Hugging Face's hub lies in.

    The hub's own cache keeps what was fetched; its token comes from the environment (HF_TOKEN). Raises UsageError
    where it is neither, or the hub's client is not installed; RunError where the hub does not give it.
    """
    if Path(name).is_dir():
        return name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"{name!r} is no folder; give one with config.json or params.json and the weights")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{name!r} is no folder; to fetch a model of this name from Hugging Face's hub: "
            "pip install -c constraints.txt -e '.[hub]'"
        ) from error
    try:
        files = set(huggingface_hub.list_repo_files(name))
        published = [kind for kind in (_Safetensors, _Bin) if files & set(kind.files())]
        weights = published[0].patterns() if published else ("params.json", "consolidated.*.pth")
        wanted = ["config.json", TOKENIZER_FILE, TEMPLATE_FILE, *COMPANIONS, *weights]
        return huggingface_hub.snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # the hub's client raises many kinds, of several libraries
        raise RunError(f"{name!r} is no folder, and the hub does not give it: {first_line(error)}") from error
