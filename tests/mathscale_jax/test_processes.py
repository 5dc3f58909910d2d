"""Two processes of four CPU devices each, on localhost, run the real training command as one."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import command, environment, run, write_config

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from mathscale_jax import processes
from mathscale_jax.config import MeshSettings
from mathscale_jax.mesh import make_mesh
from mathscale_jax.processes import ProcessSettings, rows_of_process, start_processes

TRAIN = "mathscale_jax.train"
NUM_STEPS = 20


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(folder) if "loss" in line]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start_two(config: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            command(
                TRAIN, "--config", str(config), "--coordinator", f"localhost:{port}",
                "--num-processes", "2", "--process-id", str(number), *overrides,
            ),
            env=environment(devices=4),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]  # fmt: skip


def run_two(config: Path, *overrides: str) -> list[tuple[int, str]]:
    """Exit code and stderr of both."""
    processes = start_two(config, *overrides)
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
        "checkpoint": {"every": 8, "keep": 3},
        "validation": {"sources": [test]},
        "samples": {"source": test, "num_problems": 2, "num_samples": 2, "max_tokens": 8},
    }
    return write_config(folder, **settings, **changes)


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
    assert len(validation[0]) == 3
    np.testing.assert_allclose(*validation, rtol=2e-5)
    texts = [(folder / "run" / "samples" / f"step-{NUM_STEPS}.jsonl").read_text() for folder in (undisturbed, tmp_path)]
    assert texts[0].count("\n") == 4 and texts[0] == texts[1]


@pytest.mark.slow
def test_two_killed_processes_go_on_with_bit_identical_losses(undisturbed: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    processes = start_two(config)
    wait_for_lines(tmp_path, 12)  # 11 steps, and the validation of the eighth
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 11 <= len(losses(tmp_path)) < NUM_STEPS
    again = run_two(config)
    assert [code for code, _ in again] == [0, 0], again
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_on_another_mesh(undisturbed: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    assert [code for code, _ in run_two(config, "num_steps=8")] == [0, 0]
    alone = run(TRAIN, "--config", str(config), "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=1", devices=2)
    assert alone.returncode == 0, alone.stderr
    assert "resuming" in alone.stderr
    # From step 9 on the learning rate is that of 20 steps in both runs, before it was that of 8.
    seen = [[line["tokens"] for line in metrics(folder) if "tokens" in line] for folder in (tmp_path, undisturbed)]
    assert len(seen[0]) == NUM_STEPS and seen[0] == seen[1]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    processes = start_two(config_in(tmp_path), "num_steps=4000", "checkpoint.every=4000")
    wait_for_lines(tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], said
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert f"stopped after step {step}" in said[0] and f"stopped after step {step}" in said[1]
    assert len(losses(tmp_path)) == int(step)


def test_rows_of_a_process_are_those_its_devices_hold() -> None:
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(rows_of_process(mesh, 8), np.arange(8))
    with pytest.raises(UsageError, match="6 rows cannot be split"):
        rows_of_process(mesh, 6)


def test_the_processes_are_named_completely_or_not_at_all() -> None:
    for given in [{"coordinator": "localhost:1"}, {"num_processes": 2, "process_id": 0}]:
        with pytest.raises(ValueError, match="all three"):
            ProcessSettings(**given)
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
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    start_processes(ProcessSettings(**given))
    assert calls == ([] if expected is None else [expected])


def test_a_tpu_vm_is_known_by_its_chips_and_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(processes, "_tpu_chips", lambda: True)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    start_processes()  # the tests run with JAX_PLATFORMS=cpu
    monkeypatch.delenv("JAX_PLATFORMS")
    start_processes()
    assert calls == [()]


def test_processes_that_do_not_find_each_other_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(RunError, match="did not find each other: deadline exceeded"):
        start_processes(ProcessSettings(coordinator="a:1", num_processes=2, process_id=0))
