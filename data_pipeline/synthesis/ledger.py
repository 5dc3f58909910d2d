"""The ledger: what was asked, answered and paid. Append-only, and on the disk before anything follows from it.

A request is `sent` with the most that it may cost; its one `outcome` says what it did cost. What was sent and has no
outcome, since the process or the connection died, counts with the most for ever: nobody can know.
"""

import asyncio
import contextlib
import dataclasses
import errno
import math
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from data_pipeline.cli import RunError, logger
from data_pipeline.synthesis.requests import BELIEVABLE, Bounds, Reply, Request, as_text, cost_of
from data_pipeline.synthesis.settings import Price

FORMAT_VERSION = 1
# reply: with a text; it is asked no more. unreadable: paid, without a text. unpaid: an error of the server, which
# takes no money for it. unknown: it may have been paid, and nobody knows.
Status = Literal["reply", "unreadable", "unpaid", "unknown"]  # and "duplicate", a second reply to one request
_TABLES = f"""
CREATE TABLE IF NOT EXISTS sent (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL, stage TEXT NOT NULL, max_prompt_tokens INTEGER NOT NULL,
  max_reply_tokens INTEGER NOT NULL, bound INTEGER NOT NULL, at REAL NOT NULL, batch INTEGER);
CREATE INDEX IF NOT EXISTS sent_in_batch ON sent (batch) WHERE batch IS NOT NULL;
CREATE TABLE IF NOT EXISTS outcomes (
  sent INTEGER PRIMARY KEY, key BLOB NOT NULL, status TEXT NOT NULL, finish_reason TEXT, text TEXT, model TEXT,
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost INTEGER NOT NULL, seconds REAL NOT NULL,
  at REAL NOT NULL, detail TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS reply_of ON outcomes (key) WHERE status = 'reply';
CREATE INDEX IF NOT EXISTS unreadable_of ON outcomes (key) WHERE status = 'unreadable';
CREATE TABLE IF NOT EXISTS batches (
  id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, remote TEXT, state TEXT NOT NULL, at REAL NOT NULL);
PRAGMA user_version = {FORMAT_VERSION};
"""
_RESERVE = 8 * 2**20  # bytes that are kept free: a few hundred replies
_SENT = "INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_OUTCOME = "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class BudgetReached(Exception):
    """A request might pass the budget: billionths of a dollar that are spent or held, and that it may cost."""

    def __init__(self, taken: int, wanted: int):
        super().__init__(taken, wanted)
        self.taken, self.wanted = taken, wanted


@dataclasses.dataclass
class Account:
    """Billionths of a dollar: spent, and held for what was sent and has no outcome."""

    spent: int = 0
    held: int = 0

    @property
    def total(self) -> int:
        """What cannot be spent any more."""
        return self.spent + self.held


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request that was sent: its number, what it may take at most, and the cost that is held for it."""

    id: int
    key: bytes
    bounds: Bounds
    held: int


class Ledger:
    """One file; one process at a time. Writes are gathered by a thread of its own, so that many share a flush."""

    def __init__(self, path: Path):
        """Opens or makes the ledger. Raises RunError where it is damaged or of another version."""
        self.path = path
        self._jobs: queue.SimpleQueue[tuple[list[tuple[str, tuple[Any, ...]]], Future[None]] | None]
        self._jobs = queue.SimpleQueue()
        with self._explained():
            self._reader = self._connect()
            version = self._reader.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT_VERSION):
                raise RunError(f"{path} is a ledger of version {version}; this program writes {FORMAT_VERSION}")
            if version == 0:
                self._reader.executescript(_TABLES)
            self.account = Account(
                *self._reader.execute(
                    "SELECT (SELECT coalesce(sum(cost), 0) FROM outcomes), (SELECT coalesce(sum(bound), 0) FROM sent "
                    "WHERE NOT EXISTS (SELECT 1 FROM outcomes WHERE outcomes.sent = sent.id))"
                ).fetchone()
            )
            self._next = self._reader.execute("SELECT coalesce(max(id), 0) + 1 FROM sent").fetchone()[0]
            excess = self._reader.execute(
                "SELECT coalesce(max(1.0 * prompt_tokens / max_prompt_tokens), 0), "
                "coalesce(max(1.0 * completion_tokens / max_reply_tokens), 0) "
                "FROM outcomes JOIN sent ON sent.id = outcomes.sent"
            ).fetchone()
            self._excess = [min(BELIEVABLE, times) for times in excess]  # of prompts and replies, times their bounds
        self._reserve = path.with_name(f"{path.name}.reserve")
        self._has_reserve = self._is_full = False
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """Raises RunError where the disk is full, so that nothing more should be sent."""
        if self._is_full:
            raise RunError(f"the disk is full: every reply is kept in {self.path}; make room, and go on")

    def close(self) -> None:
        """Writes what is waiting, and closes the file."""
        self._jobs.put(None)
        self._thread.join()
        self._reader.close()
        if self._has_reserve:
            self._reserve.unlink(missing_ok=True)

    def keep_free(self) -> None:
        """Keeps room on the disk for replies that are paid when it is full; `check_room` says that it is in use.

        Raises OSError where there is none.
        """
        self._has_reserve = True
        try:
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, _RESERVE)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} for the ledger {self.path}") from error

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    def reply(self, request: Request) -> Reply | None:
        """The reply to a request, where it was asked before."""
        row = self._one(
            "SELECT text, finish_reason, model, prompt_tokens, completion_tokens, cost FROM outcomes "
            "WHERE key = ? AND status = 'reply'",
            request.key,
        )
        return None if row is None else Reply(*row)

    def unreadable(self, request: Request) -> int:
        """How often a request was answered with nothing that is a reply."""
        row = self._one("SELECT count(*) FROM outcomes WHERE key = ? AND status = 'unreadable'", request.key)
        return row[0]

    def left_open(self) -> tuple[int, int]:
        """Requests that were sent one by one and have no outcome, and what is held for them."""
        return self._one(
            "SELECT count(*), coalesce(sum(bound), 0) FROM sent WHERE batch IS NULL AND NOT EXISTS "
            "(SELECT 1 FROM outcomes WHERE outcomes.sent = sent.id)"
        )

    def of_batch(self, batch: int) -> list[Sent]:
        """Requests of a batch that have no outcome."""
        return [
            Sent(number, key, Bounds(prompt, reply), held)
            for number, key, prompt, reply, held in self._all(
                "SELECT id, key, max_prompt_tokens, max_reply_tokens, bound FROM sent WHERE batch = ? AND NOT EXISTS "
                "(SELECT 1 FROM outcomes WHERE outcomes.sent = sent.id)",
                batch,
            )
        ]

    def keys_of_batch(self, batch: int) -> set[bytes]:
        """Keys of all requests of a batch."""
        return {key for (key,) in self._all("SELECT key FROM sent WHERE batch = ?", batch)}

    def batches(self, *states: str) -> list[tuple[int, str, str | None, str]]:
        """Number, name, id on the server and state of the batches in these states; of a new one the id of its file."""
        marks = ", ".join("?" * len(states))
        return self._all(f"SELECT id, name, remote, state FROM batches WHERE state IN ({marks}) ORDER BY id", *states)

    def totals(self) -> list[dict[str, Any]]:
        """By stage and status: number of outcomes, tokens, cost, mean seconds."""
        names = ("stage", "status", "finish_reason", "count", "prompt_tokens", "completion_tokens", "cost", "seconds")
        rows = self._all(
            "SELECT stage, status, finish_reason, count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost), "
            "avg(seconds) FROM outcomes JOIN sent ON sent.id = outcomes.sent GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        return [dict(zip(names, row, strict=True)) for row in rows]

    # Writing

    def send(
        self, requests: Sequence[Request], price: Price, budget: int, batch: int | None = None
    ) -> tuple[list[Sent], "Future[None]"]:
        """Holds what these requests may cost; nothing is sent before the future that is returned is done.

        Where the server once took more than a request's bounds, so much more is held for each. Raises BudgetReached,
        with nothing held.
        """
        held = [self.may_cost(request, price) for request in requests]
        if self.account.total + sum(held) > budget:
            raise BudgetReached(self.account.total, sum(held))
        self.account.held += sum(held)
        first, self._next = self._next, self._next + len(requests)
        now = time.time()
        sent = [
            Sent(first + place, request.key, request.bounds, cost)
            for place, (request, cost) in enumerate(zip(requests, held, strict=True))
        ]
        rows = [
            (_SENT, (one.id, one.key, request.stage, *one.bounds, one.held, now, batch))
            for one, request in zip(sent, requests, strict=True)
        ]
        return sent, self._submit(rows)

    def may_cost(self, request: Request, price: Price) -> int:
        """Billionths of a dollar that are held for a request."""
        prompt, reply = (
            math.ceil(bound * max(1.0, excess)) for bound, excess in zip(request.bounds, self._excess, strict=True)
        )
        return cost_of(prompt, reply, price)

    def settle(
        self, sent: Sent, status: Status, reply: Reply | None = None, cost: int = 0, tokens: tuple[int, int] = (0, 0),
        seconds: float = 0.0, detail: str = "",
    ) -> "Future[None]":  # fmt: skip
        """The outcome of a request; the future is done when it is on the disk. What was held for it is free."""
        if reply is not None:
            cost, tokens = reply.cost, (reply.prompt_tokens, reply.completion_tokens)
        self.account.held -= sent.held
        self.account.spent += cost
        self._note_excess(tokens, sent.bounds)
        said = (
            (None, None, None) if reply is None else tuple(map(as_text, (reply.finish_reason, reply.text, reply.model)))
        )
        row = (sent.id, sent.key, status, *said, *tokens, cost, seconds, time.time(), as_text(detail)[:500])
        return self._submit([(_OUTCOME, row)])

    def _note_excess(self, tokens: tuple[int, int], bounds: Bounds) -> None:
        """Where a server took more than was thought the most, it may do so again."""
        for place, what in enumerate(("prompt", "reply")):
            excess = min(BELIEVABLE, tokens[place] / bounds[place])
            if excess > max(1.0, self._excess[place]):
                logger.warning(
                    "a %s took %d tokens, where %d were thought the most: from now on %.1f times as many are held for "
                    "each", what, tokens[place], bounds[place], excess,
                )  # fmt: skip
            self._excess[place] = max(self._excess[place], excess)

    def add_batch(self, name: str, upload: str) -> int:
        """A batch that is being made, of a file on the server; its number."""
        number = self._one("SELECT coalesce(max(id), 0) + 1 FROM batches")[0]
        self.write("INSERT INTO batches VALUES (?, ?, ?, 'new', ?)", number, name, upload, time.time())
        return number

    def set_batch(self, number: int, state: str, remote: str | None = None) -> None:
        """What has become of a batch."""
        self.write("UPDATE batches SET state = ?, remote = coalesce(?, remote) WHERE id = ?", state, remote, number)

    def write(self, statement: str, *values: Any) -> None:
        """Writes, and waits until it is on the disk."""
        self._submit([(statement, values)]).result()

    def _submit(self, rows: list[tuple[str, tuple[Any, ...]]]) -> "Future[None]":
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # who stops waiting for it does not stop it
        self._jobs.put((rows, done))
        return done

    def _write(self) -> None:
        """The thread: all that waits is one transaction."""
        connection = self._connect()
        while True:
            jobs = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    jobs.append(self._jobs.get_nowait())
            work = [job for job in jobs if job is not None]
            try:
                self._commit(connection, [row for rows, _ in work for row in rows])
            except Exception:  # whose fault it is shows when each is written alone
                for rows, done in work:
                    try:
                        self._commit(connection, rows)
                    except Exception as error:
                        done.set_exception(error)
                    else:
                        done.set_result(None)
            else:
                for _, done in work:
                    done.set_result(None)
            if None in jobs:
                connection.close()
                return

    def _commit(self, connection: sqlite3.Connection, rows: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """One transaction; where the disk is full, what is kept free for it is used."""
        try:
            self._commit_once(connection, rows)
        except OSError as error:
            if error.errno != errno.ENOSPC or self._is_full or not self._has_reserve:
                raise
            self._reserve.write_bytes(b"")  # what is under way, and paid, finds room for its reply
            self._is_full = True
            self._commit_once(connection, rows)

    def _commit_once(self, connection: sqlite3.Connection, rows: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """One transaction. A second reply to a request, which cannot be one, is still paid: its cost is kept."""
        with self._explained(), connection:
            connection.execute("BEGIN")
            for statement, values in rows:
                try:
                    connection.execute(statement, values)
                except sqlite3.IntegrityError:
                    if statement != _OUTCOME:
                        raise
                    connection.execute(f"INSERT OR IGNORE{_OUTCOME[6:]}", (*values[:2], "duplicate", *values[3:]))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
        return connection

    def _one(self, statement: str, *values: Any) -> Any:
        with self._explained():
            return self._reader.execute(statement, values).fetchone()

    def _all(self, statement: str, *values: Any) -> list[Any]:
        with self._explained():
            return self._reader.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of SQLite as errors of ours: a full disk as such, a damaged file by its name."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "") or ""
            if code == "SQLITE_FULL":
                raise OSError(errno.ENOSPC, f"No space left on device for the ledger {self.path}") from error
            if code.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
                raise OSError(errno.EIO, f"the ledger {self.path} cannot be written ({error})") from error
            if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise RunError(f"the ledger {self.path} is damaged ({error}): restore a copy of it") from error
            raise


async def on_disk(done: "Future[None]") -> None:
    """Waits for a write."""
    await asyncio.shield(asyncio.wrap_future(done))
