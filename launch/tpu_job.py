"""A job on a TPU that may be taken away at any time: begun, followed, begun again, and cleaned up behind."""

import argparse
import contextlib
import hashlib
import math
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from checkout import Code, NotPacked, pack
from cloud_tpu import State, Tpu, Unreachable, Worker, Workers, hosts_of
from gcloud_cli import POLL, CloudError, Gcloud, say

DONE, FAILED, STOPPED, AGAIN, GONE, TROUBLE = "done", "failed", "stopped", "again", "gone", "trouble"
EXIT = {DONE: 0, FAILED: 1, STOPPED: 75}
_GRACE = 30 * POLL  # seconds between being asked to stop, when --hours are over, and being deleted
_TROUBLES = 4  # attempts, one after another, in which no command was begun, before the job is given up
_REACHED = 6  # tries to reach a worker: VMs that are new may not answer yet
_MISSES = 5  # looks, one after another, at which a worker does not answer
_SAVED = 75  # exit code of a command that was told to stop
_TERMINATED = 143  # of one that was told to stop before it could heed it
_BY_ANOTHER = (1, 134, _TERMINATED)  # of one whose companion is gone: it says so, is ended by jax, or by the system


class WrongUse(Exception):
    """The request cannot be meant."""


class OtherJob(Exception):
    """Somebody else follows this TPU now: it is theirs to delete."""


class Deadline:
    """--hours: when all is to be over, by the clock on the wall: a laptop that sleeps stops no bill."""

    def __init__(self, hours: float | None):
        self.hours, self.at = hours, math.inf if hours is None else time.time() + hours * 3600

    @property
    def is_over(self) -> bool:
        """Whether it has passed."""
        return time.time() >= self.at

    @property
    def is_long_over(self) -> bool:
        """Whether what was asked to stop had its time."""
        return time.time() >= self.at + _GRACE


class Session:
    """A TPU, and what is done with it under one name."""

    def __init__(self, arguments: argparse.Namespace, cloud: Gcloud, scratch: Path):
        self.arguments, self.cloud, self.scratch = arguments, cloud, scratch
        self.tpu = Tpu(cloud, arguments.name)
        self.ssh_flags = [*(["--tunnel-through-iap"] if arguments.iap else []), *arguments.gcloud_ssh_flag]
        self.deadline = Deadline(arguments.hours)
        cloud.seconds_left = lambda: self.deadline.at + _GRACE - time.time()
        self._code: Code | None = None
        self._said = ""

    # What there is

    def state(self) -> str:
        """Of the TPU, asked until there is an answer, or --hours are over: a network that is away ends nothing.

        Raises CloudError then.
        """
        while True:
            try:
                return self.tpu.state()
            except CloudError as error:
                if self.deadline.is_over:
                    raise
                if str(error) != self._said:
                    say(f"{error}\n  trying again")
                self._said = str(error)
                time.sleep(POLL)

    def workers(self) -> Workers:
        """All of them. Raises Unreachable where some are missing."""
        given, hosts = self.arguments, hosts_of(self.arguments.type or "")
        if self.cloud.dry_run:
            slices = range(given.slices)
            nodes = [self.tpu.name] if len(slices) == 1 else [f"{self.tpu.name}-{number}" for number in slices]
            made = [Worker(node, number) for node in nodes for number in range(hosts or 1)]
            return Workers(self.cloud, made, self.ssh_flags)
        found = self.tpu.workers(self.ssh_flags)
        slices_there = len({worker.node for worker in found.workers})
        if given.type and (slices_there != given.slices or (hosts and len(found) != given.slices * hosts)):
            raise Unreachable(
                f"{self.tpu.name} has {number_of(len(found), 'worker')} of {number_of(slices_there, 'slice')}, where "
                f"{number_of(given.slices, 'slice')} of {given.type} were asked for"
            )
        return found

    # The steps

    def create(self) -> None:
        """Asks for the TPU. Raises CloudError."""
        given = self.arguments
        try:
            self.tpu.create(given.type, given.slices, given.spot, given.runtime, given.wait, given.create_flag)
        except CloudError:
            with contextlib.suppress(CloudError):
                self.tpu.is_gone()  # whether there is something to name, or to delete, all the same
            raise

    def wait_active(self) -> str:
        """DONE when it is there, GONE where it was taken away, STOPPED where that took too long and it was deleted.

        Raises CloudError where it is refused; the request is deleted then.
        """
        until, before, unseen = time.time() + self.arguments.wait * 3600, None, 0
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
                if until - POLL < time.time():  # the request has ended by itself
                    say(f"{self.tpu.name} was not free in time (--wait): {why}")
                    return STOPPED
                raise CloudError(f"{self.tpu.name} was refused: {why}")
            if state in ("SUSPENDING", "SUSPENDED", "DELETING") or unseen >= 5:
                return GONE
            if time.time() > until or self.deadline.is_over:
                say(f"{self.tpu.name} was not free in time (--wait, --hours): the request is deleted")
                self.tpu.delete()
                return STOPPED
            time.sleep(POLL)
        return DONE

    def pack(self) -> Code:
        """The checkout as a file. Raises CloudError."""
        try:
            self._code = self._code or pack(self.scratch)
        except (OSError, NotPacked) as error:
            raise CloudError(f"the checkout cannot be packed: {error}") from error
        return self._code

    def set_up(self, workers: Workers) -> None:
        """Code and packages on all workers. Raises Unreachable, CloudError."""
        code = self.pack()
        say(f"{self.tpu.name}: setting up {number_of(len(workers), 'worker')}")
        workers.each("true", tries=_REACHED)
        workers.set_up(code)

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
                if misses >= _MISSES or self.deadline.is_long_over:
                    say(f"{self.tpu.name} does not answer: {error}")
                    return TROUBLE
                time.sleep(POLL)
                continue
            misses = 0
            _show(states[0].output)
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
        if not self.cloud.dry_run and self.state() != "ACTIVE":  # its machines went down under it
            return GONE
        own = [place for place, state in enumerate(states) if state.code not in (0, _SAVED, *_BY_ANOTHER)]
        # Where one was told to stop, or its machine was started anew, others end because of that.
        told = any(state.what == "lost" or state.code == _SAVED for state in states)
        if not own and (told or all(state.code in (0, _TERMINATED) for state in states)):
            return AGAIN
        place = own[0] if own else min((p for p, s in enumerate(states) if s.code), key=lambda p: states[p].code)
        return self._failed(workers, place, states[place].code)

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
            workers.logs()
            return
        try:
            workers.gather(Path("runs/launch") / self.tpu.name / time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        except (Unreachable, OSError) as error:
            say(f"warning: not all logs were gathered: {error}")


class Stage(NamedTuple):
    """A command, and whether the first worker alone runs it."""

    words: Sequence[str]
    is_single: bool = False


class Job:
    """Commands, one after another, on a TPU that may be taken away at any time."""

    def __init__(self, session: Session):
        self.session, self.owner = session, uuid.uuid4().hex[:12]
        self.restarts = self.troubles = self.unmade = 0  # the last: times, one after another, that it was not made
        self.made = self.owned = self.reached = False
        self.is_there = self.is_asked = False  # it is made; it was asked for: and not deleted by this job
        self.num_unreached = 0  # attempts, one after another, in which ssh did not reach the first worker

    def run(self, stages: Sequence[Stage]) -> int:
        """The exit code. The TPU is deleted at the end, unless it is to be kept, or somebody else's by now.

        Raises CloudError where it cannot be; WrongUse where another command runs on it.
        """
        self.session.pack()  # what is wrong with it is said before anything is paid
        outcome = DONE  # where nothing is left to do
        try:
            for stage in stages[self._first_of(stages) :]:
                outcome = self._to_its_end(stage)
                if outcome != DONE:
                    break
            self._check_owner()
        except OtherJob as error:
            say(str(error))
            self.session.tpu.may_exist = False  # the other one names it
            return EXIT[STOPPED]
        except CloudError:
            if self.session.deadline.is_over:
                self.session.tpu.delete()
            raise
        if not self.session.arguments.keep and (self.session.tpu.may_exist or self.session.cloud.dry_run):
            self.session.tpu.delete()
        return EXIT[outcome]

    def _first_of(self, stages: Sequence[Stage]) -> int:
        """The stage that another job left off with, where this goes on with it; the next one, where it is done."""
        if not self.session.arguments.attach or self.session.tpu.state() != "ACTIVE":
            return 0
        states = self._states(self.session.workers())
        for place, stage in reversed(list(enumerate(stages))):  # workers that had no part in the last one have others
            of_stage = states[:1] if stage.is_single else states
            if any(state.tag == tag_of(stage.words) for state in of_stage):
                done = all((s.tag, s.what, s.code) == (tag_of(stage.words), "ended", 0) for s in of_stage)
                return place + done
        return 0

    def _to_its_end(self, stage: Stage) -> str:
        given = self.session.arguments
        while True:
            try:
                outcome = self._attempt(stage)
            except (CloudError, Unreachable) as error:
                if not self.made:  # it was never there
                    raise
                say(f"error: {error}")
                outcome = TROUBLE if self.is_there else GONE  # where it is not made again, another time may be better
            if outcome in (DONE, FAILED, STOPPED):
                return outcome
            self.troubles = self.troubles + 1 if outcome == TROUBLE else 0
            if self.session.deadline.is_over:
                return STOPPED
            if not self.reached and self.num_unreached >= _TROUBLES // 2:
                say("no worker was ever reached by ssh: does a firewall allow tcp:22, or do they need --iap?")
                return FAILED
            if self.troubles >= _TROUBLES:
                return FAILED
            if self.restarts >= given.restarts:
                say(f"begun again {self.restarts} times (--restarts): given up; the same command goes on where it was")
                return STOPPED
            self.restarts += 1
            say(f"{self.session.tpu.name}: beginning again ({self.restarts} of at most {given.restarts})")
            self.unmade = 0 if self.is_there or outcome != GONE else self.unmade + 1
            time.sleep(POLL * 2 ** min(self.unmade, 5))

    def _attempt(self, stage: Stage) -> str:
        """One try to bring a command to its end."""
        session = self.session
        if not session.cloud.dry_run:
            outcome = self._make()
        elif not self.made:
            session.create()
            self.made, outcome = True, DONE
        else:
            outcome = DONE
        if outcome != DONE:
            return outcome
        workers = session.workers()
        workers = workers.first() if stage.is_single else workers
        self._begin(workers, stage.words)
        outcome = session.follow(workers, self.owner)
        if outcome not in (GONE, TROUBLE):
            session.gather(workers)
        return outcome

    def _make(self) -> str:
        """The TPU, anew where it was taken away: DONE when it is there."""
        session, tpu = self.session, self.session.tpu
        state = session.state()
        while state == "SUSPENDING":
            if session.deadline.is_over:
                return STOPPED
            time.sleep(POLL)
            state = session.state()
        by_user = state == "SUSPENDED" and tpu.is_by_user
        if self.is_asked and (state == "DELETING" or by_user or (not state and tpu.is_gone())):
            say(f"{tpu.name} was deleted by somebody else")
            return STOPPED
        if self.troubles == _TROUBLES // 2 or state in ("SUSPENDED", "FAILED"):
            say(f"{tpu.name} {'cannot be used' if state == 'ACTIVE' else 'was taken away'}: making it again")
            self._check_owner()
            tpu.delete()
            state, self.owned, self.is_there, self.is_asked = "", False, False, False
        if not state:
            self.is_there = False
            session.create()
        self.is_asked = True
        try:
            outcome = session.wait_active()
        except CloudError:  # it was refused, and is deleted
            self.is_asked = self.is_there = False
            raise
        self.is_there = outcome == DONE
        self.made = self.made or self.is_there
        return outcome

    def _begin(self, workers: Workers, words: Sequence[str]) -> None:
        """Starts the command where it does not run yet.

        Raises Unreachable, CloudError; WrongUse where another one runs; OtherJob where somebody else follows by now.
        """
        tag = tag_of(words)
        states = self._states(workers)
        if self.owned and states[0].owner not in (self.owner, "-"):
            raise OtherJob(f"another job follows {self.session.tpu.name} now: it is left to that one")
        running = [place for place, state in enumerate(states) if state.what == "running"]
        if any(states[place].tag != tag for place in running):
            raise WrongUse(f"another command runs on {self.session.tpu.name}: `stop` it first, or `follow` it")
        if not running:
            self.session.set_up(workers)
        # Of another job's command some may have ended already; of this one's own some were not reached.
        begun = [
            place
            for place, state in enumerate(states)
            if state.what == "running" or (running and not self.owned and state.tag == tag)
        ]
        workers.own(self.owner)
        self.owned = True
        if len(begun) < len(workers):
            workers.start(tag, words, but=begun)

    def _states(self, workers: Workers) -> list[State]:
        """How each stands. Raises Unreachable."""
        try:
            workers.first().each("true", tries=_REACHED)  # makes the ssh key, where there is none, once
        except Unreachable:
            self.num_unreached += 1
            raise
        self.reached = True
        return workers.states(tries=_REACHED)

    def _check_owner(self) -> None:
        """Raises OtherJob where somebody else follows by now; says nothing where that cannot be seen."""
        if not self.owned or self.session.cloud.dry_run:
            return
        try:
            owner = self.session.workers().first().states()[0].owner
        except (Unreachable, CloudError):
            return
        if owner != self.owner:
            raise OtherJob(f"another job follows {self.session.tpu.name} now: it is left to that one")


def _show(output: bytes) -> None:
    """The run's output; a reader that has gone ends nothing."""
    try:
        sys.stdout.buffer.write(output)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tag_of(words: Sequence[str]) -> str:
    """Identifies a command."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def number_of(count: int, what: str) -> str:
    """2 workers, and 1 worker."""
    return f"{count} {what}{'' if count == 1 else 's'}"
