"""Whole runs against servers on localhost: what comes out, what is paid, and what is refused."""

import json
from pathlib import Path

import pytest
from teachers import Hostile, Teacher, paid, rows_in

from data_pipeline.cli import RunError
from data_pipeline.dataset import read_dataset
from data_pipeline.settings import UsageError
from data_pipeline.synthesis.rules import RuleTeacher, completion, reply_to
from data_pipeline.synthesis.run import synthesize
from data_pipeline.word_problems import solve

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)


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
        assert lineage["strategy"] == "brand_new" and lineage["model"] == "rules"
        assert lineage["endpoint"] == url and lineage["settings"] == {"max_tokens": 400, "temperature": 1.0}
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


def test_the_budget_is_never_passed_and_a_larger_one_goes_on(server, settings_of):
    url, books = server(Hostile)
    said = r"the budget of \$0\.20 is reached: \$0\.\d+ are spent or held, and the next request may cost \$0\.0\d+\. "
    with pytest.raises(RunError, match=said + "Raise budget.*nothing is paid twice"):
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


def test_a_test_set_that_is_not_there_is_said_before_anything_is_asked(server, settings_of):
    url, books = server()
    for against, said in (
        ("gsm8k:test=nowhere", "against: .*'nowhere' does not exist .*data_pipeline prepare gsm8k"),
        ("gsm8k", "must look like gsm8k:test=FILE"),
    ):
        with pytest.raises(UsageError, match=said):
            synthesize(settings_of(url, against=against))
    with pytest.raises(UsageError, match=r"seeds: .*'nowhere' does not exist"):
        synthesize(settings_of(url, seeds={"task": "demo", "path": "nowhere"}))
    assert not books.num_asked


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
    with pytest.raises(UsageError, match=r"seeds: .*line 31: there is no 'solution'"):
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


def test_a_changed_strategy_of_ones_own_is_refused_by_the_name_of_what_changed(server, settings_of, tmp_path):
    url, _ = server(rules=HONEST)
    own = tmp_path / "own.yaml"
    own.write_text("about: mine\ncreate: a new question\n")
    synthesize(settings_of(url, num_items=2, strategy=str(own)))
    own.write_text("about: still mine\ncreate: another question\n")
    with pytest.raises(UsageError, match=r"wording.create: ") as error:
        synthesize(settings_of(url, num_items=2, strategy=str(own)))
    assert str(error.value).count(" -> ") == 1


def test_rows_that_fewer_items_leave_out_are_spoken_of(server, settings_of, caplog):
    url, _ = server(rules=HONEST)
    synthesize(settings_of(url, num_items=12))
    assert "left out" not in caplog.text
    assert synthesize(settings_of(url, num_items=5))["num_rows"] == 5
    assert "5 items of 30 seeds, after 12 of 30: rows of items that are not among them" in caplog.text


def test_settings_that_are_no_groups_and_seeds_for_evaluation_are_refused(settings_of):
    with pytest.raises(UsageError, match=r"price=3: is a group of settings: say teacher.price.input="):
        settings_of("http://localhost/v1", teacher={"price": 3})
    with pytest.raises(UsageError, match=r"asdiv.*set seeds.allow_evaluation_only=true"):
        settings_of("http://localhost/v1", seeds={"task": "asdiv", "split": "test", "path": "-"})
