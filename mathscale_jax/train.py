"""python -m mathscale_jax.train: fine-tunes a model, or trains one from scratch.

    python -m mathscale_jax.train --config configs/demo.yaml
    python -m mathscale_jax.train --config configs/demo.yaml optimizer.learning_rate=1e-3 num_steps=1200

The same command goes on where an earlier run of it stopped, however it stopped.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from data_pipeline.cli import (
    RunError,
    Stopped,
    StopSignal,
    add_flags,
    first_line,
    from_flags,
    logger,
    run_command,
)
from data_pipeline.files import locked, write_json, write_text
from data_pipeline.loader import Batches, iterate
from data_pipeline.progress import Progress
from data_pipeline.settings import describe, load_settings, to_yaml
from data_pipeline.sources import load_epoch
from data_pipeline.templates import load_template
from data_pipeline.tokenized import TokenizedRows
from mathscale_jax import lora, model, start
from mathscale_jax.attention import with_backend
from mathscale_jax.checkpoint import (
    Meta,
    newest_whole,
    set_aside_after,
    steps_in,
)
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.checksums import digest
from mathscale_jax.config import LoraSettings, TrainSettings
from mathscale_jax.mesh import check_batch, make_mesh
from mathscale_jax.optimizer import learning_rate_schedule, make_optimizer
from mathscale_jax.processes import (
    Agreement,
    ProcessSettings,
    all_or_none,
    check_same,
    check_shared,
    from_primary,
    is_primary,
    rows_of_process,
    start_processes,
)
from mathscale_jax.step import (
    init_state,
    make_summed_loss,
    make_train_step,
    param_shardings,
    spec_shardings,
    state_shardings,
    to_devices,
)
from mathscale_jax.telemetry import MetricsLog, Profile, SourceTokens, Throughput, Watchdog
from mathscale_jax.validation import LoopSampling, Validation


def train(settings: TrainSettings) -> None:
    """Runs the whole training that `settings` describe, from wherever it stands.

    Every process of a run calls it. Raises UsageError for what cannot be meant, before the first step; RunError
    for what went wrong; Stopped where a signal to any process ended it, with everything saved.
    """
    with StopSignal() as stop, contextlib.ExitStack() as held:
        _train(settings, stop, held)


def _train(settings: TrainSettings, stop: StopSignal, held: contextlib.ExitStack) -> None:
    output_dir = epath.Path(settings.output_dir)
    checkpoint_dir = output_dir / "checkpoints"

    # ---- where the run stands: resume, or start from weights, or from scratch -------------------------------
    check_same(settings.model_dump(mode="json"), "settings")
    with all_or_none():
        start.check_folder(output_dir)
        if is_primary():
            held.enter_context(locked(output_dir, "output_dir"))
        mesh = make_mesh(settings.mesh)
        check_batch(settings.batch_size, settings.accumulation_steps, mesh.axis_sizes)
        begun = bool(steps_in(checkpoint_dir))
    check_shared(output_dir, "output_dir")
    saved = newest_whole(settings.output_dir, lambda _: None)[0] if from_primary(begun) else None

    with all_or_none():
        base = start.open_base(settings, saved)
        adapted = None if settings.lora is None or base is None else base.as_base()
        given = saved or base

        # ---- what the model is: architecture, tokenizer, chat template --------------------------------------
        config = start.model_of(settings, given)
        tokenizer = start.tokenizer_of(settings, given, config)
        template = load_template(settings.data.template) if settings.data.template or not given else given.meta.template
        shardings = param_shardings(config, mesh)
        compute = with_backend(settings.compute, config, settings.data, mesh.devices.flat[0].platform)

        # ---- input pipeline ---------------------------------------------------------------------------------
        epoch = load_epoch(settings.data, tokenizer, template)
        logger.info("%s", epoch.table())
        rows = epoch.rows
        batches = Batches(
            rows,
            settings.data,
            batch_size=settings.batch_size,
            seed=settings.seed,
            num_steps=settings.num_steps,
            num_epochs=settings.num_epochs,
            rows_of_process=rows_of_process(mesh, settings.batch_size),
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
        if settings.batch_size > batches.bins_per_epoch:
            logger.warning(
                "batch_size=%d is more than the %d rows of all examples", settings.batch_size, batches.bins_per_epoch
            )
        if settings.profile and settings.profile.first_step > len(batches):
            logger.warning("profile.first_step=%d is never reached", settings.profile.first_step)
        validation = Validation(settings, tokenizer, template, mesh) if settings.validation else None
        sampling = LoopSampling(settings, config, tokenizer, template) if settings.samples else None
        if saved is not None:
            start.check_resume(saved, settings, rows, len(batches))
        else:
            start.check_room(output_dir, settings, config)
    check_same(rows.sha256, "data: tokenised examples")
    check_same(validation.sha256 if validation else "", "validation: tokenised examples")
    check_same(sampling.sha256 if sampling else "", "samples: problems")
    check_same(digest(base.meta.checksums[base.meta.weights_item]) if base else "", "init_from: weights")

    # ---- state ----------------------------------------------------------------------------------------------
    schedule = learning_rate_schedule(settings.optimizer, len(batches))
    optimizer = make_optimizer(settings.optimizer, schedule)
    trained_shardings = shardings
    if settings.lora is not None:
        trained_shardings = spec_shardings(lora.adapter_specs(config, settings.lora), mesh)
    all_shardings = state_shardings(trained_shardings, optimizer, mesh)
    if saved is not None:
        saved, state = newest_whole(settings.output_dir, lambda c: c.restore_state(all_shardings, optimizer))
        set_aside_after(saved)
        first_step, origin = saved.step, start.training_of(saved)["origin"]
        if first_step == len(batches):
            logger.info("all %d steps are done: nothing to do", first_step)
            return
        logger.info("resuming %s", saved.name)
        if start.training_of(saved)["num_steps"] != len(batches):
            logger.warning(
                "%d steps instead of %d: the learning rate follows the new length from here",
                len(batches),
                start.training_of(saved)["num_steps"],
            )
    else:
        params, first_step = start.first_params(settings, config, base, trained_shardings), 0
        state = init_state(params, optimizer, all_shardings)
        origin = "random weights" if base is None else base.meta.lineage
    # What LoRA leaves as it is: kept in the dtype it computes in.
    frozen: tuple[model.Params, ...] = ()
    if adapted is not None and base is not None:
        frozen = (base.restore_params(shardings, settings.compute.dtype),)
    training = {
        "settings": settings.model_dump(mode="json"),
        "num_steps": len(batches),
        "rows_sha256": rows.sha256,
        "origin": origin,
    }
    companions = given.meta.companions if given else {}
    meta = Meta(
        config, template, tokenizer.sha256, origin, training, lora=settings.lora, base=adapted, companions=companions
    )
    with all_or_none():
        if is_primary():
            write_text(output_dir / "config.yaml", to_yaml(settings))
            write_json(output_dir / "data.json", [dataclasses.asdict(source) for source in epoch.sources])
        log = MetricsLog(output_dir, first_step, settings.tensorboard)

    # ---- loop -----------------------------------------------------------------------------------------------
    step_fn = make_train_step(
        config,
        compute,
        optimizer,
        schedule,
        all_shardings,
        mesh,
        settings.accumulation_steps,
        compiler_options=settings.compiler_options,
        lora_settings=settings.lora,
        seed=settings.seed,
    )
    summed_loss = make_summed_loss(config, compute, mesh, settings.lora)
    logger.info(
        "training %.3g M parameters on %d %s device(s) of %d process(es), mesh %s, attention by %s; "
        "compiling the first step",
        sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6,
        jax.device_count(),
        jax.devices()[0].platform,
        jax.process_count(),
        dict(mesh.shape),
        compute.attention,
    )
    adapter_parameters = None if settings.lora is None else lora.num_parameters(config, settings.lora)
    throughput = Throughput(config, settings.data.context, adapter_parameters)
    source_tokens = SourceTokens(epoch, batches)
    positions = settings.batch_size * settings.data.context
    agree = Agreement(mesh)
    with (
        contextlib.closing(iterate(batches, first_step, settings.data.prefetch)) as host_batches,
        contextlib.closing(log) as metrics_log,
        contextlib.closing(Profile(settings.profile, output_dir / "profile")) as profile,
        Writer(checkpoint_dir, settings.checkpoint, tokenizer) as writer,
        Progress(len(batches), "training", "steps", done=first_step) as bar,
        Watchdog(settings.watchdog_minutes) as watchdog,
        jax.set_mesh(mesh),
        jax.transfer_guard("disallow"),
    ):
        last_loss = math.nan
        pending = None  # the last step's metrics are read while the next step runs

        def finish(step: int, device_metrics: dict[str, jax.Array], stop_code: jax.Array | int) -> int:
            """Logs a step that was started, and returns the exit code that any process was asked to stop with, or 0."""
            values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
            if not math.isfinite(values["loss"] + values["grad_norm"]):
                raise RunError(_say_not_finite(settings, step, values, batches, rows))
            nonlocal last_loss
            last_loss = values["loss"]
            watchdog.alive()
            if step == first_step + 1:
                throughput.reset()  # its time was the compiler's
            else:
                throughput.add(values["tokens"], positions)
            source_tokens.add(step)
            bar.update(1, f"loss {last_loss:.3f}")
            if step % settings.log_every == 0 or step == len(batches):
                metrics_log.write({"step": step, **values, **throughput.read(), **source_tokens.read()})
                writer.check()
            return int(jax.device_get(stop_code))

        for step in range(first_step + 1, len(batches) + 1):
            with throughput.spending("data_wait"):
                batch = to_devices(next(host_batches), mesh, settings.batch_size)
            profile.before(step)
            state, device_metrics = step_fn(state, batch, *frozen)
            profile.after(step, device_metrics)
            exit_code = finish(*pending) if pending is not None else 0
            pending = (step, device_metrics, agree(stop.exit_code or 0))
            last = step == len(batches)
            saving = step % settings.checkpoint.every == 0 or last
            validating = validation if validation and (saving or validation.due(step)) else None
            answering = sampling if sampling and (last or sampling.due(step)) else None
            if saving or validating or answering or exit_code:
                exit_code = finish(*pending) or exit_code
                pending = None
            validation_loss = None
            if validating:
                with throughput.spending("validation"), jax.transfer_guard("allow"):
                    validation_loss = validating.loss(summed_loss, state.params, *frozen)
                metrics_log.write({"step": step, "validation_loss": validation_loss})
                logger.info("step %d: validation loss %.4f", step, validation_loss)
            if answering:
                with throughput.spending("validation"), jax.transfer_guard("allow"):
                    accuracy = answering.answer(step, _computing_weights(state.params, frozen, settings.lora))
                metrics_log.write({"step": step, "sample_accuracy": accuracy})
            if saving or exit_code:
                with throughput.spending("checkpoint"):
                    lineage = f"{origin}, then trained {step} steps"
                    here = dataclasses.replace(meta, lineage=lineage, validation_loss=validation_loss)
                    writer.save(step, state.params, here, state.optimizer)
                metrics_log.flush()
            if exit_code and not last:
                writer.close()
                raise Stopped(f"stopped after step {step}, which is saved; the same command goes on", exit_code)
    logger.info("done: step %d with loss %.3f, saved in %s", len(batches), last_loss, checkpoint_dir)


def _say_not_finite(
    settings: TrainSettings, step: int, values: dict[str, Any], batches: Batches, rows: TokenizedRows
) -> str:
    """What to say of a step whose loss is NaN or infinite; the ids of its batch's examples go into a file."""
    saved = steps_in(epath.Path(settings.output_dir) / "checkpoints")
    file = epath.Path(settings.output_dir) / f"not-finite-step-{step}.json"
    if is_primary():
        write_json(file, {"step": step, **values, "examples": [rows.name(i) for i in batches.examples(step - 1)]})
    return (
        f"step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}; it is not saved, and the ids "
        f"of its examples are in {file}. Lower optimizer.learning_rate in another output_dir, from the beginning"
        + (f" or from the last step saved (init_from={settings.output_dir})" if saved else "")
    )


def _computing_weights(
    params: model.Params, frozen: tuple[model.Params, ...], settings: LoraSettings | None
) -> model.Params:
    """The weights that a training state computes with."""
    return params if settings is None else lora.merge_all(frozen[0], params, settings)


def parsed(argv: Sequence[str] | None) -> tuple[str, TrainSettings, ProcessSettings]:
    """What the command line says, first the config's name. Ends the process, or raises UsageError, where it is none."""
    parser = argparse.ArgumentParser(
        prog="python -m mathscale_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the configuration:\n" + "\n".join(describe(TrainSettings)),
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="settings of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a setting of the file")
    group = parser.add_argument_group("several processes", "found without these on TPU pods and under Slurm")
    add_flags(group, ProcessSettings)
    arguments = parser.parse_intermixed_args(argv)
    settings = load_settings(TrainSettings, arguments.config, arguments.overrides)
    return arguments.config, settings, from_flags(ProcessSettings, arguments)


def _main(argv: Sequence[str] | None) -> None:
    _, settings, processes = parsed(argv)
    start_processes(processes)
    try:
        train(settings)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise RunError(
            f"another process of this run cannot be reached any more: {first_line(error)}\nit says why; "
            "what was saved is whole, and the same commands go on"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-train."""
    run_command(_main, argv)


if __name__ == "__main__":
    main()
