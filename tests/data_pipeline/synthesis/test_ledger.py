"""The ledger by itself: what is written is there, once, and what it costs adds up."""

import asyncio
import contextlib
import sqlite3

import pytest

from data_pipeline.cli import RunError
from data_pipeline.synthesis.ledger import BudgetReached, Ledger, on_disk
from data_pipeline.synthesis.requests import Bounds, Reply, Request, cost_of, make_request, usage_of
from data_pipeline.synthesis.settings import Price, Teacher

REPLY = Reply("yes", "stop", "m", 3, 2, 70)
PRICE = Price(input=0, output=1)
HELD = 2048 * 1000  # billionths of a dollar for 2,048 tokens at a dollar a million


def request(text="Why?", sample="0", **teacher):
    return make_request(Teacher(model="m", **teacher), "answer", text, ("solution",), sample)


def test_a_request_is_known_by_all_that_determines_its_reply():
    changes = [
        {}, {"text": "Who?"}, {"sample": "1"}, {"base_url": "http://localhost/v1"}, {"temperature": 0.5},
        {"top_p": 0.9}, {"max_tokens": 7}, {"max_tokens_name": "max_completion_tokens"}, {"json_schema": True},
        {"send_seed": False}, {"extra": {"reasoning_effort": "low"}},
    ]  # fmt: skip
    keys = [request(**change).key for change in changes]
    assert len(set(keys)) == len(keys)
    assert request().key == request().key == request(key_variable="OTHER", price=Price(input=1, output=1)).key


def test_a_cost_is_the_price_to_the_billionth_rounded_up():
    assert cost_of(1_000_000, 0, Price(input=10, output=30)) == 10_000_000_000
    assert cost_of(1, 1, Price(input=0.15, output=0.6)) == 750
    assert cost_of(1, 0, Price(input=0.0001, output=0)) == 1
    assert cost_of(7, 9, Price(input=0, output=0)) == 0


def test_a_bound_is_never_below_what_a_tokenizer_makes(large_tokenizer):
    for text in ("How many?", "ﷺ" * 50, "𝔘𝔫𝔦", "\u0000\uffff", "a " * 500, "数学の問題", ""):
        assert len(large_tokenizer.encode_prompt(text)) <= request(text).bounds.prompt_tokens


def test_what_is_settled_is_there_after_it_is_opened_again(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        assert ledger.reply(request()) is None
        (sent,), done = ledger.send([request()], PRICE, 10 * HELD)
        done.result()
        assert (ledger.account.spent, ledger.account.held) == (0, HELD)
        ledger.settle(sent, "reply", REPLY).result()
        assert (ledger.account.spent, ledger.account.held) == (70, 0)
        (other,), done = ledger.send([request("Who?")], PRICE, 10 * HELD)
        done.result()
    with Ledger(path) as ledger:
        assert ledger.reply(request()) == REPLY
        assert (ledger.account.spent, ledger.account.held) == (70, HELD)
        assert ledger.left_open() == (1, HELD)
        ledger.settle(other, "unknown", cost=50).result()
        assert ledger.account.total == 120 and ledger.left_open() == (0, 0)


def test_what_is_held_counts_against_the_budget(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.send([request()], PRICE, 2 * HELD)
        with pytest.raises(BudgetReached):
            ledger.send([request("Who?"), request("When?")], PRICE, 3 * HELD - 1)
        assert ledger.account.held == HELD
        ledger.send([request("Who?"), request("When?")], PRICE, 3 * HELD)
        assert ledger.account.held == 3 * HELD


def test_what_is_held_grows_with_what_a_server_takes_and_no_further(tmp_path):
    """By hand: a prompt of n bytes may take n + 32 tokens, at $1 a million; a reply 2,048, at $2."""
    price = Price(input=1, output=2)
    of_prompt, of_reply = (len("Why?") + 32) * 1000, 2048 * 2000
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        assert ledger.may_cost(request(), price) == of_prompt + of_reply
        for tokens, text in ((72, "a"), (3 * 2048, "b")):
            (sent,), _ = ledger.send([request()], price, 10**12)
            took = (tokens, 1) if text == "a" else (1, tokens)
            ledger.settle(sent, "reply", Reply(text, "stop", "m", *took, 7)).result()
    with Ledger(path) as ledger:  # it is read from the ledger again
        assert ledger.may_cost(request(), price) == 2 * of_prompt + 3 * of_reply
        (sent,), _ = ledger.send([request()], price, 10**12)
        ledger.settle(sent, "unreadable", cost=1, tokens=(1, 10**9)).result()
        assert ledger.may_cost(request(), price) == 2 * of_prompt + 10 * of_reply


def test_a_total_counts_as_reply_where_it_can_be_true():
    bounds = Bounds(100, 50)
    usage = {"prompt_tokens": 80, "completion_tokens": 20}
    assert usage_of({"usage": usage | {"total_tokens": 120}}, bounds) == (80, 40)  # twenty were thought
    assert usage_of({"usage": usage | {"total_tokens": 1500}}, bounds) == (80, 20)  # 1,420 of 50 were not


def test_what_is_kept_free_may_be_gone(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.keep_free()
        assert (tmp_path / "ledger.sqlite.reserve").stat().st_size > 10**6
        (tmp_path / "ledger.sqlite.reserve").unlink()


def test_a_reply_is_on_the_disk_when_its_future_is_done(tmp_path):
    """The files as they lie there, copied, have it."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        (sent,), done = ledger.send([request()], PRICE, HELD)
        done.result()
        ledger.settle(sent, "reply", REPLY).result()
        copy = tmp_path / "copy.sqlite"
        copy.write_bytes(path.read_bytes())
        (tmp_path / "copy.sqlite-wal").write_bytes((tmp_path / "ledger.sqlite-wal").read_bytes())
        assert sqlite3.connect(copy).execute("SELECT text FROM outcomes").fetchall() == [("yes",)]


def test_many_writes_share_a_flush_and_none_is_lost(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        every = [request(f"{i}?") for i in range(2000)]
        sent, done = ledger.send(every, PRICE, 2000 * HELD)
        done.result()
        for future in [ledger.settle(one, "reply", REPLY) for one in sent]:
            future.result()
        assert all(ledger.reply(one) == REPLY for one in every)
        assert ledger.account.spent == 70 * 2000 and ledger.account.held == 0


def test_one_write_that_fails_takes_no_other_with_it(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        sent, done = ledger.send([request(f"{i}?") for i in range(5)], PRICE, 100 * HELD)
        done.result()
        futures = [ledger.settle(one, "reply", REPLY) for one in sent]
        futures.append(ledger._submit([("INSERT INTO nowhere VALUES (1)", ())]))
        assert [future.result() for future in futures[:5]] == [None] * 5
        with pytest.raises(sqlite3.OperationalError):
            futures[5].result()
        assert ledger.reply(request("3?")) == REPLY


def test_who_stops_waiting_stops_no_write(tmp_path):
    async def give_up(ledger, sent):
        task = asyncio.create_task(on_disk(ledger.settle(sent, "reply", REPLY)))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        sent, done = ledger.send([request("1?"), request("2?")], PRICE, 100 * HELD)
        done.result()
        asyncio.run(give_up(ledger, sent[0]))
        ledger.settle(sent[1], "reply", REPLY).result()
        assert ledger.reply(request("1?")) == ledger.reply(request("2?")) == REPLY


def test_a_second_reply_to_one_request_is_paid_and_kept_apart(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        sent, done = ledger.send([request(), request()], PRICE, 100 * HELD)
        done.result()
        for one in sent:
            ledger.settle(one, "reply", REPLY).result()
        assert sorted(row["status"] for row in ledger.totals()) == ["duplicate", "reply"]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert (ledger.account.spent, ledger.account.held) == (140, 0)


def test_a_damaged_ledger_or_one_of_another_version_is_named(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no ledger at all" * 100)
    with pytest.raises(RunError, match="is damaged"):
        Ledger(path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(RunError, match="version 99"):
        Ledger(path)


def test_a_body_says_what_the_settings_say():
    body = request(top_p=0.9, max_tokens_name="max_completion_tokens", temperature=None, extra={"n_probs": 1}).body
    assert body["max_completion_tokens"] == 2048 and "temperature" not in body and "max_tokens" not in body
    assert body["top_p"] == 0.9 and body["n_probs"] == 1 and body["messages"] == [{"role": "user", "content": "Why?"}]
    assert isinstance(request().body["seed"], int) and "seed" not in request(send_seed=False).body
    assert request(sample="1").body["seed"] != request().body["seed"]
    assert isinstance(request(), Request)
