"""Several processes as one run: how they find each other, which rows each reads, how they agree to stop."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from data_pipeline.cli import RunError, Stopped, StopSignal, explain, logger
from data_pipeline.settings import Settings, UsageError, differences
from mathscale_jax.damage import DamagedCheckpoint
from mathscale_jax.mesh import MESH_AXES, sharding_of

# How long jax lets a process that ends with an error wait for the others, before it ends them all.
_WHERE_ONE_FAILS: dict[str, Any] = {"shutdown_timeout_seconds": 30}
# Errors that one process tells the others of as what they are, the narrower first.
_KINDS: tuple[type[Exception], ...] = (DamagedCheckpoint, RunError, UsageError)


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
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"coordinator={self.coordinator!r} must be HOST:PORT, for example host0:8476")
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            raise ValueError(f"process_id={self.process_id} must be below num_processes={self.num_processes}")
        return self


def start_processes(settings: ProcessSettings | None = None) -> None:
    """Joins the other processes of the run, if there are any; call it before anything touches a device.

    By `settings` where they are given; else where a TPU VM or Slurm says that there are others, jax finds them.
    Process 0 speaks for all: the others log warnings only. Raises RunError where the others are not found.
    """
    settings = settings or ProcessSettings()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if settings.coordinator is not None:
            logger.info(
                "process %d of %d meets the others through %s (gives up after 5 minutes)",
                settings.process_id, settings.num_processes, settings.coordinator,
            )  # fmt: skip
            jax.distributed.initialize(
                settings.coordinator, settings.num_processes, settings.process_id, **_WHERE_ONE_FAILS
            )
        elif _on_several_slurm_tasks():
            gpus = gpus_of_slurm_task(os.environ)
            jax.distributed.initialize(local_device_ids=gpus, **_WHERE_ONE_FAILS)
        elif _on_tpu_vm():
            jax.distributed.initialize(**_WHERE_ONE_FAILS)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes of this run did not find each other: {error}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # jax takes it for a service of its own, and swallows it
    if not is_primary():
        logger.setLevel(logging.WARNING)


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What fails inside on one process fails on all of them, with the error of the first that has one.

    So does a signal to stop that has come by its end.

    Each process must come to it at the same place, and waits for the others at its end; inside, none may wait for
    another. Without it the others would wait for the one that failed until jax gives them up.
    """
    if jax.process_count() == 1:
        yield
        StopSignal.heed()
        return
    own: Exception | None = None
    try:
        yield
        StopSignal.heed()
    except Exception as error:
        own = error
    told = b"" if own is None else _told(own)
    lengths = multihost_utils.process_allgather(np.int32(len(told)))
    if not lengths.any():
        return
    buffer = np.zeros(lengths.max(), np.uint8)
    buffer[: len(told)] = np.frombuffer(told, np.uint8)
    first = int(np.argmax(lengths > 0))
    heard = np.asarray(multihost_utils.process_allgather(buffer))[first, : lengths[first]].tobytes()
    if own is not None and first == jax.process_index():
        raise own
    raise _heard(heard) from own


def _told(error: Exception) -> bytes:
    """An error as another process can raise it: by its kind where that decides what happens next."""
    if isinstance(error, Stopped):
        return json.dumps([Stopped.__name__, str(error), error.exit_code]).encode()
    for kind in _KINDS:
        if isinstance(error, kind):
            return json.dumps([kind.__name__, str(error)]).encode()
    return json.dumps([RunError.__name__, explain(error) or f"{type(error).__name__}: {error}"]).encode()


def _heard(told: bytes) -> Exception:
    """The error that `_told` told of."""
    kind, *arguments = json.loads(told)
    if kind == Stopped.__name__:
        return Stopped(*arguments)
    return {known.__name__: known for known in _KINDS}[kind](*arguments)


def from_primary(value: Any) -> Any:
    """The value that process 0 gives, which JSON must be able to hold; each must call it at the same place."""
    if jax.process_count() == 1:
        return value
    told = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    buffer = np.zeros(length, np.uint8)
    if is_primary():
        buffer[:] = told
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def check_same(value: Any, what: str) -> None:
    """Raises UsageError, which names `what`, on all processes where one of them has another value than process 0.

    Of dictionaries as JSON has them it names the keys.
    """
    of_primary = from_primary(value)
    with all_or_none():
        if value != of_primary:
            keys = f" ({'; '.join(differences(of_primary, value))})" if isinstance(value, dict) else ""
            raise UsageError(
                f"process {jax.process_index()} has other {what} than process 0{keys}; give all processes the same"
            )


def check_shared(folder: epath.Path, what: str) -> None:
    """Raises UsageError, which names `what`, on all processes where one of them sees another folder than process 0."""
    if jax.process_count() == 1:
        return
    mark = folder / from_primary(f".seen-by-all-{uuid.uuid4().hex}")
    with all_or_none():
        if is_primary():
            mark.write_text("for a moment, to see whether all processes have this folder\n")
    try:
        with all_or_none():
            if not mark.exists():
                raise UsageError(
                    f"{what}={folder} is not one folder for all processes: process {jax.process_index()} does not see "
                    "what process 0 wrote there; name one on a shared disk or in an object store"
                )
    finally:
        if is_primary():
            with contextlib.suppress(Exception):  # left there, it harms nobody
                mark.unlink()


def _on_several_slurm_tasks() -> bool:
    # SLURM_JOB_ID alone says nothing: an interactive shell inside an allocation has it too.
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def gpus_of_slurm_task(environ: Mapping[str, str]) -> list[int] | None:
    """The GPUs that a task of Slurm takes, of those that it sees; None leaves it to jax, which takes one a task.

    A task that is alone on its node takes all; one that was bound to its own GPU sees only that, as number 0, where
    jax would look for the number of the task.
    """
    said = environ.get("CUDA_VISIBLE_DEVICES")
    visible = [name for name in said.split(",") if name] if said is not None else _gpu_files()
    if environ["SLURM_STEP_NUM_TASKS"] == environ.get("SLURM_STEP_NUM_NODES"):
        return list(range(len(visible))) or None
    return [0] if len(visible) == 1 else None


def _gpu_files() -> list[str]:
    """The GPUs of this machine, where Slurm was not asked for any and hides none."""
    return [path.name for path in Path("/dev").glob("nvidia[0-9]*")]


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
