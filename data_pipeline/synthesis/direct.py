"""Requests one by one, many at once: the pace that a server allows, and what is done about its errors."""

import asyncio
import dataclasses
import email.utils
import json
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import openai

from data_pipeline.cli import RunError, StopSignal, first_line, logger
from data_pipeline.synthesis.ledger import BudgetReached, Ledger, Sent, Status, on_disk
from data_pipeline.synthesis.requests import Reply, Request, cost_of, of_the_prompt, read_reply, told_usage, usage_of
from data_pipeline.synthesis.settings import Limits, Teacher

_FIRST_WAIT = 1.0  # seconds after the first error; doubled from one to the next
OUT_OF_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated")
_TRIES_IF_BUSY = 0.1
_FIRST_PATIENCE = 15.0  # seconds for a server that never answered
_SILENCE = 30.0  # seconds between two warnings
_POOL = 16  # connections of a client
# Answers behind which the work may have been done, and paid: time-outs of gateways between us and the server.
_IN_DOUBT = (408, 502, 504, 520, 522, 524)
_LONGEST_PAUSE = 3600.0  # seconds that a server may ask for
_MOST_REFUSED = 20  # requests that are refused as malformed, one after another, before all is given up


class Ended(Exception):
    """No more requests: asked to stop, out of budget, or something that no request can survive."""


class _Again(NamedTuple):
    """A request that is to be sent again: after how many seconds, and how many of its tries that took."""

    wait: float = 0.0
    tries: float = 1.0


class Rate:
    """So many units a minute, evenly."""

    def __init__(self, per_minute: float | None):
        self._seconds = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0

    def delay(self, units: float) -> float:
        """Takes so many units, and says after how many seconds they may be used."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + units * self._seconds
        return start - now


class DirectTeacher:
    """Asks; replies are in the ledger when `ask` returns."""

    def __init__(self, teacher: Teacher, limits: Limits, ledger: Ledger, budget: int, stop: StopSignal):
        """`budget`: billionths of a dollar for everything in the ledger."""
        self._price, self._limits, self._ledger = teacher.prices(), limits, ledger
        self._budget, self._stop, self._where = budget, stop, teacher.base_url
        self._clean, self._extra = teacher.without_key, set(teacher.extra)
        # A pool looks through all of its connections for each request: several small ones take a tenth of the time.
        sizes = [min(_POOL, limits.concurrency - start) for start in range(0, limits.concurrency, _POOL)]
        self._clients = [_client(teacher, limits, size) for size in sizes]
        self._free: asyncio.Queue[openai.AsyncOpenAI] = asyncio.Queue()
        for client, size in zip(self._clients, sizes, strict=True):
            for _ in range(size):
                self._free.put_nowait(client)
        self._requests, self._tokens = Rate(limits.requests_per_minute), Rate(limits.tokens_per_minute)
        self._resume_at = 0.0  # nothing is sent before, since the server said that it is too much
        self._under_way: dict[bytes, asyncio.Future[bool]] = {}
        self._num_open = 0
        self._refused = self._unread = 0  # one after another
        self._down_since: float | None = None
        self._was_up = False
        self._silent_until = 0.0
        self.ended: Exception | None = None  # why no more requests are sent
        self.refusal = ""  # what the last request that failed was told
        self.num_failed = 0

    async def close(self) -> None:
        """Closes the connections."""
        for client in self._clients:
            await client.close()

    async def ask(self, request: Request) -> bool:
        """Whether the ledger has what the server answered. Who asks the same at the same time waits for the same.

        False: the server failed, for this request, as often as it may. Raises Ended, of which `ended` has the reason.
        """
        same = self._under_way.get(request.key)
        if same is not None:
            return await same
        future = asyncio.get_running_loop().create_future()
        self._under_way[request.key] = future
        try:
            answered = await self._ask(request)
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # seen, if by nobody else
            raise
        else:
            future.set_result(answered)
            return answered
        finally:
            del self._under_way[request.key]

    async def _ask(self, request: Request) -> bool:
        tries, failures = 0.0, 0
        while True:
            client = await self._free.get()
            try:
                await self._wait_turn(request)
                sent = await self._sent(request)
                try:
                    again = await self._once(client, request, sent)
                finally:
                    self._num_open -= 1
            finally:
                self._free.put_nowait(client)
            if again is None:
                return True
            tries += again.tries
            failures += 1
            if tries > self._limits.retries:
                self.num_failed += 1
                return False
            backoff = random.uniform(0.5, 1) * _FIRST_WAIT * 2 ** min(failures - 1, 20)
            await self._sleep(max(again.wait, min(self._limits.longest_wait, backoff)))

    async def _once(self, client: openai.AsyncOpenAI, request: Request, sent: Sent) -> "_Again | None":
        """None where it was answered."""
        started = time.monotonic()
        try:
            own = {name: value for name, value in request.body.items() if name not in self._extra}
            extra = {name: value for name, value in request.body.items() if name in self._extra}
            async with asyncio.timeout(self._limits.timeout):  # the client's own is one between two bytes
                response = await client.chat.completions.with_raw_response.create(**own, extra_body=extra or None)
            content = _parsed(response.http_response.content)
        except openai.APIStatusError as error:
            return await self._answered_with_error(error, sent, time.monotonic() - started)
        except (openai.APIConnectionError, TimeoutError) as error:  # a time-out of the client is one
            seconds = time.monotonic() - started
            never_sent = _was_never_sent(error)
            await on_disk(
                self._ledger.settle(
                    sent, "unpaid" if never_sent else "unknown", cost=0 if never_sent else sent.held, seconds=seconds,
                    detail=self._told(error),
                )
            )  # fmt: skip
            self._check_down(error)
            return _Again()
        seconds = time.monotonic() - started
        self._down_since, self._was_up = None, True
        if isinstance(content, dict) and content.get("error") and not content.get("choices"):
            said = f"an error with HTTP 200: {self._clean(str(content['error']))[:200]}"
            if isinstance(content["error"], dict) and content["error"].get("code") == 429:  # a gateway's
                await on_disk(self._ledger.settle(sent, "unpaid", seconds=seconds, detail=said))
                return self._is_too_much(said, _FIRST_WAIT)
            await on_disk(self._ledger.settle(sent, "unknown", cost=sent.held, seconds=seconds, detail=said))
            self._say(f"{self._where} answers {said}")
            self._count_unread(said)
            return _Again()
        reply = read_reply(content, sent.bounds, self._price)
        if reply is None:
            tokens = usage_of(content, sent.bounds)
            cost = cost_of(*tokens, self._price)
            said = "no JSON" if content is None else "no choice with a text"
            await on_disk(
                self._ledger.settle(sent, "unreadable", cost=cost, tokens=tokens, seconds=seconds, detail=said)
            )
            self._count_unread(said)
            return None
        self._refused = self._unread = 0
        reply = dataclasses.replace(reply, text=self._clean(reply.text))
        await on_disk(self._ledger.settle(sent, "reply", reply, seconds=seconds))
        return None

    async def _answered_with_error(self, error: openai.APIStatusError, sent: Sent, seconds: float) -> "_Again | None":
        code, status = self._clean(f"{error.code} {error.type}"), error.status_code
        self.refusal = told = self._told(error)
        if status < 500 and status not in (408, 409):
            self._down_since = None
        if status == 400 and of_the_prompt(f"{code} {told}"):
            # It would be refused again: that is what it was answered.
            refused = Reply(told, "refusal", "", 0, 0, 0)
            await on_disk(self._ledger.settle(sent, "reply", refused, seconds=seconds, detail=code))
            return None
        paid, tokens = sent.held if status in _IN_DOUBT else 0, (0, 0)
        took = told_usage(_parsed(error.response.content), sent.bounds)
        if took is not None:  # it failed, and says what it took all the same
            tokens, paid = took, max(paid, cost_of(*took, self._price))
        outcome: Status = "unknown" if paid else "unpaid"
        await on_disk(self._ledger.settle(sent, outcome, cost=paid, tokens=tokens, seconds=seconds, detail=told))
        if any(name in code for name in OUT_OF_QUOTA) or status == 402:
            self._end(RunError(f"{self._where} says that the account is out of quota: {told}"))
        if status in (401, 403):
            self._end(RunError(f"{self._where} refuses the key (HTTP {status}): {told}"))
        if status == 404:
            self._end(
                RunError(
                    f"{self._where} answers 404: {told}: does teacher.base_url end with /v1, and has it a "
                    "model of this name?"
                )
            )
        if status == 429 or status == 503:
            wait = retry_after(error)
            pause = _FIRST_WAIT if wait is None else min(_LONGEST_PAUSE, wait)
            if status == 503:
                self._check_down(error, pause)
                return _Again(pause)
            return self._is_too_much(told, pause)
        if status in (408, 409) or status >= 500:
            self._check_down(error)
            return _Again()
        self._refused += 1
        self._say(f"{self._where} refuses a request (HTTP {status}): {told}")
        if self._refused >= _MOST_REFUSED:
            self._end(RunError(f"{self._where} refuses one request after another: {told}"))
        return _Again(tries=math.inf)

    def _is_too_much(self, told: str, pause: float) -> _Again:
        """Everybody waits. It is no fault of this request, which may be told so many times."""
        self._resume_at = max(self._resume_at, time.monotonic() + pause)
        self._say(f"{self._where} says that it is too much: {told}; waiting {pause:.0f} s")
        return _Again(pause, _TRIES_IF_BUSY)

    def _count_unread(self, said: str) -> None:
        """Gives up where one answer after another is none: each may be paid."""
        self._unread += 1
        if self._unread >= _MOST_REFUSED:
            self._end(RunError(f"{self._where} answers one request after another with {said}: is it the right server?"))

    def _check_down(self, error: Exception, pause: float = 0.0) -> None:
        """Gives up where nothing at all was answered for some time: a short one, where nothing ever was.

        `pause`: seconds that the server itself asks to wait.
        """
        now = time.monotonic()
        self._down_since = self._down_since or now
        patience = max(60.0, 2 * self._limits.longest_wait) if self._was_up else _FIRST_PATIENCE
        if now - self._down_since > max(patience, 2 * pause) * bool(self._limits.retries):
            self._end(RunError(f"{self._where} does not answer: {self._told(error)}"))
        self._say(f"{self._where} does not answer ({self._told(error)}): trying again")

    def _told(self, error: BaseException) -> str:
        """An error with its cause: the client's own words are "Connection error."."""
        cause = error.__cause__
        if isinstance(error, TimeoutError):
            return f"no reply in {self._limits.timeout:g} s (limits.timeout)"
        told = first_line(self._clean(str(error)) or type(error).__name__)
        if cause is None:
            return told
        return f"{told} ({type(cause).__name__}: {first_line(self._clean(str(cause)) or 'nothing more is said')})"

    def _say(self, what: str) -> None:
        """A warning, now and then."""
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + _SILENCE
            logger.warning("%s", what)

    async def _sent(self, request: Request) -> Sent:
        """Holds what the request may cost, and has it on the disk."""
        try:
            self._ledger.check_room()
        except RunError as error:
            self._end(error)
        while True:
            try:
                (sent,), done = self._ledger.send([request], self._price, self._budget)
                break
            except BudgetReached as reached:
                if not self._num_open:
                    self._end(reached)
                await self._sleep(0.05)  # others under way may turn out cheaper than what is held for them
        self._num_open += 1
        try:
            await on_disk(done)
        except BaseException:
            self._num_open -= 1
            raise
        return sent

    async def _wait_turn(self, request: Request) -> None:
        tokens = request.expected_prompt_tokens + request.bounds.reply_tokens
        await self._cool_down()
        delay = max(self._requests.delay(1), self._tokens.delay(tokens))
        if delay > _SILENCE / 2:
            self._say(f"waiting {delay:.0f} s for the limits of requests and tokens a minute (limits)")
        await self._sleep(delay)
        await self._cool_down()

    async def _cool_down(self) -> None:
        """Waits as long as the server asked everybody to."""
        self._check_over()
        while (left := self._resume_at - time.monotonic()) > 0:
            await self._sleep(left + random.uniform(0, 0.25 * left))

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, and wakes where all is over."""
        until = time.monotonic() + seconds
        while True:
            self._check_over()
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.25))

    def _check_over(self) -> None:
        if self.ended is not None or self._stop.exit_code is not None:
            raise Ended

    def _end(self, error: Exception) -> None:
        self.ended = self.ended or error
        raise Ended


async def each(
    next_item: Callable[[], Any], work: Callable[[Any], Awaitable[None]], count: int, is_over: Callable[[], bool]
) -> None:
    """`count` tasks that take items until there are none, or `is_over`. An error of one ends all."""

    async def run() -> None:
        while not is_over():
            item = next_item()
            if item is None:
                return
            try:
                await work(item)
            except Ended:
                return
            await asyncio.sleep(0)  # items that are done ask nothing: others have their turn

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(run())


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that a server asks to wait: Retry-After in seconds or as a date, or OpenAI's in milliseconds."""
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        said = headers.get(name)
        if said is None:
            continue
        try:
            return max(0.0, float(said) / unit)
        except ValueError:
            try:
                return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
            except ValueError:
                continue
    return None


def _client(teacher: Teacher, limits: Limits, size: int) -> openai.AsyncOpenAI:
    import httpx2

    pool = httpx2.Limits(max_connections=size, max_keepalive_connections=size)
    # A connection that is not made in half of the time was not made: nothing was sent, and nothing paid.
    timeout = httpx2.Timeout(limits.timeout, connect=min(30.0, limits.timeout / 2))
    return openai.AsyncOpenAI(
        base_url=teacher.base_url,
        api_key=teacher.key(),
        max_retries=0,  # every try is held, counted and recorded here
        timeout=timeout,
        http_client=openai.DefaultAsyncHttpxClient(limits=pool, timeout=timeout),
    )


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _was_never_sent(error: Exception) -> bool:
    """Whether a connection was not even made, so that nothing can have been paid."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")
