"""Checkpoints: Orbax steps, the tokenizer beside them, and what they are in each step's metadata.

    DIR/tokenizer.model         the tokenizer the weights were trained with
    DIR/<step>/params           weights, a pure nested dict (see model.param_specs)
    DIR/<step>/optimizer        optimizer state; absent where only weights were imported
    DIR/<step>/meta             JSON: model, template, tokenizer's sha256, where it came from, training settings

A step appears under its number only when all of it is on disk.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from data_pipeline.cli import RunError, first_line, is_disk_full
from data_pipeline.files import write_atomically
from data_pipeline.settings import UsageError, validated
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.config import CheckpointSettings, ModelConfig
from mathscale_jax.step import TrainState

TOKENIZER_FILE = "tokenizer.model"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Meta:
    """What the weights of a step are. `lineage` says where they came from, in words for people.

    `training` holds what a resumed run must share with the one that wrote the step; None for imported weights.
    """

    model: ModelConfig
    template: Template
    tokenizer_sha256: str
    lineage: str
    training: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.model_dump(mode="json"),
            "template": self.template.model_dump(mode="json"),
            "tokenizer_sha256": self.tokenizer_sha256,
            "lineage": self.lineage,
            "training": self.training,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any], where: str) -> "Meta":
        """Raises UsageError where the metadata was written by a later version or is damaged."""
        if tree.get("format_version") != FORMAT_VERSION:
            raise UsageError(
                f"checkpoint {where} has format version {tree.get('format_version')}; "
                f"this program reads {FORMAT_VERSION}"
            )
        return cls(
            model=validated(ModelConfig, tree["model"], where),
            template=validated(Template, tree["template"], where),
            tokenizer_sha256=tree["tokenizer_sha256"],
            lineage=tree["lineage"],
            training=tree["training"],
        )


class Writer:
    """Saves steps into a folder, asynchronously; keeps the newest `settings.keep`."""

    def __init__(self, directory: epath.Path, settings: CheckpointSettings, tokenizer: Tokenizer):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed run left half-written
        )
        self._directory = directory = _absolute(directory)
        self._manager = ocp.CheckpointManager(directory, options=options)
        # Always anew: a run that died before its first save may have left the tokenizer of other settings.
        if steps_in(directory) and open_checkpoint(str(directory)).tokenizer.sha256 != tokenizer.sha256:
            raise UsageError(f"{directory} holds checkpoints of another tokenizer; choose another folder")
        write_atomically(directory / TOKENIZER_FILE, lambda file: file.write(tokenizer.model))

    def save(self, step: int, params: model.Params, meta: Meta, optimizer: optax.OptState | None = None) -> None:
        """Starts saving; returns when the arrays may be changed. An earlier save that failed raises here."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(params),
            "meta": ocp.args.JsonSave(meta.to_json()),
        }
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        with jax.transfer_guard_device_to_host("allow"):
            started = self._manager.save(step, args=ocp.args.Composite(**items))
        if not started:  # Orbax declines a step that is not newer than every folder it takes for one
            raise RunError(
                f"step {step} was not saved: {self._directory} holds a folder of a later step; remove what is not yours"
            )

    def check(self) -> None:
        """Raises what went wrong in a save that is under way."""
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits until everything is on disk. Raises what went wrong in a save."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved step, opened for reading: its metadata and tokenizer; weights come with `restore_params`.

    `path` is the folder as the user named it, `directory` where the steps lie.
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
        """The weights in `dtype`, laid out by `shardings` (a dict like the parameters'), or all on one device."""
        return self._restore("params", self.abstract_params(shardings, dtype))

    def restore_leaf(self, path: tuple[str, ...]) -> jax.Array:
        """One parameter in the dtype it is stored in, so that a whole model need not fit in memory."""
        stored = self._with_orbax(lambda c: c.metadata(self._item("params"))).item_metadata
        spec = stored
        for key in path:
            spec = spec[key]
        tree: Any = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))
        for key in reversed(path):
            tree = {key: tree}
        restore_args = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=s.sharding, dtype=s.dtype), tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = self._or_damaged(lambda: checkpointer.restore(self._item("params"), args=args))
        for key in path:
            restored = restored[key]
        return restored

    def stored_dtype(self) -> str:
        """The dtype that the weights are stored in."""
        stored = self._with_orbax(lambda c: c.metadata(self._item("params"))).item_metadata
        return str(stored["embedding"].dtype)

    def restore_state(self, shardings: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
        """The training state of this step. Raises RunError where a part is missing or damaged."""
        abstract = self.abstract_params(shardings.params, "float32")
        optimizer_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(optimizer.init, abstract),
            shardings.optimizer,
        )
        step = jax.device_put(jax.numpy.int32(self.step), shardings.step)
        return TrainState(step, self._restore("params", abstract), self._restore("optimizer", optimizer_state))

    def abstract_params(self, shardings: Any, dtype: str) -> Any:
        """Shapes, dtype and shardings of the parameters."""
        specs = model.param_specs(self.meta.model)
        is_spec = lambda x: isinstance(x, model.ParamSpec)  # noqa: E731
        if shardings is None:
            one_device = SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: one_device, specs, is_leaf=is_spec)
        return jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
            specs,
            shardings,
            is_leaf=is_spec,
        )

    def _item(self, name: str) -> epath.Path:
        return self.directory / str(self.step) / name

    def _with_orbax(self, read: Callable[[ocp.StandardCheckpointer], Any]) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return self._or_damaged(lambda: read(checkpointer))

    def _restore(self, item: str, abstract: Any) -> Any:
        return self._with_orbax(lambda checkpointer: checkpointer.restore(self._item(item), abstract))

    def _or_damaged(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # Orbax and TensorStore raise many kinds for one thing: it cannot be read
            if is_disk_full(error) or "Out of memory" in str(error):
                raise
            raise RunError(
                f"checkpoint {self.name} is damaged or incomplete and cannot be read: "
                f"{type(error).__name__}: {first_line(error)}\n"
                f"remove {self.directory / str(self.step)} to go on from the step before it"
            ) from error


@jax.jit
def _leaf_checksums(params: model.Params) -> list[jax.Array]:
    def checksum(leaf: jax.Array) -> jax.Array:
        """Sum of the mixed bits of every element with its place: the same on any mesh, whatever the order."""
        width = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        mixed = bits ^ (place * jnp.uint32(0x9E3779B1))  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in jax.tree.leaves(params)]


def fingerprint(params: model.Params) -> str:
    """Hexadecimal digest of every bit of the weights, computed on the device; the same for any sharding."""
    checksums = np.asarray(jax.device_get(_leaf_checksums(params)), np.uint32)
    return hashlib.sha256(checksums.tobytes()).hexdigest()[:16]


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes no relative paths; the URL of an object store is absolute as it is."""
    return path if "://" in str(path) else path.absolute()


def steps_in(directory: epath.Path) -> list[int]:
    """The finished steps in a folder, oldest first; none where there is no folder."""
    if not directory.is_dir():
        return []
    # Orbax knows which steps are whole: on an object store, which has no rename, a marker says so.
    return sorted(s for s in ocp.utils.checkpoint_steps(_absolute(directory)) if (directory / str(s) / "meta").exists())


def open_checkpoint(path: str, step: int | None = None) -> Checkpoint:
    """Opens the newest step (or `step`) of a checkpoint folder, or of the run folder that holds it.

    Raises UsageError where there is none, or where the tokenizer beside it is not the one it was made with.
    """
    directory = _absolute(epath.Path(path))
    if (directory / "checkpoints").exists():
        directory /= "checkpoints"
    steps = steps_in(directory)
    if (directory / "config.json").exists():
        raise UsageError(f"{path!r} is a Hugging Face folder: `python -m mathscale_jax.convert import` it first")
    if not steps:
        raise UsageError(
            f"checkpoint {path!r} holds no finished step; give a training run's folder, or what "
            "`python -m mathscale_jax.convert import` wrote"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(f"checkpoint {path!r} has no step {step}; it has {', '.join(map(str, steps))}")
    where = f"{path} step {step}"
    try:
        tree = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(directory / str(step) / "meta")
    except Exception as error:
        raise RunError(f"checkpoint {where} is damaged: its metadata cannot be read ({error})") from error
    meta = Meta.from_json(tree, where)
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    if tokenizer.sha256 != meta.tokenizer_sha256:
        raise UsageError(f"{directory / TOKENIZER_FILE} is not the tokenizer that {where} was made with")
    return Checkpoint(path, directory, step, meta, tokenizer)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, what: str) -> None:
    """Raises UsageError where a tokenizer and a model do not belong together."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"{what} has {tokenizer.vocab_size} pieces but the model's vocab_size is {config.vocab_size}; "
            "use the tokenizer the model was made with"
        )
