"""Where weights and caches lie for decoding: how many devices share the weights, and how much room they leave."""

import ctypes
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from mathscale_jax import model
from mathscale_jax.config import ModelConfig
from mathscale_jax.mesh import MESH_AXES
from mathscale_jax.sampler.decode import CacheDtype
from mathscale_jax.step import param_shardings

_USABLE = 0.9
_FOR_WEIGHTS = 0.5  # of that, before more devices share them
# Of what the weights leave, for the caches that are decoded; twice as much for what is laid aside or on its way.
_FOR_CACHES = 0.3
_OF_A_HOST = 0.5  # of its memory, for CPU devices
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_BYTES = {"float32": 4, "bfloat16": 2}


def decode_mesh(
    config: ModelConfig, dtype: str, devices: Sequence[jax.Device] | None = None, memory: float | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices`, by default all: as few as hold the weights share them by heads.

    The others hold copies, and share the rows: a step then sends less. Where heads cannot be shared by as many as the
    weights need, each device holds a part along the residual stream and gathers the rest in every step. `memory` is
    what a device gives to weights and caches, in bytes; by default most of what is free.
    """
    devices = list(jax.devices() if devices is None else devices)
    memory = memory or memory_of(devices[0])
    weights = config.num_parameters * _BYTES[dtype]
    sizes = (config.num_kv_heads, config.intermediate_size, config.vocab_size)
    shares = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and all(size % n == 0 for size in sizes)]
    tensor = next((n for n in shares if weights / n <= _FOR_WEIGHTS * memory), shares[-1])
    others = len(devices) // tensor
    gathers = weights / tensor > memory and config.hidden_size % others == 0
    grid = np.asarray(devices).reshape((1, others, tensor) if gathers else (others, 1, tensor))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def memory_of(device: jax.Device) -> float:
    """Bytes of a device that weights and caches may take beside what is there; of a CPU a share of the host's."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return usable(stats["bytes_limit"]) - stats["bytes_in_use"]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return usable(_OF_A_HOST * host / jax.local_device_count())


def keep_freed_memory() -> None:
    """On CPUs, has this process keep what is freed: each step of decoding takes the same hundreds of megabytes again.

    glibc would give them back to the system, which zeroes them anew page by page: an eighth of the time, measured. What
    the process holds stays at its peak. Without glibc, or with an accelerator, nothing is done.
    """
    if jax.default_backend() == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def usable(num_bytes: float) -> float:
    """What weights and caches may take of a device's memory; the rest is for what programs need meanwhile."""
    return _USABLE * num_bytes


def token_limit(
    config: ModelConfig, mesh: Mesh, dtype: str, cache_dtype: CacheDtype, memory: float | None = None
) -> int:
    """The tokens for whose keys and values there is room on all devices together, when the weights are there.

    Rounded down to three bits: what is decoded together does not depend on a few bytes.
    """
    memory = memory or memory_of(mesh.devices.flat[0])
    weights = config.num_parameters * _BYTES[dtype] / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    token = 2 * config.num_layers * config.num_kv_heads * bytes_of_vector(config, cache_dtype)
    limit = max(0, math.floor(_FOR_CACHES * (memory - weights) * mesh.size / token))
    dropped = max(0, limit.bit_length() - 3)
    return limit >> dropped << dropped


def bytes_of_vector(config: ModelConfig, dtype: str) -> int:
    """Of one head's key or value; in int8 with its scale."""
    return config.head_dim + 4 if dtype == "int8" else config.head_dim * _BYTES[dtype]


def placed(params: model.Params, config: ModelConfig, mesh: Mesh, dtype: str) -> model.Params:
    """A copy of the parameters in `dtype` where they belong on `mesh`, whose devices they must lie on already."""

    def place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.jit(lambda leaf: leaf.astype(dtype), out_shardings=sharding)(leaf)

    with jax.set_mesh(mesh):
        return jax.tree.map(place, params, param_shardings(config, mesh))
