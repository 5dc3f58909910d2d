"""Computer algebra at arm's length: questions go to a process that is killed where it takes too long."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

MAX_CHARS = 300  # of an expression: a longer one is no answer that algebra must look at
SECONDS = 1.5


class TooHard(Exception):
    """A comparison took more time or memory than it may have."""


class Algebra:
    """Compares expressions in a process of its own, which is started when the first question comes.

    Use it from one thread at a time, and close it; one that is not closed ends with this process.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def same(self, answer: str, gold: str) -> bool:
        """Whether two LaTeX expressions are the same. Raises TooHard."""
        if max(len(answer), len(gold)) > MAX_CHARS:
            return False
        question = json.dumps([gold, answer, self._seconds]).encode() + b"\n"
        for _ in range(2):  # should somebody kill the process from outside, another one is asked
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(question)
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if line:
                verdict = json.loads(line)
                if verdict is None:
                    raise TooHard
                return verdict
            self.close()
        raise RuntimeError(f"{sys.executable} cannot run math-verify: is it installed? pip install math-verify")

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # By its path, and without its folder on the import path: it needs nothing of ours.
            command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # "ready"; nothing if it could not start, which the first question finds
        return self._process


_shared: Algebra | None = None
_lock = threading.Lock()


def same(answer: str, gold: str) -> bool:
    """`Algebra.same` by one process for whoever asks now and then, from any thread. Raises TooHard."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = Algebra()
        return _shared.same(answer, gold)
