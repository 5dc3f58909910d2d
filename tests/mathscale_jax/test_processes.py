"""Two processes of four CPU devices each, on localhost, run the real training command as one."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from small_run import command, environment, free_port, run, write_config

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.templates import Template
from data_pipeline.tokenizer import train_tokenizer
from mathscale_jax import model, processes
from mathscale_jax.checkpoint import Meta, open_checkpoint
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.config import CheckpointSettings, MeshSettings, ModelConfig
from mathscale_jax.convert.importing import import_weights
from mathscale_jax.mesh import make_mesh
from mathscale_jax.processes import ProcessSettings, rows_of_process, start_processes

TRAIN = "mathscale_jax.train"
NUM_STEPS = 20


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(folder) if "loss" in line]


def start_two(config: Path, *overrides: str, devices: int = 4) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            command(
                TRAIN, "--config", str(config), "--coordinator", f"localhost:{port}",
                "--num-processes", "2", "--process-id", str(number), *overrides,
            ),
            env=environment(devices),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]  # fmt: skip


def run_two(config: Path, *overrides: str, devices: int = 4) -> list[tuple[int, str]]:
    """Exit code and stderr of both."""
    processes = start_two(config, *overrides, devices=devices)
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def wait_for_lines(folder: Path, count: int) -> None:
    log = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= count):
        time.sleep(0.02)


def config_in(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    test = {"task": "demo", "path": str(folder / "data" / "test.jsonl")}
    settings = {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "num_steps": NUM_STEPS,
        "checkpoint": {"every": 10, "keep": 3},
        "validation": {"sources": [test]},
        "samples": {"source": test, "num_problems": 8, "num_samples": 2, "max_tokens": 8},
    }
    return write_config(folder, **{**settings, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert [code for code, _ in run_two(config_in(folder))] == [0, 0]
    return folder


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(undisturbed: Path, tmp_path: Path) -> None:
    alone = run(TRAIN, "--config", str(config_in(tmp_path)), devices=8)
    assert alone.returncode == 0, alone.stderr
    one, two = losses(tmp_path), losses(undisturbed)
    assert [step for step, _, _ in two] == list(range(1, NUM_STEPS + 1))
    np.testing.assert_allclose(two, one, rtol=2e-5)
    validation = [
        [line["validation_loss"] for line in metrics(folder) if "validation_loss" in line]
        for folder in (undisturbed, tmp_path)
    ]
    assert len(validation[0]) == 2
    np.testing.assert_allclose(*validation, rtol=2e-5)
    texts = [(folder / "run" / "samples" / f"step-{NUM_STEPS}.jsonl").read_text() for folder in (undisturbed, tmp_path)]
    assert texts[0].count("\n") == 16 and texts[0] == texts[1]


@pytest.mark.slow
def test_two_killed_processes_go_on_with_bit_identical_losses(undisturbed: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    processes = start_two(config)
    wait_for_lines(tmp_path, 13)  # 12 steps, and the validation of the tenth
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 12 <= len(losses(tmp_path)) < NUM_STEPS
    again = run_two(config)
    assert [code for code, _ in again] == [0, 0], again
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_on_another_mesh(undisturbed: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, mesh={"fsdp": 4}, samples=None, validation=None)
    assert [code for code, _ in run_two(config, "num_steps=4", devices=2)] == [0, 0]
    alone = run(TRAIN, "--config", str(config), "mesh.fsdp=1", "mesh.tensor=2", devices=2)
    assert alone.returncode == 0, alone.stderr
    assert "resuming" in alone.stderr and "step 4" in alone.stderr
    seen = [[line["tokens"] for line in metrics(folder) if "tokens" in line] for folder in (tmp_path, undisturbed)]
    assert len(seen[0]) == NUM_STEPS and seen[0] == seen[1]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    config = config_in(tmp_path, mesh={"fsdp": 4}, samples=None, validation=None, num_steps=4000)
    processes = start_two(config, "checkpoint.every=4000", devices=2)
    wait_for_lines(tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], said
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert f"stopped after step {step}" in said[0] and f"stopped after step {step}" in said[1]
    assert len(losses(tmp_path)) == int(step)


AGREEING = """
import os, shutil, signal, sys
from pathlib import Path
from etils import epath
from data_pipeline.cli import RunError, Stopped, StopSignal
from mathscale_jax.checkpoint import newest_whole
from mathscale_jax.processes import (
    ProcessSettings, all_or_none, check_same, check_shared, from_primary, is_primary, start_processes
)

folder, port, me = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
said = (folder / f"said-by-{me}").open("w")  # gloo writes to stdout, in pieces of lines
start_processes(ProcessSettings(coordinator=f"localhost:{port}", num_processes=2, process_id=me))
own = folder / f"disk-of-{me}"  # as if each process had a disk of its own


def fails_on(number, error):
    with all_or_none():
        if me == number:
            raise error


def steps():
    print("resumes", newest_whole(str(own), lambda checkpoint: checkpoint.step)[1], file=said)


def unseen():  # a step that process 0 alone sees
    if not is_primary():
        (own / "1").rename(own / "hidden")
    steps()


def signalled():
    with StopSignal():
        if not is_primary():
            os.kill(os.getpid(), signal.SIGTERM)
        fails_on(None, None)


for do in (
    lambda: fails_on(None, None),
    lambda: fails_on(1, FileNotFoundError("no such data")),
    lambda: fails_on(1, Stopped("asked to stop", 75)),
    lambda: print("told", from_primary(["of", me]), file=said),
    lambda: check_same("equal", "settings"),
    lambda: check_same(f"by {me}", "examples"),
    lambda: check_same({"a": {"b": me, "c": 0}}, "settings"),
    lambda: check_shared(epath.Path(folder), "output_dir"),
    lambda: check_shared(epath.Path(own), "output_dir"),
    steps,
    unseen,
    signalled,
):
    try:
        do()
    except Exception as error:
        if isinstance(error, FileNotFoundError):  # process 1 has its own, process 0 is told of it
            error = RunError(str(error))
        told = str(error).replace(str(folder), "FOLDER")
        print(type(error).__name__, getattr(error, "exit_code", ""), told, file=said)
"""


@pytest.mark.slow
def test_what_one_process_meets_is_said_by_all(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], vocab_size=320)
    config = ModelConfig.model_validate({"preset": "demo", "vocab_size": 320, "num_layers": 1, "hidden_size": 16})
    disk = tmp_path / "disk-of-0"
    with Writer(epath.Path(disk), CheckpointSettings(keep=3), tokenizer) as writer:
        for step in (1, 2, 3):
            writer.save(step, model.init(config, 0), Meta(config, Template(), tokenizer.sha256, "-", training={}))
    shutil.copytree(disk, tmp_path / "disk-of-1")
    (tmp_path / "disk-of-1" / "3" / "meta" / "metadata").unlink()  # only process 1 finds this one damaged
    shutil.rmtree(tmp_path / "disk-of-0" / "2")  # and only it sees this one

    port = str(free_port())
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", AGREEING, str(tmp_path), port, str(number)],
            env=environment(devices=2),
        )
        for number in range(2)
    ]
    assert [process.wait(timeout=120) for process in pair] == [0, 0]
    expected = [
        "RunError  no such data",
        "Stopped 75 asked to stop",
        "told ['of', 0]",
        "UsageError  process 1 has other examples than process 0; give all processes the same",
        "UsageError  process 1 has other settings than process 0 (a.b: 0 -> 1); give all processes the same",
        "UsageError  output_dir=FOLDER/disk-of-1 is not one folder for all processes: process 1 does not see what "
        "process 0 wrote there; name one on a shared disk or in an object store",
        "resumes 1",
        "RunError  process 1 does not see step 1 of FOLDER/disk-of-1, which process 0 sees; run the same command again "
        "when the disk they share shows it to all",
        "Stopped 75 stopped before it was done: run the same command again",
    ]
    for number in range(2):
        assert (tmp_path / f"said-by-{number}").read_text().splitlines() == expected
    assert not list(tmp_path.glob(".seen*")) and not list(disk.glob(".seen*"))


def test_rows_of_a_process_are_those_its_devices_hold() -> None:
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(rows_of_process(mesh, 8), np.arange(8))
    with pytest.raises(UsageError, match="6 rows cannot be split"):
        rows_of_process(mesh, 6)


def test_the_processes_are_named_completely_or_not_at_all() -> None:
    for given in [{"coordinator": "localhost:1"}, {"num_processes": 2, "process_id": 0}]:
        with pytest.raises(ValueError, match="all three"):
            ProcessSettings(**given)
    with pytest.raises(ValueError, match="coordinator='localhost' must be HOST:PORT"):
        ProcessSettings(coordinator="localhost", num_processes=2, process_id=0)
    with pytest.raises(ValueError, match="below num_processes=2"):
        ProcessSettings(coordinator="localhost:1", num_processes=2, process_id=2)


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, None),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, {}, ()),
        ({"SLURM_JOB_ID": "7"}, {}, None),  # a shell inside an allocation, not a task of several
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        ({}, {"coordinator": "a:1", "num_processes": 2, "process_id": 1}, ("a:1", 2, 1)),
    ],
)
def test_processes_are_found_by_flags_or_slurm_and_not_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, environment: dict, given: dict, expected: tuple | None
) -> None:
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments))
    start_processes(ProcessSettings(**given))
    assert calls == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("tasks", "nodes", "visible", "expected"),
    [
        (2, 2, "0,1,2,3", [0, 1, 2, 3]),  # one task a node: all of its GPUs
        (2, 2, None, None),  # CPUs
        (8, 2, "0,1,2,3", None),  # four tasks a node that see all: each the one of its number, by jax
        (8, 2, "3", [0]),  # bound to one each, which is called 0 there
        (8, 2, "GPU-3c1f", [0]),
    ],
)
def test_a_slurm_task_takes_the_gpus_that_are_its_own(
    tasks: int, nodes: int, visible: str | None, expected: list[int] | None
) -> None:
    environment = {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(nodes)}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    assert processes.gpus_of_slurm_task(environment) == expected


def test_a_tpu_vm_is_known_by_its_chips_and_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(processes, "_tpu_chips", lambda: True)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    start_processes()  # the tests run with JAX_PLATFORMS=cpu
    monkeypatch.delenv("JAX_PLATFORMS")
    start_processes()
    assert calls == [()]


def test_processes_that_do_not_find_each_other_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(RunError, match="did not find each other: deadline exceeded"):
        start_processes(ProcessSettings(coordinator="a:1", num_processes=2, process_id=0))


@pytest.mark.slow
def test_two_processes_import_weights_together_each_its_share(golden: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], 320).model)
    source = str(golden / "llama_gqa")
    import_weights(source, str(tmp_path / "alone"), tokenizer=str(tokenizer))
    arguments = ["import", source, str(tmp_path / "together"), "--tokenizer", str(tokenizer)]
    port = free_port()
    where = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id"]
    pair = [
        subprocess.Popen(
            command("mathscale_jax.convert", *arguments, *where, str(number)),
            env=environment(devices=2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    alone, together = (open_checkpoint(str(tmp_path / name)) for name in ("alone", "together"))
    assert alone.meta == together.meta
    for a, b in zip(*(jax.tree.leaves(c.restore_params()) for c in (alone, together)), strict=True):
        np.testing.assert_array_equal(a, b)
    shares = (tmp_path / "together" / "0" / "params").glob("ocdbt.process_*")
    written = [sum(file.stat().st_size for file in share.rglob("*")) for share in shares]
    assert len(written) == 2 and min(written) > 0.2 * sum(written)
