"""A TPU of Google Cloud and its workers. Runs outside of the project's environment, too."""

from __future__ import annotations

import base64
import concurrent.futures
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from checkout import Code
from gcloud_cli import POLL, CloudError, Gcloud, NotFound, say

RUNTIMES = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e",
            "v4": "tpu-ubuntu2204-base"}  # fmt: skip
_CORES_ARE_COUNTED = ("v4", "v5p")  # v5p-8 has four chips, v5litepod-8 eight
_CHIPS_OF_A_HOST = 4  # of several; the only one of a small slice may have eight
_MAX_SSH = 32  # connections at once
_LOOKS = 4  # that find nothing, before a TPU counts as gone
_MARK = "mathscale-says:"
_SCRIPT = "mathscale/code/launch/worker.sh"
_WORKER = f"bash {_SCRIPT}"


class Unreachable(Exception):
    """A worker does not answer, or did not do it. The message names it."""


class Worker(NamedTuple):
    """One VM: the slice that it belongs to, and its number there."""

    node: str
    number: int

    def __str__(self) -> str:
        return f"{self.node} {self.number}"


class State(NamedTuple):
    """What a worker says: who follows it, which command it has, what became of that, and its output from a byte on."""

    owner: str
    tag: str
    what: str  # none, running, lost, ended, stopped
    code: int
    output: bytes


class Tpu:
    """A queued resource of some slices. `may_exist`: whether it may cost money, as far as this process knows."""

    def __init__(self, cloud: Gcloud, name: str):
        self.cloud, self.name, self.may_exist, self.is_by_user = cloud, name, False, False

    def state(self) -> str:
        """WAITING_FOR_RESOURCES, ..., ACTIVE, SUSPENDED, ...; "" where none is listed. Sets `is_by_user`."""
        columns = "--format=value(state.state,state.stateInitiator)"
        found = self.cloud.tpus("queued-resources", "list", f"--filter=name~/{self.name}$", columns)
        state, _, initiator = found.partition("\t")
        self.is_by_user = "USER" in initiator
        self.may_exist = self.may_exist or bool(state)
        return state.rpartition("=")[2].strip()  # some versions print state=ACTIVE

    def find(self) -> str:
        """Its state; "" where several looks find nothing: one may come too early, or from a part of the service."""
        for look in range(_LOOKS):
            if look:
                time.sleep(POLL)
            state = self.state()
            if state or self.cloud.dry_run:
                return state
        self.may_exist = False
        return ""

    def is_gone(self) -> bool:
        """Whether several looks find nothing."""
        return not self.find()

    def create(self, kind: str, slices: int, spot: bool, runtime: str, seconds: float, flags: Sequence[str]) -> None:
        """Asks for it; the request ends by itself after so many `seconds`. Raises CloudError."""
        nodes = [f"--node-id={self.name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={self.name}"]
        self.may_exist = True
        self.cloud.tpus(
            "queued-resources", "create", self.name, f"--accelerator-type={kind}", f"--runtime-version={runtime}",
            *nodes, *(["--spot"] if spot else []), f"--valid-until-duration={max(60, round(seconds))}s",
            *flags, "--async",
        )  # fmt: skip

    def why_failed(self) -> str:
        """What a request that was refused says."""
        reason = "--format=value(state.failedData.error.message)"
        try:
            return self.cloud.tpus("queued-resources", "describe", self.name, reason)
        except CloudError as error:
            return str(error)

    def delete(self) -> None:
        """Deletes it with all that runs there. Raises CloudError where it may still be there after some tries."""
        self.cloud.step("delete the TPU")
        for tries in range(4):
            try:
                self.cloud.tpus("queued-resources", "delete", self.name, "--force", seconds=1200)
                break
            except NotFound:
                break
            except CloudError:
                if tries == 3:
                    raise
                time.sleep(POLL)
        if not self.is_gone():
            raise CloudError(f"{self.name} was deleted, and is still listed")
        if not self.cloud.dry_run:
            say(f"{self.name} is deleted")

    def workers(self, ssh_flags: Sequence[str]) -> Workers:
        """All workers of all slices. Raises Unreachable where there are none."""
        listed = self.cloud.tpus(
            "tpu-vm", "list", f"--filter=queuedResource~/{self.name}$",
            '--format=csv[no-heading,separator=" "](name.basename(),networkEndpoints.len())',
        )  # fmt: skip
        nodes = sorted((line.split() for line in listed.splitlines()), key=lambda node: (len(node[0]), node[0]))
        found = [Worker(node, number) for node, count in nodes for number in range(int(count))]
        if not found:
            raise Unreachable(f"{self.name} has no workers")
        return Workers(self.cloud, found, ssh_flags)


class Workers:
    """What is done on all of them at once. Raises Unreachable, which names the first that failed, when all ended."""

    def __init__(self, cloud: Gcloud, workers: Sequence[Worker], ssh_flags: Sequence[str] = ()):
        self.cloud, self.workers, self.ssh_flags = cloud, list(workers), list(ssh_flags)

    def __len__(self) -> int:
        return len(self.workers)

    def first(self) -> Workers:
        """The first one alone."""
        return Workers(self.cloud, self.workers[:1], self.ssh_flags)

    def each(self, command: str | Callable[[int], str], seconds: float = 120, tries: int = 3) -> list[str]:
        """What a command line prints on each; `command` may depend on the worker's number, and be "" for nothing.

        It is run again where a worker is not reached, up to `tries` times.
        """
        lines = [command if isinstance(command, str) else command(number) for number in range(len(self))]
        return self._at_once(
            lambda number: (
                lines[number]
                and self.cloud.tpus(
                    "tpu-vm",
                    "ssh",
                    self.workers[number].node,
                    f"--worker={self.workers[number].number}",
                    "--strict-host-key-checking=no",
                    *self.ssh_flags,
                    f"--command={lines[number]}",
                    "--ssh-flag=-oConnectTimeout=15",
                    "--ssh-flag=-oServerAliveInterval=15",
                    seconds=seconds,
                )
            ),
            tries,
        )

    def copy(self, source: Path, name: str) -> None:
        """Copies a file into the home folder of each."""
        self._at_once(
            lambda number: self.cloud.tpus(
                "tpu-vm",
                "scp",
                str(source),
                f"{self.workers[number].node}:{name}",
                f"--worker={self.workers[number].number}",
                "--strict-host-key-checking=no",
                *self.ssh_flags,
                seconds=600,
            ),
            tries=3,
        )

    def _at_once(self, act: Callable[[int], str], tries: int) -> list[str]:
        if self.cloud.dry_run:
            return [act(0)] * len(self)  # the others alike

        def patiently(number: int) -> str:
            for attempt in range(tries - 1):
                try:
                    return act(number)
                except CloudError as error:
                    if attempt == 1 and number == 0:  # the first may come too early, and others fail alike
                        say(f"worker {self.workers[number]} is not reached yet, trying again: {error}")
                self.cloud.sleep()
            return act(number)

        results: list[str] = []
        with concurrent.futures.ThreadPoolExecutor(_MAX_SSH) as pool:
            futures: list[concurrent.futures.Future[str]] = []
            try:
                futures += [pool.submit(patiently, number) for number in range(len(self))]
                concurrent.futures.wait(futures)
            except BaseException:  # Ctrl-C: nobody waits for the others
                pool.shutdown(wait=False, cancel_futures=True)
                self.cloud.end_all()
                raise
        for worker, future in zip(self.workers, futures, strict=True):
            error = future.exception()
            if isinstance(error, CloudError):
                raise Unreachable(f"worker {worker}: {error}") from error
            results.append(future.result())
        return results

    # What worker.sh does there

    def set_up(self, code: Code) -> None:
        """The code and the pinned packages, unless they are there. Raises CloudError where workers differ then."""
        told = self.versions()
        if not self.cloud.dry_run and told[0].startswith(code.digest) and len(set(told)) == 1:
            return
        self.copy(code.file, "mathscale-code.tgz")
        self.each(
            f"set -e; if [ -e {_SCRIPT} ]; then case $({_WORKER} state) in *running*) "
            "echo 'a command is running here: stop it first' >&2; exit 3;; esac; fi; "
            "rm -rf mathscale/new mathscale/digest; mkdir -p mathscale/new; "
            "tar -xzf mathscale-code.tgz -C mathscale/new; rm -rf mathscale/code; mv mathscale/new mathscale/code; "
            f"{_WORKER} install {code.digest}",
            seconds=1800,
            tries=2,
        )
        self.check_versions()

    def versions(self) -> list[str]:
        """Code and packages of each, as one line."""
        return self.each(f"if [ -e {_SCRIPT} ]; then {_WORKER} version; else echo nothing; fi")

    def check_versions(self) -> None:
        """Raises CloudError where workers differ: a run of several versions ends in wrong numbers, or in silence."""
        told = self.versions()
        for worker, line in zip(self.workers, told, strict=True):
            if line != told[0]:
                raise CloudError(
                    f"worker {worker} has other versions than worker {self.workers[0]}:\n  {told[0]}\n  {line}\n"
                    "`setup NAME` installs the same on all"
                )
            if not self.cloud.dry_run and line.startswith("nothing"):
                raise CloudError(f"worker {worker} has no code yet: `setup NAME` brings it")

    def own(self, token: str) -> None:
        """Says who follows from now on."""
        self.each(f"{_WORKER} own {token}")

    def start(self, tag: str, words: Sequence[str], but: Collection[int] = ()) -> None:
        """Starts a command; {shard} in it becomes the worker's share, who takes no notice of the others then.

        `but`: numbers of workers that run it already.
        """
        alone = has_shard(words)

        def command(number: int) -> str:
            if number in but:
                return ""
            here = [word.replace("{shard}", f"{number}/{len(self)}") for word in words]
            if alone and any(worker.number for worker in self.workers):  # else a slice of several waits for all of them
                here = ["env", "TPU_PROCESS_BOUNDS=1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1", *here]
            return f"{_WORKER} start {tag} " + " ".join(map(shlex.quote, here))

        self.each(command, tries=1)

    def states(self, offset: int = 0, tries: int = 3) -> list[State]:
        """How each stands; the output from a byte on of the first one."""

        def command(number: int) -> str:
            look = f"if [ -e {_SCRIPT} ]; then bash {_SCRIPT} state {'' if number else offset}; else echo - - none; fi"
            return f"echo {_MARK}; {look}" + ("" if number else " | base64")

        told = self.each(command, tries=tries)
        if self.cloud.dry_run:
            return [State("-", "-", "ended", 0, b"")] * len(self)
        return [_parsed(line, encoded=number == 0) for number, line in enumerate(told)]

    def stop(self) -> None:
        """Asks the command to end."""
        self.each(f"{_WORKER} stop")

    def logs(self) -> list[str]:
        """The output of each."""
        return self.each("cat mathscale/run/log 2> /dev/null || true", seconds=600)

    def gather(self, folder: Path) -> None:
        """Brings the output of each."""
        folder.mkdir(parents=True, exist_ok=True)
        for worker, output in zip(self.workers, self.logs(), strict=True):
            (folder / f"{worker.node}-worker-{worker.number}.log").write_text(output + "\n")
        say(f"the logs of all workers are in {folder}")


def _parsed(told: str, encoded: bool) -> State:
    try:
        _, _, answer = told.partition(_MARK)  # a machine may greet before
        whole = base64.b64decode("".join(answer.split()), validate=True) if encoded else answer.strip().encode()
        line, _, output = whole.partition(b"\n")
        owner, tag, what, *code = line.decode().split()
        return State(owner, tag, what, int(code[0]) if code else 0, output)
    except (ValueError, IndexError):
        raise Unreachable(f"a worker answers {told[:200]!r}") from None


def has_shard(words: Sequence[str]) -> bool:
    """Whether workers share a command."""
    return any("{shard}" in word for word in words)


def chips_of(kind: str) -> int | None:
    """How many chips a slice of a type has; None where that is not known."""
    family, _, size = kind.partition("-")
    if family not in RUNTIMES or not size.isdigit():
        return None
    return int(size) // 2 if family in _CORES_ARE_COUNTED else int(size)


def hosts_of(kind: str) -> int | None:
    """How many workers a slice of a type such as v5litepod-16 has; None where that is not known."""
    chips, family = chips_of(kind), kind.partition("-")[0]
    if chips is None:
        return None
    alone = _CHIPS_OF_A_HOST if family in _CORES_ARE_COUNTED else 2 * _CHIPS_OF_A_HOST
    return 1 if chips <= alone else chips // _CHIPS_OF_A_HOST
