"""The Batch API under the same ledger, against a server that has it, and does with it what the real one does."""

import json
import sqlite3
from pathlib import Path

import openai
import pytest
from teachers import BatchTeacher, Teacher, rows_in

from data_pipeline.cli import RunError, Stopped, StopSignal
from data_pipeline.settings import UsageError
from data_pipeline.synthesis import batch as batch_module
from data_pipeline.synthesis.rules import RuleTeacher
from data_pipeline.synthesis.run import synthesize

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)


@pytest.fixture
def batches(server, settings_of, monkeypatch):
    """Starts a server with these endings; gives settings for it, its store and its books."""

    monkeypatch.setattr(batch_module, "DOUBT", 0.1)

    def start(*endings, limits=None, **changes):
        store = {"files": {}, "batches": {}, "sizes": []}
        limit = changes.pop("limit", 10**9)
        url, books = server(BatchTeacher, rules=HONEST, endings=list(endings), store=store, limit=limit)
        settings = settings_of(url, transport="batch", batch={"poll_seconds": 0.02} | (limits or {}), **changes)
        return settings, store, books

    return start


@pytest.fixture
def directly(server, settings_of):
    """The rows of the same run, request by request."""

    def rows(**changes):
        url, _ = server(Teacher, rules=HONEST)
        settings = settings_of(url, "direct", **changes)
        synthesize(settings)
        return [(row["id"], row["question"], row["answer"]) for row in rows_in(settings.out)]

    return rows


def made(settings):
    return [(row["id"], row["question"], row["answer"]) for row in rows_in(settings.out)]


def test_batches_give_the_same_rows_at_half_the_price(batches, directly):
    settings, store, books = batches()
    report = synthesize(settings)
    assert made(settings) == directly()
    assert store["sizes"] == [30, 30] and max(books.answered.values()) == 1
    assert report["dollars"] == pytest.approx((books.tokens[0] * 5 + books.tokens[1] * 15) / 1e6)
    before = len(store["batches"])
    synthesize(settings)
    assert len(store["batches"]) == before


def test_requests_are_split_by_number_and_by_size(batches, directly):
    settings, store, _ = batches(limits={"max_requests": 7})
    synthesize(settings)
    assert max(store["sizes"]) == 7 and sum(store["sizes"]) == 60 and made(settings) == directly()
    settings, store, _ = batches(limits={"max_megabytes": 0.01}, out="small")
    synthesize(settings)
    assert max(len(content) for name, content in store["files"].items()) <= 1.3e4
    assert all(len(store["files"][batch["input_file_id"]]) <= 1e4 for batch in store["batches"].values())
    assert sum(store["sizes"]) == 60


@pytest.mark.parametrize(
    "ending",
    [
        "no output file",
        "nothing done",
        "expired",
        "some fail",
        "damaged line",
        "cut on creation",
        "error on creation",
        "busy",
        "odd lines",
    ],
)
def test_whatever_a_batch_ends_in_what_was_not_done_is_asked_again_and_nothing_else(batches, directly, ending):
    settings, store, books = batches(ending)
    report = synthesize(settings)
    assert report["num_open"] == 0 and made(settings) == directly()
    expected = {
        "no output file": 90,
        "nothing done": 90,
        "expired": 75,
        "some fail": 70,
        "damaged line": 61,
        "odd lines": 61,
    }
    assert sum(store["sizes"]) == expected.get(ending, 60)
    twice = [times for times in books.answered.values() if times > 1]
    # A line that cannot be read cannot be had again: it counts as paid.
    assert twice == ([2] if ending in ("damaged line", "odd lines") else [])
    paid = (books.tokens[0] * 5 + books.tokens[1] * 15) / 1e6
    assert report["dollars_held"] == 0
    assert report["dollars"] >= paid - 1e-9 if ending != "odd lines" else report["dollars"] > 0


def test_more_than_the_server_takes_at_once_is_sent_in_smaller_batches(batches, directly):
    settings, store, books = batches(limit=8)
    synthesize(settings)
    assert made(settings) == directly() and max(books.answered.values()) == 1
    assert store["sizes"][:2] == [30, 15] and len(store["sizes"]) < 30


def test_a_batch_that_fails_for_good_ends_the_run_with_its_reason(batches, monkeypatch):
    settings, _, _ = batches(limit=0)
    monkeypatch.setattr(batch_module, "_TOO_MUCH", ())
    with pytest.raises(RunError, match="failed: Enqueued token limit reached"):
        synthesize(settings)


def test_a_direct_run_waits_for_batches_that_are_under_way(batches, server, monkeypatch):
    settings, store, books = batches()

    class Death(BaseException):
        pass

    def die(self):
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(batch_module.BatchTeacher, "collect", die)
        with pytest.raises(Death):
            synthesize(settings)
    with pytest.raises(UsageError, match="1 batches of this folder are under way, and would be paid again"):
        synthesize(settings.model_copy(update={"transport": "direct"}))
    assert synthesize(settings)["num_rows"] == 30 and max(books.answered.values()) == 1
    assert len(store["batches"]) == 2


def test_batches_that_fail_for_good_end_a_run_that_has_more_to_send(batches, monkeypatch):
    settings, store, _ = batches(limit=0, limits={"max_requests": 5, "max_open": 2})
    monkeypatch.setattr(batch_module, "_TOO_MUCH", ())
    with pytest.raises(RunError, match="failed: Enqueued token limit reached"):
        synthesize(settings)
    assert len(store["batches"]) <= 3


def test_a_key_that_a_batch_server_says_again_is_neither_kept_nor_shown(batches, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    settings, _, _ = batches("refuses sk-very-secret", teacher={"key_variable": "MY_KEY"})
    with pytest.raises(RunError, match=r"a batch is refused: .*\*\*\*") as error:
        synthesize(settings)
    assert "very-secret" not in str(error.value)
    assert not any(b"very-secret" in f.read_bytes() for f in Path(settings.out).rglob("*") if f.is_file())


def test_a_batch_in_doubt_that_cannot_be_looked_for_is_left_for_the_next_run(batches, monkeypatch):
    settings, store, books = batches("cut on creation")

    def refused(self):
        raise RunError("the key may not list batches")

    with monkeypatch.context() as patch:
        patch.setattr(batch_module.BatchServer, "named", refused)
        with pytest.raises(RunError, match="may not list"):
            synthesize(settings)
    assert synthesize(settings)["num_rows"] == 30
    assert max(books.answered.values()) == 1 and len(store["batches"]) == 2


def test_a_server_without_a_batch_api_is_said_to_have_none(server, settings_of):
    url, _ = server(Teacher)
    with pytest.raises(RunError, match="has it a Batch API\\? Without one, say transport=direct"):
        synthesize(settings_of(url, transport="batch"))


def test_a_request_that_fails_again_and_again_is_left_and_said(batches):
    settings, store, _ = batches(*["no output file"] * 3)
    with pytest.raises(RunError, match="30 requests failed as often as they may"):
        synthesize(settings)
    assert len(store["batches"]) == 3


def test_the_budget_holds_for_batches(batches):
    settings, _, books = batches(budget=0.08, limits={"max_requests": 10})
    with pytest.raises(RunError, match=r"the budget of .* is reached"):
        synthesize(settings)
    paid = (books.tokens[0] * 5 + books.tokens[1] * 15) / 1e6
    assert 0.02 < paid <= 0.08
    synthesize(settings.model_copy(update={"budget": 10.0}))
    assert len(rows_in(settings.out)) == 30 and max(books.answered.values()) == 1


@pytest.mark.parametrize("moment", ["before upload", "before creation", "after creation", "while collecting"])
def test_a_run_that_dies_finds_its_batches_again(batches, directly, monkeypatch, moment):
    """The process dies (an error that nothing catches) at each moment of a batch's life; the next one goes on."""

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    settings, store, books = batches()
    with monkeypatch.context() as patch:
        ledger = batch_module.Ledger
        if moment == "before upload":
            patch.setattr(openai.resources.Files, "create", die)
        elif moment == "before creation":
            patch.setattr(openai.resources.Batches, "create", die)
        elif moment == "after creation":
            patch.setattr(batch_module.BatchTeacher, "_opened", die)
        else:
            settle, settled = ledger.settle, []

            def some(self, *arguments, **named):
                settled.append(1)
                return die() if len(settled) == 10 else settle(self, *arguments, **named)

            patch.setattr(ledger, "settle", some)
        with pytest.raises(Death):
            synthesize(settings)
    report = synthesize(settings)
    assert report["num_open"] == 0 and made(settings) == directly()
    assert max(books.answered.values()) == 1 and sum(store["sizes"]) == 60
    assert report["dollars_held"] == 0


def test_a_stop_leaves_batches_at_the_server_and_the_next_run_collects_them(batches, monkeypatch):
    settings, store, _ = batches()
    entered = StopSignal.__enter__

    def stopping(self):
        entered(self)
        real = batch_module.BatchTeacher.collect

        def collect(teacher):
            self.exit_code = 130
            return real(teacher)

        monkeypatch.setattr(batch_module.BatchTeacher, "collect", collect)
        return self

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "__enter__", stopping)
        with pytest.raises(Stopped):
            synthesize(settings)
    monkeypatch.undo()
    assert len(store["batches"]) == 1
    with sqlite3.connect(Path(settings.out) / "ledger.sqlite") as connection:
        assert connection.execute("SELECT state FROM batches").fetchall() == [("open",)]
    synthesize(settings)
    assert len(store["batches"]) == 2 and len(rows_in(settings.out)) == 30


def test_a_direct_run_goes_on_with_what_batches_brought(batches, server):
    settings, _, _ = batches("expired")
    synthesize(settings)
    again = settings.model_copy(update={"transport": "direct", "num_items": 30})
    synthesize(again)
    assert json.loads((Path(settings.out) / "report.json").read_text())["num_rows"] == 30
