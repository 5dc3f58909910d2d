"""A checkpoint that is not bit for bit what was saved is found out, and the newest whole step takes its place."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from small_run import environment, run, write_config

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Meta, newest_whole, open_checkpoint, set_aside_after, steps_in
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.config import CheckpointSettings, MeshSettings, ModelConfig
from mathscale_jax.damage import DamagedCheckpoint, or_damaged
from mathscale_jax.mesh import make_mesh
from mathscale_jax.step import init_state, param_shardings, state_shardings

CONFIG = ModelConfig.model_validate(
    {"preset": "demo", "vocab_size": 320, "num_layers": 2, "hidden_size": 32, "head_dim": 8}
)
OPTIMIZER = optax.adamw(1e-3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], vocab_size=320)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Steps 1, 2 and 3 of a training state."""
    folder = tmp_path_factory.mktemp("saved")
    mesh = make_mesh(MeshSettings(fsdp=4, tensor=2))
    shardings = state_shardings(param_shardings(CONFIG, mesh), OPTIMIZER, mesh)
    params = jax.jit(lambda: model.init(CONFIG, 0), out_shardings=shardings.params)()
    state = init_state(params, OPTIMIZER, shardings)
    with Writer(epath.Path(folder), CheckpointSettings(keep=3), tokenizer) as writer:
        for step in (1, 2, 3):
            meta = Meta(CONFIG, Template(), tokenizer.sha256, "random weights", training={})
            writer.save(step, state.params, meta, state.optimizer)
    return folder


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A copy of them to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def restore(folder: Path, mesh: MeshSettings | None = None) -> tuple[int, model.Params]:
    on = make_mesh(mesh or MeshSettings(fsdp=2, tensor=4))
    shardings = state_shardings(param_shardings(CONFIG, on), OPTIMIZER, on)
    checkpoint, state = newest_whole(str(folder), lambda c: c.restore_state(shardings, OPTIMIZER))
    return checkpoint.step, state.params


def data_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and "/d/" in str(file)]


def resave_with_one_bit_flipped(folder: Path, name: str) -> None:
    """Writes an item anew, as valid files, with another lowest bit of one element of one array."""
    arrays = ocp.PyTreeCheckpointer().restore(folder)
    bits = np.asarray(arrays[name]).copy().view(np.uint32)
    bits.reshape(-1)[7] ^= 1
    arrays[name] = bits.view(np.float32)
    ocp.PyTreeCheckpointer().save(folder, arrays, force=True)


def test_an_undamaged_state_comes_back_on_any_mesh(folder: Path) -> None:
    for mesh in (MeshSettings(), MeshSettings(data=2, fsdp=2, tensor=2)):
        step, params = restore(folder, mesh)
        assert step == 3
        saved = jax.jit(lambda: model.init(CONFIG, 0))()
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("item", "array"), [("params", "blocks.mlp.up"), ("params", "norm.scale"), ("optimizer", "0.nu.output")]
)
def test_one_flipped_bit_is_found_and_the_step_before_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture, item: str, array: str
) -> None:
    resave_with_one_bit_flipped(folder / "3" / item, array)
    assert restore(folder)[0] == 2
    assert f"the bits of its {item} {array} have changed" in caplog.text


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("how", ["truncated", "removed", "one byte"])
def test_a_damaged_file_is_found_and_the_step_before_is_used(folder: Path, how: str, item: str) -> None:
    assert restore(folder)[0] == 3
    for file in data_files(folder / "3" / item):  # Orbax leaves some that nothing refers to
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole if how == "one byte" else whole[: len(whole) // 2])
        if how == "removed":
            file.unlink()
    assert restore(folder)[0] == 2


@pytest.mark.parametrize("item", ["params", "optimizer", "meta"])
def test_a_missing_item_is_found_and_the_step_before_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture, item: str
) -> None:
    (folder / "3" / item).rename(folder / "elsewhere")
    assert restore(folder)[0] == 2
    assert "step 3 is damaged" in caplog.text


def test_every_changed_byte_of_the_metadata_is_found(folder: Path) -> None:
    file = folder / "3" / "meta" / "metadata"
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] = ord("7") if changed[place] != ord("7") else ord("8")
        file.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match="step 3 is damaged"):
            open_checkpoint(str(folder))
    file.write_bytes(whole)
    assert open_checkpoint(str(folder)).step == 3


def test_metadata_of_another_version_says_what_to_do(folder: Path) -> None:
    file = folder / "3" / "meta" / "metadata"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}
    file.write_text(json.dumps(old | {"format_version": 1}))
    with pytest.raises(UsageError, match=r"format version 1, this program reads \d+: export .* with the version"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "trouble",
    [
        OSError(errno.EIO, "Input/output error"),
        ValueError("UNAVAILABLE: CURL error[28] Timeout was reached: HTTP response code: 503"),
        ValueError("INTERNAL: CURL error: Could not resolve host: storage.googleapis.com"),
        OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
        RuntimeError("Server disconnected"),
        TimeoutError("no answer"),
    ],
)
def test_storage_that_fails_is_not_taken_for_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(RunError, match="nothing says that it is damaged") as caught:
        restore(folder)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert steps_in(epath.Path(folder)) == [1, 2, 3]


def test_a_disk_that_does_not_answer_is_not_taken_for_missing_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.path.exists says no where a disk fails, so a file that is not there proves nothing."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (folder / "3" / "meta").rename(folder / "elsewhere")
    monkeypatch.setattr(type(epath.Path(folder)), "iterdir", fail)
    with pytest.raises(RunError, match="nothing says that it is damaged"):
        or_damaged("x", epath.Path(folder) / "3", (folder / "3" / "meta" / "metadata").read_text)
    with pytest.raises(OSError, match="Input/output error"):
        steps_in(epath.Path(folder))


def test_a_path_that_sounds_like_an_error_is_none(folder: Path) -> None:
    named = folder.rename(folder.with_name("UNAVAILABLE: connection"))
    for file in data_files(named / "3" / "params"):
        file.unlink()
    assert restore(named)[0] == 2


def test_what_was_set_aside_before_is_kept(folder: Path) -> None:
    (folder / "damaged-3").mkdir()
    (folder / "damaged-3" / "kept").touch()
    set_aside_after(open_checkpoint(str(folder), 2))
    assert (folder / "damaged-3" / "kept").exists() and (folder / "damaged-3-2" / "params").exists()


def test_damaged_steps_are_set_aside_so_that_the_run_can_write_them_anew(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "3" / "optimizer").rename(folder / "elsewhere")
    set_aside_after(open_checkpoint(str(folder), 2))
    assert steps_in(epath.Path(folder)) == [1, 2] and (folder / "damaged-3" / "params").exists()
    with Writer(epath.Path(folder), CheckpointSettings(keep=3), tokenizer) as writer:
        writer.save(3, jax.jit(lambda: model.init(CONFIG, 0))(), Meta(CONFIG, Template(), tokenizer.sha256, "again"))
    assert steps_in(epath.Path(folder)) == [1, 2, 3]


def test_no_whole_step_is_an_error(folder: Path) -> None:
    for step in (1, 2, 3):
        (folder / str(step) / "params").rename(folder / f"elsewhere-{step}")
    with pytest.raises(DamagedCheckpoint, match=r"no step of .* could be read"):
        restore(folder)


def test_weights_for_sampling_are_checked_too_and_never_taken_from_another_step(folder: Path) -> None:
    resave_with_one_bit_flipped(folder / "3" / "params", "output")
    with pytest.raises(DamagedCheckpoint, match="bits of its params output have changed"):
        open_checkpoint(str(folder)).restore_params(dtype="bfloat16")


@pytest.mark.slow
def test_training_goes_on_from_the_newest_whole_step_with_the_same_losses(tmp_path: Path) -> None:
    config = write_config(tmp_path, num_steps=48)
    assert run("mathscale_jax.train", "--config", str(config)).returncode == 0
    log = tmp_path / "run" / "metrics.jsonl"

    def losses() -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in map(json.loads, log.read_text().splitlines())]

    undisturbed = losses()
    checkpoints = tmp_path / "run" / "checkpoints"
    resave_with_one_bit_flipped(checkpoints / "32" / "params", "embedding")
    resave_with_one_bit_flipped(checkpoints / "48" / "params", "output")  # the run is done, but not whole
    again = run("mathscale_jax.train", "--config", str(config))
    assert again.returncode == 0, again.stderr
    assert all(text in again.stderr for text in ("step 32 is damaged", "step 48 is damaged", "damaged-32", "step 16"))
    assert losses() == undisturbed
    names = {path.name for path in checkpoints.iterdir() if re.search(r"\d", path.name)}
    assert names == {"16", "32", "48", "damaged-32", "damaged-48"}


RESTORE_UNDER_WATCH = """
import sys, threading, time, jax, jax.numpy as jnp, optax
from pathlib import Path
from etils import epath
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Meta, open_checkpoint
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.config import CheckpointSettings, MeshSettings, ModelConfig
from mathscale_jax.mesh import make_mesh
from mathscale_jax.step import init_state, param_shardings, state_shardings

folder, doing = sys.argv[1:]
config = ModelConfig.model_validate({"preset": "demo", "vocab_size": 320, "hidden_size": 512, "head_dim": 128,
                                     "intermediate_size": 1024, "num_layers": 12})
mesh = make_mesh(MeshSettings())
optimizer = optax.adamw(1e-3)
shardings = state_shardings(param_shardings(config, mesh), optimizer, mesh)

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

if doing == "save":
    tokenizer = Tokenizer.load(folder + ".tokenizer")
    state = init_state(jax.jit(lambda: model.init(config, 0))(), optimizer, shardings)
    with Writer(epath.Path(folder), CheckpointSettings(), tokenizer) as writer:
        writer.save(1, state.params, Meta(config, Template(), tokenizer.sha256, "-", training={}), state.optimizer)
else:
    checkpoint = open_checkpoint(folder)
    idle = peak = anonymous()
    done = False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    state = checkpoint.restore_state(shardings, optimizer)
    jax.block_until_ready(state)
    done = True
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(size, peak - idle)
"""


@pytest.mark.slow
def test_restoring_never_holds_two_copies_of_the_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "checkpoint.tokenizer").write_bytes(tokenizer.model)
    said = ""
    for doing in ("save", "restore"):
        command = [sys.executable, "-c", RESTORE_UNDER_WATCH, str(tmp_path / "checkpoint"), doing]
        # So that memory that is freed leaves the process, and does not stay in malloc's heaps.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment() | malloc, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    size, grown = map(int, said.split())
    assert size > 300e6
    # The largest leaf, a twelfth of the state, may be there twice; the rest is what reading takes.
    assert grown < 1.4 * size
