"""python -m mathscale_jax.train: fine-tunes a model, or trains one from scratch.

    python -m mathscale_jax.train --config configs/demo.yaml
    python -m mathscale_jax.train --config configs/demo.yaml optimizer.learning_rate=1e-3 num_steps=1200

The same command goes on where an earlier run of it stopped, however it stopped.
"""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from data_pipeline.cli import RunError, Stopped, StopSignal, logger, make_folder, run_command
from data_pipeline.files import write_text
from data_pipeline.loader import Batches, iterate, load_rows
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError, describe, load_settings, to_yaml, validated
from data_pipeline.templates import load_template
from data_pipeline.tokenized import TokenizedRows
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Checkpoint, Meta, Writer, check_vocabulary, open_checkpoint, steps_in
from mathscale_jax.config import ModelConfig, TrainSettings, changes_that_forbid_resume
from mathscale_jax.mesh import make_mesh
from mathscale_jax.optimizer import learning_rate_schedule, make_optimizer
from mathscale_jax.step import (
    init_state,
    make_train_step,
    param_shardings,
    state_shardings,
    to_devices,
)
from mathscale_jax.telemetry import MetricsLog, Throughput


def train(settings: TrainSettings) -> None:
    """Runs the whole training that `settings` describe, from wherever it stands.

    Raises UsageError for what cannot be meant, before the first step; RunError for what went wrong;
    Stopped where a signal ended it, with everything saved.
    """
    output_dir = epath.Path(settings.output_dir)
    checkpoint_dir = output_dir / "checkpoints"

    # ---- where the run stands: resume, or start from weights, or from scratch -------------------------------
    if jax.process_count() > 1:
        raise UsageError(f"{jax.process_count()} processes: training runs in one process, over all of its devices")
    _check_folder(output_dir)
    mesh = make_mesh(settings.mesh)
    _check_batch(settings, mesh)
    saved = open_checkpoint(settings.output_dir) if steps_in(checkpoint_dir) else None
    base = open_checkpoint(settings.init_from) if settings.init_from is not None and saved is None else None
    given = saved or base

    # ---- what the model is: architecture, tokenizer, chat template ------------------------------------------
    config = settings.model or _model_of(given, settings)
    tokenizer = _tokenizer(settings, given)
    check_vocabulary(tokenizer, config, f"data.tokenizer {settings.data.tokenizer or '(from init_from)'}")
    template = load_template(settings.data.template) if settings.data.template or not given else given.meta.template
    shardings = param_shardings(config, mesh)

    # ---- input pipeline -------------------------------------------------------------------------------------
    rows = load_rows(settings.data, tokenizer, template)
    batches = Batches(
        rows,
        settings.data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_steps=settings.num_steps,
        num_epochs=settings.num_epochs,
    )
    logger.info(
        "%d examples in %d rows of %d tokens, %.1f %% filled; %d steps of %d rows are %.2f epochs",
        len(rows),
        batches.bins_per_epoch,
        settings.data.context,
        100 * batches.fill,
        len(batches),
        settings.batch_size,
        settings.num_epochs or len(batches) * settings.batch_size / batches.bins_per_epoch,
    )

    # ---- state ----------------------------------------------------------------------------------------------
    schedule = learning_rate_schedule(settings.optimizer, len(batches))
    optimizer = make_optimizer(settings.optimizer, schedule)
    all_shardings = state_shardings(shardings, optimizer, mesh, config)
    if saved is not None:
        assert saved.meta.training is not None  # `_check_folder` has refused imported weights
        _check_resume(saved, saved.meta.training, settings, rows, len(batches))
        if saved.step == len(batches):
            logger.info("all %d steps are done: nothing to do", saved.step)
            return
        logger.info("resuming %s", saved.name)
        before = saved.meta.training["num_steps"]
        if before != len(batches):
            logger.warning(
                "%d steps instead of %d: the learning rate follows the new length from here", len(batches), before
            )
        state, first_step = saved.restore_state(all_shardings, optimizer), saved.step
        origin = saved.meta.training["origin"]
    elif base is not None:
        logger.info("starting from the weights of %s (%s)", base.name, base.meta.lineage)
        state, first_step = init_state(base.restore_params(shardings), optimizer, all_shardings), 0
        origin = base.meta.lineage
    else:
        logger.info("starting from random weights")
        params = jax.jit(lambda: model.init(config, settings.seed), out_shardings=shardings)()
        state, first_step = init_state(params, optimizer, all_shardings), 0
        origin = "random weights"
    training = {
        "settings": settings.model_dump(mode="json"),
        "num_steps": len(batches),
        "rows_sha256": rows.sha256,
        "origin": origin,
    }
    meta = Meta(config, template, tokenizer.sha256, lineage=origin, training=training)
    write_text(output_dir / "config.yaml", to_yaml(settings))
    metrics_log = MetricsLog(output_dir / "metrics.jsonl", first_step)

    # ---- loop -----------------------------------------------------------------------------------------------
    step_fn = make_train_step(
        config, settings.compute, optimizer, schedule, all_shardings, mesh, settings.accumulation_steps
    )
    logger.info(
        "training %.3g M parameters on %d %s device(s), mesh %s; compiling the first step",
        config.num_parameters / 1e6,
        jax.device_count(),
        jax.devices()[0].platform,
        dict(mesh.shape),
    )
    throughput = Throughput(config, settings.data.context)
    positions = settings.batch_size * settings.data.context
    with (
        StopSignal() as stop,
        contextlib.closing(iterate(batches, first_step, settings.data.prefetch)) as host_batches,
        Writer(checkpoint_dir, settings.checkpoint, tokenizer) as writer,
        Progress(len(batches), "training", "steps", done=first_step) as bar,
        jax.set_mesh(mesh),
        jax.transfer_guard("disallow"),
    ):
        last_loss = math.nan
        pending = None  # the last step's metrics are read while the next step runs

        def finish(step: int, device_metrics: dict[str, jax.Array]) -> None:
            values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
            if not math.isfinite(values["loss"] + values["grad_norm"]):
                raise RunError(
                    f"step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}; it is not saved. "
                    "Lower optimizer.learning_rate in another output_dir, from the beginning or from the last "
                    f"step saved (init_from={settings.output_dir})"
                )
            nonlocal last_loss
            last_loss = values["loss"]
            throughput.add(values["tokens"], positions)
            bar.update(1, f"loss {values['loss']:.3f}")
            if step % settings.log_every == 0 or step == len(batches):
                metrics_log.write({"step": step, **values, **throughput.read()})
                writer.check()

        for step in range(first_step + 1, len(batches) + 1):
            waited_from = time.monotonic()
            batch = to_devices(next(host_batches), mesh)
            throughput.data_wait_s += time.monotonic() - waited_from
            state, device_metrics = step_fn(state, batch)
            if pending is not None:
                finish(*pending)
            pending = (step, device_metrics)
            exit_code = stop.exit_code  # read once: a signal may come at any time
            if step % settings.checkpoint.every == 0 or step == len(batches) or exit_code is not None:
                finish(*pending)
                pending = None
                lineage = f"trained {step} steps from {origin}"
                writer.save(step, state.params, dataclasses.replace(meta, lineage=lineage), state.optimizer)
                metrics_log.flush()
            if exit_code is not None and step < len(batches):
                writer.close()
                raise Stopped(f"stopped after step {step}, which is saved; the same command goes on", exit_code)
    logger.info("done: step %d with loss %.3f, saved in %s", len(batches), last_loss, checkpoint_dir)


def _check_batch(settings: TrainSettings, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = settings.batch_size // settings.accumulation_steps
    if rows % parts:
        raise UsageError(
            f"batch_size={settings.batch_size} / accumulation_steps={settings.accumulation_steps} = {rows} rows "
            f"cannot be split over mesh.data*mesh.fsdp={parts} devices; make batch_size a multiple of "
            f"{parts * settings.accumulation_steps}"
        )


def _check_folder(output_dir: epath.Path) -> None:
    if steps_in(output_dir):
        raise UsageError(f"output_dir={output_dir} holds an imported checkpoint; choose another folder for the run")
    make_folder(output_dir, "output_dir")


def _model_of(given: Checkpoint | None, settings: TrainSettings) -> ModelConfig:
    assert given is not None  # TrainSettings has either model or init_from
    try:
        settings.check_context(given.meta.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return given.meta.model


def _tokenizer(settings: TrainSettings, given: Checkpoint | None) -> Tokenizer:
    if settings.data.tokenizer is None:
        assert given is not None  # without init_from, TrainSettings requires data.tokenizer
        return given.tokenizer
    tokenizer = Tokenizer.load(settings.data.tokenizer)
    if given is not None and tokenizer.sha256 != given.tokenizer.sha256:
        raise UsageError(
            f"data.tokenizer={settings.data.tokenizer} is not the tokenizer that {given.name} was made with; "
            "leave it out to use that one"
        )
    return tokenizer


def _check_resume(
    saved: Checkpoint, training: dict[str, Any], settings: TrainSettings, rows: TokenizedRows, num_steps: int
) -> None:
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


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mathscale_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the configuration:\n" + "\n".join(describe(TrainSettings)),
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="settings of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a setting of the file")
    arguments = parser.parse_args(argv)
    train(load_settings(TrainSettings, arguments.config, arguments.overrides))


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-train."""
    run_command(_main, argv)


if __name__ == "__main__":
    main()
