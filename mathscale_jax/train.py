"""python -m mathscale_jax.train: fine-tunes a model, or trains one from scratch.

    python -m mathscale_jax.train --config configs/demo.yaml
    python -m mathscale_jax.train --config configs/demo.yaml optimizer.learning_rate=1e-3 num_steps=1200

The same command goes on where an earlier run of it stopped, however it stopped.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from data_pipeline.cli import RunError, Stopped, StopSignal, logger, run_command
from data_pipeline.files import write_text
from data_pipeline.loader import Batches, iterate, load_rows
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError, describe, load_settings, to_yaml, validated
from data_pipeline.templates import load_template
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

    # ---- what there is: devices, weights to start from, tokenizer -------------------------------------------
    mesh = make_mesh(settings.mesh)
    _check_batch(settings, mesh)
    base = None if settings.init_from is None else open_checkpoint(settings.init_from)
    config = settings.model or _model_of(base, settings)
    tokenizer = _tokenizer(settings, base)
    check_vocabulary(tokenizer, config, f"data.tokenizer {settings.data.tokenizer or '(from init_from)'}")
    template = load_template(settings.data.template)
    shardings = param_shardings(config, mesh)

    # ---- input pipeline -------------------------------------------------------------------------------------
    rows = load_rows(settings.data, tokenizer, template)
    rows_per_process = settings.batch_size // jax.process_count()
    batches = Batches(
        rows,
        settings.data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_steps=settings.num_steps,
        num_epochs=settings.num_epochs,
        rows_of_process=slice(rows_per_process * jax.process_index(), rows_per_process * (jax.process_index() + 1)),
    )
    logger.info(
        "%d examples in %d rows of %d tokens, %.1f %% filled; %d steps of %d rows are %.2f epochs",
        len(rows),
        batches.bins_per_epoch,
        settings.data.context,
        100 * batches.fill,
        len(batches),
        settings.batch_size,
        len(batches) * settings.batch_size / batches.bins_per_epoch,
    )
    rows_sha256 = hashlib.sha256(rows.tokens.tobytes() + rows.offsets.tobytes()).hexdigest()
    training = {"settings": settings.model_dump(mode="json"), "rows_sha256": rows_sha256}

    # ---- where the run stands: resume, or start from weights, or from scratch -------------------------------
    schedule = learning_rate_schedule(settings.optimizer, len(batches))
    optimizer = make_optimizer(settings.optimizer, schedule)
    all_shardings = state_shardings(shardings, optimizer, mesh, config)
    saved = open_checkpoint(settings.output_dir) if steps_in(checkpoint_dir) else None
    if saved is not None:
        _check_resume(saved, settings, rows_sha256)
        logger.info("resuming %s", saved.name)
        state = saved.restore_state(all_shardings, optimizer)
        if saved.step >= len(batches):
            logger.info("all %d steps are done: nothing to do", len(batches))
            return
    elif base is not None:
        logger.info("starting from the weights of %s (%s)", base.name, base.meta.lineage)
        state = init_state(base.restore_params(shardings), optimizer, all_shardings)
    else:
        logger.info("starting from random weights")
        params = jax.jit(lambda: model.init(config, settings.seed), out_shardings=shardings)()
        state = init_state(params, optimizer, all_shardings)
    first_step = 0 if saved is None else saved.step

    output_dir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_text(output_dir / "config.yaml", to_yaml(settings))
    metrics_log = MetricsLog(output_dir / "metrics.jsonl", first_step)
    lineage = f"trained {len(batches)} steps from {'random weights' if base is None else base.meta.lineage}"
    meta = Meta(config, template, tokenizer.sha256, lineage, training)

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
    host_batches = iterate(batches, first_step, settings.data.prefetch)
    throughput = Throughput(config, settings.data.context)
    positions = settings.batch_size * settings.data.context
    with (
        StopSignal() as stop,
        Writer(checkpoint_dir, settings.checkpoint, tokenizer) as writer,
        Progress(len(batches), "training", "steps", done=first_step) as bar,
        jax.set_mesh(mesh),
        jax.transfer_guard("disallow"),
    ):
        pending = None  # the last step's metrics are read while the next step runs

        def finish(step: int, device_metrics: dict[str, jax.Array]) -> None:
            values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
            if not math.isfinite(values["loss"]):
                raise RunError(f"the loss of step {step} is {values['loss']}; lower optimizer.learning_rate")
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
            if step % settings.checkpoint.every == 0 or step == len(batches) or stop.exit_code is not None:
                finish(*pending)
                pending = None
                writer.save(step, state.params, meta, state.optimizer)
                metrics_log.flush()
            if stop.exit_code is not None and step < len(batches):
                writer.close()
                raise Stopped(f"stopped after step {step}, which is saved; the same command goes on", stop.exit_code)
    logger.info("done: checkpoint step %d in %s", len(batches), checkpoint_dir)


def _check_batch(settings: TrainSettings, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = settings.batch_size // settings.accumulation_steps
    if rows % parts:
        raise UsageError(
            f"batch_size={settings.batch_size} / accumulation_steps={settings.accumulation_steps} = {rows} rows "
            f"cannot be split over mesh.data*mesh.fsdp={parts} devices; make batch_size a multiple of "
            f"{parts * settings.accumulation_steps}"
        )


def _model_of(base: Checkpoint | None, settings: TrainSettings) -> ModelConfig:
    assert base is not None  # TrainSettings has either model or init_from
    try:
        settings.check_context(base.meta.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return base.meta.model


def _tokenizer(settings: TrainSettings, base: Checkpoint | None) -> Tokenizer:
    if settings.data.tokenizer is not None:
        return Tokenizer.load(settings.data.tokenizer)
    assert base is not None
    return base.tokenizer


def _check_resume(saved: Checkpoint, settings: TrainSettings, rows_sha256: str) -> None:
    if saved.meta.training is None:
        raise UsageError(f"{saved.directory} holds imported weights, not a training run; choose another output_dir")
    before = validated(TrainSettings, saved.meta.training["settings"], saved.name)
    changes = changes_that_forbid_resume(before, settings)
    if saved.meta.training["rows_sha256"] != rows_sha256 and not changes:
        changes = ["data: the tokenised examples are not the ones the run began with"]
    if changes:
        listed = "\n  ".join(changes)
        raise UsageError(
            f"{saved.directory} holds a run with other settings:\n  {listed}\n"
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
