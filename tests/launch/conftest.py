"""A cloud on this machine: a `gcloud` and a `uv` on PATH, and a checkout to launch from."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Cloud:
    """What a test says of it, and sees of it."""

    def __init__(self, folder: Path):
        self.store, self.checkout = folder / "store", folder / "a checkout"
        self.begun: list[subprocess.Popen[str]] = []
        (self.store / "bin").mkdir(parents=True)
        self.write_program("gcloud", f'exec {sys.executable} -S -E {Path(__file__).with_name("gcloud.py")} "$@"')
        # Makes the environment of a worker, in which python is this one.
        self.write_program(
            "uv",
            f"""echo "$@" >> "$HOME/uv.log"
            case $1 in venv) for last; do :; done; mkdir -p "$last/bin"
            printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > "$last/bin/python"
            chmod +x "$last/bin/python";; esac""",
        )
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / ".gitignore").write_text("/runs/\n__pycache__/\n")
        shutil.copy(ROOT / "constraints.txt", self.checkout)
        git = ["git", "-C", str(self.checkout), "-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run([*git, "init", "-q"], check=True)
        self.says()

    def write_program(self, name: str, text: str) -> None:
        file = self.store / "bin" / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def says(self, **script: Any) -> None:
        """What happens from now on; a project and a zone are set."""
        script = {"project": "my-project", "compute/zone": "us-west4-a"} | script
        (self.store / "script.json").write_text(json.dumps(script))

    def launch(self, *words: str, timeout: float = 60, poll: float = 0.05) -> subprocess.CompletedProcess[str]:
        """Runs tpu_vm.py with these words to its end."""
        with self.begin(*words, poll=poll) as process:
            out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def begin(self, *words: str, poll: float = 0.05) -> subprocess.Popen[str]:
        """Starts tpu_vm.py with these words; it looks every `poll` seconds."""
        process = subprocess.Popen(
            [sys.executable, str(self.checkout / "launch" / "tpu_vm.py"), *words],
            cwd=self.checkout,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ
            | {"GCLOUD_STORE": str(self.store), "MATHSCALE_POLL": str(poll)}
            | {"PATH": f"{self.store / 'bin'}:{os.environ['PATH']}"},
        )
        self.begun.append(process)
        return process

    def python_is(self, text: str) -> None:
        """What `python` does on workers from now on, as a shell script, which also writes its words to `told`."""
        self.write_program("uv", f"""for last; do :; done; case $1 in venv) mkdir -p "$last/bin"
            cat > "$last/bin/python" << 'X'
#!/bin/sh
echo "$@" >> {self.store}/told
{text}
X
            chmod +x "$last/bin/python";; esac""")  # fmt: skip
        worker = self.checkout / "launch" / "worker.sh"
        worker.write_text(worker.read_text().replace("python - ", "cat - > /dev/null; echo "))

    def told(self) -> str:
        """The words of every `python` on workers, a line each."""
        file = self.store / "told"
        return file.read_text() if file.exists() else ""

    def calls(self, *names: str) -> list[list[str]]:
        """What gcloud was asked that begins with these words."""
        file = self.store / "calls.jsonl"
        every = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in every if call[: len(names)] == list(names)]

    def home(self, life: int = 1, worker: str = "tpu-0") -> Path:
        """The home folder of a worker."""
        return self.store / "workers" / str(life) / worker

    def state(self) -> str | None:
        """Of the TPU; None where there is none."""
        return json.loads((self.store / "state.json").read_text())["tpus"].get("tpu")

    def end(self) -> None:
        """Nothing runs on."""
        for process in self.begun:
            if process.poll() is None:
                process.kill()
                process.wait()
        for pid in self.store.glob("workers/*/*/mathscale/run/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                continue


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A cloud of its own."""
    made = Cloud(tmp_path)
    yield made
    made.end()


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a Python program to a file."""

    def write(text: str) -> Path:
        file = tmp_path / "program.py"
        file.write_text(text)
        return file

    return write
