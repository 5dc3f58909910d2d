"""Several processes as one run: how they find each other, which rows each reads, how they agree to stop."""

import importlib.util
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from data_pipeline.cli import RunError, logger
from data_pipeline.settings import Settings, UsageError
from mathscale_jax.mesh import MESH_AXES, sharding_of


class ProcessSettings(Settings):
    """How this process finds the others; needed only where neither a TPU pod nor Slurm says it."""

    coordinator: str | None = pydantic.Field(None, description="HOST:PORT of process 0, the same for all processes")
    num_processes: pydantic.PositiveInt | None = pydantic.Field(None, description="processes of the run")
    process_id: pydantic.NonNegativeInt | None = pydantic.Field(None, description="number of this one, from 0")

    @pydantic.model_validator(mode="after")
    def _all_or_none(self) -> "ProcessSettings":
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(value is not None for value in given) and any(value is None for value in given):
            raise ValueError("give all three of coordinator, num_processes and process_id, or none of them")
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            raise ValueError(f"process_id={self.process_id} must be below num_processes={self.num_processes}")
        return self


def start_processes(settings: ProcessSettings | None = None) -> None:
    """Joins the other processes of the run, if there are any; call it before anything touches a device.

    By `settings` where they are given; else where a TPU VM or Slurm says that there are others, jax finds them.
    Process 0 speaks for all: the others log warnings only. Raises RunError where the others are not found.
    """
    settings = settings or ProcessSettings()
    try:
        if settings.coordinator is not None:
            jax.distributed.initialize(settings.coordinator, settings.num_processes, settings.process_id)
        elif _on_several_slurm_tasks() or _on_tpu_vm():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes of this run did not find each other: {error}") from error
    if not is_primary():
        logger.setLevel(logging.WARNING)


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether any process says so; each must call it at the same place, and waits for the others."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _on_several_slurm_tasks() -> bool:
    # SLURM_JOB_ID alone says nothing: an interactive shell inside an allocation has it too.
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _on_tpu_vm() -> bool:
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return _tpu_chips()


def _tpu_chips() -> bool:
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def rows_of_process(mesh: Mesh, num_rows: int) -> Int[np.ndarray, " rows"]:
    """The global rows of a batch, ascending, that this process's devices hold.

    Processes share rows where the tensor axis spans them. Raises UsageError where the mesh does not divide the rows.
    """
    sharding = sharding_of(mesh, ("batch",))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if num_rows % parts:
        raise UsageError(f"{num_rows} rows cannot be split over mesh.data*mesh.fsdp={parts} devices")
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices]))


class Agreement:
    """Lets all processes act on the same number: the largest that any of them gave."""

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._local, self._size = len(mesh.local_devices), mesh.size

    def __call__(self, value: int) -> jax.Array | int:
        """The largest `value` of all processes; each must call it at the same place. Does not wait for it."""
        if jax.process_count() == 1:
            return value
        mine = np.full(self._local, value, np.int32)
        with jax.transfer_guard_host_to_device("allow"):
            everyones = jax.make_array_from_process_local_data(self._sharding, mine, (self._size,))
        return self._max(everyones)
