"""Ahead of time: the programs of training and sampling compiled by libtpu for a slice that is not here.

Everything is lowered over abstract arrays, so a 70B step needs no more memory than its compilation.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from data_pipeline.cli import logger
from data_pipeline.settings import UsageError
from mathscale_jax import lora, model
from mathscale_jax.attention import with_backend
from mathscale_jax.chips import Topology
from mathscale_jax.config import ComputeSettings, ModelConfig, TrainSettings
from mathscale_jax.mesh import check_batch, sharding_of
from mathscale_jax.optimizer import learning_rate_schedule, make_optimizer
from mathscale_jax.sampler import decode
from mathscale_jax.sampler.draw import SamplingSettings
from mathscale_jax.sampler.placement import decode_mesh, token_limit, usable
from mathscale_jax.sampler.schedule import FEWEST_SLOTS
from mathscale_jax.step import TrainState, make_train_step, param_shardings, spec_shardings, state_shardings

# Of the planned decode step: the rows and lengths of a usual evaluation.
DECODE_PROMPT, DECODE_RESPONSE = 256, 512


def devices_of(topology: Topology) -> list[jax.Device]:
    """The slice's devices, which can be compiled for and nothing else. Raises UsageError where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("planning needs libtpu, the TPU compiler: pip install -c constraints.txt -e '.[tpu]'")
    jax.config.update("jax_platforms", "cpu")  # or jax would look for a TPU in this machine
    # libtpu asks a TPU VM's metadata server, and locks the chips, unless told that there is nothing of the kind.
    nowhere = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # of the host; what is compiled for is named below
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in nowhere.items():
        os.environ.setdefault(name, value)
    try:
        options = topology.chip.topology_options
        description = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"--topology {topology.name}: libtpu knows no such slice (they are made of whole hosts, for example of 2x2 "
            f"chips): {str(error).splitlines()[0]}"
        ) from error
    return list(description.devices)


def lower_train_step(settings: TrainSettings, config: ModelConfig, mesh: Mesh) -> Any:
    """The training step over abstract arrays. Raises UsageError where model or batch cannot be split over the mesh."""
    check_batch(settings.batch_size, settings.accumulation_steps, mesh.axis_sizes)
    schedule = learning_rate_schedule(settings.optimizer, settings.num_steps or 1000)
    optimizer = make_optimizer(settings.optimizer, schedule)
    compute = with_backend(settings.compute, config, settings.data, "tpu")
    every_spec = model.param_specs(config)
    specs = every_spec if settings.lora is None else lora.adapter_specs(config, settings.lora)
    shardings = state_shardings(spec_shardings(specs, mesh), optimizer, mesh)
    state = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
        _abstract(specs, jnp.float32),
    )
    frozen: tuple[Any, ...] = ()
    if settings.lora is not None:
        frozen = (_with_shardings(_abstract(every_spec, compute.dtype), param_shardings(config, mesh)),)
    rows = jax.ShapeDtypeStruct(
        (settings.batch_size, settings.data.context), jnp.int32, sharding=sharding_of(mesh, ("batch", None))
    )
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), rows)
    batch["loss_mask"] = rows.update(dtype=jnp.bool_)
    step: Any = make_train_step(
        config, compute, optimizer, schedule, shardings, mesh, settings.accumulation_steps,
        compiler_options=settings.compiler_options, lora_settings=settings.lora, seed=settings.seed,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        return step.lower(_with_shardings(state, shardings), batch, *frozen)


def compile_sampler(
    config: ModelConfig, topology: Topology, devices: Sequence[jax.Device]
) -> tuple[Mesh, dict[str, Any]]:
    """The sampler's prefill of one prompt, and a decode step of the default number of its samples, compiled.

    With caches as long as the sampler would let them grow for so many, and no longer than a usual response.
    """
    memory = usable(topology.chip.hbm_bytes)
    mesh = decode_mesh(config, "bfloat16", devices, memory)
    limit = token_limit(config, mesh, "bfloat16", "bfloat16", memory)
    compute = ComputeSettings(remat="none")
    params = _with_shardings(_abstract(model.param_specs(config), jnp.bfloat16), param_shardings(config, mesh))
    settings = SamplingSettings()
    num_slots = DECODE_RESPONSE
    while num_slots > FEWEST_SLOTS and DECODE_PROMPT + settings.num_samples * num_slots > limit:
        num_slots //= 2
    logger.info("decoding %d rows of one problem with caches for %d tokens each", settings.num_samples, num_slots)
    rule = decode.Rule(settings.temperature, settings.top_k, settings.top_p, eos_id=2, num_pieces=config.vocab_size)

    def whole(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(mesh, ()))

    with jax.set_mesh(mesh):
        prefill = decode.begin.lower(
            config, compute, params, whole((1, DECODE_PROMPT)), whole((1,)), whole((1,)), whole((1, 2), jnp.uint32),
            whole((1, settings.num_samples)), rule=rule, cache_dtype="bfloat16", num_slots=num_slots,
        ).compile()  # fmt: skip
        prompts, rows, _ = _with_shardings(prefill.out_info, prefill.output_shardings)
        none = (whole(()),) * 3
        step = decode.decode_chunk.lower(config, compute, params, prompts, rows, none, rule=rule, num_steps=1)
        return mesh, {"prefill": prefill, "decode": step.compile()}


def _abstract(specs: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype),
        specs,
        is_leaf=lambda x: isinstance(x, model.ParamSpec),
    )


def _with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one device, in bytes."""

    capacity: float
    peak: float
    arguments: float | None = None  # these four are unknown where the compiler gave up
    aliased: float | None = None
    outputs: float | None = None
    temporaries: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the peak lies within what the chip gives a program."""
        return self.peak <= self.capacity


def memory_of(compiled: Any, topology: Topology) -> Memory:
    """What libtpu's memory analysis of a compiled program says."""
    stats = compiled.memory_analysis()
    code = stats.generated_code_size_in_bytes
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        capacity=topology.chip.hbm_bytes,
        peak=max(peak + stats.temp_size_in_bytes, stats.peak_memory_in_bytes) + code,
        arguments=stats.argument_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def memory_of_failure(error: Exception, topology: Topology) -> Memory:
    """The same from the compiler's refusal, which names what is needed and what there is. Re-raises other errors."""
    sizes = re.findall(r"([\d.]+)([KMG])", str(error).partition("HBM")[2] or str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise error
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return Memory(topology.chip.hbm_bytes, peak=max(float(size) * units[unit] for size, unit in sizes))
