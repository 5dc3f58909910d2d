"""A job on a TPU that may be taken away at any time: begun, followed, begun again, and cleaned up behind."""

import hashlib
import time
import uuid
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from cloud_tpu import State, Unreachable, Workers
from gcloud_cli import POLL, CloudError, say
from tpu_session import DONE, EXIT, FAILED, GONE, REACHED, STOPPED, TROUBLE, OtherJob, Session, WrongUse

_TROUBLES = 4  # attempts, one after another, in which no command was begun, before the job is given up


class Stage(NamedTuple):
    """A command, and whether the first worker alone runs it."""

    words: Sequence[str]
    is_single: bool = False

    @property
    def title(self) -> str:
        """python -m eval grade, on the first worker alone"""
        return " ".join(self.words[:4]) + (", on the first worker alone" if self.is_single else "")


class Hold(IntEnum):
    """What a job has of its TPU, as far as it knows."""

    NOTHING = 0
    DELETED = 1  # by this job; it may be listed still
    ASKED = 2
    THERE = 3


class Job:
    """Commands, one after another, on a TPU that may be taken away at any time."""

    def __init__(self, session: Session):
        self.session, self.owner = session, uuid.uuid4().hex[:12]
        self.restarts = self.troubles = self.unmade = 0  # the last: times, one after another, that it was not made
        self.hold = Hold.NOTHING
        self.was_there = False  # once at least
        self.is_ours = self.follows = False  # this job asked for it, or followed it, once; it told its workers so, once
        self.was_reached, self.num_unreached = False, 0  # whether, and in how many attempts not, ssh reached a worker

    def run(self, stages: Sequence[Stage]) -> int:
        """The exit code. The TPU is deleted at the end, unless it is to be kept, or is somebody else's.

        Raises CloudError where it cannot be; WrongUse where another command runs on it.
        """
        self.session.pack()  # what is wrong with it is said before anything is paid
        outcome = DONE  # where nothing is left to do
        try:
            for stage in stages[self._first_of(stages) :]:
                if len(stages) > 1:
                    self.session.cloud.step(stage.title)
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
        is_left = self.session.arguments.keep or (outcome == FAILED and not self.is_ours)
        if not is_left and (self.session.tpu.may_exist or self.session.cloud.dry_run):
            self.session.tpu.delete()
        return EXIT[outcome]

    def _first_of(self, stages: Sequence[Stage]) -> int:
        """The stage that another job left off with, where this goes on with it; the next one, where it is done."""
        if not self.session.arguments.attach or self._look() != "ACTIVE":
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
                if not self.was_there:
                    raise
                say(f"error: {error}")
                # Where it is not made again, another time may be better.
                outcome = TROUBLE if self.hold == Hold.THERE else GONE
            self.troubles = self.troubles + 1 if outcome == TROUBLE else 0
            if outcome in (DONE, FAILED, STOPPED):
                return outcome
            if self.session.deadline.is_over:
                return STOPPED
            if not self.was_reached and self.num_unreached >= _TROUBLES // 2:
                say("no worker was ever reached by ssh: does a firewall allow tcp:22, or do they need --iap?")
                return FAILED
            if self.troubles >= _TROUBLES:
                return FAILED
            if self.restarts >= given.restarts:
                say(f"begun again {self.restarts} times (--restarts): given up; the same command goes on where it was")
                return STOPPED
            self.restarts += 1
            say(f"{self.session.tpu.name}: beginning again ({self.restarts} of at most {given.restarts})")
            self.unmade = 0 if self.hold == Hold.THERE or outcome != GONE else self.unmade + 1
            time.sleep(POLL * 2 ** min(self.unmade, 5))

    def _attempt(self, stage: Stage) -> str:
        """One try to bring a command to its end."""
        session = self.session
        outcome = self._make()
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
        """The TPU, anew where it was taken away: DONE when it is there. Raises CloudError, OtherJob, WrongUse."""
        session, tpu = self.session, self.session.tpu
        state = self._settled()
        if state == "SUSPENDING":
            return STOPPED
        if self.hold == Hold.DELETED and state in ("", "DELETING"):
            if state:
                return GONE
            self.hold = Hold.NOTHING
        by_another = state in ("", "DELETING") or (state == "SUSPENDED" and tpu.is_by_user)
        if self.hold >= Hold.ASKED and by_another and not session.cloud.dry_run:
            say(f"{tpu.name} was deleted by somebody else")
            return STOPPED
        if state and self.hold == Hold.NOTHING and not session.arguments.attach:
            raise WrongUse(
                f"{tpu.name} was made by somebody else meanwhile: --attach goes on with it, or choose a NAME"
            )
        if state == "ACTIVE" and self.troubles == _TROUBLES // 2 and not self.is_ours:
            say(f"{tpu.name} cannot be used; this job neither asked for it nor followed it, and leaves it as it is")
            return FAILED
        if self.troubles == _TROUBLES // 2 or state in ("SUSPENDED", "FAILED") or (state and self.hold == Hold.DELETED):
            say(f"{tpu.name} {'cannot be used' if state == 'ACTIVE' else 'was taken away'}: making it again")
            self._check_owner()
            self.hold = Hold.DELETED
            tpu.delete()
            state, self.hold = "", Hold.NOTHING
        try:
            if not state and self.hold == Hold.NOTHING:
                session.create()
                self.is_ours = True
            self.hold = max(self.hold, Hold.ASKED)
            outcome = session.wait_active()
        except CloudError:
            self.hold = Hold.ASKED if tpu.may_exist else Hold.NOTHING
            raise
        self.hold = Hold.THERE if outcome == DONE else Hold.ASKED
        self.was_there = self.was_there or outcome == DONE
        return outcome

    def _settled(self) -> str:
        """The TPU's state, when it is not being suspended any more, or that has taken too long."""
        until, state = time.time() + self.session.patience, self._look()
        if state == "SUSPENDING":
            say(f"{self.session.tpu.name}: {state}")
        while state == "SUSPENDING" and time.time() < until:
            time.sleep(POLL)
            state = self._look()
        return state

    def _look(self) -> str:
        """The TPU's state. One look that finds nothing, where there was one, may have come amiss."""
        session = self.session
        session.cloud.step("is it there?")
        state = session.state()
        return session.tpu.find() if not state and session.tpu.may_exist and not session.cloud.dry_run else state

    def _begin(self, workers: Workers, words: Sequence[str]) -> None:
        """Starts the command where it does not run yet.

        Raises Unreachable, CloudError; WrongUse where another one runs; OtherJob where somebody else follows by now.
        """
        tag = tag_of(words)
        self.session.cloud.step("reach the workers, and see what they run")
        states = self._states(workers)
        if self.follows:
            self.session.check_owner(states[0], self.owner)
        running = [place for place, state in enumerate(states) if state.what == "running"]
        if any(states[place].tag != tag for place in running):
            raise WrongUse(f"another command runs on {self.session.tpu.name}: `stop` it first, or `follow` it")
        if not running:
            self.session.set_up(workers)
        # Of another job's command some may have ended already; of this one's own some were not reached.
        begun = [
            place
            for place, state in enumerate(states)
            if state.what == "running" or (running and not self.follows and state.tag == tag)
        ]
        self.session.cloud.step("start the command")
        workers.own(self.owner)
        self.is_ours = self.follows = True
        if len(begun) < len(workers):
            workers.start(tag, words, but=begun)

    def _states(self, workers: Workers) -> list[State]:
        """How each stands. Raises Unreachable."""
        try:
            workers.first().each("true", tries=REACHED)  # makes the ssh key, where there is none, once
        except Unreachable:
            self.num_unreached += 1
            raise
        self.was_reached = True
        return workers.states(tries=REACHED)

    def _check_owner(self) -> None:
        """Raises OtherJob where somebody else follows by now; says nothing where that cannot be seen."""
        if not self.follows or self.session.cloud.dry_run:
            return
        try:
            state = self.session.tpu.workers(self.session.ssh_flags).first().states()[0]  # of whatever size it is
        except (Unreachable, CloudError):
            return
        self.session.check_owner(state, self.owner)


def tag_of(words: Sequence[str]) -> str:
    """Identifies a command."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
