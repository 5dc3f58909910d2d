"""gcloud: its calls, what its errors mean, and the buckets that a command names. Runs outside of the project's
environment, too."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

POLL = float(os.environ.get("MATHSCALE_POLL", "20"))  # seconds between two looks
_LEAST = max(1.0, 3 * POLL)  # seconds that a call has, when all is to be over, too
# Regions, or what their names begin with, that a bucket's location means where it is no region.
_NEAR = {
    "us": ("us-", "northamerica-"), "eu": ("europe-",), "asia": ("asia-",),
    "nam4": ("us-central1-", "us-east1-"), "asia1": ("asia-northeast1-", "asia-northeast2-"),
    "eur4": ("europe-north1-", "europe-west4-"), "eur5": ("europe-west1-", "europe-west2-"),
    "eur7": ("europe-west2-", "europe-west3-"), "eur8": ("europe-west3-", "europe-west6-"),
}  # fmt: skip
_HINTS = (
    (r"Reauthentication|invalid_grant|gcloud auth login|refreshing your current auth",
     "your login has expired, or there is none: gcloud auth login"),
    (r"has not been used|SERVICE_DISABLED|is not enabled",
     "enable the API that it names: gcloud services enable tpu.googleapis.com compute.googleapis.com"),
    (r"(?<!Disk )\b[Qq]uota|RESOURCE_EXHAUSTED",
     "no quota for this type in this zone: ask for it under IAM & Admin > Quotas, or take another --zone or --type"),
    (r"ALREADY_EXISTS|already exists", "choose another NAME, or delete that one"),
    (r"PERMISSION_DENIED|does not have permission|403", "this account lacks a role for that in the project"),
)  # fmt: skip


class CloudError(Exception):
    """gcloud did not do it; the message says what that means."""


class NotFound(CloudError):
    """What was asked for is not there."""


def say(text: str) -> None:
    """For people: on stderr, since stdout is the run's own."""
    print(text, file=sys.stderr, flush=True)


def show(output: bytes) -> None:
    """On stdout; a reader that has gone ends nothing."""
    try:
        sys.stdout.buffer.write(output)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Gcloud:
    """Runs gcloud in a project and a zone. In a dry run it prints what it would run, and returns nothing."""

    def __init__(self, project: str, zone: str, dry_run: bool = False):
        self.project, self.zone, self.dry_run = project, zone, dry_run
        self.seconds_left: Callable[[], float] = lambda: math.inf  # of all calls but those that delete
        self._under_way: set[subprocess.Popen[bytes]] = set()
        self._is_ending = threading.Event()

    def __call__(self, *words: str, seconds: float = 120) -> str:
        """What gcloud prints. Raises CloudError."""
        if "delete" not in words:
            seconds = min(seconds, max(_LEAST, self.seconds_left()))
        if self.dry_run:
            show(f"gcloud {shlex.join(words)}\n".encode())
            return ""
        with subprocess.Popen(
            ["gcloud", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us alone, and what gcloud started ends with it
        ) as process:  # fmt: skip
            self._under_way.add(process)
            if self._is_ending.is_set():
                _end(process)
            try:
                out, err = process.communicate(timeout=seconds)
            except BaseException as error:
                _end(process)
                if isinstance(error, subprocess.TimeoutExpired):
                    said = (error.stderr or b"").decode(errors="replace").strip()
                    raise CloudError(
                        f"{_named(words)} did not end in {seconds:.0f} s" + (said and f": {said[-1000:]}")
                    ) from None
                raise
            finally:
                self._under_way.discard(process)
        said = err.decode(errors="replace").strip()
        if process.returncode:
            hint = next((hint for pattern, hint in _HINTS if re.search(pattern, said)), None)
            kind = NotFound if re.search(r"\bNOT_FOUND\b|HTTPError 404|not found: 404", said) else CloudError
            raise kind(f"{_named(words)} failed: {said or 'it says nothing'}" + (f"\n  {hint}" if hint else ""))
        return out.decode(errors="replace").strip()

    def step(self, text: str) -> None:
        """Says, in a dry run, what the calls that follow are for."""
        if self.dry_run:
            show("".join(["\n", *(f"# {line}\n" for line in text.splitlines())]).encode())

    def sleep(self) -> None:
        """Until another try, or until all is ended."""
        self._is_ending.wait(POLL)

    def end_all(self) -> None:
        """Ends what is under way, and what is begun from now on."""
        self._is_ending.set()
        for process in list(self._under_way):
            _end(process)

    def tpus(self, *words: str, seconds: float = 120) -> str:
        """`gcloud compute tpus`, which asks nobody anything, such as about a first ssh key."""
        place = (f"--zone={self.zone}", f"--project={self.project}", "--quiet")
        alpha = ("alpha",) if "--tunnel-through-iap" in words else ()  # only there for these
        return self(*alpha, "compute", "tpus", *words, *place, seconds=seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _named(words: Sequence[str]) -> str:
    return " ".join(["gcloud", *[word for word in words if not word.startswith("-")][:5]])


def buckets_in(words: Sequence[str]) -> list[str]:
    """The buckets that a command names."""
    return sorted(set(re.findall(r"gs://([a-z0-9][a-z0-9._-]*)", " ".join(words))))


def check_buckets(cloud: Gcloud, words: Sequence[str]) -> None:
    """Raises NotFound where a bucket is not there; warns of one that is far away, or cannot be looked at."""
    region = cloud.zone.rpartition("-")[0]
    buckets = buckets_in(words)
    if buckets:
        cloud.step("is each bucket there, and near?")
    for bucket in buckets:
        try:
            location = cloud("storage", "buckets", "describe", f"gs://{bucket}", "--format=value(location)").lower()
        except NotFound:
            raise
        except CloudError as error:
            say(f"warning: whether gs://{bucket} is near is not known: {error}")
            continue
        near = _NEAR.get(location, (location,))
        if location and not f"{region}-".startswith(near):
            say(f"warning: gs://{bucket} is in {location}, the TPU in {region}: slow, and its traffic is paid for")
