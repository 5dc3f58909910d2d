#!/usr/bin/env python3
"""Runs commands on Cloud TPU VMs, with gcloud alone: from nothing to a finished run, and back to nothing.

    tpu_vm.py job NAME --type v5litepod-16 --spot -- python -m mathscale_jax.train --config ... output_dir=gs://...
    tpu_vm.py evaluate NAME --type v5litepod-16 --spot -- --task gsm8k --checkpoint gs://... --out gs://...

job creates the TPU, sets up every worker, runs the command on all of them, follows it to its end, and deletes the TPU,
however it ended. A TPU that is pre-empted is made again, and the same command goes on from its checkpoint. evaluate is
a job in which every worker draws a share of the samples (python -m eval sample --shard); then one grades and reports.
The single steps:

    tpu_vm.py create NAME --type TYPE     a queued resource, waited for until it is there
    tpu_vm.py setup NAME                  this checkout's code and pinned packages on every worker
    tpu_vm.py run NAME -- COMMAND...      starts a command on every worker, and follows it; {shard} in it becomes i/N
    tpu_vm.py follow NAME                 follows what runs there, and gathers the logs at the end
    tpu_vm.py status NAME                 what is there, and what runs on it
    tpu_vm.py stop NAME                   ends the command, which saves first; a job that follows it ends, too
    tpu_vm.py delete NAME                 deletes the TPU with what runs there; a job that follows it ends, too

Exit codes: 0 done; 1 failed; 2 wrong use; 75 stopped, run it again; 130 Ctrl-C (what runs, runs on, and is named). Logs
of all workers are gathered in runs/launch/NAME/. The last line names what may still cost money.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from checkout import ROOT, NotPacked, travels
from cloud_tpu import RUNTIMES, Unreachable, chips_of
from gcloud_cli import CloudError, Gcloud, buckets_in, check_buckets, say
from tpu_job import Job, Stage, tag_of
from tpu_session import AGAIN, EXIT, GONE, STOPPED, Session, WrongUse


def _job(session: Session, stages: Sequence[Stage]) -> int:
    given, words = session.arguments, stages[0].words
    if words[0].startswith("-") or "=" in words[0]:
        raise WrongUse(
            f"the command begins with {words[0]}: say the program first, as in python -m mathscale_jax.train"
        )
    chips = chips_of(given.type)
    told = _checked(words, [] if chips is None else ["--chips", str(chips), "--slices", str(given.slices)])
    places = [*words, *told.places]
    placeholder = re.search(r"gs://(?![a-z0-9])[^/ ]*", " ".join(places))
    if placeholder:
        raise WrongUse(f"{placeholder[0]} is no bucket: its name has small letters and digits; is it a placeholder?")
    if not given.keep:
        writes = told.writes
        if (
            not told.is_known
            and "mathscale_jax.train" in words
            and not any(w.startswith("output_dir=gs:") for w in words)
        ):
            writes = "no output_dir=gs://..."
        if writes and not writes.startswith("gs://"):
            raise WrongUse(
                f"the command writes to {writes}, which is deleted with the TPU: name gs://..., or add --keep"
            )
        if not buckets_in(places):
            raise WrongUse("nothing in the command is on gs://: what it writes is deleted with the TPU. Or add --keep")
    if not (given.keep or given.attach):
        _check_reads(told.reads)
    session.cloud.step(session.summary())
    check_buckets(session.cloud, places)
    session.cloud.step("is it there?" if given.attach else "is the name free?")
    state = session.tpu.find() if given.attach else session.tpu.state()
    if state and not given.attach:
        raise WrongUse(
            f"{session.tpu.name} exists already ({state}): add --attach to go on with it, delete it, or choose another "
            "NAME"
        )
    return Job(session).run(stages)


def _evaluate(session: Session) -> int:
    given = session.arguments
    if given.slices > 1:
        raise WrongUse("--slices: an evaluation's workers stand alone; take a larger --type, or several evaluations")
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", default="")
    parser.add_argument("--shard")
    known, _ = parser.parse_known_args(given.words)
    if known.shard is not None:
        raise WrongUse("--shard is said by evaluate: leave it out")
    if not known.out.startswith("gs://"):
        raise WrongUse("evaluate needs --out gs://... behind --: all workers write there")
    sample = ["python", "-m", "eval", "sample", *given.words, "--shard", "{shard}"]
    after = (Stage(["python", "-m", "eval", word, known.out], is_single=True) for word in ("grade", "report"))
    return _job(session, [Stage(sample), *after])


class Checked(NamedTuple):
    """What a command of ours writes to and reads, and the gs:// paths in its settings, where that is known."""

    is_known: bool
    writes: str | None = None
    reads: Sequence[str] = ()
    places: Sequence[str] = ()


def _checked(words: Sequence[str], about: Sequence[str]) -> Checked:
    """What check.py says of a command, told `about` the machine.

    Raises WrongUse where a command of ours is none, or its settings are wrong.
    """
    python = ROOT / ".venv" / "bin" / "python"
    words = [word.replace("{shard}", "0/1") for word in words]
    command = [str(python if python.exists() else sys.executable), str(ROOT / "launch" / "check.py"), *about, *words]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    if checked.returncode == 2:
        raise WrongUse(checked.stderr.strip().rpartition("error: ")[2])
    try:
        told = json.loads(checked.stdout)
    except ValueError:  # an error, or a command that asks for --help
        why = "the packages are not installed here" if checked.returncode == 3 else checked.stderr.strip()[-300:]
        say(f"warning: the command's settings were not checked{why and f': {why}'}")
        return Checked(False)
    return Checked(True, **told)


def _check_reads(paths: Sequence[str]) -> None:
    """Raises WrongUse where a command reads what no worker will have."""
    for path in paths:
        try:
            there = "://" in path or path == "default" or travels(path)
        except NotPacked as error:
            raise WrongUse(str(error)) from error
        if not there:
            raise WrongUse(
                f"the command reads {path}, which is neither on gs:// nor a file of this checkout that git knows, and "
                "nothing else travels: name gs://..., or add --keep and bring it there yourself"
            )


def _must_exist(session: Session) -> None:
    """Raises CloudError where there is no such TPU."""
    session.cloud.step("is it there?")
    if session.cloud.dry_run:
        session.tpu.state()
    elif session.tpu.is_gone():
        raise CloudError(f"there is no {session.tpu.name} in {session.cloud.zone} of {session.cloud.project}")


def _run(session: Session) -> int:
    check_buckets(session.cloud, session.arguments.words)
    _must_exist(session)
    workers, words = session.workers(), session.arguments.words
    session.cloud.step("start the command, where all workers have the same versions")
    workers.check_versions()
    workers.start(tag_of(words), words)
    if not session.cloud.dry_run:
        say(f"{session.tpu.name}: started; Ctrl-C leaves it running")
    return _follow(session)


def _follow(session: Session) -> int:
    _must_exist(session)
    workers = session.workers()
    outcome = session.follow(workers)
    if outcome == GONE:
        say(f"{session.tpu.name} was taken away")
        return EXIT[STOPPED]
    session.gather(workers)
    return EXIT.get(outcome, 75 if outcome == AGAIN else 1)


def _status(session: Session) -> int:
    session.cloud.step("what is there, and what runs on it?")
    state = session.tpu.state()
    if session.cloud.dry_run:
        session.workers().states()
        return 0
    session.tpu.may_exist = bool(state)
    say(f"{session.tpu.name}: {state or 'does not exist in ' + session.cloud.zone + ' of ' + session.cloud.project}")
    if state == "ACTIVE":
        workers = session.workers()
        for worker, told in zip(workers.workers, workers.states(), strict=True):
            print(f"{worker}: {told.what}" + (f" {told.code}" if told.what in ("ended", "stopped") else ""))
    return 0


def _create(session: Session) -> int:
    session.cloud.step(f"{session.size()}\npaid for from when it is there until you delete it")
    session.cloud.step("is the name free?")
    state = session.tpu.state()
    if state:
        raise WrongUse(f"{session.tpu.name} exists already ({state}): delete it, or choose another NAME")
    session.create()
    return EXIT.get(session.wait_active(), 75)


def _setup(session: Session) -> int:
    _must_exist(session)
    session.set_up(session.workers())
    return 0


def _stop(session: Session) -> int:
    _must_exist(session)
    workers = session.workers()
    session.cloud.step("ask the command to end")
    if not session.cloud.dry_run and not any(state.what == "running" for state in workers.states()):
        say(f"{session.tpu.name}: nothing runs there; a job that is setting it up goes on, and `delete` ends that")
        return 1
    workers.stop()
    return 0


def _delete(session: Session) -> int:
    _must_exist(session)
    session.tpu.delete()
    return 0


COMMANDS = {
    "job": lambda session: _job(session, [Stage(session.arguments.words)]),
    "evaluate": _evaluate, "create": _create, "setup": _setup, "run": _run, "follow": _follow, "status": _status,
    "stop": _stop, "delete": _delete,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="tpu_vm.py COMMAND NAME [options] [-- WORDS...]",
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    parser.add_argument("name", metavar="NAME", help="of the TPU: lower-case letters, digits and -")
    add = parser.add_argument
    add("--type", help="such as v5litepod-16, v5p-128, v6e-8")
    add("--slices", type=_count, default=1, metavar="N", help="slices of that type, which train as one (1)")
    add("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    add("--zone", default="", help="default: gcloud's compute/zone")
    add("--project", default="", help="default: gcloud's project")
    add("--runtime", metavar="VERSION", help="image of the VMs; default: the one for the type")
    add("--restarts", type=_number, default=20, metavar="N", help="times that a job is begun again (20)")
    add(
        "--wait",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="for a TPU to become free; then the request ends (24)",
    )
    add(
        "--hours",
        type=_hours,
        metavar="HOURS",
        help="a job is stopped, and its TPU deleted unless --keep, after so long, waiting included (no limit)",
    )
    add("--attach", action="store_true", help="job: go on with a TPU of this name that is there")
    add("--keep", action="store_true", help="job: leave the TPU there at the end")
    add("--iap", action="store_true", help="reach the workers through Identity-Aware Proxy, where they have no address")
    add("--create-flag", action="append", default=[], metavar="FLAG", help="one more for gcloud's create, such as "
        "--create-flag=--internal-ips or --create-flag=--reserved")  # fmt: skip
    add("--gcloud-ssh-flag", action="append", default=[], metavar="FLAG", help="one more for gcloud's ssh and scp")
    add("--dry-run", action="store_true", help="print the gcloud commands that would be run, and what for; run none")
    return parser


def _number(text: str, least: int = 0) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on")
    return int(text)


def _count(text: str) -> int:
    return _number(text, least=1)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < 10_000:
        raise argparse.ArgumentTypeError("must be hours, such as 0.5")
    return hours


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked for. Raises WrongUse."""
    words: list[str] = []
    if "--" in argv:
        argv, words = list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])
    given = _parser().parse_args(argv)
    given.words = words
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", given.name):
        raise WrongUse(f"NAME {given.name!r}: lower-case letters, digits and -, at most 62, beginning with a letter")
    if given.command in ("job", "evaluate", "create"):
        family = (given.type or "").partition("-")[0]
        if not given.type:
            raise WrongUse(f"{given.command} needs --type TYPE, such as --type v5litepod-16")
        if given.runtime is None and family not in RUNTIMES:
            meant = re.sub(r"^(v5litepod|v5p|v6e|v4)(?=\d+$)", r"\1-", given.type.replace("v5e", "v5litepod"))
            hint = (
                f"is it {meant}?"
                if re.fullmatch(r"\w+-\d+", meant) and meant != given.type
                else "or give --runtime VERSION"
            )
            raise WrongUse(f"--type {given.type}: known are {', '.join(f'{name}-N' for name in RUNTIMES)}; {hint}")
        given.runtime = given.runtime or RUNTIMES[family]
    if given.command in ("job", "run", "evaluate") and not words:
        raise WrongUse(f"{given.command} needs a command behind --, such as -- python -m mathscale_jax.train ...")
    if given.command not in ("job", "run", "evaluate") and words:
        raise WrongUse(f"{given.command} takes no command: {shlex.join(words)}")
    return given


def _cloud(given: argparse.Namespace) -> Gcloud:
    """gcloud, in the project and the zone that are meant. Raises CloudError, WrongUse."""
    cloud = Gcloud(given.project, given.zone, given.dry_run)
    if not given.dry_run:
        try:
            cloud("auth", "print-access-token")
        except FileNotFoundError:
            raise WrongUse("gcloud is not installed: https://cloud.google.com/sdk") from None
        cloud.project = cloud.project or cloud("config", "get-value", "project").replace("(unset)", "")
        cloud.zone = cloud.zone or cloud("config", "get-value", "compute/zone").replace("(unset)", "")
    if not cloud.project:
        raise WrongUse("no project: give --project PROJECT, or gcloud config set project PROJECT")
    if not cloud.zone:
        raise WrongUse("no zone: give --zone ZONE, such as us-west4-a, or gcloud config set compute/zone ZONE")
    return cloud


def main(argv: Sequence[str]) -> NoReturn:
    """Runs a command, and ends the process; what may cost money is named last."""

    def told_to_end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, told_to_end)
    session: Session | None = None
    code = 1
    try:
        with tempfile.TemporaryDirectory() as scratch:
            given = _arguments(argv)
            session = Session(given, _cloud(given), Path(scratch))
            session.tpu.may_exist = given.attach or given.command in (
                "setup",
                "run",
                "follow",
                "status",
                "stop",
                "delete",
            )
            session.cloud.step("what would be run: to read, not to run as it stands. One worker stands for all of them")
            code = COMMANDS[given.command](session)
    except WrongUse as error:
        say(f"error: {error}")
        code = 2
    except (CloudError, Unreachable) as error:
        say(f"error: {error}")
    except KeyboardInterrupt:
        code = 130
    finally:
        if session is not None and session.tpu.may_exist and not session.cloud.dry_run:
            place = f"--zone {session.cloud.zone} --project {session.cloud.project}"
            name = session.tpu.name
            say(f"{name} may still exist, and cost money: tpu_vm.py follow|stop|delete {name} {place}")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
