"""A conversion that is killed, stopped or out of room leaves nothing that looks whole, and can be run again."""

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from small_run import command, environment, free_port, run

from benchmarks.convert import config_of, make_checkpoint
from data_pipeline.tokenizer import train_tokenizer
from mathscale_jax.checkpoint import steps_in

pytestmark = pytest.mark.slow
CONVERT = "mathscale_jax.convert"
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 100 MB of weights: enough for a signal to come while they are written."""
    folder = tmp_path_factory.mktemp("published")
    texts = ["a small corpus of words, digits 0123456789 and signs", "enough of it for some merges"]
    (folder / "tokenizer").write_bytes(train_tokenizer(texts, vocab_size=320).model)
    config = config_of(4, 1024, str(folder / "tokenizer"))
    make_checkpoint(folder / "model", config, str(folder / "tokenizer"))
    return folder / "model"


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    assert run(CONVERT, "import", str(source), str(folder)).returncode == 0
    return folder


def stop(arguments: list[str], under_way: str, number: int) -> tuple[int, str]:
    """Starts a conversion (source and destination last) and sends the signal when a file `under_way` is there.

    Tries again where a busy machine sent it too late.
    """
    out = Path(arguments[-1])
    for _ in range(5):
        process = subprocess.Popen(command(CONVERT, *arguments), env=environment(), stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not list(out.parent.glob(under_way)):
            time.sleep(0.001)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        if process.returncode != 0:
            break
        shutil.rmtree(out)
    return process.returncode, said


def pair(source: Path, out: Path, preexec_fn: Callable[[], None] | None) -> list[subprocess.Popen[str]]:
    """Two processes that import together; what `preexec_fn` does is done to the second."""
    where = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    return [
        subprocess.Popen(
            command(CONVERT, "import", str(source), str(out), *where, str(number)),
            env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn if number else None,
        )
        for number in range(2)
    ]  # fmt: skip


def no_large_files() -> None:
    """Writes fail as on a full disk, and need no disk of their own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def same_tensors(one: Path, other: Path) -> None:
    a, b = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert np.array_equal(tensor.view(np.uint16), b[name].view(np.uint16)), name


def test_a_stopped_import_leaves_no_checkpoint_and_runs_again(source: Path, tmp_path: Path) -> None:
    for number, code in STOPS.items():
        out = tmp_path / str(number)
        ended, said = stop(["import", str(source), str(out)], f"{out.name}/0.orbax*", number)
        assert ended == code, said
        assert "Traceback" not in said
        assert not out.exists() or (number == signal.SIGKILL and steps_in(out) == [])
    refused = run(CONVERT, "export", str(out), str(tmp_path / "again"))
    assert refused.returncode == 2 and "holds no finished step" in refused.stderr
    again = run(CONVERT, "import", str(source), str(out))
    assert again.returncode == 0, again.stderr
    assert not list(out.glob("*tmp*"))
    assert run(CONVERT, "export", str(out), str(tmp_path / "again")).returncode == 0
    same_tensors(source, tmp_path / "again")


def test_a_stopped_export_leaves_no_folder_and_runs_again(source: Path, imported: Path, tmp_path: Path) -> None:
    for number, code in STOPS.items():
        arguments = ["export", str(imported), str(tmp_path / str(number))]
        ended, said = stop(arguments, f".{number}.partial/model.safetensors", number)
        assert ended == code, said
        assert "Traceback" not in said
        assert not (tmp_path / str(number)).exists()
    again = run(CONVERT, *arguments)
    assert again.returncode == 0, again.stderr
    same_tensors(source, tmp_path / str(number))
    assert [path.name for path in tmp_path.iterdir()] == [str(number)]


def test_a_full_disk_ends_either_with_one_message_and_nothing_half_written(
    source: Path, imported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    full = run(CONVERT, "import", str(source), str(out), preexec_fn=no_large_files)
    assert full.returncode == 1
    assert "no room on disk" in full.stderr and "Traceback" not in full.stderr
    assert not out.exists()
    assert run(CONVERT, "import", str(source), str(out)).returncode == 0
    full = run(CONVERT, "export", str(imported), str(tmp_path / "exported"), preexec_fn=no_large_files)
    assert full.returncode == 1
    assert "no room on disk" in full.stderr and "Traceback" not in full.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_ends_one_process_of_an_import_ends_both_in_the_same_way(source: Path, tmp_path: Path) -> None:
    for _ in range(5):  # where a busy machine sends the signal too late
        both = pair(source, tmp_path / "stopped", None)
        while not list((tmp_path / "stopped").glob("0.orbax*")) and all(process.poll() is None for process in both):
            time.sleep(0.001)
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[1] for process in both]
        if any(process.returncode for process in both):
            break
        shutil.rmtree(tmp_path / "stopped")
    assert [process.returncode for process in both] == [75, 75], "\n----\n".join(said)

    both = pair(source, tmp_path / "full", no_large_files)
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], "\n----\n".join(said)
    assert all("no room on disk" in text for text in said), "\n----\n".join(said)
    assert not any(steps_in(tmp_path / name) for name in ("stopped", "full"))
