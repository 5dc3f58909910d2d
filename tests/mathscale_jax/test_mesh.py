"""The mesh fits the devices, and the parameters fit the mesh, or one clear error says why not."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec

from data_pipeline.settings import UsageError
from mathscale_jax.config import PRESETS, MeshSettings, ModelConfig
from mathscale_jax.mesh import LOGICAL_AXES, make_mesh
from mathscale_jax.step import param_shardings


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1)),
        ({"data": 1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(settings: dict, shape: tuple[int, ...]) -> None:
    assert tuple(make_mesh(MeshSettings(**settings)).shape.values()) == shape


@pytest.mark.parametrize("settings", [{"data": 3}, {"data": 2, "fsdp": 2}, {"data": 16}])
def test_a_mesh_that_does_not_divide_the_devices_is_refused(settings: dict) -> None:
    with pytest.raises(UsageError, match=r"8 cpu device.*must be 8"):
        make_mesh(MeshSettings(**settings))


@pytest.mark.parametrize("settings", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_impossible_sizes_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"mesh"):
        MeshSettings(**settings)


def test_a_dimension_that_cannot_be_split_is_named() -> None:
    config = ModelConfig.model_validate({**PRESETS["demo"], "num_heads": 4, "num_kv_heads": 2})
    with pytest.raises(
        UsageError, match=r"key: its kv_heads dimension of 2 cannot be split over mesh axis tensor of 4"
    ):
        param_shardings(config, make_mesh(MeshSettings(fsdp=2, tensor=4)))


def test_matrices_are_split_over_fsdp_and_tensor_and_norms_are_not() -> None:
    shardings = param_shardings(
        ModelConfig.model_validate({"preset": "demo"}), make_mesh(MeshSettings(fsdp=4, tensor=2))
    )
    assert shardings["blocks"]["mlp"]["up"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert shardings["blocks"]["attention"]["output"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert shardings["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["norm"]["scale"].spec == PartitionSpec(None)
    assert len(jax.devices()) == 8


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device, of a machine of several slices of 2 x 2 chips."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id // 2 % 2, self.id // 4, 0


SLICES = [Device(id=number, slice_index=number % 2) for number in range(8)]  # dealt out, not in order


def test_the_data_axis_spans_slices_and_the_others_stay_inside_one() -> None:
    mesh = make_mesh(MeshSettings(data=-1, fsdp=2, tensor=2), SLICES)
    assert tuple(mesh.shape.values()) == (2, 2, 2)
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    larger = make_mesh(MeshSettings(data=4, fsdp=2), SLICES).devices
    assert [{device.slice_index for device in replica.flat} for replica in larger] == [{0}, {0}, {1}, {1}]


def test_hosts_of_gpus_are_not_slices() -> None:
    """jax gives the GPUs of each host a slice_index of their own, and fsdp may span hosts."""
    hosts = [Device(id=number, slice_index=number // 4, platform="gpu", device_kind="GPU") for number in range(8)]
    assert [device.id for device in make_mesh(MeshSettings(), hosts).devices.flat] == list(range(8))
    by_host = make_mesh(MeshSettings(data=2, fsdp=4), hosts).devices
    assert [{device.slice_index for device in replica.flat} for replica in by_host] == [{0}, {1}]


def test_a_data_axis_that_cannot_span_the_slices_is_refused() -> None:
    with pytest.raises(UsageError, match=r"mesh.data=1 must be a multiple of the 2 slices: fsdp=8"):
        make_mesh(MeshSettings(), SLICES)


def test_a_model_that_would_lie_whole_on_every_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table without its entry for the MLP, which is two thirds of the blocks."""
    config = ModelConfig.model_validate({"preset": "demo"})
    mesh = make_mesh(MeshSettings(fsdp=1, tensor=4, data=2))
    param_shardings(config, mesh)
    monkeypatch.setitem(LOGICAL_AXES, "mlp", None)
    with pytest.raises(UsageError, match=r"5\d\.\d % of the parameters \(first blocks\.mlp\..*at most 2 % may"):
        param_shardings(config, mesh)
    param_shardings(config, make_mesh(MeshSettings(data=8, fsdp=1)))  # replicas are meant to be whole
