"""Writing checkpoints; see checkpoint.py for what lies in them."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath

from data_pipeline.cli import RunError
from data_pipeline.files import write_atomically
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import TOKENIZER_FILE, Meta, absolute, chunks, open_checkpoint, steps_in
from mathscale_jax.checksums import checksums
from mathscale_jax.config import CheckpointSettings
from mathscale_jax.damage import DamagedCheckpoint
from mathscale_jax.processes import all_or_none, is_primary


@dataclasses.dataclass
class _LowestLoss:
    """Orbax's preservation policy for the `count` steps of the lowest validation loss.

    Orbax's own forgets the losses of the steps that an earlier process saved; ours are in each step's metadata.
    """

    count: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        known = [checkpoint.step for checkpoint in checkpoints if checkpoint.step in self.losses]
        kept = sorted(known, key=lambda step: self.losses[step])[: self.count]
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _validation_losses(directory: epath.Path) -> dict[int, float]:
    """Of the steps that are there already."""
    losses = {}
    for step in steps_in(directory):
        with contextlib.suppress(DamagedCheckpoint):  # whoever reads that step will say so
            loss = open_checkpoint(str(directory), step).meta.validation_loss
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
    return losses


class Writer:
    """Saves steps into a folder, asynchronously, and removes those that `settings` do not keep.

    Every process of a run makes one and calls it at the same places; each writes its own shards.
    """

    def __init__(self, directory: epath.Path, settings: CheckpointSettings, tokenizer: Tokenizer):
        self._directory = directory = absolute(directory)
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(settings.keep)]
        with all_or_none():
            self._lowest_loss = _LowestLoss(settings.keep_best, _validation_losses(directory))
            if steps_in(directory) and open_checkpoint(str(directory)).tokenizer.sha256 != tokenizer.sha256:
                raise UsageError(f"{directory} holds checkpoints of another tokenizer; choose another folder")
        if settings.keep_every is not None:
            kept.append(policies.EveryNSteps(settings.keep_every))
        kept.append(self._lowest_loss)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed run left half-written
        )
        self._manager = ocp.CheckpointManager(directory, options=options)
        with all_or_none():
            # Always anew: a run that died before its first save may have left the tokenizer of other settings.
            if is_primary():
                write_atomically(directory / TOKENIZER_FILE, lambda file: file.write(tokenizer.model))

    def save(self, step: int, weights: model.Params, meta: Meta, optimizer: optax.OptState | None = None) -> None:
        """Starts saving `weights` (an adapter where `meta` has `lora`); returns when the arrays may be changed.

        An earlier save that failed raises here.
        """
        items = {meta.weights_item: model.named_leaves(weights)}
        if optimizer is not None:
            items["optimizer"] = model.named_leaves(optimizer)
        with jax.transfer_guard("allow"):
            meta = dataclasses.replace(meta, checksums={item: checksums(arrays) for item, arrays in items.items()})
            args: dict[str, Any] = {
                item: ocp.args.StandardSave(arrays, {name: chunks(name) for name in arrays})
                for item, arrays in items.items()
            }
            args["meta"] = ocp.args.JsonSave(meta.to_json())
            if meta.validation_loss is not None and math.isfinite(meta.validation_loss):
                self._lowest_loss.losses[step] = meta.validation_loss
            started = self._manager.save(step, args=ocp.args.Composite(**args))
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
