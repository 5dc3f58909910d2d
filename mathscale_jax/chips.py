"""What accelerators can do, from their makers' public documentation: one table for planning and for MFU.

TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (peak compute, HBM bandwidth, bidirectional inter-chip
bandwidth, ports). A link's bandwidth is the chip's bidirectional figure over its ports, and half of that each way;
v4's is from its paper, arXiv 2304.01433. Usable HBM is what libtpu 0.0.42 gives a program, the capacity less its own
reserve. GPUs: NVIDIA's data sheets of A100, H100 SXM and H200 (dense bf16, without sparsity).
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from data_pipeline.settings import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Rates are per second."""

    name: str
    device_kind: str  # a part of what jax reports
    peak_flops: float  # dense bfloat16
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float = 0.0  # bytes one way over one link to a neighbour
    torus_dims: int = 0
    ring_multiple: int = 0  # a dimension of the torus closes to a ring where its size is a multiple of this
    max_chips: int = 0
    topology_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# What libtpu 0.0.42 needs to be told to move no more bytes than a gather or a reduce-scatter has to.
#
# Over all three dimensions of a slice it gathers and scatters by all-reducing whole buffers: twice the bytes, and the
# embedding in float32. With these it uses the chip's SparseCores, and overlaps with computation.
_SPARSE_CORE_COLLECTIVES = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
}
# It fuses an all-reduce with the slice that is kept of it only where the layout suits.
_SCATTER_LAYOUTS = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}

TPUS = (
    Chip("v4", "TPU v4", 275e12, 30.75 * GIB, 1200e9, 50e9, 3, 4, 4096, {"chip_config_name": "megacore"}),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 50e9, 2, 16, 256, {}, _SCATTER_LAYOUTS),
    Chip("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 100e9, 3, 4, 6144, {}, _SPARSE_CORE_COLLECTIVES),
    Chip("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1638e9, 100e9, 2, 16, 256, {}, _SCATTER_LAYOUTS),
)
GPUS = (
    Chip("a100", "A100", 312e12, 80e9, 2039e9),
    Chip("h100", "H100", 989e12, 80e9, 3350e9),
    Chip("h200", "H200", 989e12, 141e9, 4800e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where it is not in the table (CPUs)."""
    fitting = [chip for chip in (*TPUS, *GPUS) if chip.device_kind in device_kind]
    return max(fitting, key=lambda chip: len(chip.device_kind), default=None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips."""

    chip: Chip
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        """As Cloud TPU and libtpu write it: v5p:4x4x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    def bandwidth(self, coordinates: Int[np.ndarray, "members dims"]) -> float:
        """Bytes per second that a chip can receive from the others of a group of chips at these coordinates.

        Along every dimension in which they differ, two links where the group closes the ring, else one (the chip at
        the end of a row has one neighbour); a group that leaves chips out shares the links with those in between.
        """
        links = 0.0
        for dim, size in enumerate(self.dims):
            at = np.unique(coordinates[:, dim])
            if len(at) > 1:
                stride = int(np.diff(at).max())
                closed = size % self.chip.ring_multiple == 0 and len(at) * stride == size
                links += (2 if closed else 1) / stride
        return links * self.chip.link_bandwidth


def parse_topology(text: str) -> Topology:
    """`text` such as v5p:4x4x4 as a Topology. Raises UsageError that lists the chips and the form."""
    by_name = {chip.name: chip for chip in TPUS}
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if found is None or found.group(1) not in by_name:
        raise UsageError(
            f"--topology {text}: no such topology; it is CHIP:SHAPE with a chip of {', '.join(by_name)}, "
            "for example v5e:4x4 or v5p:4x4x4 (what Cloud calls v5p-128: it counts two cores a chip)"
        )
    chip, dims = by_name[found.group(1)], tuple(int(d) for d in found.group(2).split("x"))
    if len(dims) != chip.torus_dims or not 1 <= math.prod(dims) <= chip.max_chips:
        raise UsageError(
            f"--topology {text}: a slice of {chip.name} has {chip.torus_dims} dimensions and at most "
            f"{chip.max_chips} chips, for example {chip.name}:{'x'.join(['4'] * chip.torus_dims)}"
        )
    return Topology(chip, dims)
