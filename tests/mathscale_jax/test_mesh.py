"""The mesh fits the devices, and the parameters fit the mesh, or one clear error says why not."""

import jax
import pytest
from jax.sharding import PartitionSpec

from data_pipeline.settings import UsageError
from mathscale_jax.config import PRESETS, MeshSettings, ModelConfig
from mathscale_jax.mesh import make_mesh
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
