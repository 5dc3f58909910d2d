"""Checkpoints: Orbax steps, the tokenizer beside them, and what they are in each step's metadata.

    DIR/tokenizer.model         the tokenizer the weights were trained with
    DIR/<step>/params           weights by dotted name (blocks.mlp.up); or, of a LoRA run,
    DIR/<step>/adapter          the adapter alone: its base is another checkpoint, which the metadata names
    DIR/<step>/optimizer        optimizer state by dotted name; absent where only weights were imported
    DIR/<step>/meta             JSON: model, template, tokenizer's sha256, lineage, training settings, checksums

A step appears under its number only when all of it is on disk. Each array's checksum was computed from the array
itself before it was saved, and is compared after it is restored, whatever mesh it is restored onto.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from data_pipeline.cli import RunError, logger
from data_pipeline.settings import UsageError, validated
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import lora, model
from mathscale_jax.checksums import array_checksum, digest
from mathscale_jax.config import LoraSettings, ModelConfig
from mathscale_jax.damage import DamagedCheckpoint, or_damaged
from mathscale_jax.processes import all_or_none, from_primary, is_primary
from mathscale_jax.step import TrainState

TOKENIZER_FILE = "tokenizer.model"
FORMAT_VERSION = 3
T = TypeVar("T")
_CHUNK_BYTES = 2**27  # on disk: what a device reads of a matrix is not much more than its share


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint an adapter belongs to; `digest` tells its weights from any others."""

    path: str
    step: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Meta:
    """What the weights of a step are. `lineage` says where they came from, in words for people.

    `training` holds what a resumed run must share with the one that wrote the step; None for imported weights.
    `lora` and `base` say that the step holds an adapter. `checksums` are by item and array; the writer adds them.
    `companions` are small files that were published beside the weights, by name, as JSON or text: they go out with
    them again.
    """

    model: ModelConfig
    template: Template
    tokenizer_sha256: str
    lineage: str
    training: dict[str, Any] | None = None
    lora: LoraSettings | None = None
    base: Base | None = None
    validation_loss: float | None = None
    companions: dict[str, Any] = dataclasses.field(default_factory=dict)
    checksums: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def weights_item(self) -> str:
        """The item that holds what was trained."""
        return "params" if self.lora is None else "adapter"

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tree = {
            "format_version": FORMAT_VERSION,
            **plain,
            "model": self.model.model_dump(mode="json"),
            "template": self.template.model_dump(mode="json"),
            "lora": None if self.lora is None else self.lora.model_dump(mode="json"),
            "base": None if self.base is None else dataclasses.asdict(self.base),
        }
        return {**tree, "sha256": _sha256(tree)}

    @classmethod
    def from_json(cls, tree: dict[str, Any], where: str) -> "Meta":
        """Raises UsageError where the metadata was written by another version, ValueError where it is damaged."""
        version, sha256 = tree["format_version"], tree.pop("sha256", None)
        if sha256 != _sha256(tree) and (version == FORMAT_VERSION or sha256 is not None):
            raise ValueError("its metadata has changed since it was written")
        if version != FORMAT_VERSION:
            raise UsageError(
                f"checkpoint {where} has format version {version}, this program reads {FORMAT_VERSION}: "
                "export its weights with the version of mathscale_jax that wrote it, and import them with this one"
            )
        plain = {field.name: tree[field.name] for field in dataclasses.fields(cls)}
        return cls(
            **{
                **plain,
                "model": validated(ModelConfig, tree["model"], where),
                "template": validated(Template, tree["template"], where),
                "lora": None if tree["lora"] is None else validated(LoraSettings, tree["lora"], where),
                "base": None if tree["base"] is None else Base(**tree["base"]),
            }
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved step, opened for reading: its metadata and tokenizer; weights come with `restore_params`.

    `path` is the folder as the user named it, `directory` where the steps lie. What is restored is compared with
    the checksums of what was saved; DamagedCheckpoint names what differs, is missing or cannot be read.
    """

    path: str
    directory: epath.Path
    step: int
    meta: Meta
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"{self.path} step {self.step}"

    def restore_params(self, shardings: Any = None, dtype: str = "float32") -> model.Params:
        """The weights in `dtype`, laid out by `shardings` (a dict like the parameters'), or all on one device.

        One leaf is read at a time, so nothing is held twice. A LoRA checkpoint gives its base's weights with the
        adapter added.
        """
        specs = model.param_specs(self.meta.model)
        treedef = jax.tree.structure(specs, is_leaf=_is_spec)
        by_name = model.named_leaves(shardings) if shardings is not None else dict.fromkeys(_names(specs))
        read = self._leaf_reader()
        return jax.tree.unflatten(treedef, [read(name, by_name[name]).astype(dtype) for name in _names(specs)])

    def _leaf_reader(self) -> Callable[..., jax.Array]:
        """A function (dotted name, sharding or None for one device) -> that parameter, an adapter added."""
        if self.meta.lora is None:
            return lambda name, sharding=None: self._read("params", name, sharding)
        base, settings = self.open_base(), self.meta.lora
        adapter = jax.device_get(self.restore_adapter())
        adapted = lora.adapted_matrices(settings)
        merge = jax.jit(lora.merge, static_argnums=3, donate_argnums=0)

        def read(name: str, sharding: Any = None) -> jax.Array:
            leaf = base._read("params", name, sharding)
            if name not in adapted:
                return leaf
            module, matrix = adapted[name]
            return merge(leaf, adapter[module][matrix]["a"], adapter[module][matrix]["b"], settings)

        return read

    def restore_adapter(self, shardings: Any = None) -> model.Params:
        """The adapter of a LoRA checkpoint in float32."""
        assert self.meta.lora is not None
        specs = lora.adapter_specs(self.meta.model, self.meta.lora)
        by_name = model.named_leaves(shardings) if shardings is not None else dict.fromkeys(_names(specs))
        leaves = [self._read("adapter", name, by_name[name]) for name in _names(specs)]
        return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=_is_spec), leaves)

    def restore_state(self, shardings: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
        """The training state of this step: one leaf at a time, so that nothing is held twice."""
        item, specs = self.meta.weights_item, self.trained_specs()
        by_name = model.named_leaves(shardings.params)
        trained = [self._read(item, name, by_name[name]) for name in _names(specs)]
        params = jax.tree.unflatten(jax.tree.structure(specs, is_leaf=_is_spec), trained)
        state = jax.eval_shape(optimizer.init, params)
        by_name = model.named_leaves(shardings.optimizer)
        moments = [self._read("optimizer", name, by_name[name]) for name in model.named_leaves(state)]
        step = jax.device_put(jax.numpy.int32(self.step), shardings.step)
        return TrainState(step, params, jax.tree.unflatten(jax.tree.structure(state), moments))

    def trained_specs(self) -> Any:
        """Shapes and axes of what the run that wrote this step trains: the parameters, or an adapter."""
        if self.meta.lora is None:
            return model.param_specs(self.meta.model)
        return lora.adapter_specs(self.meta.model, self.meta.lora)

    def stored_dtype(self) -> str:
        """The dtype that the weights are stored in; of an adapter, its base's."""
        if self.meta.lora is not None:
            return self.open_base().stored_dtype()
        return str(self._stored("params")["embedding"].dtype)

    def as_base(self) -> Base:
        """How the metadata of an adapter names this checkpoint. Raises UsageError where it is an adapter itself."""
        if self.meta.lora is not None:
            raise UsageError(
                f"{self.name} is an adapter: export it merged and import that, to train an adapter of the result"
            )
        return Base(str(self.directory), self.step, digest(self.meta.checksums["params"]))

    def open_base(self) -> "Checkpoint":
        """What the adapter of this step belongs to. Raises UsageError where it is gone, or holds other weights now."""
        assert self.meta.base is not None
        at = self.meta.base
        try:
            base = open_checkpoint(at.path, at.step)
        except UsageError as error:
            raise UsageError(
                f"{self.name} is an adapter of {at.path} step {at.step}, which must lie there (a symbolic link will "
                f"do): {error}"
            ) from error
        if digest(base.meta.checksums["params"]) != at.digest:
            raise UsageError(f"{self.name} is an adapter of other weights than {base.name} holds now")
        return base

    def _stored(self, item: str) -> dict[str, Any]:
        """What an item holds: name -> an object with shape and dtype."""
        return dict(or_damaged(self.name, self.folder, lambda: _HANDLER().metadata(self.folder / item).tree))

    def _read(self, item: str, name: str, sharding: Any) -> jax.Array:
        """One array as it is stored, checked; on the first local device where `sharding` is None."""
        with all_or_none():  # go on to the checksum, which the processes compute together
            array = or_damaged(self.name, self.folder, lambda: self._restore(item, name, sharding))
        found = int(array_checksum(array))
        with all_or_none():
            if found != self.meta.checksums[item][name]:
                raise DamagedCheckpoint(
                    f"checkpoint {self.name} is damaged: the bits of its {item} {name} have changed"
                )
        return array

    def _restore(self, item: str, name: str, sharding: Any) -> jax.Array:
        stored = self._stored(item)
        if name not in stored or name not in self.meta.checksums[item]:
            raise ValueError(f"its {item} has no {name}")
        sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
        args = ocp.args.PyTreeRestore(
            item={name: stored[name]},
            restore_args={name: ocp.ArrayRestoreArgs(sharding=sharding, dtype=stored[name].dtype)},
            partial_restore=True,
        )
        # The handler by itself: Orbax's checkpointers wait for all processes, so one that fails would stall the rest.
        return _HANDLER().restore(self.folder / item, args=args)[name]

    @property
    def folder(self) -> epath.Path:
        """Where the step lies."""
        return self.directory / str(self.step)


_HANDLER = ocp.PyTreeCheckpointHandler


def _sha256(tree: dict[str, Any]) -> str:
    """Of metadata, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _is_spec(x: Any) -> bool:
    return isinstance(x, model.ParamSpec)


def _names(specs: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def absolute(path: epath.Path) -> epath.Path:
    """Orbax takes no relative paths; the URL of an object store is absolute as it is."""
    return path if "://" in str(path) else path.absolute()


def chunks(name: str) -> ocp.SaveArgs:
    """How the parameter `name` lies on disk: a layer a chunk, so that it can be read layer by layer."""
    # shard_axes splits an axis to its elements, so not that of a vocabulary.
    return ocp.SaveArgs(shard_axes=(0,) if "blocks." in name else (), chunk_byte_size=_CHUNK_BYTES)


def steps_in(directory: epath.Path) -> list[int]:
    """The finished steps in a folder, oldest first, damaged ones too; none where there is no folder."""
    try:
        next(iter(directory.iterdir()), None)  # an error of the disk is none of a folder that is not there
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Orbax knows which steps are whole: on an object store, which has no rename, a marker says so.
    steps = ocp.utils.checkpoint_steps(absolute(directory))
    parts = ("_CHECKPOINT_METADATA", "meta", "params", "adapter")  # by any of which it is known for one of ours
    return sorted(step for step in steps if any((directory / str(step) / part).exists() for part in parts))


def open_checkpoint(path: str, step: int | None = None) -> Checkpoint:
    """Opens a step of a checkpoint folder, or of the run folder that holds it.

    Without `step`, `path` may end in @STEP or @best (the lowest validation loss); else the newest is opened.
    Raises UsageError where there is none, or where the tokenizer beside it is not the one it was made with;
    DamagedCheckpoint where its metadata cannot be read.
    """
    folder, wanted = _split(path) if step is None else (path, "")
    directory = _directory(folder)
    steps = steps_in(directory)
    if (directory / "config.json").exists():
        raise UsageError(f"{folder!r} is a Hugging Face folder: `python -m mathscale_jax.convert import` it first")
    if not directory.exists():
        run, _, behind = folder.rpartition("@")
        if run and _directory(run).exists():
            raise UsageError(f"checkpoint {folder!r}: behind the @ stands a step's number, or best, not {behind!r}")
        raise UsageError(f"checkpoint {folder!r} does not exist")
    if not steps:
        if steps_in(directory.parent) and directory.name.isdigit():
            raise UsageError(
                f"{folder!r} is a step: give {str(epath.Path(folder).parent)!r}, or that and @{directory.name}"
            )
        raise UsageError(
            f"checkpoint {folder!r} holds no finished step; give a training run's folder, or what "
            "`python -m mathscale_jax.convert import` wrote"
        )
    if wanted == "best":
        return _best([_open(folder, directory, step) for step in steps], folder)
    step = step if step is not None else int(wanted) if wanted else steps[-1]
    if step not in steps:
        raise UsageError(f"checkpoint {folder!r} has no step {step}; it has {', '.join(map(str, steps))}")
    return _open(folder, directory, step)


def newest_whole(path: str, read: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """The newest step of a run that `read` reads without finding damage, and what it read.

    Each damaged step that is passed over is named in a warning. Raises DamagedCheckpoint where none is whole.
    """
    with all_or_none():
        steps = steps_in(_directory(path))
    for step in reversed(from_primary(steps)):  # a disk that processes share may show them different folders
        try:
            with all_or_none():
                if step not in steps_in(_directory(path)):
                    raise RunError(
                        f"process {jax.process_index()} does not see step {step} of {path}, which process 0 sees; "
                        "run the same command again when the disk they share shows it to all"
                    )
                checkpoint = open_checkpoint(path, step)
            return checkpoint, read(checkpoint)
        except DamagedCheckpoint as error:
            logger.warning("%s; it is passed over", error)
    raise DamagedCheckpoint(
        f"no step of {path} could be read; what is wrong with each is said above. To begin anew, choose another folder"
    )


def set_aside_after(checkpoint: Checkpoint) -> None:
    """Renames the steps after `checkpoint`, which are damaged, so that the run can write them anew."""
    with all_or_none():  # the others wait for process 0
        for step in steps_in(checkpoint.directory) if is_primary() else ():
            if step > checkpoint.step:
                names = (f"damaged-{step}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
                damaged = next(path for path in map(checkpoint.directory.joinpath, names) if not path.exists())
                (checkpoint.directory / str(step)).rename(damaged)
                logger.warning("step %d is kept as %s, for you to look at or remove", step, damaged)


def _split(path: str) -> tuple[str, str]:
    """A path and what stands behind its @: a step, "best", or nothing."""
    found = re.fullmatch(r"(.+)@(\d+|best)", path)
    return (found[1], found[2]) if found else (path, "")


def _directory(path: str) -> epath.Path:
    directory = absolute(epath.Path(path))
    return directory / "checkpoints" if (directory / "checkpoints").exists() else directory


def _best(checkpoints: list[Checkpoint], path: str) -> Checkpoint:
    known = [(c.meta.validation_loss, c) for c in checkpoints if c.meta.validation_loss is not None]
    losses = [(loss, checkpoint) for loss, checkpoint in known if math.isfinite(loss)]
    if not losses:
        raise UsageError(
            f"checkpoint {path!r} has no step with a validation loss; give @STEP, or train with validation"
        )
    return min(losses, key=lambda pair: pair[0])[1]


def _open(path: str, directory: epath.Path, step: int) -> Checkpoint:
    where, file = f"{path} step {step}", directory / str(step) / "meta"
    meta = or_damaged(
        where,
        directory / str(step),
        lambda: Meta.from_json(ocp.JsonCheckpointHandler().restore(file, ocp.args.JsonRestore()), where),
    )
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    if tokenizer.sha256 != meta.tokenizer_sha256:
        raise UsageError(f"{directory / TOKENIZER_FILE} is not the tokenizer that {where} was made with")
    return Checkpoint(path, directory, step, meta, tokenizer)
