"""A job on a TPU that may be taken away at any time: begun, followed, begun again, and cleaned up behind."""

import argparse
import hashlib
import math
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cloud_tpu import POLL, CloudError, Code, Gcloud, State, Tpu, Unreachable, Worker, Workers, hosts_of, pack, say

T = TypeVar("T")
DONE, FAILED, STOPPED, AGAIN, GONE, TROUBLE = "done", "failed", "stopped", "again", "gone", "trouble"
EXIT = {DONE: 0, FAILED: 1, STOPPED: 75}
_GRACE = 30 * POLL  # seconds between being asked to stop, when --hours are over, and being deleted
_TROUBLES = 4  # attempts, one after another, in which no command was begun, before the job is given up
_MISSES = 5  # looks, one after another, at which a worker does not answer
_SAVED = 75  # exit code of a command that was told to stop
_BY_ANOTHER = (1, 134, 143)  # of one whose companion is gone: it says so, is ended by jax, or by the system


class WrongUse(Exception):
    """The request cannot be meant."""


class OtherJob(Exception):
    """Somebody else follows this TPU now: it is theirs to delete."""


class Deadline:
    """--hours: when all is to be over."""

    def __init__(self, hours: float | None):
        self.hours, self.at = hours, math.inf if hours is None else time.monotonic() + hours * 3600

    @property
    def is_over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self.at

    @property
    def is_long_over(self) -> bool:
        """Whether what was asked to stop had its time."""
        return time.monotonic() >= self.at + _GRACE


class Session:
    """A TPU, and what is done with it under one name."""

    def __init__(self, arguments: argparse.Namespace, cloud: Gcloud, scratch: Path):
        self.arguments, self.cloud, self.scratch = arguments, cloud, scratch
        self.tpu = Tpu(cloud, arguments.name)
        self.ssh_flags = [*(["--tunnel-through-iap"] if arguments.iap else []), *arguments.gcloud_ssh_flag]
        self.deadline = Deadline(arguments.hours)
        self._code: Code | None = None

    # What there is

    def state(self) -> str:
        """Of the TPU; a network that is away for a while ends nothing. Raises CloudError."""
        return self.patiently(self.tpu.state)

    def workers(self) -> Workers:
        """All of them. Raises Unreachable."""
        if self.cloud.dry_run:
            slices = range(self.arguments.slices)
            nodes = [self.tpu.name] if len(slices) == 1 else [f"{self.tpu.name}-{number}" for number in slices]
            hosts = hosts_of(self.arguments.type or "") or 1
            made = [Worker(node, index) for node in nodes for index in range(hosts)]
            return Workers(self.cloud, made, self.ssh_flags)
        return self.tpu.workers(self.ssh_flags)

    # The steps

    def create(self) -> None:
        """Asks for the TPU. Raises CloudError."""
        given = self.arguments
        try:
            self.tpu.create(given.type, given.slices, given.spot, given.runtime, given.wait, given.create_flag)
        except CloudError:
            self.tpu.state()  # whether there is something to name, or to delete, all the same
            raise

    def wait_active(self) -> str:
        """DONE when it is there, GONE where it was taken away, STOPPED where that took too long and it was deleted.

        Raises CloudError where it is refused; the request is deleted then.
        """
        until, before, unseen = time.monotonic() + self.arguments.wait * 3600, None, 0
        while not self.cloud.dry_run:
            state = self.state()
            if state != before:
                say(f"{self.tpu.name}: {state or 'not listed yet'}")
            before = state
            unseen = 0 if state else unseen + 1
            if state == "ACTIVE":
                return DONE
            if state == "FAILED":
                why = self.tpu.why_failed()
                self.tpu.delete()
                raise CloudError(f"{self.tpu.name} was refused: {why}")
            if state in ("SUSPENDING", "SUSPENDED", "DELETING") or unseen >= 5:
                return GONE
            if time.monotonic() > until or self.deadline.is_over:
                say(f"{self.tpu.name} was not free in time (--wait {self.arguments.wait:g}): the request is deleted")
                self.tpu.delete()
                return STOPPED
            time.sleep(POLL)
        return DONE

    def set_up(self, workers: Workers) -> None:
        """Code and packages on all workers. Raises Unreachable, CloudError."""
        self._code = self._code or pack(self.scratch)
        say(f"{self.tpu.name}: setting up {number_of(len(workers), 'worker')}")
        self.patiently(lambda: workers.each("true"))  # VMs that are new may not answer yet
        workers.set_up(self._code)

    @staticmethod
    def patiently(act: Callable[[], T]) -> T:
        """What `act` returns; asked a few times where it meets a flake. Raises what the last try raised."""
        for tries in range(1, 5):
            try:
                return act()
            except (Unreachable, CloudError):
                time.sleep(tries * POLL)
        return act()

    def follow(self, workers: Workers, owner: str | None = None) -> str:
        """The command's output, to its end on every worker; what became of it. Raises OtherJob, CloudError."""
        offset = misses = 0
        while True:
            try:
                states = workers.states(offset)
            except Unreachable as error:
                if self.state() != "ACTIVE":
                    return GONE
                misses += 1
                if misses >= _MISSES:
                    say(f"{self.tpu.name} does not answer: {error}")
                    return TROUBLE
                time.sleep(POLL)
                continue
            misses = 0
            sys.stdout.buffer.write(states[0].output)
            sys.stdout.flush()
            offset += len(states[0].output)
            if owner is not None and states[0].owner != owner and not self.cloud.dry_run:
                raise OtherJob(f"another job follows {self.tpu.name} now: it is left to that one")
            if self.deadline.is_over and any(state.what == "running" for state in states):
                if self.deadline.is_long_over:
                    say(f"{self.tpu.name}: it does not end by itself")
                    return STOPPED
                say(f"{self.tpu.name}: --hours {self.deadline.hours:g} are over: stopping")
                try:
                    workers.stop()
                except Unreachable as error:  # another look, another try
                    say(str(error))
            elif not any(state.what == "running" for state in states):
                return self._verdict(workers, states)
            time.sleep(POLL)

    def _verdict(self, workers: Workers, states: Sequence[State]) -> str:
        """What became of a command that runs nowhere any more."""
        if all(state.what in ("ended", "stopped") and state.code == 0 for state in states):
            return DONE
        if self.deadline.is_over or any(state.what == "stopped" for state in states):
            return STOPPED
        if any(state.what == "none" for state in states):
            say(f"{self.tpu.name}: nothing was started on some workers")
            return TROUBLE
        for place, state in enumerate(states):
            if state.what == "ended" and state.code not in (0, _SAVED, *_BY_ANOTHER):
                return self._failed(workers, place, state.code)
        # Where one was told to stop, or its machine was started anew, others end because of that.
        if any(state.what == "lost" or state.code == _SAVED for state in states):
            return AGAIN
        worst = min((place for place, state in enumerate(states) if state.code), key=lambda place: states[place].code)
        return self._failed(workers, worst, states[worst].code)

    def _failed(self, workers: Workers, place: int, code: int) -> str:
        worker = workers.workers[place]
        try:
            tail = Workers(self.cloud, [worker], self.ssh_flags).each("tail -n 20 mathscale/run/log")[0]
        except Unreachable as error:
            tail = str(error)
        say(f"worker {worker} ended with {code}; the end of its output:\n{tail}")
        return FAILED

    def gather(self, workers: Workers) -> None:
        """The logs of all workers, as far as they can be had."""
        if self.cloud.dry_run:
            return
        try:
            workers.gather(Path("runs/launch") / self.tpu.name / time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        except (Unreachable, OSError) as error:
            say(f"warning: not all logs were gathered: {error}")


class Job:
    """Commands, one after another, on a TPU that may be taken away at any time."""

    def __init__(self, session: Session):
        self.session, self.owner = session, uuid.uuid4().hex[:12]
        self.restarts, self.made, self.troubles = 0, False, 0

    def run(self, stages: Sequence[Sequence[str]]) -> int:
        """The exit code. The TPU is deleted at the end, unless it is to be kept, or somebody else's by now."""
        outcome = FAILED
        try:
            for words in stages:
                outcome = self._to_its_end(words)
                if outcome != DONE:
                    break
        except OtherJob as error:
            say(str(error))
            self.session.tpu.may_exist = False  # the other one names it
            return EXIT[STOPPED]
        if not self.session.arguments.keep and (self.session.tpu.may_exist or self.session.cloud.dry_run):
            self.session.tpu.delete()
        return EXIT[outcome]

    def _to_its_end(self, words: Sequence[str]) -> str:
        given = self.session.arguments
        while True:
            outcome = self._attempt(words)
            if outcome in (DONE, FAILED, STOPPED):
                return outcome
            self.troubles = self.troubles + 1 if outcome == TROUBLE else 0
            if self.session.deadline.is_over:
                return STOPPED
            if self.troubles >= _TROUBLES:
                return FAILED
            if self.restarts >= given.restarts:
                say(f"begun again {self.restarts} times (--restarts): given up; the same command goes on where it was")
                return STOPPED
            self.restarts += 1
            say(f"{self.session.tpu.name}: beginning again ({self.restarts} of at most {given.restarts})")
            time.sleep(POLL)

    def _attempt(self, words: Sequence[str]) -> str:
        """One try to bring a command to its end."""
        session, tpu = self.session, self.session.tpu
        state = "" if self.made and session.cloud.dry_run else session.state()
        while state == "SUSPENDING":
            time.sleep(POLL)
            state = session.state()
        if self.made and state in ("", "DELETING") and not session.cloud.dry_run:
            say(f"{tpu.name} was deleted by somebody else")
            return STOPPED
        if self.troubles == _TROUBLES // 2 or state in ("SUSPENDED", "FAILED"):
            say(f"{tpu.name} {'cannot be used' if state == 'ACTIVE' else 'was taken away'}: making it again")
            tpu.delete()
            state = ""
        if not state and not (self.made and session.cloud.dry_run):
            session.create()
        self.made = True
        outcome = session.wait_active()
        if outcome != DONE:
            return outcome
        try:
            workers = session.workers()
            workers = workers if "{shard}" in words or not self._is_single(words) else workers.first()
            self._begin(workers, words)
        except (Unreachable, CloudError) as error:
            say(f"error: {error}")
            return TROUBLE
        outcome = session.follow(workers, self.owner)
        if outcome not in (GONE, TROUBLE):
            session.gather(workers)
        return outcome

    @staticmethod
    def _is_single(words: Sequence[str]) -> bool:
        """Whether it is a command of one worker: those behind an evaluation's sampling."""
        return list(words[:3]) == ["python", "-m", "eval"]

    def _begin(self, workers: Workers, words: Sequence[str]) -> None:
        """Starts the command, unless it runs already. Raises Unreachable, WrongUse where another one does."""
        tag = tag_of(words)
        states = self._states(workers)
        if any(state.what == "running" for state in states):
            if any(state.tag != tag for state in states):
                raise WrongUse(f"another command runs on {self.session.tpu.name}: `stop` it first, or `follow` it")
            workers.own(self.owner)
            return
        self.session.set_up(workers)
        workers.own(self.owner)
        workers.start(tag, words, alone="{shard}" in " ".join(words))

    def _states(self, workers: Workers) -> list[State]:
        """How each stands, also where nothing was ever set up. Raises Unreachable when that stays unknown."""
        look = "if [ -e mathscale/code/launch/worker.sh ]; then echo yes; else echo no; fi"
        there = self.session.patiently(lambda: workers.each(look))
        known = all(line == "yes" for line in there) and not self.session.cloud.dry_run
        return self.session.patiently(workers.states) if known else []


def tag_of(words: Sequence[str]) -> str:
    """Identifies a command."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def number_of(count: int, what: str) -> str:
    """2 workers, and 1 worker."""
    return f"{count} {what}{'' if count == 1 else 's'}"
