"""Where weights and caches lie for decoding: how many devices share the weights, and how much room they leave."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mathscale_jax import model
from mathscale_jax.config import ModelConfig
from mathscale_jax.mesh import MESH_AXES
from mathscale_jax.sampler.decode import CacheDtype
from mathscale_jax.step import param_shardings

# Of a device's memory: what weights may take before more devices share them, and what programs get at all.
_FOR_WEIGHTS, _USABLE = 0.45, 0.9
# Of what the weights leave, for the caches that are decoded; as much for what is laid aside or copied.
_FOR_CACHES = 0.4
_BYTES_OF_A_CPU = 2**33
_BYTES = {"float32": 4, "bfloat16": 2}


def decode_mesh(
    config: ModelConfig, dtype: str, devices: Sequence[jax.Device] | None = None, memory: int | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices`, by default all: as few as hold the weights share them by heads.

    The others hold copies, and share the rows: a step then sends less. Where heads cannot be shared by as many as the
    weights need, each device holds a part along the residual stream and gathers the rest in every step. `memory` of a
    device in bytes is asked of it by default.
    """
    devices = list(jax.devices() if devices is None else devices)
    memory = memory or memory_of(devices[0])
    weights = config.num_parameters * _BYTES[dtype]
    sizes = (config.num_kv_heads, config.intermediate_size, config.vocab_size)
    shares = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and all(size % n == 0 for size in sizes)]
    tensor = next((n for n in shares if weights / n <= _FOR_WEIGHTS * memory), shares[-1])
    others = len(devices) // tensor
    gathers = weights / tensor > _USABLE * memory and config.hidden_size % others == 0
    grid = np.asarray(devices).reshape((1, others, tensor) if gathers else (others, 1, tensor))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def memory_of(device: jax.Device) -> int:
    """Bytes of a device; of a CPU, some that any machine has."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats else _BYTES_OF_A_CPU


def token_limit(config: ModelConfig, mesh: Mesh, dtype: str, cache_dtype: CacheDtype, memory: int | None = None) -> int:
    """The tokens for whose keys and values there is room on all devices together, when the weights are there."""
    memory = memory or memory_of(mesh.devices.flat[0])
    weights = config.num_parameters * _BYTES[dtype] / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    free = (_USABLE * memory - weights) * mesh.size
    vector = config.head_dim + 4 if cache_dtype == "int8" else config.head_dim * _BYTES[cache_dtype]
    return max(0, math.floor(_FOR_CACHES * free / (2 * config.num_layers * config.num_kv_heads * vector)))


def placed(params: model.Params, config: ModelConfig, mesh: Mesh, dtype: str) -> model.Params:
    """A copy of the parameters in `dtype` where they belong on `mesh`, in the form that its devices decode fastest."""
    with jax.set_mesh(mesh):
        params = jax.jit(model.cast, static_argnums=1, out_shardings=param_shardings(config, mesh))(params, dtype)
    return model.layers_apart(params) if mesh.devices.flat[0].platform == "gpu" else params
