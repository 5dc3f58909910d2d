"""The mesh, and the one table from logical axes of arrays to axes of the mesh."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipeline.settings import UsageError
from mathscale_jax.config import MeshSettings

MESH_AXES = ("data", "fsdp", "tensor")
MAX_UNSHARDED = 0.02  # of a model's parameters: norms are whole, and far less than this

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
    "rank": None,
}


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over `devices`, by default all of all processes.

    Where the devices are several TPU slices, the data axis spans the slices (only gradients cross the slower
    network between them) and fsdp and tensor stay inside one. Elsewhere the devices are taken in the order of
    their hosts, so that data is what spans hosts first. Raises UsageError where sizes do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    on_tpus = devices[0].platform == "tpu"  # of GPUs, each host has a slice_index of its own
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpus else 1
    sizes = mesh_sizes(settings, len(devices), devices[0].platform, num_slices)
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        in_slice = (sizes[0] // num_slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            in_slice, (num_slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(settings: MeshSettings, num_devices: int, platform: str, num_slices: int = 1) -> tuple[int, ...]:
    """Devices along data, fsdp and tensor. Raises UsageError where they do not fit these devices and slices."""
    sizes = [settings.data, settings.fsdp, settings.tensor]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
        known = num_devices
    if known != num_devices:
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise UsageError(
            f"{shape} does not divide the {num_devices} {platform} device(s) at hand: the product of the sizes must "
            f"be {num_devices}, so each one of {divisors}; -1 in one axis takes what is left"
        )
    if sizes[0] % num_slices:
        raise UsageError(
            f"mesh.data={sizes[0]} must be a multiple of the {num_slices} slices: fsdp={sizes[1]} and "
            f"tensor={sizes[2]} stay inside a slice of {num_devices // num_slices} devices"
        )
    return tuple(sizes)


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


def constrain_rows(array: jax.Array) -> jax.Array:
    """Pins the first axis of a value to the axes of a batch; where the mesh does not divide it, nothing is split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or array.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return constrain(array)
    return constrain(array, LOGICAL_AXES["batch"])


def gather_over_fsdp(parameter: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """A parameter whole along fsdp, whose gradient is split over fsdp as the parameter is.

    The transpose of a plain constraint would ask for the whole gradient on every device: twice the bytes of a
    reduce-scatter. Without a mesh around it, does nothing.
    """
    split = partition_spec(*logical_axes)
    if "fsdp" not in split or jax.sharding.get_abstract_mesh().empty:
        return parameter
    return _gather(parameter, split, PartitionSpec(*[None if axis == "fsdp" else axis for axis in split]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(parameter: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    return constrain(parameter, *whole)


_gather.defvjp(
    lambda parameter, split, whole: (constrain(parameter, *whole), None),
    lambda split, whole, _, gradient: (constrain(gradient, *split),),
)


def on_own_rows(
    function: Callable[..., jax.Array],
    matrix: jax.Array,
    logical_axes: Sequence[str | None],
    *rows: jax.Array,
    summed: bool = False,
) -> jax.Array:
    """`function(tensor_axis, matrix, *rows)` on every device, with its own rows and the matrix gathered over fsdp.

    `rows` are split along their first axis; so is the result, or with `summed` it is the sum over all rows. The
    matrix keeps its split over tensor, and `function` adds up over `tensor_axis` what that leaves in parts. The
    gradient of the matrix is summed over a device's own rows first, then scattered over fsdp, once: left to the
    partitioner, it crosses the network for every chunk of the loss, or stays whole on every device.
    Without a mesh around it, on a single device, or where the mesh does not divide the rows (a few samples drawn
    while training), `function` is called plainly, with None for the axis.
    """
    mesh, split = jax.sharding.get_abstract_mesh(), partition_spec(*logical_axes)
    if mesh.empty or mesh.size == 1 or rows[0].shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return function(None, gather_over_fsdp(matrix, logical_axes), *rows)

    def local(matrix: jax.Array, *rows: jax.Array) -> jax.Array:
        matrix = jax.lax.pcast(matrix, "data", to="varying")  # here, so that data sums what fsdp has scattered
        matrix = jax.lax.all_gather(matrix, "fsdp", axis=split.index("fsdp"), tiled=True)
        result = function("tensor", matrix, *rows)
        return jax.lax.psum(result, LOGICAL_AXES["batch"]) if summed else result

    own = partition_spec("batch")
    mapped = jax.shard_map(local, in_specs=(split, *[own] * len(rows)), out_specs=PartitionSpec() if summed else own)
    return mapped(matrix, *rows)


def check_batch(batch_size: int, accumulation_steps: int, sizes: Sequence[int]) -> None:
    """Raises UsageError where a part of the batch cannot be split evenly over a mesh of these `mesh_sizes`."""
    parts = sizes[0] * sizes[1]
    rows = batch_size // accumulation_steps
    if rows % parts:
        raise UsageError(
            f"batch_size={batch_size} / accumulation_steps={accumulation_steps} = {rows} rows cannot be split over "
            f"mesh.data*mesh.fsdp={parts} devices; make batch_size a multiple of {parts * accumulation_steps}"
        )


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


def check_sharded(mesh: Mesh, sizes: Mapping[str, int], shardings: Mapping[str, NamedSharding]) -> None:
    """Raises UsageError where more than 2 % of a model would lie whole on every device of a mesh that splits it."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    whole = {name: size for name, size in sizes.items() if shardings[name].is_fully_replicated}
    share = sum(whole.values()) / sum(sizes.values())
    if share > MAX_UNSHARDED:
        largest = max(whole, key=lambda name: whole[name])
        raise UsageError(
            f"{100 * share:.1f} % of the parameters (first {largest}) would lie unsharded on every device of the mesh "
            f"{dict(mesh.shape)}; at most {100 * MAX_UNSHARDED:.0f} % may: give their axes a mesh axis in LOGICAL_AXES"
        )
