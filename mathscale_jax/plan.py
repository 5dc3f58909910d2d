"""python -m mathscale_jax.plan: will a training run fit a TPU slice, and how fast can it be? Needs no TPU.

    python -m mathscale_jax.plan --config configs/llama2_70b_v5p_128.yaml --preset llama2-70b --topology v5p:4x4x4

libtpu compiles the very step that training runs, and the sampler's prefill and decode step, for the named slice. What
the page says is read from the compiled programs; nothing was run, so speeds are bounds, not measurements. The exit
code is 0 where the training step fits the chips' memory, 1 where it does not.
"""

import argparse
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data_pipeline.cli import RunError, logger, run_command
from data_pipeline.files import write_json
from data_pipeline.settings import UsageError, describe, load_settings
from mathscale_jax import hlo, hlo_cost, lora
from mathscale_jax.aot import Memory, compile_sampler, devices_of, lower_train_step, memory_of, memory_of_failure
from mathscale_jax.attention_kernels import splash_tiling
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.chips import GIB, Topology, parse_topology
from mathscale_jax.config import PRESETS, ModelConfig, TrainSettings
from mathscale_jax.mesh import make_mesh
from mathscale_jax.telemetry import flops_per_token

# ---- what a compiled program says -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one run needs at least: for its products, its HBM traffic, and its collectives."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(dataclasses.asdict(self), key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """Seconds where all three run at the same time: no step is faster."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def one_by_one(self) -> float:
        """Seconds where nothing overlaps."""
        return self.compute + self.hbm + self.interconnect


def roofline_of(cost: hlo_cost.Cost, topology: Topology, mesh: Mesh) -> Roofline:
    """Rates from `chips`; a collective's is that of the links its group spans, a permute's one ring, both ways."""
    interconnect = 0.0
    for collective in cost.collectives:
        if collective.total_bytes:
            rate = topology.bandwidth(_group_coordinates(mesh, collective.axes))
            if collective.kind == "collective-permute":
                rate = min(rate, 2 * topology.chip.link_bandwidth)
            interconnect += collective.total_bytes / rate
    return Roofline(cost.flops / topology.chip.peak_flops, cost.hbm_bytes / topology.chip.hbm_bandwidth, interconnect)


def _group_coordinates(mesh: Mesh, axes: str) -> np.ndarray:
    """Where in the slice the devices lie that differ from the first one along these mesh axes only."""
    index = tuple(slice(None) if name in axes.split("+") else 0 for name in mesh.axis_names)
    return np.array([device.coords for device in np.ravel(mesh.devices[index])])


# ---- the plan -------------------------------------------------------------------------------------------------


def plan(
    settings: TrainSettings, config: ModelConfig, topology: Topology, *, with_sampler: bool = True
) -> dict[str, Any]:
    """The plan of a run as plain values, the content of `--json`. Raises UsageError."""
    devices = devices_of(topology)
    mesh = make_mesh(settings.mesh, devices)
    lowered = lower_train_step(settings, config, mesh)
    logger.info("compiling the training step for %s: a minute or more", topology.name)
    programs = {"train_step": (mesh, _compile(lowered.compile, topology))}
    if with_sampler:
        logger.info("compiling the sampler's prefill and decode step")
        sampler = _compile(lambda: compile_sampler(config, topology, devices), topology)
        if isinstance(sampler, Memory):
            programs["sampler"] = (mesh, sampler)
        else:
            programs |= {name: (sampler[0], compiled) for name, compiled in sampler[1].items()}
    report: dict[str, Any] = {
        "topology": topology.name,
        "devices": len(devices),
        "chip": dataclasses.asdict(topology.chip),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "model": config.model_dump(mode="json"),
        "num_parameters": config.num_parameters,
        "mesh": dict(mesh.shape),
        "settings": settings.model_dump(mode="json"),
        "programs": {},
    }
    in_kernels = _attention_flops(settings, config) / len(devices)
    for name, (of_mesh, compiled) in programs.items():
        report["programs"][name] = _report(compiled, topology, of_mesh, in_kernels if name == "train_step" else 0)
    step = report["programs"]["train_step"]
    if "roofline" in step:
        step["speed"] = _speed(step, settings, config, topology, len(devices))
    report["fits"] = step["memory"]["fits"]
    report["advice"] = [] if report["fits"] else _advice(settings, config, mesh, topology)
    return report


def _compile(build: Callable[[], Any], topology: Topology) -> Any:
    """What `build()` compiles, or the Memory of a program that does not fit."""
    started = time.monotonic()
    try:
        compiled = build()
    except jax.errors.JaxRuntimeError as error:
        compiled = memory_of_failure(error, topology)
    logger.info("compiled in %.0f s", time.monotonic() - started)
    return compiled


def _attention_flops(settings: TrainSettings, config: ModelConfig) -> float:
    """Of a step's attention: two products forward, once more where they are recomputed, five backward; 2 d T each.

    The kernel skips its blocks above the diagonal.
    """
    padded, block = splash_tiling(settings.data.context)
    products = 9 if settings.compute.remat in ("dots", "full") else 7
    share = (padded // block + 1) / (2 * padded // block)
    one_product = 2 * config.num_layers * config.num_heads * config.head_dim * padded
    return share * products * one_product * settings.batch_size * padded


def _report(compiled: Any, topology: Topology, mesh: Mesh, in_kernels: float) -> dict[str, Any]:
    """`in_kernels` are the FLOPs of attention, which count where it runs in kernels that declare none."""
    memory = compiled if isinstance(compiled, Memory) else memory_of(compiled, topology)
    report: dict[str, Any] = {"memory": {**dataclasses.asdict(memory), "fits": memory.fits}}
    if memory is compiled:
        return report
    cost = hlo_cost.cost_of(hlo.parse(compiled.as_text()), dict(mesh.shape))
    in_kernels = in_kernels if cost.opaque_kernels else 0
    cost = dataclasses.replace(cost, flops=cost.flops + in_kernels)
    roofline = roofline_of(cost, topology, mesh)
    largest = cost.largest_collective
    return report | {
        "flops": cost.flops,
        "hbm_bytes": cost.hbm_bytes,
        "collectives": {
            "bytes": cost.collective_bytes,
            "by_kind": cost.bytes_by("kind"),
            "by_axes": cost.bytes_by("axes"),
            "largest": largest
            and {
                "operand": str(largest.largest),
                "bytes": largest.largest.num_bytes,
                "kind": largest.kind,
                "axes": largest.axes,
                "op_name": largest.op_name,
            },
        },
        "roofline": {
            **{f"{k}_seconds": v for k, v in dataclasses.asdict(roofline).items()},
            "overlapped_seconds": roofline.overlapped,
            "one_by_one_seconds": roofline.one_by_one,
            "bound": roofline.bound,
        },
        "kernels": {"names": sorted({_kernel_name(k) for k in cost.opaque_kernels}), "flops_by_formula": in_kernels},
        "loops_of_unknown_length": sorted(set(cost.unknown_loops)),
    }


def _kernel_name(op_name: str) -> str:
    """What the kernel was called, of the whole path of calls to it."""
    return op_name.removesuffix("/pallas_call").rpartition("/")[2]


def _speed(
    step: dict[str, Any], settings: TrainSettings, config: ModelConfig, topology: Topology, num_devices: int
) -> dict[str, Any]:
    tokens = settings.batch_size * settings.data.context / num_devices
    adapter_parameters = None if settings.lora is None else lora.num_parameters(config, settings.lora)
    formula = flops_per_token(config, settings.data.context, adapter_parameters)

    def at(seconds: float, name: str) -> dict[str, float]:
        rate = tokens / seconds
        return {f"tokens_per_second_per_device_{name}": rate, f"mfu_{name}": rate * formula / topology.chip.peak_flops}

    return {
        "tokens_per_step": settings.batch_size * settings.data.context,
        "flops_per_token_compiled": step["flops"] / tokens,
        "flops_per_token_formula": formula,
        "formula": "6 N + 12 L d T" if adapter_parameters is None else "4 N + 12 L d T + 6 x the adapter's",
        **at(step["roofline"]["overlapped_seconds"], "overlapped"),
        **at(step["roofline"]["one_by_one_seconds"], "one_by_one"),
    }


def _advice(settings: TrainSettings, config: ModelConfig, mesh: Mesh, topology: Topology) -> list[str]:
    """What to change where a training step does not fit, the cheapest first."""
    advice = []
    rows = settings.batch_size // settings.accumulation_steps // (mesh.shape["data"] * mesh.shape["fsdp"])
    if settings.compute.remat != "full":
        advice.append(f"compute.remat=full instead of {settings.compute.remat}")
    if rows > 1:
        advice.append(f"accumulation_steps={settings.accumulation_steps * rows}: {rows} rows a device at once now")
    if settings.compute.loss_chunk > 128:
        advice.append("compute.loss_chunk=128: fewer logits at a time")
    bytes_each = 16
    if settings.optimizer.state_dtype == "bfloat16":
        bytes_each = 12
    else:
        saved = 4 * config.num_parameters / (mesh.shape["fsdp"] * mesh.shape["tensor"])
        advice.append(f"optimizer.state_dtype=bfloat16: moments take {saved / GIB:.1f} GiB a device less")
    state = bytes_each * config.num_parameters / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    advice.append(
        f"more devices in mesh.fsdp (now {mesh.shape['fsdp']}) or mesh.tensor (now {mesh.shape['tensor']}): weights, "
        f"moments and gradients take {state / GIB:.1f} of {topology.chip.hbm_bytes / GIB:.1f} GiB a device"
    )
    return advice


# ---- the page and the command ---------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """The plan as text."""
    chip, mesh, versions = report["chip"], report["mesh"], report["versions"]
    settings = report["settings"]
    lines = [
        f"Plan for {report['num_parameters'] / 1e9:.2f} billion parameters on {report['topology']}, "
        f"{report['devices']} chips;",
        f"mesh {', '.join(f'{axis}={size}' for axis, size in mesh.items())}; {settings['batch_size']} rows of "
        f"{settings['data']['context']} tokens a step in {settings['accumulation_steps']} part(s), remat "
        f"{settings['compute']['remat']}.",
        f"Planned by compiling, not measured: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"Chip {chip['name']}: {chip['peak_flops'] / 1e12:.0f} TFLOP/s bf16, HBM {chip['hbm_bytes'] / GIB:.2f} GiB at "
        f"{chip['hbm_bandwidth'] / 1e9:.0f} GB/s, {2 * chip['torus_dims']} links of {chip['link_bandwidth'] / 1e9:.0f} "
        "GB/s each way (makers' documentation).",
    ]
    for name, program in report["programs"].items():
        lines += ["", name.replace("_", " ").upper(), *_program_lines(program)]
        if "speed" in program:
            lines += _speed_lines(program["speed"])
    lines += ["", "VERDICT", *(f"  {name.replace('_', ' ')} {verdict(report, name)}" for name in report["programs"])]
    return "\n".join([*lines, *(f"  - {line}" for line in report["advice"])])


def verdict(report: dict[str, Any], program: str) -> str:
    """Fits, or does not, and by how much."""
    memory = report["programs"][program]["memory"]
    spare = (memory["capacity"] - memory["peak"]) / GIB
    return f"fits, with {spare:.2f} GiB to spare" if memory["fits"] else f"does not fit, by {-spare:.2f} GiB"


def _program_lines(program: dict[str, Any]) -> list[str]:
    memory = program["memory"]
    share = 100 * memory["peak"] / memory["capacity"]
    lines = [
        f"  memory a device     peak {memory['peak'] / GIB:.2f} of {memory['capacity'] / GIB:.2f} GiB ({share:.0f} %)"
    ]
    if "roofline" not in program:
        return [*lines, "  the compiler gave up here, so there is nothing more to say of it"]
    lines[0] += (
        f": arguments {memory['arguments'] / GIB:.2f}, of which outputs reuse {memory['aliased'] / GIB:.2f}, "
        f"temporaries {memory['temporaries'] / GIB:.2f}"
    )
    collectives, roofline = program["collectives"], program["roofline"]
    largest = collectives["largest"]
    lines += [
        f"  compute             {_si(program['flops'])}FLOP a device",
        f"  HBM traffic         {_si(program['hbm_bytes'])}B a device",
        f"  received            {_si(collectives['bytes'])}B a device "
        f"({_shares(collectives['by_kind'])}; over {_shares(collectives['by_axes'])})",
    ]
    if largest:
        lines.append(
            f"  largest collective  {largest['operand']} ({_si(largest['bytes'])}B), {largest['kind']} over "
            f"{largest['axes']}, from {largest['op_name'] or 'the compiler'}"
        )
    lines.append(
        f"  at least            {1e3 * roofline['overlapped_seconds']:.2f} ms, bound by {roofline['bound']}: compute "
        f"{1e3 * roofline['compute_seconds']:.2f}, HBM {1e3 * roofline['hbm_seconds']:.2f}, interconnect "
        f"{1e3 * roofline['interconnect_seconds']:.2f}; one by one {1e3 * roofline['one_by_one_seconds']:.2f}"
    )
    if program["kernels"]["names"]:
        lines.append(
            f"  kernels             {_si(program['kernels']['flops_by_formula'])}FLOP by formula, as they declare "
            f"none: {', '.join(program['kernels']['names'])}"
        )
    if program["loops_of_unknown_length"]:
        lines.append(
            f"  counted as one turn {', '.join(program['loops_of_unknown_length'])}: its length depends on data"
        )
    return lines


def _shares(bytes_by: dict[str, float]) -> str:
    total = sum(bytes_by.values())
    return ", ".join(f"{name} {_si(size)}B" for name, size in bytes_by.items() if size >= 0.001 * total) or "nothing"


def _si(value: float) -> str:
    """Three digits or more and the prefix of a unit: 12.4 G for 12.4e9."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}" if value < 1000 * factor else f"{value / factor:.0f} {prefix}"
    return f"{value:.0f} "


def _speed_lines(speed: dict[str, Any]) -> list[str]:
    compiled, formula = speed["flops_per_token_compiled"], speed["flops_per_token_formula"]
    return [
        f"  FLOPs a token       {_si(compiled)} compiled, recomputation included; {_si(formula)} by "
        f"{speed['formula']} ({compiled / formula:.2f} times)",
        f"  planned speed       at most {speed['tokens_per_second_per_device_overlapped']:.0f} tokens/s a device, MFU "
        f"{100 * speed['mfu_overlapped']:.1f} %; {speed['tokens_per_second_per_device_one_by_one']:.0f} and "
        f"{100 * speed['mfu_one_by_one']:.1f} % if nothing overlaps",
    ]


def _architecture(settings: TrainSettings, preset: str | None) -> ModelConfig:
    """The model a run would train: of `--preset`, of the config, or of the checkpoint it starts from."""
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--preset {preset}: unknown; allowed: {', '.join(PRESETS)}")
        config = ModelConfig.model_validate({"preset": preset})
    elif settings.model is not None:
        return settings.model
    else:
        try:
            config = open_checkpoint(str(settings.init_from)).meta.model
        except UsageError as error:
            raise UsageError(
                f"{error}\nto plan without the checkpoint, say what it holds: --preset {'|'.join(PRESETS)}"
            ) from error
    try:
        settings.check_context(config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mathscale_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the configuration:\n" + "\n".join(describe(TrainSettings)),
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="settings of the training run")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="for example v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--preset", metavar="NAME", help="architecture, where the checkpoint of init_from is not here")
    parser.add_argument("--json", metavar="FILE", help="writes everything the page says, and more, as JSON")
    parser.add_argument("--no-sampler", action="store_true", help="plans the training step only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a setting of the file")
    arguments = parser.parse_intermixed_args(argv)
    topology = parse_topology(arguments.topology)
    settings = load_settings(TrainSettings, arguments.config, arguments.overrides)
    config = _architecture(settings, arguments.preset)
    report = plan(settings, config, topology, with_sampler=not arguments.no_sampler)
    if arguments.json:
        write_json(epath.Path(arguments.json), report)
    print(page(report))
    if not report["fits"]:
        raise RunError(f"{topology.name}: the training step {verdict(report, 'train_step')}")


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-plan."""
    run_command(_main, argv)


if __name__ == "__main__":
    main()
