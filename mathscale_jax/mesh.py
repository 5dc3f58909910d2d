"""The mesh, and the one table from logical axes of arrays to axes of the mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipeline.settings import UsageError
from mathscale_jax.config import MeshSettings, ModelConfig

MESH_AXES = ("data", "fsdp", "tensor")

# Parameters are split over fsdp along the residual stream and over tensor along heads, MLP width or vocabulary;
# a batch is split over data and fsdp.
LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "head_dim": None,
    "norm": None,
}


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over `devices`, by default all. Raises UsageError where sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [settings.data, settings.fsdp, settings.tensor]
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
        known = len(devices)
    if known != len(devices):
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UsageError(
            f"{shape} does not divide the {len(devices)} {devices[0].platform} device(s) at hand: the product of "
            f"the sizes must be {len(devices)}, so each one of {divisors}; -1 in one axis takes what is left"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def largest_mesh(config: ModelConfig) -> Mesh:
    """A mesh that splits the weights over as many of the devices as divide the residual stream."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if config.hidden_size % n == 0)
    return make_mesh(MeshSettings(data=1, fsdp=count, tensor=1), devices[:count])


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: not split)."""
    return PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in logical_axes))


def sharding_of(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(*logical_axes))


def constrain(array: jax.Array, *spec: Any) -> jax.Array:
    """Pins the sharding of a value inside jit by mesh axes; without a mesh around it, leaves it alone."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def check_divisible(mesh: Mesh, name: str, shape: Sequence[int], logical_axes: Sequence[str | None]) -> None:
    """Raises UsageError where a dimension of the array `name` cannot be split evenly over its mesh axes."""
    for size, axis in zip(shape, logical_axes, strict=True):
        mesh_axes = None if axis is None else LOGICAL_AXES[axis]
        for_axis = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        parts = 1
        for mesh_axis in for_axis:
            parts *= mesh.shape[mesh_axis]
        if size % parts:
            fitting = [n for n in range(1, mesh.size + 1) if size % n == 0]
            raise UsageError(
                f"{name}: its {axis} dimension of {size} cannot be split over mesh axis {'*'.join(for_axis)} of "
                f"{parts}; sizes that divide it: {fitting}"
            )
