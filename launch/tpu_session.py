"""A TPU, and the single steps that are done with it: ask for it, wait, set up its workers, follow what they run."""

import argparse
import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

from checkout import Code, NotPacked, pack
from cloud_tpu import State, Tpu, Unreachable, Worker, Workers, chips_of, hosts_of
from gcloud_cli import POLL, CloudError, Gcloud, say, show

DONE, FAILED, STOPPED, AGAIN, GONE, TROUBLE = "done", "failed", "stopped", "again", "gone", "trouble"
EXIT = {DONE: 0, FAILED: 1, STOPPED: 75}
REACHED = 6  # tries to reach a worker: VMs that are new may not answer yet
_GRACE = 30 * POLL  # seconds between being asked to stop, when --hours are over, and being deleted
_MISSES = 5  # looks, one after another, at which a worker does not answer
_SAVED = 75  # exit code of a command that was told to stop
_TERMINATED = 143  # of one that was told to stop before it could heed it
_BY_ANOTHER = (1, 134, _TERMINATED)  # of one whose companion is gone: it says so, is ended by jax, or by the system


class WrongUse(Exception):
    """The request cannot be meant."""


class OtherJob(Exception):
    """Somebody else follows this TPU now: it is theirs to delete."""

    def __init__(self, name: str):
        super().__init__(f"another job follows {name} now: it is left to that one")


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
            with contextlib.suppress(Unreachable):
                self.tpu.workers(self.ssh_flags)
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

    def check_owner(self, state: State, owner: str) -> None:
        """Raises OtherJob where a worker names another than `owner`; one that was set up anew names nobody."""
        if state.owner not in (owner, "-"):
            raise OtherJob(self.tpu.name)

    @property
    def patience(self) -> float:
        """Seconds that are still waited for a TPU: --wait, and no longer than --hours leave."""
        return max(0.0, min(self.arguments.wait * 3600, self.deadline.at - time.time()))

    # In words

    def size(self) -> str:
        """What is asked for."""
        given = self.arguments
        chips, hosts = chips_of(given.type), hosts_of(given.type)
        size = "" if chips is None or hosts is None else f" of {number_of(chips, 'chip')}, {number_of(hosts, 'worker')}"
        each = " each" if given.slices > 1 and size else ""
        kind = "spot" if given.spot else "not spot"
        wait = given.wait if given.hours is None else min(given.wait, given.hours)
        return (
            f"{given.slices} x {given.type}{size}{each}; {kind}, in {self.cloud.zone}\n"
            f"a request waits for at most {number_of(wait, 'hour')}, which costs nothing"
        )

    def summary(self) -> str:
        """What a job takes, and how long it is paid for."""
        given, chips = self.arguments, chips_of(self.arguments.type)
        hours = number_of(given.hours or 0, "hour")
        if given.keep:
            told = "" if given.hours is None else f"the command is told to stop after {hours} (--hours); "
            bound = f"{told}paid for until you delete it (--keep)"
        elif given.hours is None:
            bound = "paid for until the command has ended, however long that takes: --hours sets a limit"
        else:
            paid = math.ceil((given.hours + _GRACE / 3600) * (chips or 0) * given.slices)
            worth = (
                "" if chips is None else f": at most {number_of(paid, 'chip-hour')}, where gcloud can delete it then"
            )
            minutes = number_of(_GRACE / 60, "minute")
            bound = f"all is over after {hours} (--hours), waiting included, and {minutes} to save and end{worth}"
        again = (
            f"made and begun again, where it is taken away, at most {number_of(given.restarts, 'time')} (--restarts)"
        )
        return f"{self.size()}\n{again}\n{bound}\nand all that as long as this command is left running"

    # The steps

    def create(self) -> None:
        """Asks for the TPU. Raises CloudError."""
        given = self.arguments
        self.cloud.step(f"ask for the TPU{', unless it is there,' if given.attach else ''} and wait until it is")
        try:
            self.tpu.create(given.type, given.slices, given.spot, given.runtime, self.patience, given.create_flag)
        except CloudError:
            with contextlib.suppress(CloudError):
                self.tpu.is_gone()  # whether there is something to name, or to delete, all the same
            raise

    def wait_active(self) -> str:
        """DONE when it is there, GONE where it was taken away, STOPPED where that took too long and it was deleted.

        Raises CloudError where it is refused; the request is deleted then.
        """
        until, before, unseen = time.time() + self.patience, None, 0
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
                    say(f"{self.tpu.name} was not free in time (--wait, --hours): {why}")
                    return STOPPED
                raise CloudError(f"{self.tpu.name} was refused: {why}")
            if state in ("SUSPENDING", "SUSPENDED", "DELETING") or unseen >= 5:
                return GONE
            if time.time() > until:
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
        if self.cloud.dry_run:
            self.cloud.step("bring this checkout and its pinned packages, unless they are there")
        else:
            say(f"{self.tpu.name}: setting up {number_of(len(workers), 'worker')}")
        workers.each("true", tries=REACHED)
        workers.set_up(code)

    def follow(self, workers: Workers, owner: str | None = None) -> str:
        """The command's output, to its end on every worker; what became of it. Raises OtherJob, CloudError."""
        offset = misses = 0
        self.cloud.step(f"follow it to its end, with a look every {POLL:g} s")
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
            show(states[0].output)
            offset += len(states[0].output)
            if owner is not None:
                self.check_owner(states[0], owner)
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
        self.cloud.step("gather the logs")
        if self.cloud.dry_run:
            workers.logs()
            return
        try:
            workers.gather(Path("runs/launch") / self.tpu.name / time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        except (Unreachable, OSError) as error:
            say(f"warning: not all logs were gathered: {error}")


def number_of(count: float, what: str) -> str:
    """2 workers, 1 worker, 0.5 hours, 1,000 chip-hours."""
    return f"{f'{int(count):,}' if count == int(count) else f'{count:g}'} {what}{'' if count == 1 else 's'}"
