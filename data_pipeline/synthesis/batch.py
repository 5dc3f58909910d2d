"""OpenAI's Batch API under the same ledger: requests in files, replies within a day, at half the price.

A batch is written to the ledger, with all that is held for it, before it is made on the server, where it bears the
name that it has in the ledger: so a run that died in between finds it there, or knows that it was never made.
"""

import io
import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import openai

from data_pipeline.cli import RunError, StopSignal, first_line, logger
from data_pipeline.synthesis.direct import OUT_OF_QUOTA
from data_pipeline.synthesis.ledger import BudgetReached, Ledger, Sent
from data_pipeline.synthesis.requests import Reply, Request, cost_of, of_the_prompt, read_reply, usage_of
from data_pipeline.synthesis.settings import BATCH_SHARE, BatchLimits, Price, Teacher

_PATH: Final = "/v1/chat/completions"
_NAME = "mathscale_batch"  # under which the name stands in a batch's metadata
_RETRIES = 6  # of what costs nothing: looks, uploads, downloads
_MOST_FAILURES = 3  # of one request in one run
DOUBT = 180.0  # seconds that a batch is looked for, before it counts as never made
_LONGEST_PAUSE = 1800.0  # seconds
_ENDED = ("completed", "expired", "cancelled", "failed")
_TOO_MUCH = ("token_limit_exceeded", "request_limit_exceeded")  # of what may wait on the server at once


class _Gone(RunError):
    """What was asked for is not on the server."""


class BatchTeacher:
    """Submits requests and collects replies."""

    def __init__(self, teacher: Teacher, limits: BatchLimits, ledger: Ledger, budget: int, stop: StopSignal):
        """`budget`: billionths of a dollar for everything in the ledger."""
        whole = teacher.prices()
        self.price = Price(input=whole.input * BATCH_SHARE, output=whole.output * BATCH_SHARE)
        self._limits, self._ledger, self._budget, self._stop = limits, ledger, budget, stop
        self._where, self._clean = teacher.base_url, teacher.without_key
        self._pause = limits.poll_seconds / 2  # after being told that it is too much; doubled each time
        self._client = openai.OpenAI(base_url=teacher.base_url, api_key=teacher.key(), max_retries=_RETRIES)
        self._failures: Counter[bytes] = Counter()
        self._max_requests, self._max_open = limits.max_requests, limits.max_open
        self._wait_until = 0.0  # the server has as much as it takes
        self._open = {number: remote for number, _, remote, _ in ledger.batches("open") if remote is not None}
        self._doubtful = {number: (name, time.monotonic()) for number, name, _, _ in ledger.batches("new")}
        self._waiting = {sent.key for number in (*self._open, *self._doubtful) for sent in ledger.of_batch(number)}
        self.budget_reached: BudgetReached | None = None
        self.errors: list[RunError] = []

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

        They are those that a run was about to make when it, or its connection, died. Returns how many are void.
        """
        void = 0
        if not self._doubtful:
            return void
        there = {
            (batch.metadata or {}).get(_NAME): batch.id
            for batch in self._asked(lambda: list(self._client.batches.list(limit=100)))
        }
        for number, (name, since) in list(self._doubtful.items()):
            if name in there:
                logger.info("batch %s was found on the server", there[name])
                del self._doubtful[number]
                self._opened(number, there[name])
            elif time.monotonic() - since > DOUBT:
                del self._doubtful[number]
                self._settle_rest(number, "was never made")
                self._ledger.set_batch(number, "void")
                void += 1
        return void

    def leave_doubtful(self) -> None:
        """No longer looks for batches that may have been made: the ledger keeps them for the next run."""
        self._doubtful.clear()

    def submit(self, requests: Iterable[Request]) -> int:
        """Makes batches of `requests` while there is room; returns how many requests are on their way."""
        submitted = 0
        for chunk, file in self._chunks(requests):
            if not self.has_room() or self._stop.exit_code is not None:
                break
            submitted += self._submit(chunk, file)
        return submitted

    def collect(self) -> int:
        """Looks at the batches under way, and takes what has ended; returns how many have.

        One that cannot be collected is left for the next run, and its error kept in `errors`.
        """
        ended = 0
        for number, remote in list(self._open.items()):
            try:
                batch = self._asked(lambda remote=remote: self._client.batches.retrieve(remote))
                if batch.status in _ENDED:
                    self._collect(number, batch)
                    ended += 1
            except _Gone as error:
                logger.warning("batch %s, or what it brought, is gone: it counts as paid (%s)", remote, error)
                self._settle_rest(number, "is gone", in_doubt=True)
                self._closed(number)
                ended += 1
            except RunError as error:
                self.give_up(error)
                self._open.pop(number, None)
        return ended

    def _chunks(self, requests: Iterable[Request]) -> Iterator[tuple[list[Request], bytes]]:
        """Requests that fit a batch and its file."""
        chunk: list[Request] = []
        file = io.BytesIO()
        for request in requests:
            line = json.dumps({"custom_id": request.key.hex(), "method": "POST", "url": _PATH, "body": request.body})
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
        room = self._budget - self._ledger.account.total
        fitting = sum(total <= room for total in itertools.accumulate(one.bounds.cost(self.price) for one in chunk))
        if not fitting:
            if not self.num_open:  # else others may turn out cheaper than what is held for them
                self.budget_reached = BudgetReached(self._ledger.account.total, chunk[0].bounds.cost(self.price))
            return 0
        if fitting < len(chunk):
            ((chunk, file),) = self._chunks(chunk[:fitting])
        name = uuid.uuid4().hex
        upload = self._asked(lambda: self._client.files.create(file=(f"{name}.jsonl", file), purpose="batch"))
        number = self._ledger.add_batch(name)
        self._ledger.send(chunk, self.price, self._budget, batch=number)[1].result()
        try:
            batch = self._client.with_options(max_retries=0).batches.create(
                input_file_id=upload.id, endpoint=_PATH, completion_window="24h", metadata={_NAME: name}
            )
            remote = batch.id
        except (openai.APIStatusError, openai.APIConnectionError, ValueError, AttributeError) as error:
            status = error.status_code if isinstance(error, openai.APIStatusError) else 500
            if status < 500 and status not in (408, 409):
                return self._refused(number, error)
            said = self._clean(first_line(error))
            logger.warning("%s: a batch may have been made, or not (%s): looking for it", self._where, said)
            self._doubtful[number] = (name, time.monotonic())
            self._waiting |= {request.key for request in chunk}
            return len(chunk)
        self._opened(number, remote)
        logger.info("batch %s: %s requests", remote, f"{len(chunk):,}")
        return len(chunk)

    def _refused(self, number: int, error: Any) -> int:
        """A batch that the server does not make: too much just now, or for good, which raises RunError."""
        said = self._clean(first_line(error))
        self._settle_rest(number, said)
        self._ledger.set_batch(number, "void")
        if error.status_code == 429 and not any(word in f"{error.code} {error.type}" for word in OUT_OF_QUOTA):
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            logger.warning("%s takes no batch now (%s): waiting %.0f s", self._where, said, self._pause)
            self._wait_until = time.monotonic() + self._pause
            return 0
        raise RunError(f"{self._where} refuses a batch: {said}") from error

    def give_up(self, error: RunError) -> int:
        """No more is submitted, and what is under way collected; returns that nothing was submitted."""
        logger.warning("%s", error)
        self.errors.append(error)
        return 0

    def _opened(self, number: int, remote: str) -> None:
        self._ledger.set_batch(number, "open", remote)
        self._open[number] = remote
        self._waiting |= {sent.key for sent in self._ledger.of_batch(number)}

    def _collect(self, number: int, batch: Any) -> None:
        """Takes the lines of a batch that has ended; what has none was not done, and not paid."""
        if batch.status == "failed":
            codes = [error.code or "" for error in (batch.errors.data or [] if batch.errors else [])]
            said = "; ".join(
                filter(None, (error.message for error in (batch.errors.data or [] if batch.errors else [])))
            )
            size = self._settle_rest(number, said or "failed")
            self._closed(number)
            if not any(code in _TOO_MUCH for code in codes):
                raise RunError(f"{self._where}: batch {batch.id} failed: {said or 'it does not say why'}")
            self._make_smaller(size, said)
            return
        there = {sent.key: sent for sent in self._ledger.of_batch(number)}
        read_all = True
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            content = self._asked(lambda file=file: self._client.files.content(file).content)
            lines = [line for line in content.splitlines() if line.strip()]
            taken = [self._take(line, there) for line in lines]
            read_all = read_all and None not in taken
            for written in taken:
                if written is not None:
                    written.result()
        if batch.status != "completed":
            logger.warning("batch %s is %s: %d of its requests are asked again", batch.id, batch.status, len(there))
        # What has no line may be paid all the same, of a batch that was done or has a line that cannot be read.
        self._settle_rest(number, batch.status, in_doubt=batch.status == "completed" or not read_all)
        self._closed(number)

    def _take(self, line: bytes, there: dict[bytes, Sent]) -> "Future[None] | None":
        """One line of a file: lines come in any order, and may be damaged. What is returned is done on the disk."""
        try:
            row = json.loads(line)
            sent = there.pop(bytes.fromhex(row["custom_id"]), None)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if sent is None:
            return None
        self._waiting.discard(sent.key)
        response = _mapping(row.get("response"))
        if response.get("status_code") == 200:
            body = response.get("body")
            reply = read_reply(body, sent.bounds, self.price)
            if reply is not None:
                return self._ledger.settle(sent, "reply", reply)
            tokens = usage_of(body, sent.bounds)
            return self._ledger.settle(
                sent, "unreadable", cost=cost_of(*tokens, self.price), tokens=tokens, detail="no choice with a text"
            )
        error = row.get("error") or _mapping(response.get("body")).get("error") or response
        said = self._clean(str(_mapping(error).get("message") or error))
        if response.get("status_code") == 400 and of_the_prompt(f"{_mapping(error).get('code')} {said}"):
            return self._ledger.settle(sent, "reply", Reply(said, "refusal", "", 0, 0, 0))
        self._failures[sent.key] += 1
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
        logger.warning("%s takes no more at once (%s): waiting", self._where, said)
        if self._open:
            self._max_open = len(self._open)
        else:
            self._max_requests = max(1, size // 2)
        self._wait_until = time.monotonic() + self._limits.poll_seconds

    def _asked(self, call: Any) -> Any:
        """What `call` returns. Raises RunError where the server does not do it."""
        try:
            return call()
        except openai.NotFoundError as error:
            said = self._clean(first_line(error))
            raise _Gone(f"{self._where}: {said}: has it a Batch API? Without one, say transport=direct") from error
        except openai.APIStatusError as error:
            raise RunError(f"{self._where}: {self._clean(first_line(error))}") from error
        except (ValueError, AttributeError) as error:
            raise RunError(f"{self._where} answers with something that is no answer of a Batch API") from error
        except openai.OpenAIError as error:
            raise RunError(f"{self._where} does not answer: {self._clean(first_line(error))}") from error


def _mapping(value: Any) -> dict[str, Any]:
    """`value`, where it is a mapping: a server may write anything."""
    return value if isinstance(value, dict) else {}
