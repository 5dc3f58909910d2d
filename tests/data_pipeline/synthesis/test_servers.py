"""Servers that answer late, wrongly, or not at all: what is asked again, what is paid, and what ends a run."""

import json
import time
from pathlib import Path

import pytest
from teachers import Hostile, Teacher, outcomes, paid, rows_in

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.synthesis.rules import RuleTeacher, completion, reply_to
from data_pipeline.synthesis.run import synthesize

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)


def test_troubles_that_pass_change_nothing(server, settings_of):
    quiet, _ = server(Hostile, troubles=False)
    loud, books = server(Hostile)
    one, other = settings_of(quiet, "quiet", num_items=60), settings_of(loud, "loud", num_items=60)
    synthesize(one)
    report = synthesize(other)
    assert report["num_open"] == 0
    assert rows_in(one.out) == [
        row | {"lineage": row["lineage"] | {key: mine["lineage"][key] for key in ("requests", "endpoint")}}
        for row, mine in zip(rows_in(other.out), rows_in(one.out), strict=True)
    ]
    seen = {(status, reason) for status, reason, _ in outcomes(other.out)}
    assert {("unpaid", None), ("unknown", None), ("unreadable", None)} < seen
    assert {("reply", "stop"), ("reply", "length"), ("reply", "refusal")} < seen
    # Twice were answered only those whose answer was cut on its way, which count as paid.
    cut = sum(status == "unknown" for status, _, _ in outcomes(other.out))
    assert sum(times - 1 for times in books.answered.values()) <= cut
    assert paid(books) <= 1e9 * (report["dollars"] + report["dollars_held"])


def test_replies_that_were_cut_or_refused_are_kept_and_not_asked_again(server, settings_of):
    class Cutter(Teacher):
        def trouble(self, key, times, body, prompt):
            whole = completion(reply_to(prompt, body, self.rules), body, prompt)
            if int(key[0], 16) < 8:
                whole["choices"][0]["finish_reason"] = "length"
            else:
                whole["choices"][0]["message"]["refusal"] = "No."
            self.pay(key, whole)
            return True

    url, books = server(Cutter)
    with pytest.raises(RunError, match="no row is kept of 30 items"):
        synthesize(settings_of(url))
    report = json.loads((Path(settings_of(url).out) / "report.json").read_text())
    assert books.num_asked == 30 and not report["num_kept"] and not report["num_rows"]
    assert {row["reason"] for row in report["lost"]} == {"was cut", "was refused"}
    assert sum(row["count"] for row in report["lost"]) == 30
    assert report["dollars"] * 1e9 == pytest.approx(paid(books))
    with pytest.raises(RunError, match="no row is kept"):
        synthesize(settings_of(url))
    assert books.num_asked == 30


def test_what_cannot_be_read_is_asked_again_a_bounded_number_of_times(server, settings_of):
    class Babbler(Teacher):
        def trouble(self, key, times, body, prompt):
            self.pay(key, completion("I am a teacher.", body, prompt))
            return True

    url, books = server(Babbler)
    with pytest.raises(RunError, match="no row is kept of 10 items"):
        synthesize(settings_of(url, num_items=10, attempts=3))
    report = json.loads((Path(settings_of(url).out) / "report.json").read_text())
    assert books.num_asked == 30 and max(books.asked.values()) == 1  # each time another request
    assert report["lost"] == [{"stage": "question", "reason": "has no question", "count": 10}]


def test_a_usage_that_cannot_be_true_counts_as_the_most_it_can_be(server, settings_of):
    class Liar(Teacher):
        def trouble(self, key, times, body, prompt):
            content = completion(reply_to(prompt, body, self.rules), body, prompt)
            content["usage"] = [None, {"prompt_tokens": "many"}, {"prompt_tokens": -1, "completion_tokens": 10**9}][
                int(key[0], 16) % 3
            ]
            self.answer(200, content)
            return True

    url, _ = server(Liar)
    settings = settings_of(url, num_items=5)
    report = synthesize(settings)
    prompts = [row["prompt_tokens"] for row in report["requests"]]
    assert all(row["completion_tokens"] == 400 * row["count"] for row in report["requests"]) and all(prompts)
    assert report["dollars"] == pytest.approx(sum(prompts) * 10e-6 + 10 * 400 * 30e-6)


def test_a_server_that_takes_more_than_was_asked_for_is_held_for_more(server, settings_of, caplog):
    class Greedy(Teacher):
        def trouble(self, key, times, body, prompt):
            whole = completion(reply_to(prompt, body, self.rules), body, prompt)
            whole["usage"]["completion_tokens"] = 3 * body["max_tokens"]
            self.pay(key, whole)
            return True

    url, books = server(Greedy)
    settings = settings_of(url, num_items=60, budget=0.5, limits={"concurrency": 1})
    with pytest.raises(RunError, match=r"the budget of \$0.50 is reached"):
        synthesize(settings)
    # Only the first request can take more than was held for it.
    assert 0.3e9 < paid(books) <= 0.5e9
    assert caplog.text.count("where 400 were thought the most: from now on 3.0 times as many are held for each") == 1
    with pytest.raises(RunError, match=r"the budget of \$0.50 is reached"):  # another run knows it from the ledger
        synthesize(settings)
    assert paid(books) <= 0.5e9


def test_what_an_error_says_that_it_took_is_counted(server, settings_of):
    class Costly(Teacher):
        def trouble(self, key, times, body, prompt):
            if times > 1:
                return False
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            with self.books.lock:
                self.books.tokens[0] += 100
                self.books.tokens[1] += 10
            self.answer(500, {"error": {"message": "broken", "code": "server_error"}, "usage": usage})
            return True

    url, books = server(Costly, rules=HONEST)
    report = synthesize(settings_of(url, num_items=5))
    assert report["dollars"] * 1e9 == pytest.approx(paid(books)) and report["dollars_held"] == 0


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": 5}, {"prompt_tokens": "5", "completion_tokens": 10**9}, 5])
def test_an_error_that_does_not_say_what_it_took_costs_nothing(server, settings_of, usage):
    class Busy(Teacher):
        def trouble(self, key, times, body, prompt):
            if times > 1:
                return False
            self.answer(
                429, {"error": {"message": "slowly", "code": "rate_limit"}, "usage": usage}, {"Retry-After": "0"}
            )
            return True

    url, books = server(Busy, rules=HONEST)
    report = synthesize(settings_of(url, num_items=5))
    assert report["dollars"] * 1e9 == pytest.approx(paid(books)) and report["dollars_held"] == 0


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (429, "insufficient_quota", "out of quota"),
        (402, "payment_required", "out of quota"),
        (401, "invalid_api_key", "refuses the key"),
        (403, "forbidden", "refuses the key"),
        (404, "model_not_found", "answers 404.*base_url end with /v1"),
    ],
)
def test_what_no_request_survives_ends_all_at_once(server, settings_of, status, code, said):
    class Refusing(Teacher):
        def trouble(self, key, times, body, prompt):
            if self.books.num_asked <= 10:
                return False
            self.error(status, code)
            return True

    url, books = server(Refusing, rules=HONEST)
    started = time.monotonic()
    with pytest.raises(RunError, match=said):
        synthesize(settings_of(url))
    assert time.monotonic() - started < 5
    assert books.num_asked <= 10 + 8  # those that were under way
    assert (
        sum(books.answered.values()) == sum(status == "reply" for status, _, _ in outcomes(settings_of(url).out)) == 10
    )


def test_requests_that_are_refused_one_after_another_end_it(server, settings_of):
    class Strict(Teacher):
        def trouble(self, key, times, body, prompt):
            self.error(400, "unsupported_parameter")
            return True

    url, books = server(Strict)
    with pytest.raises(RunError, match=r"refuses one request after another.*unsupported_parameter"):
        synthesize(settings_of(url))
    assert books.num_asked < 30


def test_a_server_that_is_not_there_is_said_in_one_message(settings_of):
    with pytest.raises(RunError, match="does not answer"):
        synthesize(settings_of("http://127.0.0.1:9/v1", limits={"retries": 0}))
    assert {status for status, _, _ in outcomes(settings_of("http://127.0.0.1:9/v1").out)} == {"unpaid"}


def test_too_many_requests_silence_everybody_for_as_long_as_is_asked(server, settings_of):
    class Busy(Teacher):
        def trouble(self, key, times, body, prompt):
            if self.number == 9:
                self.error(429, "rate_limit_exceeded", Retry_After="1")
                return True
            time.sleep(0.01)
            return False

    url, books = server(Busy, rules=HONEST)
    synthesize(settings_of(url, limits={"longest_wait": 5}))
    quiet = [later - earlier for earlier, later in zip(books.times[8:], books.times[9:], strict=False)]
    assert 0.8 < max(quiet[:16]) < 1.6
    assert len(books.times) == 61


def test_a_busy_server_may_say_so_more_often_than_a_broken_one(server, settings_of):
    class Busy(Teacher):
        def trouble(self, key, times, body, prompt):
            if times <= 12:
                self.error(429, "rate_limit_exceeded", Retry_After="0")
                return True
            return False

    url, books = server(Busy, rules=HONEST)
    assert synthesize(settings_of(url, num_items=3, limits={"retries": 2}))["num_rows"] == 3
    assert books.num_asked == 3 * 2 * 13


def test_what_a_model_thinks_aloud_is_no_part_of_its_reply(server, settings_of):
    class Thinker(Teacher):
        def complete(self, body, prompt):
            text = "<think>SOLUTION: perhaps 5?\nFINAL ANSWER: 5</think>\nSOLUTION: 3 + 4 = 7\nFINAL ANSWER: 7"
            if "FINAL CREATED QUESTION" in prompt:
                text = f"<think>CREATED QUESTION: hm</think>CREATED QUESTION: How much are 3 and 4, {body['seed']}?"
            self.answer(200, completion(text, body, prompt))

    url, _ = server(Thinker)
    settings = settings_of(url, num_items=3)
    synthesize(settings)
    assert [(row["solution"], row["answer"]) for row in rows_in(settings.out)] == [("3 + 4 = 7", "7")] * 3
    assert all(row["question"].startswith("How much are 3 and 4") for row in rows_in(settings.out))


def test_a_pace_is_kept(server, settings_of):
    url, books = server(rules=HONEST)
    started = time.monotonic()
    synthesize(settings_of(url, num_items=15, limits={"requests_per_minute": 900}))  # 30 requests, one every 1/15 s
    assert 1.8 < time.monotonic() - started < 5
    gaps = [later - earlier for earlier, later in zip(books.times, books.times[1:], strict=False)]
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(1 / 15, rel=0.2)
    started = time.monotonic()
    settings = settings_of(url, "tokens", num_items=8, limits={"tokens_per_minute": 300_000})
    synthesize(settings)  # 16 requests of 400 tokens and their prompts: at least 6,400 at 5,000 a second
    assert time.monotonic() - started > 1.2


def test_as_many_requests_are_under_way_as_may_be(server, settings_of):
    class Slow(Teacher):
        def trouble(self, key, times, body, prompt):
            time.sleep(0.05)
            return False

    url, books = server(Slow, rules=HONEST)
    synthesize(settings_of(url, limits={"concurrency": 5}))
    assert books.most_under_way == 5


def test_half_of_a_character_in_a_reply_hurts_no_other(server, settings_of):
    class Odd(Teacher):
        def complete(self, body, prompt):
            text = reply_to(prompt, body, self.rules)
            self.answer(200, json.dumps(completion(text + "\nx", body, prompt)).replace("\\nx", "\\n\\ud83d").encode())

    url, _ = server(Odd, rules=HONEST)
    report = synthesize(settings_of(url, num_items=10))
    assert report["num_open"] == 0 and {status for status, _, _ in outcomes(settings_of(url).out)} == {"reply"}


def test_a_server_that_answers_something_else_ends_it_soon(server, settings_of):
    class Page(Teacher):
        def trouble(self, key, times, body, prompt):
            self.answer(200, b"<html>maintenance</html>")
            return True

    url, books = server(Page)
    with pytest.raises(RunError, match="answers one request after another with no JSON"):
        synthesize(settings_of(url, num_items=200))
    assert books.num_asked <= 28


class WrappedOnce(Teacher):
    """The first answer to each request says 200, and is an error of this code."""

    code = 502

    def trouble(self, key, times, body, prompt):
        if times == 1:
            self.answer(200, {"error": {"message": "not now", "code": self.code}})
        return times == 1


def test_an_error_in_an_answer_that_says_200_is_an_error(server, settings_of):
    url, books = server(WrappedOnce, rules=HONEST)
    assert synthesize(settings_of(url, num_items=5))["num_rows"] == 5
    assert books.num_asked == 20


def test_a_server_whose_every_answer_is_an_error_ends_it_soon(server, settings_of):
    class Wrapped(Teacher):
        def trouble(self, key, times, body, prompt):
            self.answer(200, {"error": {"message": "no such plan", "code": 401}})
            return True

    url, books = server(Wrapped, rules=HONEST)
    with pytest.raises(RunError, match="answers one request after another with an error with HTTP 200"):
        synthesize(settings_of(url))
    assert books.num_asked <= 28


def test_a_gateways_limit_in_an_answer_that_says_200_is_waited_for_and_not_paid(server, settings_of):
    url, _ = server(WrappedOnce, rules=HONEST, code=429)
    settings = settings_of(url, num_items=2)
    assert synthesize(settings)["num_rows"] == 2
    assert {(status, cost) for status, _, cost in outcomes(settings.out) if status != "reply"} == {("unpaid", 0)}


def test_the_reason_of_a_few_refusals_is_told(server, settings_of, caplog):
    class Strict(Teacher):
        def trouble(self, key, times, body, prompt):
            self.answer(400, {"error": {"message": "Unsupported parameter: 'max_tokens'", "code": "x", "type": "y"}})
            return True

    url, books = server(Strict)
    with pytest.raises(RunError, match=r"3 requests failed .*the last: .*Unsupported parameter: 'max_tokens'"):
        synthesize(settings_of(url, num_items=3))
    assert "refuses a request (HTTP 400)" in caplog.text and books.num_asked == 3


def test_a_context_that_is_too_short_today_may_be_long_enough_tomorrow(server, settings_of):
    class Short(Teacher):
        short = True

        def trouble(self, key, times, body, prompt):
            if not self.short:
                return False
            said = "This model's maximum context length is 512 tokens"
            self.answer(400, {"error": {"message": said, "code": "context_length_exceeded", "type": "x"}})
            return True

    handlers = []

    class Here(Short):
        def setup(self):
            handlers.append(type(self))
            super().setup()

    url, _ = server(Here, rules=HONEST)
    with pytest.raises(RunError, match="maximum context length"):
        synthesize(settings_of(url, num_items=4))
    handlers[0].short = False
    assert synthesize(settings_of(url, num_items=4))["num_rows"] == 4


def test_a_server_that_loads_is_waited_for_as_long_as_it_says(server, settings_of, monkeypatch):
    class Loading(Teacher):
        def trouble(self, key, times, body, prompt):
            if len(self.books.times) <= 4:
                self.send_response(503)
                self.send_header("Retry-After", "1")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return True
            return False

    monkeypatch.setattr("data_pipeline.synthesis.direct._FIRST_PATIENCE", 0.2)
    url, _ = server(Loading, rules=HONEST)
    assert synthesize(settings_of(url, num_items=2, limits={"concurrency": 2}))["num_rows"] == 2


def test_a_reply_that_never_ends_is_given_up(server, settings_of):
    class Dripping(Teacher):
        def trouble(self, key, times, body, prompt):
            if times > 1:
                return False
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"\n")
                self.wfile.flush()
                time.sleep(0.1)
            self.cut()
            return True

    url, _ = server(Dripping, rules=HONEST)
    started = time.monotonic()
    assert synthesize(settings_of(url, num_items=2, limits={"timeout": 0.5}))["num_rows"] == 2
    assert time.monotonic() - started < 5


def test_further_keys_of_a_body_are_sent(server, settings_of):
    bodies = []

    class Seen(Teacher):
        def trouble(self, key, times, body, prompt):
            bodies.append(body)
            return False

    url, _ = server(Seen, rules=HONEST)
    extra = {"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}}
    synthesize(settings_of(url, num_items=2, teacher={"extra": extra}))
    assert all(body["top_k"] == 5 and body["chat_template_kwargs"] == {"enable_thinking": False} for body in bodies)
    for name in ("service_tier", "extra_headers", "tools"):
        with pytest.raises(UsageError, match=name):
            settings_of(url, teacher={"extra": {name: "x"}})


def test_a_prompt_that_a_policy_refuses_is_lost_and_not_asked_again(server, settings_of):
    class Strict(Teacher):
        def trouble(self, key, times, body, prompt):
            if int(key[0], 16) < 8 and "SOLUTION" not in prompt:
                self.error(400, "content_policy_violation")
                return True
            return False

    url, books = server(Strict, rules=HONEST)
    report = synthesize(settings_of(url))
    (lost,) = report["lost"]
    assert lost["reason"] == "was refused" and 5 < lost["count"] < 25
    asked = books.num_asked
    synthesize(settings_of(url))
    assert books.num_asked == asked


@pytest.mark.parametrize("answers", [1, 3])
def test_what_is_under_way_when_all_ends_is_kept(server, settings_of, answers):
    class Ending(Teacher):
        def trouble(self, key, times, body, prompt):
            if self.number > 20:
                self.error(429, "insufficient_quota")
                return True
            time.sleep(0.05)
            return False

    url, books = server(Ending, rules=HONEST)
    settings = settings_of(url, answers=answers)
    with pytest.raises(RunError, match="out of quota"):
        synthesize(settings)
    assert sum(books.answered.values()) == sum(status == "reply" for status, _, _ in outcomes(settings.out))
