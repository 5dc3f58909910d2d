"""Computer algebra at arm's length: questions go to a process that is killed where it takes too long."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MAX_CHARS = 300  # of an expression: a longer one is no answer that algebra must look at
SECONDS = 2.5  # for all questions about an answer together, whatever else the machine does
CPU_SECONDS = 1.0  # for one question


class TooHard(Exception):
    """A comparison took more time or memory than it may have."""


class Algebra:
    """Compares expressions in a process of its own, which is started when the first question comes.

    Use it from one thread at a time, and close it; one that is not closed ends with this process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def same(self, answer: str, gold: str, seconds: float = SECONDS) -> bool:
        """Whether two LaTeX expressions are the same. Raises TooHard, after `seconds` at most."""
        if max(len(answer), len(gold)) > MAX_CHARS:
            return False
        question = json.dumps([gold, answer, min(CPU_SECONDS, seconds), seconds]).encode() + b"\n"
        for _ in range(2):  # should somebody kill the process from outside, another one is asked
            process = self.start()
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
            os.killpg(process.pid, signal.SIGKILL)  # its fork, too, which may be busy
            process.wait()

    def start(self) -> subprocess.Popen[bytes]:
        """The process, which is ready: its imports take a second, and longer on a busy machine."""
        if self._process is None:
            # By its path, and without its folder on the import path: it needs nothing of ours.
            command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # "ready"; nothing if it could not start, which the first question finds
        return self._process


class Questions:
    """The questions about one answer, to the process that this one shares among its threads.

    Together they may take SECONDS; the start of the process does not count.
    """

    _shared = Algebra()
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._left = SECONDS

    def __call__(self, answer: str, gold: str) -> bool:
        """Whether two LaTeX expressions are the same. Raises TooHard."""
        with self._lock:
            self._shared.start()
            asked_at = time.monotonic()
            if self._left <= 0:
                raise TooHard
            try:
                return self._shared.same(answer, gold, self._left)
            finally:
                self._left -= time.monotonic() - asked_at

    @classmethod
    def _begin_anew(cls) -> None:
        """In a fork: another process's pipes, and a lock that nobody here will open, are left alone."""
        cls._shared, cls._lock = Algebra(), threading.Lock()


os.register_at_fork(after_in_child=Questions._begin_anew)
