"""Where a run stands, and what it starts from: its folder, weights, tokenizer, and the run that it goes on with."""

import shutil
from functools import partial
from typing import Any

import jax
from etils import epath

from data_pipeline.cli import logger, make_folder
from data_pipeline.settings import UsageError, validated
from data_pipeline.tokenized import TokenizedRows
from data_pipeline.tokenizer import Tokenizer, check_vocabulary
from mathscale_jax import lora, model
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint, steps_in
from mathscale_jax.config import ModelConfig, TrainSettings, changes_that_forbid_resume


def check_folder(output_dir: epath.Path) -> None:
    """Makes a run's folder where it is not there. Raises UsageError where it cannot be one."""
    if steps_in(output_dir):
        raise UsageError(f"output_dir={output_dir} holds an imported checkpoint; choose another folder for the run")
    make_folder(output_dir, "output_dir")


def check_room(output_dir: epath.Path, settings: TrainSettings, config: ModelConfig) -> None:
    """Raises UsageError where the disk has no room for the first checkpoint. Object stores are not asked."""
    if "://" in str(output_dir) or settings.lora is not None:
        return
    bytes_each = 4 + 2 * (4 if settings.optimizer.state_dtype == "float32" else 2)
    needed, free = bytes_each * config.num_parameters, shutil.disk_usage(output_dir).free
    if needed > free:
        raise UsageError(
            f"output_dir={output_dir} has {free / 1e9:.1f} GB free, and one checkpoint of weights and optimizer takes "
            f"{needed / 1e9:.1f} GB: free some space or name another disk"
        )


def open_base(settings: TrainSettings, saved: Checkpoint | None) -> Checkpoint | None:
    """The weights a run starts from: a full fine-tuning needs them once, an adapter always, and always the same."""
    if saved is not None:
        return saved.open_base() if saved.meta.lora is not None else None
    return None if settings.init_from is None else open_checkpoint(settings.init_from)


def model_of(settings: TrainSettings, given: Checkpoint | None) -> ModelConfig:
    """The architecture that is said, else that of the weights. Raises UsageError where the context is not its."""
    if settings.model is not None:
        return settings.model
    assert given is not None  # TrainSettings has either model or init_from
    try:
        settings.check_context(given.meta.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return given.meta.model


def tokenizer_of(settings: TrainSettings, given: Checkpoint | None, config: ModelConfig) -> Tokenizer:
    """The tokenizer that is named, else that of the weights. Raises UsageError where it cannot be theirs."""
    named = settings.data.tokenizer
    if named is None:
        assert given is not None  # without init_from, TrainSettings requires data.tokenizer
        tokenizer = given.tokenizer
    else:
        tokenizer = Tokenizer.load(named)
        if given is not None and tokenizer.sha256 != given.tokenizer.sha256:
            raise UsageError(
                f"data.tokenizer={named} is not the tokenizer that {given.name} was made with; "
                "leave it out to use that one"
            )
    check_vocabulary(tokenizer, config.vocab_size, f"data.tokenizer {named or '(from init_from)'}")
    return tokenizer


def training_of(saved: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of the run that saved it."""
    assert saved.meta.training is not None  # `check_folder` has refused imported weights
    return saved.meta.training


def check_resume(saved: Checkpoint, settings: TrainSettings, rows: TokenizedRows, num_steps: int) -> None:
    """Raises UsageError where a run cannot go on from `saved` with these settings and data, for so many steps."""
    training = training_of(saved)
    changes = changes_that_forbid_resume(validated(TrainSettings, training["settings"], saved.name), settings)
    if training["rows_sha256"] != rows.sha256 and not changes:
        changes = ["data: the tokenised examples are not the ones the run began with"]
    if saved.step > num_steps:
        changes.append(f"num_steps: {num_steps} are fewer than the {saved.step} that are done")
    if changes:
        listed = "\n  ".join(changes)
        raise UsageError(
            f"{saved.path} holds a run with other settings:\n  {listed}\n"
            "choose another output_dir, or start from its weights with init_from"
        )


def first_params(settings: TrainSettings, config: ModelConfig, base: Checkpoint | None, shardings: Any) -> Any:
    """What a new run trains: the weights of `base`, a new adapter, or random weights."""
    if base is None:
        logger.info("starting from random weights")
        return jax.jit(partial(model.init, config, settings.seed), out_shardings=shardings)()
    logger.info("starting from the weights of %s (%s)", base.name, base.meta.lineage)
    if settings.lora is None:
        return base.restore_params(shardings)
    return jax.jit(partial(lora.init, config, settings.lora, settings.seed), out_shardings=shardings)()
