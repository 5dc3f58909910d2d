"""What a checkpoint keeps, on which mesh it can be read, and how damage shows."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Meta, newest_whole, open_checkpoint, steps_in
from mathscale_jax.checkpoint_lazy import LazyReader
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.checksums import fingerprint
from mathscale_jax.config import CheckpointSettings, MeshSettings, ModelConfig
from mathscale_jax.mesh import make_mesh
from mathscale_jax.step import param_shardings

CONFIG = ModelConfig.model_validate(
    {"preset": "demo", "vocab_size": 320, "num_layers": 2, "hidden_size": 32, "head_dim": 8}
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], vocab_size=320)


@pytest.fixture
def params() -> model.Params:
    return jax.jit(lambda: model.init(CONFIG, 0))()


@pytest.fixture
def saved(tmp_path: Path, params: model.Params, tokenizer: Tokenizer) -> Path:
    template = Template(prompt="Q: {question}\nA:")
    with Writer(epath.Path(tmp_path), CheckpointSettings(keep=2), tokenizer) as writer:
        for step in (1, 2, 3):
            writer.save(step, params, Meta(CONFIG, template, tokenizer.sha256, "random weights"))
    return tmp_path


def test_weights_template_tokenizer_and_architecture_come_back(
    saved: Path, params: model.Params, tokenizer: Tokenizer
) -> None:
    checkpoint = open_checkpoint(str(saved))
    assert checkpoint.step == 3
    assert checkpoint.meta.model == CONFIG
    assert checkpoint.meta.template.prompt == "Q: {question}\nA:"
    assert checkpoint.tokenizer.model == tokenizer.model
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(checkpoint.restore_params()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_only_the_newest_steps_are_kept(saved: Path) -> None:
    assert open_checkpoint(str(saved), step=2).step == 2
    with pytest.raises(UsageError, match="no step 1; it has 2, 3"):
        open_checkpoint(str(saved), step=1)


def test_the_best_step_is_kept_by_a_run_that_was_resumed(
    tmp_path: Path, params: model.Params, tokenizer: Tokenizer
) -> None:
    """A second process must know the losses that the first one saved; @best is neither the newest nor NaN."""
    for sitting in ({1: math.nan, 2: 1.0, 3: 2.0}, {4: 4.0, 5: 5.0}, {6: 0.5, 7: 6.0}):
        with Writer(epath.Path(tmp_path), CheckpointSettings(keep=1, keep_best=1), tokenizer) as writer:
            for step, loss in sitting.items():
                writer.save(step, params, Meta(CONFIG, Template(), tokenizer.sha256, "", validation_loss=loss))
        best = 6 if 6 in sitting else 2
        assert steps_in(epath.Path(tmp_path)) == sorted({best, max(sitting)})
        assert open_checkpoint(f"{tmp_path}@best").step == best


def test_a_folder_whose_name_ends_like_a_step_is_that_folder(tmp_path: Path, saved: Path) -> None:
    named = tmp_path.with_name("run@2")
    saved.rename(named)
    assert newest_whole(str(named), lambda checkpoint: checkpoint.step)[1] == 3


def test_weights_are_restored_onto_any_mesh(saved: Path, params: model.Params) -> None:
    shardings = param_shardings(CONFIG, make_mesh(MeshSettings(fsdp=4, tensor=2)))
    restored = open_checkpoint(str(saved)).restore_params(shardings)
    up = restored["blocks"]["mlp"]["up"]
    assert up.sharding == shardings["blocks"]["mlp"]["up"] and len(up.addressable_shards) == 8
    np.testing.assert_array_equal(up, params["blocks"]["mlp"]["up"])


def test_one_leaf_can_be_read_alone(saved: Path, params: model.Params) -> None:
    pieces = LazyReader(open_checkpoint(str(saved))).pieces("blocks.attention.key")
    leaf = np.concatenate([piece.copy() for piece in pieces])
    np.testing.assert_array_equal(leaf, params["blocks"]["attention"]["key"])


def test_the_fingerprint_is_the_same_on_any_mesh_and_changes_with_one_bit(params: model.Params) -> None:
    digest = fingerprint(params)
    shardings = param_shardings(CONFIG, make_mesh(MeshSettings(fsdp=4, tensor=2)))
    assert fingerprint(jax.device_put(params, shardings)) == digest
    key = params["blocks"]["attention"]["key"]
    bits = jax.lax.bitcast_convert_type(key, jnp.uint32).at[1, 2, 3, 4].add(1)
    params["blocks"]["attention"]["key"] = jax.lax.bitcast_convert_type(bits, jnp.float32)
    assert fingerprint(params) != digest
    swapped = key.at[0, 0, 0, 0].set(key[0, 0, 0, 1]).at[0, 0, 0, 1].set(key[0, 0, 0, 0])
    params["blocks"]["attention"]["key"] = swapped
    assert fingerprint(params) != digest


def test_another_tokenizer_beside_the_weights_is_refused(saved: Path) -> None:
    (saved / "tokenizer.model").write_bytes(train_tokenizer(["other text of other words"], vocab_size=300).model)
    with pytest.raises(UsageError, match="is not the tokenizer"):
        open_checkpoint(str(saved))


def test_a_step_without_all_its_files_is_damaged(saved: Path) -> None:
    for file in (saved / "3" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.unlink()
    with pytest.raises(RunError, match="step 3 is damaged or incomplete"):
        open_checkpoint(str(saved)).restore_params()


def test_an_unfinished_step_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "7.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no finished step"):
        open_checkpoint(str(tmp_path))


def test_a_tokenizer_left_by_a_run_that_never_saved_is_replaced(
    tmp_path: Path, params: model.Params, tokenizer: Tokenizer
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"of other settings")
    with Writer(epath.Path(tmp_path), CheckpointSettings(), tokenizer) as writer:
        writer.save(1, params, Meta(CONFIG, Template(), tokenizer.sha256, "random weights"))
    assert open_checkpoint(str(tmp_path)).tokenizer.model == tokenizer.model


def test_a_folder_of_another_tokenizers_checkpoints_is_refused(saved: Path) -> None:
    other = train_tokenizer(["entirely different text, of 0123456789"], vocab_size=300)
    with pytest.raises(UsageError, match="another tokenizer"):
        Writer(epath.Path(saved), CheckpointSettings(), other)


def test_a_step_that_orbax_declines_to_save_is_an_error(
    tmp_path: Path, params: model.Params, tokenizer: Tokenizer
) -> None:
    (tmp_path / "900").mkdir()
    with (
        Writer(epath.Path(tmp_path), CheckpointSettings(), tokenizer) as writer,
        pytest.raises(RunError, match="step 1 was not saved"),
    ):
        writer.save(1, params, Meta(CONFIG, Template(), tokenizer.sha256, "random weights"))
