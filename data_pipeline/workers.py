"""Work in other processes, each `python -m MODULE`: they need nothing of the program that starts them, not even that
it guards its main, and end with it. Messages are pickled; both ends are ours."""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.cli import RunError


class WorkerProcess:
    """A process that answers messages, one after another, as `serve` says. Use it from one thread."""

    def __init__(self, module: str, first: Any):
        """Starts `python -m module`, which is given `first` to begin with."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._send(first)

    def ask(self, message: Any) -> Any:
        """The answer to `message`. Raises RunError where the process has ended, and what the work raised there."""
        assert self._process.stdout is not None
        self._send(message)
        try:
            error, answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as cut:  # it ended before, or in the middle of, its answer
            raise RunError(f"a process of {self._module} has ended (exit code {self._process.wait()})") from cut
        if error is not None:
            raise error
        return answer

    def close(self) -> None:
        """Ends the process, at once."""
        self._process.kill()
        self._process.wait()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:  # what it has to say is read, or missed, by who waits for the answer
            pass


def serve(begin: Callable[[Any], Callable[[Any], Any]]) -> None:
    """The other end: `begin(first)` gives what answers each message. Returns when nothing more is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    messages = sys.stdin.buffer
    answer = begin(pickle.load(messages))
    while True:
        try:
            message = pickle.load(messages)
        except EOFError:
            return
        told: tuple[Exception | None, Any]
        try:
            told = (None, answer(message))
        except Exception as error:
            told = (error, None)
        pickle.dump(told, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


def in_processes(module: str, first: Any, messages: Iterable[Any], num_processes: int) -> Iterator[Any]:
    """The answers to `messages`, in their order, by several processes; a few messages ahead are in work."""
    workers = [WorkerProcess(module, first) for _ in range(num_processes)]
    idle = deque(workers)

    def ask(message: Any) -> Any:
        worker = idle.popleft()  # as many threads as workers: one is there
        try:
            return worker.ask(message)
        finally:
            idle.append(worker)

    pool = ThreadPoolExecutor(num_processes)
    try:
        waiting: deque[Future[Any]] = deque()
        for message in messages:
            waiting.append(pool.submit(ask, message))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for worker in workers:
            worker.close()
        pool.shutdown(wait=True, cancel_futures=True)
