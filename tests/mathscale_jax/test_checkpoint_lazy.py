"""Weights that are read while they are written become the same checkpoint as weights that lie on devices."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from data_pipeline.settings import UsageError
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Meta, open_checkpoint, steps_in
from mathscale_jax.checkpoint_lazy import LazyArray, write_lazily
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.checksums import _ROW, array_checksum, host_checksum
from mathscale_jax.config import CheckpointSettings, ModelConfig

CONFIG = ModelConfig.model_validate(
    {"preset": "demo", "vocab_size": 320, "num_layers": 3, "hidden_size": 32, "head_dim": 8}
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], vocab_size=320)


@pytest.fixture(scope="module")
def params() -> model.Params:
    return jax.jit(lambda: model.init(CONFIG, 0))()


def lazy(params: model.Params) -> dict[str, LazyArray]:
    """The parameters as arrays of one piece a layer, or of one."""
    arrays = {}
    for name, leaf in model.named_leaves(params).items():
        whole = np.asarray(leaf)
        count = len(whole) if name.startswith("blocks.") else 1
        rows = len(whole) // count
        arrays[name] = LazyArray(
            whole.shape,
            whole.dtype,
            tuple(f"{name} of layer {i}" for i in range(count)),
            lambda i, into, whole=whole, rows=rows: np.copyto(into, whole[i * rows : (i + 1) * rows]),
        )
    return arrays


def meta(tokenizer: Tokenizer) -> Meta:
    return Meta(CONFIG, Template(), tokenizer.sha256, "random weights", companions={"a.json": {"b": [1, None]}})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_hosts_checksum_is_the_devices_and_ranges_add_up(dtype: str) -> None:
    assert 2 * _ROW < 7 * 33 * 50 < 3 * _ROW  # whole rows and a rest
    array = np.random.default_rng(0).standard_normal((7, 33, 50)).astype(dtype)
    expected = int(array_checksum(jnp.asarray(array)))
    assert host_checksum(array, 0) == (expected, 0)
    parts = [host_checksum(part, start * 33 * 50)[0] for start, part in ((0, array[:3]), (3, array[3:]))]
    assert sum(parts) % 2**32 == expected
    assert int(array_checksum(jnp.asarray(array[3:]), 3 * 33 * 50)) == parts[1]


def test_every_value_that_is_not_finite_is_counted() -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = np.zeros((100, 100), dtype)
        array[3, 4], array[50, 50], array[99, 99] = np.nan, np.inf, -np.inf
        array[7, 7] = ml_dtypes.finfo(dtype).max
        assert host_checksum(array, 0)[1] == 3


def test_the_checkpoint_is_the_one_that_is_written_from_devices(
    params: model.Params, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    told: list[int] = []
    arrays = lazy(params)
    write_lazily(epath.Path(tmp_path / "lazy"), 0, arrays, meta(tokenizer), tokenizer, told.append)
    with Writer(epath.Path(tmp_path / "eager"), CheckpointSettings(), tokenizer) as writer:
        writer.save(0, params, meta(tokenizer))
    ours, theirs = (open_checkpoint(str(tmp_path / name)) for name in ("lazy", "eager"))
    assert ours.meta == theirs.meta
    assert sum(told) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for a, b in zip(jax.tree.leaves(ours.restore_params()), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_more_pieces_are_read_at_a_time_than_are_allowed(
    params: model.Params, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mathscale_jax.checkpoint_lazy._BYTES_UNDER_WAY", 1)
    reading, most, lock = 0, 0, threading.Lock()

    def watched(array: LazyArray) -> LazyArray:
        def read(i: int, into: np.ndarray) -> None:
            nonlocal reading, most
            with lock:
                reading += 1
                most = max(most, reading)
            array.read(i, into)
            with lock:
                reading -= 1

        return LazyArray(array.shape, array.dtype, array.pieces, read)

    arrays = {name: watched(array) for name, array in lazy(params).items()}
    write_lazily(epath.Path(tmp_path), 0, arrays, meta(tokenizer), tokenizer, lambda _: None)
    assert most == 1


def test_what_reading_raises_ends_it_and_leaves_nothing_that_looks_whole(
    params: model.Params, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    arrays = lazy(params)

    def fail(i: int, into: np.ndarray) -> None:
        raise UsageError("this tensor is gone")

    broken = arrays | {"norm.scale": LazyArray((32,), np.dtype(np.float32), ("norm",), fail)}
    with pytest.raises(UsageError, match="this tensor is gone"):
        write_lazily(epath.Path(tmp_path), 0, broken, meta(tokenizer), tokenizer, lambda _: None)
    assert steps_in(epath.Path(tmp_path)) == []
    write_lazily(epath.Path(tmp_path), 0, arrays, meta(tokenizer), tokenizer, lambda _: None)
    assert steps_in(epath.Path(tmp_path)) == [0]


def test_tensors_with_nan_are_all_named(params: model.Params, tokenizer: Tokenizer, tmp_path: Path) -> None:
    changed = jax.tree.map(np.array, params)
    changed["blocks"]["mlp"]["up"][1, 2, 3] = np.nan
    changed["blocks"]["mlp"]["up"][2, 2, 3:5] = np.inf
    changed["norm"]["scale"][5] = np.nan
    with pytest.raises(UsageError) as caught:
        write_lazily(epath.Path(tmp_path), 0, lazy(changed), meta(tokenizer), tokenizer, lambda _: None)
    for line in ("blocks.mlp.up of layer 1: 1", "blocks.mlp.up of layer 2: 2", "norm.scale of layer 0: 1"):
        assert line in str(caught.value)
    assert str(caught.value).count("of layer") == 3
    assert steps_in(epath.Path(tmp_path)) == []
