"""Batches that are not found, bring something else, are never made or are too much; and keys that stay unsaid."""

import json
import sqlite3
import time
from pathlib import Path

import pytest
from teachers import BatchTeacher

from data_pipeline.cli import RunError
from data_pipeline.synthesis import batch as batch_module
from data_pipeline.synthesis import batch_server
from data_pipeline.synthesis.ledger import Ledger
from data_pipeline.synthesis.rules import RuleTeacher
from data_pipeline.synthesis.run import synthesize

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)
PAGE = b"<html>maintenance</html>"


@pytest.fixture
def troubled(server, settings_of, monkeypatch):
    """Starts a server of a kind; gives settings for it, its store and its books."""
    monkeypatch.setattr(batch_module, "DOUBT", 0.1)
    monkeypatch.setattr(batch_server, "_RETRIES", 0)

    def start(kind, *endings, limits=None, limit=10**9, **changes):
        store = {"files": {}, "batches": {}, "sizes": []}
        url, books = server(kind, rules=HONEST, endings=list(endings), store=store, limit=limit)
        settings = settings_of(url, transport="batch", batch={"poll_seconds": 0.02} | (limits or {}), **changes)
        return settings, store, books

    return start


def states(settings):
    with sqlite3.connect(Path(settings.out) / "ledger.sqlite") as connection:
        return [state for (state,) in connection.execute("SELECT state FROM batches ORDER BY id")]


def said_anywhere(settings, secret):
    return [file.name for file in Path(settings.out).rglob("*") if file.is_file() and secret in file.read_bytes()]


class Late(BatchTeacher):
    """A batch is not found at the first look at it."""

    def look(self, name):
        batch = self.store["batches"][name]
        if not batch.setdefault("found", False):
            batch["found"] = True
            return None
        return super().look(name)


class LateFiles(BatchTeacher):
    """A completed batch names its files a look later."""

    def look(self, name):
        batch = super().look(name)
        if batch["status"] == "completed" and not batch.setdefault("told", False):
            batch["told"] = True
            return {key: value for key, value in batch.items() if key != "output_file_id"}
        return batch


class PageForAFile(BatchTeacher):
    """What is downloaded first is a page of something in between."""

    def do_GET(self):
        if "/content" in self.path and not self.store.setdefault("shown", False):
            self.store["shown"] = True
            self.answer(200, PAGE)
        else:
            super().do_GET()


class PageForALook(BatchTeacher):
    """So is the first look at a batch."""

    def do_GET(self):
        if "/batches/" in self.path and not self.store.setdefault("shown", False):
            self.store["shown"] = True
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)
        else:
            super().do_GET()


class Shaky(BatchTeacher):
    """Every third look meets a server that is down."""

    def do_GET(self):
        self.store["looks"] = self.store.get("looks", 0) + 1
        if self.store["looks"] % 3 == 0:
            self.error(503, "unavailable")
        else:
            super().do_GET()


@pytest.mark.parametrize("kind", [Late, LateFiles, PageForAFile, PageForALook, Shaky])
def test_what_is_found_at_another_look_is_neither_lost_nor_paid_again(troubled, kind):
    settings, store, books = troubled(kind)
    report = synthesize(settings)
    assert report["num_rows"] == 30 and store["sizes"] == [30, 30]
    assert max(books.answered.values()) == 1
    assert report["dollars"] == pytest.approx((books.tokens[0] * 5 + books.tokens[1] * 15) / 1e6)


def test_batches_of_another_key_are_left_alone_until_the_key_is_back(troubled, monkeypatch):
    class Keyed(BatchTeacher):
        def create(self, body):
            number = len(self.store["batches"])
            super().create(body)
            self.store["batches"][f"batch-{number}"]["owner"] = self.headers["Authorization"]

        def look(self, name):
            batch = self.store["batches"][name]
            return super().look(name) if batch["owner"] == self.headers["Authorization"] else None

    class Death(BaseException):
        pass

    def die(self):
        raise Death

    monkeypatch.setenv("MY_KEY", "sk-project-one")
    settings, store, books = troubled(Keyed, teacher={"key_variable": "MY_KEY"})
    with monkeypatch.context() as patch:
        patch.setattr(batch_module.BatchTeacher, "collect", die)
        with pytest.raises(Death):
            synthesize(settings)
    monkeypatch.setenv("MY_KEY", "sk-project-two")
    with pytest.raises(RunError, match=r"is this the key of the project that made it\? .*count_gone_as_paid=true"):
        synthesize(settings)
    assert states(settings) == ["open"] and len(store["batches"]) == 1
    monkeypatch.setenv("MY_KEY", "sk-project-one")
    assert synthesize(settings)["num_rows"] == 30 and max(books.answered.values()) == 1


def test_a_batch_in_doubt_whose_file_is_not_there_is_not_taken_for_one_that_was_never_made(troubled, monkeypatch):
    settings, store, books = troubled(BatchTeacher)

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(batch_module.BatchTeacher, "_opened", die)
        with pytest.raises(Death):
            synthesize(settings)
    there, store["batches"] = store["batches"], {}  # as with the key of another project
    files, store["files"] = store["files"], {}
    with pytest.raises(RunError, match="is this the key of the project that made it"):
        synthesize(settings)
    assert states(settings) == ["new"]
    store["batches"], store["files"] = there, files
    assert synthesize(settings)["num_rows"] == 30 and max(books.answered.values()) == 1


def test_a_batch_that_is_really_gone_counts_as_paid_where_that_is_said(troubled):
    class Lost(BatchTeacher):
        def look(self, name):
            return None if name == "batch-0" else super().look(name)

    settings, _, _ = troubled(Lost)
    with pytest.raises(RunError, match="count_gone_as_paid=true"):
        synthesize(settings)
    assert states(settings) == ["open"]
    changes = {"batch": settings.batch.model_copy(update={"count_gone_as_paid": True})}
    report = synthesize(settings.model_copy(update=changes))
    assert report["num_rows"] == 30 and report["dollars_held"] == 0
    assert sum(row["cost"] for row in report["requests"] if row["status"] == "unknown") > 0


def test_a_server_that_is_down_for_long_leaves_what_is_under_way_for_the_next_run(troubled, monkeypatch):
    class Down(BatchTeacher):
        def do_GET(self):
            if self.store.get("up"):
                super().do_GET()
            else:
                self.error(502, "bad_gateway")

    settings, store, books = troubled(Down)
    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "PATIENCE", 0.1)
        with pytest.raises(RunError, match="bad_gateway"):
            synthesize(settings)
    assert states(settings) == ["open"]
    store["up"] = True
    assert synthesize(settings)["num_rows"] == 30 and max(books.answered.values()) == 1


@pytest.mark.parametrize("kind", ["creation", "upload"])
def test_batches_that_are_never_made_end_the_run(troubled, monkeypatch, kind):
    class Broken(BatchTeacher):
        def do_POST(self):
            if self.path.endswith("/batches" if kind == "creation" else "/files"):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.error(500, "wrong model behind the gateway")
            else:
                super().do_POST()

    monkeypatch.setattr(batch_module, "PATIENCE", 0.1)
    settings, store, _ = troubled(Broken)
    with pytest.raises(RunError, match="wrong model behind the gateway"):
        synthesize(settings)
    assert not store["batches"] and len(store["files"]) <= 3


def test_lines_that_were_taken_before_a_death_are_no_damage(troubled, monkeypatch):
    class Death(BaseException):
        pass

    settings, _, books = troubled(BatchTeacher, "expired")
    ledger, settled = batch_module.Ledger, []
    settle = ledger.settle

    def some(self, *arguments, **named):
        settled.append(1)
        if len(settled) == 10:
            raise Death
        return settle(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "settle", some)
        with pytest.raises(Death):
            synthesize(settings)
    report = synthesize(settings)
    assert report["dollars"] == pytest.approx((books.tokens[0] * 5 + books.tokens[1] * 15) / 1e6)


def test_a_queue_that_was_full_for_a_while_is_used_again(troubled):
    class Full(BatchTeacher):
        def look(self, name):
            type(self).limit = 0 if len(self.store["sizes"]) < 4 else 10**9
            return super().look(name)

    settings, store, books = troubled(Full, num_items=60)
    assert synthesize(settings)["num_rows"] == 60 and max(books.answered.values()) == 1
    assert store["sizes"][:4] == [60, 30, 30, 15] and store["sizes"] != sorted(store["sizes"], reverse=True)


def test_a_server_that_takes_not_even_one_request_ends_the_run(troubled, monkeypatch):
    monkeypatch.setattr(batch_module, "MOST_ALONE", 3)
    settings, store, _ = troubled(BatchTeacher, limit=0)
    with pytest.raises(RunError, match="does not even take one request: Enqueued token limit reached"):
        synthesize(settings)
    assert store["sizes"] == [30, 15, 15, 7, 3, 1, 1, 1]


def test_a_request_that_is_refused_is_told_and_not_sent_again(troubled):
    class Strict(BatchTeacher):
        def done(self, line):
            said = {"error": {"message": "Unsupported parameter: 'max_tokens'", "code": "unsupported_parameter"}}
            response = {"status_code": 400, "body": said}
            return json.dumps({"id": "x", "custom_id": line["custom_id"], "response": response}).encode()

    settings, store, _ = troubled(Strict)
    with pytest.raises(RunError, match=r"30 requests failed .*the last: Unsupported parameter: 'max_tokens'"):
        synthesize(settings)
    assert store["sizes"] == [30]


def test_the_key_is_not_in_what_a_failed_batch_says(troubled, monkeypatch):
    class Echo(BatchTeacher):
        def look(self, name):
            said = {"code": "x", "message": "bad " + self.headers["Authorization"]}
            return self.store["batches"][name] | {
                "status": "failed",
                "errors": {"object": "list", "data": [said]},
            }

    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    settings, _, _ = troubled(Echo, teacher={"key_variable": "MY_KEY"})
    with pytest.raises(RunError, match=r"bad Bearer \*\*\*"):
        synthesize(settings)
    assert not said_anywhere(settings, b"very-secret")


def test_a_run_whose_creation_is_refused_ends_at_once(troubled):
    settings, _, _ = troubled(BatchTeacher, "busy", "refuses", limits={"poll_seconds": 0.5})
    started = time.monotonic()
    with pytest.raises(RunError, match="a batch is refused"):
        synthesize(settings)
    assert time.monotonic() - started < 10


def test_a_full_disk_buys_no_batch(troubled, monkeypatch):
    settings, store, _ = troubled(BatchTeacher)
    keep_free = Ledger.keep_free

    def full(ledger):
        keep_free(ledger)
        ledger._is_full = True

    monkeypatch.setattr(Ledger, "keep_free", full)
    with pytest.raises(RunError, match=r"the disk is full: every reply is kept in .*make room, and go on"):
        synthesize(settings)
    assert not store["batches"]
