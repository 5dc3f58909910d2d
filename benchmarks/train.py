"""python -m benchmarks.train: our training step against PyTorch's, packed against padded rows, and our own variants.

    python -m benchmarks.train                                     # three sizes on this machine, against PyTorch
    python -m benchmarks.train --models small --context 2048 --rows 1 --layouts packed,padded \\
        --data gsm8k_train.jsonl --tokenizer tokenizer.model       # what packing is worth
    python -m benchmarks.train --models llama2-7b --context 2048 --rows 1 --dtype bfloat16 --peers ours \\
        --attention splash,cudnn,pallas,xla --remat full,dots --scan-unroll 1,2,4 --together false --rounds 1

A step is the whole of it: forward, backward, clipping, AdamW on float32 weights. Before anything is timed, both
sides have trained the warm-up steps from the same weights on the same batch, and their losses must agree.

MFU counts 6 N + 12 L d T FLOPs a token, nothing off for causality, against the device's bf16 peak.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from benchmarks.flags import Names, Numbers, settings_and_command
from benchmarks.peers import JaxPeer, TorchPeer
from benchmarks.report import environment, row_as_json, train_table, write_results
from benchmarks.rounds import Contestant, Row, measure
from benchmarks.worker import Limits
from data_pipeline.cli import RunError, logger, run_command
from data_pipeline.loader import Batch, Batches
from data_pipeline.settings import Settings, UsageError, validated
from data_pipeline.sources import DataSettings, Source, load_rows
from data_pipeline.templates import load_template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax.config import PRESETS, ComputeSettings, ModelConfig
from mathscale_jax.telemetry import flops_per_token

# For CPUs: small enough for a step of seconds, each with LLaMA-2's vocabulary and shape of a block.
SIZES: dict[str, dict[str, Any]] = {
    name: dict(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 64,
        head_dim=64,
        max_context=4096,
    )
    for name, hidden, mlp, layers in (
        ("small", 256, 688, 6),  # 21 M parameters
        ("medium", 512, 1376, 8),  # 58 M
        ("large", 1024, 2752, 4),  # 116 M
    )
}
# Relative difference of two losses that is rounding: measured, between torch and float64 as between torch and us.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
PEERS = ("ours", "torch", "torch-compile", "torch-recompute")


class BenchmarkSettings(Settings):
    """What is measured; lists are separated by commas, and every combination of them is one variant of ours."""

    models: Names = pydantic.Field(
        ("small", "medium", "large"), description=f"of {', '.join([*SIZES, *PRESETS])}; each has a table of its own"
    )
    rows: pydantic.PositiveInt = pydantic.Field(4, description="rows of a step, for each device")
    context: pydantic.PositiveInt = pydantic.Field(512, description="positions in a row")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("float32", description="of the pass; weights are float32")
    peers: Names = pydantic.Field(("torch", "ours"), description=f"of {', '.join(PEERS)}; the first is the reference")
    layouts: Names = pydantic.Field(("padded",), description="of packed, padded; packed needs data")
    attention: Names = pydantic.Field(("auto",), description="compute.attention of ours")
    remat: Names = pydantic.Field(("none",), description="compute.remat of ours")
    scan_unroll: Numbers = pydantic.Field((1,), description="compute.scan_unroll of ours")
    loss_chunk: Numbers = pydantic.Field((256,), description="compute.loss_chunk of ours")
    data: str | None = pydantic.Field(None, description="rows of GSM8K to train on; null: rows full of random tokens")
    tokenizer: str | None = pydantic.Field(None, description="tokenizer.model for data")
    warmup_steps: pydantic.PositiveInt = pydantic.Field(3, description="steps before the timing; the first compiles")
    rounds: pydantic.PositiveInt = pydantic.Field(7, description="times that every variant is measured, in turns")
    steps: pydantic.PositiveInt = pydantic.Field(2, description="steps of a measurement")
    together: bool = pydantic.Field(
        True, description="all variants stay in memory and take turns; false: one after another, memory freed between"
    )
    time_limit: pydantic.PositiveFloat = pydantic.Field(1800.0, description="seconds a variant may take to answer")
    cores: pydantic.PositiveInt | None = pydantic.Field(None, description="cores a variant may use; null: all")
    patience: pydantic.NonNegativeFloat = pydantic.Field(
        0.0, description="seconds a measurement may wait, and be repeated, until other programs leave the cores alone"
    )
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "BenchmarkSettings":
        for key, allowed in (
            ("models", (*SIZES, *PRESETS)),
            ("peers", PEERS),
            ("layouts", ("packed", "padded")),
        ):
            for value in getattr(self, key):
                if value not in allowed:
                    raise ValueError(f"{key}={value!r} is unknown; allowed: {', '.join(allowed)}")
        if (self.data is None) != (self.tokenizer is None):
            raise ValueError("data and tokenizer go together: give both or neither")
        if self.data is None and "packed" in self.layouts:
            raise ValueError("layouts=packed needs data: rows of random tokens are full")
        return self


def contestants_of(settings: BenchmarkSettings, name: str) -> list[Contestant]:
    """Every row of one model's table. Raises UsageError."""
    config = validated(ModelConfig, {**{**SIZES, **PRESETS}[name]}, f"model {name}")
    if settings.context > config.max_context:
        raise UsageError(f"--context {settings.context} is longer than {name}'s max_context={config.max_context}")
    batches = {layout: _batches(settings, layout, config) for layout in settings.layouts}
    same_weights = any(peer != "ours" for peer in settings.peers)
    found: list[Contestant] = []
    arguments: tuple[Any, ...]
    for peer, layout in itertools.product(settings.peers, settings.layouts):
        mine = batches[layout]
        positions = settings.rows * settings.context
        tokens = round(float(np.mean([(batch["segment_ids"] > 0).sum() for batch in mine])))
        suffix = f", {layout}" if settings.data is not None else ""
        if peer != "ours":
            if layout == "packed":
                continue  # transformers has no packed rows without kernels that only GPUs have
            arguments = (config, settings.dtype, mine, peer == "torch-compile", peer == "torch-recompute")
            found.append(Contestant(peer + suffix, layout, TorchPeer, arguments, positions, tokens))
            continue
        for compute, label in _variants(settings):
            arguments = (config, compute, mine, same_weights)
            found.append(Contestant(f"ours{suffix}{label}", layout, JaxPeer, arguments, positions, tokens))
    return found


def _variants(settings: BenchmarkSettings) -> list[tuple[ComputeSettings, str]]:
    """Every combination of the listed compute settings, and what tells it from the others."""
    lists = {
        "attention": settings.attention,
        "remat": settings.remat,
        "scan_unroll": settings.scan_unroll,
        "loss_chunk": settings.loss_chunk,
    }
    variants = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        label = "".join(f", {key} {value}" for key, value in chosen.items() if len(lists[key]) > 1)
        variants.append((validated(ComputeSettings, {"dtype": settings.dtype, **chosen}, "compute"), label))
    for chunk in settings.loss_chunk:
        if settings.context % chunk:
            raise UsageError(f"--loss-chunk {chunk} must divide --context {settings.context}")
    return variants


def _gpu_memory(together: bool) -> dict[str, str]:
    """Of a GPU that several share, each takes what it needs; alone, all but what CUDA itself needs."""
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if together else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def _batches(settings: BenchmarkSettings, layout: str, config: ModelConfig) -> list[Batch]:
    if settings.data is None:
        shape = (settings.rows, settings.context)
        tokens = np.random.default_rng(0).integers(3, config.vocab_size, (shape[0], shape[1] + 1), np.int32)
        return [
            Batch(
                tokens=tokens[:, :-1].copy(),
                targets=tokens[:, 1:].copy(),
                loss_mask=np.ones(shape, bool),
                segment_ids=np.ones(shape, np.int32),
                positions=np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            )
        ]
    assert settings.tokenizer is not None  # the settings have both or neither
    data = DataSettings(
        sources=(Source(task="gsm8k", path=settings.data),),
        tokenizer=settings.tokenizer,
        context=settings.context,
        layout=layout,
    )
    tokenizer = Tokenizer.load(settings.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"--tokenizer has {tokenizer.vocab_size} pieces, the model {config.vocab_size}")
    rows = load_rows(data, tokenizer, load_template(None))
    num_steps = settings.warmup_steps + settings.rounds * settings.steps
    batches = Batches(rows, data, batch_size=settings.rows, seed=0, num_steps=num_steps)
    return [batches[step] for step in range(num_steps)]


def check_losses(rows: Sequence[Row], dtype: str) -> None:
    """Raises RunError where two contestants on the same batches do not have the same losses while they warm up."""
    for layout in {row.contestant.layout for row in rows}:
        alike = [row for row in rows if row.first_losses and row.contestant.layout == layout]
        for row in alike[1:]:
            first, second = np.asarray(alike[0].first_losses), np.asarray(row.first_losses)
            if not np.allclose(first, second, rtol=LOSS_TOLERANCE[dtype], atol=0):
                raise RunError(
                    f"{alike[0].contestant.name} has the losses {first.tolist()} and {row.contestant.name} "
                    f"{second.tolist()}: they do not compute the same, so comparing their speed means nothing"
                )


def benchmark(settings: BenchmarkSettings, command: str) -> None:
    """Measures every model, prints its table, and writes its files. Raises UsageError and RunError."""
    plans = {name: contestants_of(settings, name) for name in settings.models}
    for name, contestants in plans.items():
        config = ModelConfig(**{**SIZES, **PRESETS}[name])
        load = os.getloadavg()[0]
        rows = measure(
            contestants,
            warmup_steps=settings.warmup_steps,
            rounds=settings.rounds,
            steps=settings.steps,
            together=settings.together,
            patience=settings.patience,
            limits=Limits(settings.time_limit, settings.cores, _gpu_memory(settings.together)),
        )
        check_losses(rows, settings.dtype)
        measured = [row for row in rows if row.failure is None]
        if not measured:
            raise RunError(f"{name}: no variant could be measured: {rows[0].failure}")
        where = environment(measured[0].description["device"], load)
        peaks = [row.description["peak_flops"] for row in measured if row.description["peak_flops"] is not None]
        for row in measured:
            row.description["peak_flops"] = peaks[0] if peaks else None  # torch's is the same device
        reference = rows[0] if len(rows) > 1 else None
        flops = flops_per_token(config, settings.context)
        best = max(measured, key=lambda row: row.tokens_per_second)
        body = "\n\n".join(
            [
                f"{config.num_parameters / 1e6:.4g} M parameters ({config.num_layers} layers of {config.hidden_size}, "
                f"vocabulary {config.vocab_size:,}); {settings.rows} rows of {settings.context} positions a device, "
                f"{settings.dtype}; {settings.rounds} rounds of {settings.steps} steps.",
                train_table(rows, flops, reference),
                f"Best: {best.contestant.name}, {best.tokens_per_second:,.0f} useful tokens/s/device.",
            ]
        )
        print(f"\n{name}: {body}\n", flush=True)
        if settings.out is not None:
            values = {
                "model": config.model_dump(),
                "settings": settings.model_dump(mode="json", exclude={"out"}),
                "flops_per_token": flops,
                "best": best.contestant.name,
                "rows": [row_as_json(row, reference) for row in rows],
            }
            logger.info("wrote %s", write_results(settings.out, f"train {name}", where, command, body, values))


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.train", __doc__, BenchmarkSettings, argv))


if __name__ == "__main__":
    run_command(_main)
