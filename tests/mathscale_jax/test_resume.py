"""A run that is killed, stopped or damaged goes on exactly, or says why it does not."""

import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_run import NUM_STEPS, command, environment, run, train_here, write_config

from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import train_tokenizer
from mathscale_jax.checkpoint import open_checkpoint

TRAIN = "mathscale_jax.train"


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) as written: JSON holds every bit of them."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def steps(folder: Path) -> set[str]:
    return {path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.isdigit()}


def start_and_wait_for_step(config: Path, step: int, *overrides: str, devices: int = 1) -> subprocess.Popen[str]:
    """A training process that has just logged `step`."""
    process = subprocess.Popen(
        command(TRAIN, "--config", str(config), *overrides),
        env=environment(devices),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = config.parent / "run" / "metrics.jsonl"
    for _ in range(3000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return process
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} was never logged: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[int, float, float]]]:
    """The losses of undisturbed runs on one device and on eight."""
    found = {}
    for devices in (1, 8):
        folder = tmp_path_factory.mktemp("undisturbed")
        assert run(TRAIN, "--config", str(write_config(folder)), devices=devices).returncode == 0
        found[devices] = losses(folder)
        assert [step for step, _, _ in found[devices]] == list(range(1, NUM_STEPS + 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "killed_after"), [(1, 3), (1, 24), (8, 20)])
def test_a_run_killed_with_sigkill_goes_on_with_bit_identical_losses(
    undisturbed: dict, tmp_path: Path, devices: int, killed_after: int
) -> None:
    config = write_config(tmp_path, num_steps=NUM_STEPS)
    process = start_and_wait_for_step(config, killed_after, devices=devices)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(tmp_path)) < NUM_STEPS
    again = run(TRAIN, "--config", str(config), devices=devices)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == undisturbed[devices]


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_with_bit_identical_losses(undisturbed: dict, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = subprocess.Popen(
        command(TRAIN, "--config", str(config)), env=environment(), stderr=subprocess.DEVNULL, text=True
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(checkpoints.glob("32.*tmp*")):
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(checkpoints.glob("32*")), "the save had begun"
    again = run(TRAIN, "--config", str(config))
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == undisturbed[1]
    assert steps(tmp_path) == {"16", "32", "48"}


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_the_run_goes_on(undisturbed: dict, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = start_and_wait_for_step(config, 2, "num_steps=4000", "checkpoint.every=4000")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said and "which is saved" in said
    (saved,) = steps(tmp_path)
    assert len(losses(tmp_path)) == int(saved)
    more = int(saved) + 3
    again = run(TRAIN, "--config", str(config), f"num_steps={more}")
    assert again.returncode == 0, again.stderr
    assert f"resuming {tmp_path / 'run'} step {saved}" in again.stderr
    assert [step for step, _, _ in losses(tmp_path)] == list(range(1, more + 1))


@pytest.mark.slow
def test_sigterm_ends_with_75_for_pre_empted(tmp_path: Path) -> None:
    process = start_and_wait_for_step(write_config(tmp_path), 2, "num_steps=4000", "checkpoint.every=4000")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert len(steps(tmp_path)) == 1


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_a_changed_one_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert run(TRAIN, "--config", str(config)).returncode == 0
    before = losses(tmp_path)
    assert steps(tmp_path) == {"16", "32", "48"}
    done = run(TRAIN, "--config", str(config))
    assert done.returncode == 0 and "nothing to do" in done.stderr
    for override, told in [
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate: 0.01 -> 0.02"),
        ("seed=1", "seed: 0 -> 1"),
        ("num_steps=8", "num_steps: 8 are fewer than the 48 that are done"),
        ("data.layout=padded", "data.layout: 'packed' -> 'padded'"),
    ]:
        with pytest.raises(UsageError) as refused:
            train_here(config, "num_steps=64", override)
        assert told in str(refused.value) and "init_from" in str(refused.value)
    rows = tmp_path / "data" / "train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    changed = run(TRAIN, "--config", str(config), "num_steps=64")
    assert changed.returncode == 2 and "not the ones the run began with" in changed.stderr
    assert losses(tmp_path) == before


@pytest.mark.slow
def test_a_full_disk_while_saving_is_one_message_and_leaves_the_checkpoints_whole(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert run(TRAIN, "--config", str(config), "num_steps=16").returncode == 0

    def no_large_files() -> None:  # the write fails as on a full disk, and needs no disk of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    full = run(TRAIN, "--config", str(config), preexec_fn=no_large_files)
    assert full.returncode == 1
    assert "no room on disk" in full.stderr and "Traceback" not in full.stderr
    assert steps(tmp_path) == {"16"}
    again = run(TRAIN, "--config", str(config))
    assert again.returncode == 0, again.stderr
    assert steps(tmp_path) == {"16", "32", "48"}
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_run_goes_on_without_the_weights_it_began_with_and_keeps_their_template(tmp_path: Path) -> None:
    """`init_from` is needed to begin, not to resume; tokenizer and template come with it."""
    template = tmp_path / "template.yaml"
    template.write_text('prompt: "Q: {question} A:"\nresponse: "{solution} The answer is: {answer}"\n')
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.mkdir(), tuned.mkdir()
    config = write_config(base)
    assert run(TRAIN, "--config", str(config), "num_steps=16", f"data.template={template}").returncode == 0
    config = write_config(tuned, model=None, init_from=str(base / "run"))
    arguments = ["--config", str(config), "data.tokenizer=null"]
    assert run(TRAIN, *arguments, "num_steps=16").returncode == 0
    checkpoint = open_checkpoint(str(tuned / "run"))
    assert checkpoint.meta.template.prompt == "Q: {question} A:"
    assert checkpoint.meta.lineage == "random weights, then trained 16 steps, then trained 16 steps"
    (base / "run").rename(base / "moved")
    again = run(TRAIN, *arguments, "num_steps=20")
    assert again.returncode == 0, again.stderr
    assert steps(tuned) == {"16", "20"}
    (base / "moved").rename(base / "run")
    other = run(TRAIN, "--config", str(config), f"data.tokenizer={tuned}/data/tokenizer.model", "num_steps=24")
    assert other.returncode == 0, other.stderr  # the same tokenizer, named
    text = (tuned / "data" / "train.jsonl").read_text()
    (tuned / "data" / "other.model").write_bytes(train_tokenizer([line[::-1] for line in text.splitlines()], 340).model)
    with pytest.raises(UsageError, match="is not the tokenizer that"):
        train_here(config, f"data.tokenizer={tuned}/data/other.model", "num_steps=28")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert run(TRAIN, "--config", str(config), "num_steps=16").returncode == 0
    second = write_config(tmp_path, model=None, init_from=str(tmp_path / "run"), output_dir=str(tmp_path / "second"))
    result = run(TRAIN, "--config", str(second), "optimizer.learning_rate=1e30", "data.tokenizer=null")
    assert result.returncode == 1
    assert "is not saved" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "second" / "checkpoints" / "48").exists()
