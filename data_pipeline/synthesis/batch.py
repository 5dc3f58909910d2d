"""OpenAI's Batch API under the same ledger: requests in files, replies within a day, at half the price.

A batch is written to the ledger, with all that is held for it, before it is made on the server, where it bears the
name that it has in the ledger: so a run that died in between finds it there, or knows that it was never made.
"""

import dataclasses
import io
import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from data_pipeline.cli import RunError, StopSignal, logger
from data_pipeline.synthesis.batch_server import PATH, Batch, BatchServer, Busy, Down, Gone
from data_pipeline.synthesis.ledger import BudgetReached, Ledger, Sent
from data_pipeline.synthesis.requests import Reply, Request, cost_of, of_the_prompt, read_reply, usage_of
from data_pipeline.synthesis.settings import BATCH_SHARE, BatchLimits, Price, Teacher

_MOST_FAILURES = 3  # of one request in one run
_MOST_UNCLEAR = 3  # creations, one after another, of which nobody knows whether they made a batch
MOST_ALONE = 8  # batches of one request, one after another, that are too much where nothing else waits
DOUBT = 180.0  # seconds that a batch, or what it brought, is looked for
PATIENCE = 3600.0  # seconds without an answer, before what is under way is left for another run
_LONGEST_PAUSE = 1800.0  # seconds
_ENDED = ("completed", "expired", "cancelled", "failed")
_TOO_MUCH = ("token_limit_exceeded", "request_limit_exceeded")  # of what may wait on the server at once


_IS_IT_THE_KEY = (
    "is this the key of the project that made it? If it is really gone, batch.count_gone_as_paid=true asks its "
    "requests again"
)


class _Odd(RunError):
    """What a batch brought cannot be its own: another look may find what is."""


class _Nothing(_Odd):
    """A batch has ended, and says that nothing was done."""


class BatchTeacher:
    """Submits requests and collects replies."""

    def __init__(self, teacher: Teacher, limits: BatchLimits, ledger: Ledger, budget: int, stop: StopSignal):
        """`budget`: billionths of a dollar for everything in the ledger."""
        whole = teacher.prices()
        self.price = Price(input=whole.input * BATCH_SHARE, output=whole.output * BATCH_SHARE)
        self._limits, self._ledger, self._budget, self._stop = limits, ledger, budget, stop
        self._server = BatchServer(teacher)
        self._failures: Counter[bytes] = Counter()
        self._max_requests, self._max_open = limits.max_requests, limits.max_open
        self._pause = limits.poll_seconds / 2  # after being told that it is too much; doubled each time
        self._wait_until = 0.0  # the server takes nothing before
        self._num_unclear = self._num_alone = 0
        self._down_since: float | None = None
        self._missed: dict[int, float] = {}  # since when a batch, or what it brought, is not found
        self._open = {number: remote for number, _, remote, _ in ledger.batches("open") if remote is not None}
        self._doubtful = {number: (name, upload, time.monotonic()) for number, name, upload, _ in ledger.batches("new")}
        self._waiting = {sent.key for number in (*self._open, *self._doubtful) for sent in ledger.of_batch(number)}
        self.budget_reached: BudgetReached | None = None
        self.errors: list[RunError] = []
        self.refusal = ""  # what the last request that failed was told

    @property
    def num_open(self) -> int:
        """Batches under way, or perhaps under way."""
        return len(self._open) + len(self._doubtful)

    @property
    def num_failed(self) -> int:
        """Requests that failed as often as they may."""
        return sum(failures >= _MOST_FAILURES for failures in self._failures.values())

    @property
    def is_waiting(self) -> bool:
        """Whether the server takes no more just now."""
        return time.monotonic() < self._wait_until

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to wait for."""
        return not self.num_open and (bool(self.errors) or not self.is_waiting)

    def is_under_way(self, key: bytes) -> bool:
        """Whether a request is in a batch that is under way."""
        return key in self._waiting

    def is_asked(self, request: Request) -> bool:
        """Whether a request is under way, or failed as often as it may."""
        return self.is_under_way(request.key) or self._failures[request.key] >= _MOST_FAILURES

    def has_room(self) -> bool:
        """Whether another batch may be submitted now."""
        return self.num_open < self._max_open and not (self.is_waiting or self.budget_reached or self.errors)

    def adopt(self) -> int:
        """Batches of which nobody knows whether they were made: found on the server, or void after some time.

        They are those that a run was about to make when it, or its connection, died. Returns how many are void. Those
        that cannot be looked for are left for the next run.
        """
        if not self._doubtful:
            return 0
        void = 0
        try:
            there = self._server.named()
            for number, (name, upload, since) in list(self._doubtful.items()):
                if name in there:
                    logger.info("batch %s was found on the server", there[name])
                    del self._doubtful[number]
                    self._opened(number, there[name])
                elif time.monotonic() - since > DOUBT:
                    self._void(number, upload)
                    void += 1
            self._down_since = None
        except Down as error:
            self._wait_for(error)
        except RunError as error:
            self._give_up(error)
            self._doubtful.clear()
        return void

    def _void(self, number: int, upload: str | None) -> None:
        """A batch that is not on the server, where the file that it was to be made of is."""
        gone = None
        try:
            if upload is not None:
                self._server.check_upload(upload)
        except Gone as error:
            if not self._limits.count_gone_as_paid:
                raise RunError(f"{error}: {_IS_IT_THE_KEY}") from error
            gone = error
        del self._doubtful[number]
        self._settle_rest(number, "was never made" if gone is None else "is gone", in_doubt=gone is not None)
        self._ledger.set_batch(number, "void")

    def submit(self, requests: Iterable[Request]) -> int:
        """Makes batches of `requests` while there is room; returns how many requests are on their way.

        What ends it for good is kept in `errors`: what is under way is collected all the same.
        """
        submitted = 0
        for chunk, file in self._chunks(requests):
            if not self.has_room() or self._stop.exit_code is not None:
                break
            try:
                submitted += self._submit(chunk, file)
            except Down as error:
                self._wait_for(error)
            except RunError as error:
                self._give_up(error)
        return submitted

    def collect(self) -> int:
        """Looks at the batches under way, and takes what has ended; returns how many have.

        One that cannot be collected is left for the next run, and its error kept in `errors`.
        """
        ended = 0
        for number, remote in list(self._open.items()):
            if self._stop.exit_code is not None:
                break
            try:
                batch = self._server.batch(remote)
                if batch.status in _ENDED:
                    self._collect(number, batch)
                    ended += 1
                self._missed.pop(number, None)
                self._down_since = None
            except Down as error:
                self._wait_for(error)
                break
            except (Gone, _Odd) as error:
                ended += self._miss(number, remote, error)
            except RunError as error:
                del self._open[number]
                self._give_up(error)
        return ended

    def _miss(self, number: int, remote: str, error: RunError) -> bool:
        """A batch that is not found, or brought nothing of its own: whether it is given up as paid."""
        since = self._missed.setdefault(number, time.monotonic())
        if time.monotonic() - since <= DOUBT:
            logger.info("batch %s: %s; looking again", remote, error)
            return False
        if isinstance(error, _Nothing):
            self._failures.update(sent.key for sent in self._ledger.of_batch(number))
            logger.warning("batch %s: %s: %d are asked again", remote, error, self._settle_rest(number, str(error)))
            self._closed(number)
            return True
        if not self._limits.count_gone_as_paid:
            del self._open[number]
            self._give_up(RunError(f"batch {remote}: {error}: {_IS_IT_THE_KEY}"))
            return False
        logger.warning("batch %s counts as paid, and its requests are asked again: %s", remote, error)
        self._settle_rest(number, "is gone", in_doubt=True)
        self._closed(number)
        return True

    def _wait_for(self, error: Down) -> None:
        """Another try at the next look; after some time without any answer, the next run's."""
        now = time.monotonic()
        self._down_since = self._down_since or now
        if now - self._down_since > PATIENCE:
            self._give_up(error)
            self._open.clear()
            self._doubtful.clear()
        else:
            logger.warning("%s: trying again", error)
            self._wait_until = max(self._wait_until, now + self._limits.poll_seconds)

    def _give_up(self, error: RunError) -> None:
        """No more is submitted, and what is under way collected."""
        logger.warning("%s", error)
        self.errors.append(error)

    def _chunks(self, requests: Iterable[Request]) -> Iterator[tuple[list[Request], bytes]]:
        """Requests that fit a batch and its file."""
        chunk: list[Request] = []
        file = io.BytesIO()
        for request in requests:
            line = json.dumps({"custom_id": request.key.hex(), "method": "POST", "url": PATH, "body": request.body})
            data = line.encode() + b"\n"
            if chunk and (
                len(chunk) >= self._max_requests or file.tell() + len(data) > self._limits.max_megabytes * 1e6
            ):
                yield chunk, file.getvalue()
                chunk, file = [], io.BytesIO()
            chunk.append(request)
            file.write(data)
        if chunk:
            yield chunk, file.getvalue()

    def _submit(self, chunk: list[Request], file: bytes) -> int:
        self._ledger.check_room()
        room = self._budget - self._ledger.account.total
        costs = [self._ledger.may_cost(one, self.price) for one in chunk]
        fitting = sum(total <= room for total in itertools.accumulate(costs))
        if not fitting:
            if not self.num_open:  # else others may turn out cheaper than what is held for them
                self.budget_reached = BudgetReached(self._ledger.account.total, costs[0])
            return 0
        if fitting < len(chunk):
            ((chunk, file),) = self._chunks(chunk[:fitting])
        name = uuid.uuid4().hex
        upload = self._server.upload(f"{name}.jsonl", file)
        number = self._ledger.add_batch(name, upload)
        self._ledger.send(chunk, self.price, self._budget, batch=number)[1].result()
        try:
            remote = self._server.create(upload, name)
        except Busy as error:
            self._never_made(number, error)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            logger.warning("%s: waiting %.0f s", error, self._pause)
            self._wait_until = time.monotonic() + self._pause
            return 0
        except Down as error:
            self._doubtful[number] = (name, upload, time.monotonic())
            self._waiting |= {request.key for request in chunk}
            self._num_unclear += 1
            if self._num_unclear >= _MOST_UNCLEAR:
                raise RunError(f"no batch is made: {error}") from error
            logger.warning("%s: a batch may have been made, or not: looking for it", error)
            return len(chunk)
        except RunError as error:
            self._never_made(number, error)
            raise RunError(f"a batch is refused: {error}") from error
        self._opened(number, remote)
        self._num_unclear, self._pause = 0, self._limits.poll_seconds / 2
        logger.info("batch %s: %s requests", remote, f"{len(chunk):,}")
        return len(chunk)

    def _never_made(self, number: int, error: RunError) -> None:
        self._settle_rest(number, str(error))
        self._ledger.set_batch(number, "void")

    def _opened(self, number: int, remote: str) -> None:
        self._ledger.set_batch(number, "open", remote)
        self._open[number] = remote
        self._waiting |= {sent.key for sent in self._ledger.of_batch(number)}

    def _collect(self, number: int, batch: Batch) -> None:
        """Takes the lines of a batch that has ended; what has none was not done, and not paid.

        Raises _Odd where what it brought cannot be its own.
        """
        if batch.status == "failed":
            size = self._settle_rest(number, batch.said or "failed")
            self._closed(number)
            if any(code in _TOO_MUCH for code in batch.codes):
                self._make_smaller(size, batch.said)
            else:
                said = batch.said or "it does not say why"
                self._give_up(RunError(f"{self._server.where}: batch {batch.id} failed: {said}"))
            return
        if batch.status == "completed" and not batch.files:
            if batch.num_done == 0:
                raise _Nothing("it is completed, names no file, and says that none of its requests was done")
            raise _Odd("it is completed and names no file")
        ours = self._ledger.keys_of_batch(number)
        contents = [self._lines(self._server.content(file), ours) for file in batch.files]
        if any(lines and all(row is None for row in lines) for lines in contents):
            raise _Odd("a file of it holds nothing of its own")
        there = {sent.key: sent for sent in self._ledger.of_batch(number)}
        rows = [row for lines in contents for row in lines]
        for written in [self._take(row, there) for row in rows if row is not None]:
            if written is not None:
                written.result()
        if batch.status != "completed":
            done = sum(row is not None and _mapping(row.get("response")).get("status_code") == 200 for row in rows)
            logger.warning("batch %s is %s: %d of its %d requests were done; the others are asked again",
                           batch.id, batch.status, done, len(ours))  # fmt: skip
        # What has no line may be paid all the same, of a batch that was done or has a line that cannot be read.
        self._settle_rest(number, batch.status, in_doubt=batch.status == "completed" or None in rows)
        self._closed(number)
        # What was too much may be none any more.
        self._max_requests = min(self._limits.max_requests, self._max_requests * 5 // 4 + 1)
        self._max_open = min(self._limits.max_open, self._max_open + 1)
        self._num_alone = 0

    @staticmethod
    def _lines(content: bytes, ours: set[bytes]) -> list[dict[str, Any] | None]:
        """The lines of a file, in any order; None for one that is damaged, or of no request of the batch."""
        lines: list[dict[str, Any] | None] = []
        for line in filter(None, map(bytes.strip, content.splitlines())):
            try:
                row = json.loads(line)
                lines.append(row if bytes.fromhex(row["custom_id"]) in ours else None)
            except (ValueError, KeyError, TypeError, RecursionError):
                lines.append(None)
        return lines or [None]

    def _take(self, row: dict[str, Any], there: dict[bytes, Sent]) -> "Future[None] | None":
        """One line of a file, if it was not taken before. What is returned is done on the disk."""
        sent = there.pop(bytes.fromhex(row["custom_id"]), None)
        if sent is None:
            return None
        self._waiting.discard(sent.key)
        response = _mapping(row.get("response"))
        if response.get("status_code") == 200:
            body = response.get("body")
            reply = read_reply(body, sent.bounds, self.price)
            if reply is not None:
                cleaned = dataclasses.replace(reply, text=self._server.cleaned(reply.text))
                return self._ledger.settle(sent, "reply", cleaned)
            tokens = usage_of(body, sent.bounds)
            return self._ledger.settle(
                sent, "unreadable", cost=cost_of(*tokens, self.price), tokens=tokens, detail="no choice with a text"
            )
        error = row.get("error") or _mapping(response.get("body")).get("error") or response
        self.refusal = said = self._server.cleaned(str(_mapping(error).get("message") or error), 300)
        refused = response.get("status_code") == 400
        if refused and of_the_prompt(f"{_mapping(error).get('code')} {said}"):
            return self._ledger.settle(sent, "reply", Reply(said, "refusal", "", 0, 0, 0))
        self._failures[sent.key] += _MOST_FAILURES if refused else 1
        return self._ledger.settle(sent, "unpaid", detail=said)

    def _settle_rest(self, number: int, why: str, in_doubt: bool = False) -> int:
        """What of a batch has no outcome: not done, and not paid, or `in_doubt`; how many requests that are."""
        rest = self._ledger.of_batch(number)
        for sent in rest:
            self._failures[sent.key] += in_doubt
        for done in [
            self._ledger.settle(sent, "unknown", cost=sent.held, detail=why)
            if in_doubt
            else self._ledger.settle(sent, "unpaid", detail=why)
            for sent in rest
        ]:
            done.result()
        self._waiting -= {sent.key for sent in rest}
        return len(rest)

    def _closed(self, number: int) -> None:
        self._ledger.set_batch(number, "done")
        del self._open[number]

    def _make_smaller(self, size: int, said: str) -> None:
        """The server has more waiting than it takes: wait for what it has, or send less at once."""
        logger.warning("%s takes no more at once (%s): waiting", self._server.where, said)
        if self._open:
            self._max_open = len(self._open)
        else:
            self._max_requests = max(1, size // 2)
            self._num_alone += size == 1
        if self._num_alone >= MOST_ALONE:
            self._give_up(RunError(f"{self._server.where} does not even take one request: {said}"))
        if self._num_alone:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._wait_until = time.monotonic() + max(self._pause, self._limits.poll_seconds)


def _mapping(value: Any) -> dict[str, Any]:
    """`value`, where it is a mapping: a server may write anything."""
    return value if isinstance(value, dict) else {}
