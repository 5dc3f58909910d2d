"""Whole runs against servers on localhost: what comes out, what is paid, and what is refused."""

import json
import sqlite3
import time
from pathlib import Path

import pytest
from teachers import Hostile, Teacher, rows_in

from data_pipeline.cli import RunError, is_disk_full
from data_pipeline.dataset import read_dataset
from data_pipeline.settings import UsageError
from data_pipeline.synthesis import ledger
from data_pipeline.synthesis.rules import RuleTeacher, completion, reply_to
from data_pipeline.synthesis.run import synthesize
from data_pipeline.word_problems import solve

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)


def outcomes(out):
    with sqlite3.connect(f"{out}/ledger.sqlite") as connection:
        return connection.execute("SELECT status, finish_reason, cost FROM outcomes").fetchall()


def paid(books):
    """Billionths of a dollar by the server's own books, at $10 and $30 a million tokens."""
    return books.tokens[0] * 10_000 + books.tokens[1] * 30_000


def test_rows_are_new_right_and_know_where_they_come_from(server, settings_of, seeds):
    url, _ = server(rules=HONEST)
    settings = settings_of(url, num_items=40)
    report = synthesize(settings)
    rows = rows_in(settings.out)
    assert len(rows) == 40 and report["num_open"] == 0 and not report["lost"]
    known = {json.loads(line)["id"]: json.loads(line)["question"] for line in Path(seeds).read_text().splitlines()}
    for row in rows:
        problem = solve(row["question"])  # an independent solution
        assert (row["answer"], row["solution"], row["num_steps"]) == (
            problem.answer,
            problem.solution,
            problem.num_steps,
        )
        lineage = row["lineage"]
        assert lineage["seed"] in known and row["question"] not in known.values()
        assert lineage["strategy"] == "brand_new" and lineage["model"] == "rules" and lineage["temperature"] == 1.0
        assert lineage["votes"] == [1, 1] and lineage["attempts"] == [1, 1] and len(lineage["requests"]) == 2
        tokens = lineage["prompt_tokens"] * 10e-6 + lineage["completion_tokens"] * 30e-6
        assert lineage["dollars"] == pytest.approx(tokens)
    # Thirty seeds once each, then ten of them again.
    variations = sorted(row["lineage"]["variation"] for row in rows)
    assert variations == [0] * 30 + [1] * 10
    kept = list(read_dataset(f"{settings.out}/dataset", "train"))
    assert len(kept) == report["num_kept"] == len({row["question"] for row in rows})
    assert all(json.loads(problem.lineage)["seed"] in known for problem in kept)


def test_what_was_paid_is_never_asked_again_and_growing_pays_for_what_is_new(server, settings_of):
    url, books = server(rules=HONEST)
    synthesize(settings_of(url, num_items=20))
    assert books.num_asked == 40
    first = rows_in(settings_of(url).out)
    synthesize(settings_of(url, num_items=20))
    assert books.num_asked == 40
    synthesize(settings_of(url, num_items=35))
    assert books.num_asked == 70
    assert rows_in(settings_of(url).out)[:20] == first
    synthesize(settings_of(url, num_items=35, answers=3))
    assert books.num_asked == 70 + 2 * 35
    assert max(books.answered.values()) == 1


def test_more_seeds_pay_for_the_new_ones_only(server, settings_of, seeds):
    url, books = server(rules=HONEST)
    lines = Path(seeds).read_text().splitlines()
    Path(seeds).write_text("\n".join(lines[:10]))
    synthesize(settings_of(url))
    assert books.num_asked == 20
    Path(seeds).write_text("\n".join(lines))
    synthesize(settings_of(url))
    assert books.num_asked == 60


def test_the_majority_of_several_answers_is_kept_and_disagreement_goes(server, settings_of):
    url, _ = server(rules=RuleTeacher(wrong_questions=0, wrong_answers=0.3))
    one = settings_of(url, "one", num_items=120)
    five = settings_of(url, "five", num_items=120, answers=5, agreement=0.6)
    synthesize(one)
    report = synthesize(five)
    wrong = [
        sum(row["answer"] != solve(row["question"]).answer for row in rows_in(out)) / len(rows_in(out))
        for out in (one.out, five.out)
    ]
    assert wrong[0] > 0.15 and wrong[1] < wrong[0] / 2
    lost = {(row["stage"], row["reason"]): row["count"] for row in report["lost"]}
    assert set(lost) <= {("answer", "answers disagree")}
    assert len(rows_in(five.out)) + sum(lost.values()) == 120
    assert all(row["lineage"]["votes"][0] >= 3 and row["lineage"]["votes"][1] == 5 for row in rows_in(five.out))


def test_verification_leaves_fewer_questions_that_cannot_be_answered(server, settings_of):
    url, _ = server(rules=RuleTeacher(wrong_questions=0.5, mended=0.9, wrong_answers=0))
    bad = {}
    for strategy in ("brand_new", "brand_new_unverified"):
        settings = settings_of(url, strategy, strategy=strategy, num_items=60)
        synthesize(settings)
        bad[strategy] = sum("has some" in row["question"] for row in rows_in(settings.out))
    assert bad["brand_new"] < 10 < 20 < bad["brand_new_unverified"]


def test_known_answers_are_held_against_the_rows(server, settings_of, seeds):
    """Answers to the seeds' own questions: a wrong one is seen by the seed's answer."""
    url, _ = server(rules=RuleTeacher(wrong_answers=0.4))
    settings = settings_of(url, strategy="answer_augmentation", num_items=60)
    with pytest.raises(RunError, match="no row is kept"):  # its solutions are the seeds' own, word for word
        synthesize(settings)
    report = json.loads((Path(settings.out) / "report.json").read_text())
    known = {json.loads(line)["question"]: json.loads(line)["answer"] for line in Path(seeds).read_text().splitlines()}
    rows = rows_in(settings.out)
    assert all(known[row["question"]] == row["answer"] for row in rows)
    (lost,) = report["lost"]
    assert lost["reason"] == "is not the known one" and lost["count"] == 60 - len(rows) > 10


@pytest.mark.parametrize("strategy", ["fobar", "self_verification"])
def test_a_masked_number_is_the_answer_that_is_expected(server, settings_of, seeds, strategy):
    class Solver(Teacher):
        def complete(self, body, prompt):
            """Answers with the number that the seed had where there is an x; asked for a statement, makes one."""
            known = [json.loads(line)["question"].split() for line in Path(seeds).read_text().splitlines()]
            asked = prompt.partition("The question:")[2].strip().split("\n\n")[0]
            if "QUESTION ABOUT X" in prompt:
                answer = prompt.partition("Its answer is ")[2].split(".")[0]
                said = f"In the end there are {answer}. What is the value of the unknown x?"
                text = f"QUESTION ABOUT X: {asked.rpartition('.')[0]}. {said}"
            else:
                words = asked.split()
                for seed in known:
                    places = [i for i, word in enumerate(seed[:-7]) if i < len(words) and words[i] != word]
                    if len(places) == 1 and words[places[0]].startswith("x"):
                        text = f"SOLUTION: Back from the end.\nFINAL ANSWER: {seed[places[0]].rstrip('.')}"
                        break
                else:
                    text = "SOLUTION: ?\nFINAL ANSWER: 999"
            self.answer(200, completion(text, body, prompt))

    url, _ = server(Solver)
    settings = settings_of(url, strategy=strategy, num_items=60)
    report = synthesize(settings)
    rows = rows_in(settings.out)
    assert len(rows) >= 55, report["lost"]
    assert all(" x" in row["question"] and "unknown x?" in row["question"] for row in rows)
    assert report["num_kept"] > 40


def test_troubles_that_pass_change_nothing(server, settings_of):
    quiet, _ = server(Hostile, troubles=False)
    loud, books = server(Hostile)
    one, other = settings_of(quiet, "quiet", num_items=60), settings_of(loud, "loud", num_items=60)
    synthesize(one)
    report = synthesize(other)
    assert report["num_open"] == 0
    assert rows_in(one.out) == [
        row | {"lineage": row["lineage"] | {"requests": mine["lineage"]["requests"]}}
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


def test_the_budget_is_never_passed_and_a_larger_one_goes_on(server, settings_of):
    url, books = server(Hostile)
    with pytest.raises(RunError, match=r"the budget of \$0\.20 is reached.*Raise budget.*nothing is paid twice"):
        synthesize(settings_of(url, num_items=60, budget=0.2, limits={"concurrency": 32}))
    assert 0.1e9 < paid(books) <= 0.2e9
    there = json.loads((Path(settings_of(url).out) / "report.json").read_text())
    assert there["num_open"] > 0 and there["num_rows"] > 0 and there["dollars"] + there["dollars_held"] <= 0.2
    report = synthesize(settings_of(url, num_items=60, budget=100))
    assert paid(books) <= 1e9 * (report["dollars"] + report["dollars_held"])
    quiet, _ = server(Hostile, troubles=False)
    synthesize(settings_of(quiet, "quiet", num_items=60))
    assert [r["question"] for r in rows_in(settings_of(url).out)] == [
        r["question"] for r in rows_in(settings_of(quiet, "quiet").out)
    ]


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


def test_a_test_set_that_is_not_there_is_said_before_anything_is_asked(server, settings_of):
    url, books = server()
    for against, said in (
        ("gsm8k:test=nowhere", "'nowhere' does not exist"),
        ("gsm8k", "must look like gsm8k:test=FILE"),
    ):
        with pytest.raises(UsageError, match=said):
            synthesize(settings_of(url, against=against))
    assert not books.num_asked


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


def test_a_key_is_needed_sent_and_never_kept(server, settings_of, monkeypatch, caplog):
    sent = []

    class Locked(Teacher):
        def trouble(self, key, times, body, prompt):
            sent.append(self.headers["Authorization"])
            return False

    url, _ = server(Locked, rules=HONEST)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        UsageError, match=r"no key for https://api\.openai\.com/v1: set the environment variable OPENAI_API_KEY"
    ):
        synthesize(settings_of("https://api.openai.com/v1"))
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    settings = settings_of(url, num_items=3, teacher={"key_variable": "MY_KEY"})
    synthesize(settings)
    assert set(sent) == {"Bearer sk-very-secret"}
    kept = [file.read_bytes() for file in Path(settings.out).rglob("*") if file.is_file()]
    assert kept and not any(b"very-secret" in content for content in kept) and "very-secret" not in caplog.text


def test_openais_key_is_not_sent_elsewhere_unasked(settings_of, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    with pytest.raises(UsageError, match=r"no key for https://other\.example/v1: say in teacher\.key_variable"):
        synthesize(settings_of("https://other.example/v1"))


def test_a_key_that_a_server_says_again_is_neither_kept_nor_shown(server, settings_of, monkeypatch):
    class Echo(Teacher):
        def trouble(self, key, times, body, prompt):
            self.error(401, f"bad key {self.headers['Authorization']}")
            return True

    url, _ = server(Echo)
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    settings = settings_of(url, num_items=3, teacher={"key_variable": "MY_KEY"})
    with pytest.raises(RunError, match="refuses the key") as error:
        synthesize(settings)
    assert "very-secret" not in str(error.value) and "***" in str(error.value)
    assert not any(b"very-secret" in f.read_bytes() for f in Path(settings.out).rglob("*") if f.is_file())


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


def test_an_error_in_an_answer_that_says_200_is_an_error(server, settings_of):
    class Wrapped(Teacher):
        def trouble(self, key, times, body, prompt):
            if times == 1:
                self.answer(200, {"error": {"message": "upstream is busy", "code": 502}})
                return True
            return False

    url, books = server(Wrapped, rules=HONEST)
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


def test_a_tie_is_no_majority(server, settings_of):
    class Torn(Teacher):
        def complete(self, body, prompt):
            text = reply_to(prompt, body, HONEST)
            if "SOLUTION:" in prompt:
                with self.books.lock:
                    self.books.asked[prompt] += 1
                    text = f"SOLUTION: so\nFINAL ANSWER: {self.books.asked[prompt] % 2}"
            self.answer(200, completion(text, body, prompt))

    url, _ = server(Torn)
    with pytest.raises(RunError, match="no row is kept"):
        synthesize(settings_of(url, num_items=5, answers=2))
    report = json.loads((Path(settings_of(url).out) / "report.json").read_text())
    assert report["lost"] == [{"stage": "answer", "reason": "answers disagree", "count": 5}]


def test_a_folder_in_which_nothing_was_answered_takes_other_settings(server, settings_of):
    with pytest.raises(RunError, match="does not answer"):
        synthesize(settings_of("http://127.0.0.1:9/v1", limits={"retries": 0}))
    url, _ = server(rules=HONEST)
    assert synthesize(settings_of(url))["num_rows"] == 30


def test_a_model_without_a_price_is_refused_before_anything_is_asked(server, settings_of):
    url, books = server()
    with pytest.raises(UsageError, match=r"'gpt-9' has no price: say teacher.price=.*gpt-4-turbo"):
        synthesize(settings_of(url, teacher={"model": "gpt-9", "price": None}))
    assert not books.num_asked


def test_a_bad_seed_is_named_before_anything_is_asked(server, settings_of, seeds):
    url, books = server()
    Path(seeds).write_text(Path(seeds).read_text() + '\n{"question": "?"}')
    with pytest.raises(UsageError, match="line 31: there is no 'solution'"):
        synthesize(settings_of(url))
    assert not books.num_asked and not Path(settings_of(url).out).exists()


def test_settings_that_mean_something_else_are_refused_in_a_folder(server, settings_of):
    url, books = server(rules=HONEST)
    synthesize(settings_of(url, num_items=5))
    asked = books.num_asked
    for changes, said in (
        ({"strategy": "change_numbers"}, "strategy: 'brand_new' -> 'change_numbers'"),
        ({"teacher": {"temperature": 0.5}}, "teacher.temperature: 1.0 -> 0.5"),
        ({"seed": 1}, "seed: 0 -> 1"),
    ):
        with pytest.raises(UsageError, match="is another synthesis") as error:
            synthesize(settings_of(url, num_items=5, **changes))
        assert said in str(error.value) and "choose another out" in str(error.value)
    synthesize(settings_of(url, num_items=5, teacher={"price": {"input": 1, "output": 1}}, limits={"retries": 1}))
    assert books.num_asked == asked


def test_a_full_disk_is_said_and_loses_nothing(server, settings_of, monkeypatch):
    url, books = server(rules=HONEST)
    connect = ledger.Ledger._connect

    def small(self):
        connection = connect(self)
        connection.execute("PRAGMA max_page_count = 12")  # what SQLite then says is what it says of a full disk
        return connection

    monkeypatch.setattr(ledger.Ledger, "_connect", small)
    with pytest.raises(OSError, match="No space left on device for the ledger") as error:
        synthesize(settings_of(url, num_items=150, limits={"concurrency": 4}))
    assert is_disk_full(error.value)
    monkeypatch.setattr(ledger.Ledger, "_connect", connect)
    there = sum(status == "reply" for status, _, _ in outcomes(settings_of(url).out))
    assert 0 < there < 300
    synthesize(settings_of(url, num_items=150))
    assert len(rows_in(settings_of(url).out)) == 150
    assert sum(books.answered.values()) <= 300 + 4  # replies to what was under way found no room


def test_a_dry_run_says_what_is_left_and_sends_nothing(server, settings_of, capsys):
    url, books = server(rules=HONEST)
    settings = settings_of(url, num_items=30, answers=2)
    synthesize(settings, dry_run=True)
    said = capsys.readouterr().out
    assert not books.num_asked and not Path(settings.out).exists()
    assert "30 items, of which 0 are done" in said and "Nothing was sent" in said
    question, answer = (
        next(line.split() for line in said.splitlines() if line.startswith(s)) for s in ("question", "answer")
    )
    assert (question[1], answer[1]) == ("30", "60")
    # Replies are assumed to be as long as they may be here: 400 tokens of a question, 250 of an answer.
    assert (question[3], answer[3]) == ("12,000", "15,000")
    expected = (int(question[2].replace(",", "")) + int(answer[2].replace(",", ""))) * 10e-6 + 27_000 * 30e-6
    assert f"Expected: ${expected:.2f}" in said
    assert "The reference question:" in said
    synthesize(settings_of(url, num_items=25))
    asked = books.num_asked
    synthesize(settings, dry_run=True)
    said = capsys.readouterr().out
    assert books.num_asked == asked
    question, answer = (
        next(line.split() for line in said.splitlines() if line.startswith(s)) for s in ("question", "answer")
    )
    assert (question[1], answer[1]) == ("5", str(5 * 2 + 25)), "a second answer to each question that is there"
    assert "as long as those in the ledger" in said


def test_a_budget_that_will_not_do_is_said_in_a_dry_run(server, settings_of, capsys):
    url, _ = server()
    synthesize(settings_of(url, budget=0.01), dry_run=True)
    assert "The budget will be reached before the end" in capsys.readouterr().out


def test_the_report_shows_what_came_of_it_and_no_text_runs_in_it(server, settings_of):
    class Rude(Teacher):
        def trouble(self, key, times, body, prompt):
            if int(key[0], 16) < 4:
                self.pay(key, completion("<script>alert(1)</script>", body, prompt))
                return True
            return False

    url, _ = server(Rude)
    settings = settings_of(url, attempts=1)
    report = synthesize(settings)
    page = (Path(settings.out) / "report.html").read_text()
    assert f"{report['num_kept']} new rows of 30 items" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "question has no question" in page and "Rows beside their seeds" in page
    assert "{{" not in page
