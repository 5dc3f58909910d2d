"""Strategies and prompts: what a teacher is told; settings; the rule-based teacher as a command."""

import json
import re
import subprocess
import sys
import urllib.request

import pytest
from teachers import Teacher, rows_in

from data_pipeline.__main__ import main
from data_pipeline.problem import Problem
from data_pipeline.settings import UsageError, load_settings, validated
from data_pipeline.synthesis.rules import RuleTeacher, completion
from data_pipeline.synthesis.run import synthesize
from data_pipeline.synthesis.settings import SynthesisSettings
from data_pipeline.synthesis.strategies import answer_prompt, load_strategy, masked, strategies, unfilled

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")

SEED = Problem("s", r"Ann has 12 pens and $\frac{1}{2}$ of 1,300 {cards}. How many in all?", "…", "662", 2)


@pytest.mark.parametrize("kind", ["number", "latex"])
@pytest.mark.parametrize("name", list(strategies()))
def test_a_prompt_holds_the_seed_its_labels_and_no_place_that_is_left_open(name, kind):
    strategy = load_strategy(name)
    hidden = masked(SEED, 0, 0) if strategy.mask else None
    prompt = strategy.question_prompt(SEED, hidden, kind)
    assert (hidden.question if hidden is not None else SEED.question) in prompt
    assert not re.search(r"\{(create|rules|reference|question|answer|masked)\}", prompt)
    if strategy.asks:
        for label in strategy.question_fields:
            assert re.search(rf"^{label.upper()}: <", prompt, re.MULTILINE)
    assert strategy.about and len(strategy.about.splitlines()) == 1


@pytest.mark.parametrize("kind", ["number", "latex"])
@pytest.mark.parametrize("name", list(strategies()))
def test_a_prompt_is_read_back_by_its_own_strategy_and_by_no_other_that_asks(name, kind):
    strategy = load_strategy(name)
    hidden = masked(SEED, 0, 0) if strategy.mask else None
    prompt = strategy.question_prompt(SEED, hidden, kind)
    texts = strategy.read_prompt(prompt, kind)
    whole = {"question": SEED.question, "reference": SEED.question, "answer": SEED.answer}
    if hidden is not None:
        whole["masked"] = hidden.question
    assert texts and texts.items() <= whole.items() and {"reference", "question", "masked"} & texts.keys()
    others = [other for other in strategies() if other != name and load_strategy(other).asks]
    assert [other for other in others if load_strategy(other).read_prompt(prompt, kind) is not None] == []


def test_a_text_is_read_back_from_its_layout():
    assert unfilled("{question}? {answer} {question}", "a.b? c\nd a.b") == {"question": "a.b", "answer": "c\nd"}
    assert unfilled("{question}? {answer} {question}", "a? c b") is None
    assert unfilled(r"Say \frac{a}{b}: {answer}", r"Say \frac{a}{b}: 3") == {"answer": "3"}
    assert unfilled("Say it", "Say it") == {} and unfilled("Say it", "Say it.") is None


def test_what_is_to_be_created_may_speak_of_the_seed(tmp_path):
    (tmp_path / "s.yaml").write_text("about: x\ncreate: The answer must not be {answer}.\n")
    prompt = load_strategy(str(tmp_path / "s.yaml")).question_prompt(SEED, None, "number")
    assert "Job 1, create. The answer must not be 662.\n" in prompt and SEED.question in prompt


def test_the_papers_call_creates_verifies_and_modifies_and_its_ablation_creates_only():
    whole, ablated = (
        load_strategy(n).question_prompt(SEED, None, "number") for n in ("brand_new", "brand_new_unverified")
    )
    assert load_strategy("brand_new").question_fields == (
        "created question", "verification and modification", "final created question"
    )  # fmt: skip
    assert load_strategy("brand_new_unverified").question_fields == ("created question",)
    for text in ("create", "verify", "modify", "answer is one number", "common sense", "never seen the reference"):
        assert text.lower() in whole.lower()
    assert "verify" not in ablated.lower() and "Keep to these rules" in ablated


def test_answers_are_asked_for_as_their_kind_is():
    assert "bare number" in answer_prompt("Why?", "number") and "in LaTeX" in answer_prompt("Why?", "latex")
    assert answer_prompt("{answer} {question}", "number").count("{answer} {question}") == 1


def test_every_number_of_a_seed_is_masked_in_turn():
    found = [masked(SEED, variation, 0) for variation in range(8)]
    assert {one.value for one in found[:4]} == {"12", "1", "2", "1300"}
    assert found[:4] == found[4:]
    for one in found:
        assert one.question.count("x") == 1 and len(re.findall(r"\d[\d,]*", one.question)) == 3
    assert masked(Problem("n", "Why?", "", "1"), 0, 0) is None


def test_another_wording_is_another_synthesis():
    digests = {load_strategy(name).digest(kind) for name in strategies() for kind in ("number", "latex")}
    assert len(digests) == 2 * len(strategies())


def test_a_strategy_of_ones_own_is_one_file(tmp_path, server, settings_of):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        'about: harder\nquestion: "Make {question} harder.\\n\\nHARDER QUESTION: <it>"\nfields: [harder question]\n'
    )
    url, _ = server(rules=RuleTeacher(wrong_questions=0, wrong_answers=0))
    settings = settings_of(url, strategy=str(mine), num_items=5)
    assert synthesize(settings)["num_rows"] == 5
    assert all(row["id"].startswith("mine/") for row in rows_in(settings.out))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("about: x", "give one of create, question and given"),
        ("about: x\ncreate: a\ngiven: b", "give one of create, question and given"),
        ("about: x\nquestion: 'a {question}'", "question and fields go together"),
        ("about: x\nquestion: 'Do {quesion}'\nfields: [q]", r"\{quesion\} is no place; there are \{question\}"),
        ("about: x\nquestion: 'Do it'\nfields: [q]", "the seed is not in it"),
        ("about: x\ngiven: '{question}'\nmask: true", "mask=true goes with"),
        ("create: a", "about is required"),
        ("about: x\ncreate: a\nrule: b", "unknown key rule"),
    ],
)
def test_a_strategy_that_cannot_be_meant_is_refused(tmp_path, text, said):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_strategy(str(tmp_path / "s.yaml"))


def test_an_unknown_strategy_is_answered_with_those_there_are():
    with pytest.raises(UsageError, match=r"strategy='brandnew' is unknown; did you mean brand_new\? allowed: add_"):
        load_strategy("brandnew")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"base_url": "api.openai.com"}}, "must look like https://host/v1"),
        ({"teacher": {"base_url": "https://me:secret@host/v1"}}, "must hold no key"),
        ({"teacher": {"extra": {"temperature": 0}}}, "is a setting of its own"),
        ({"teacher": {"api_key": "sk-1"}}, "unknown key teacher.api_key"),
        ({"out": "gs://bucket/x"}, "needs a local disk"),
        ({"budget": 0}, "budget=0"),
        ({"seeds": {"task": "hungarian", "split": "test"}}, "seeds.allow_evaluation_only=true"),
        ({"seeds": {"task": "gsm8k", "weight": 1}}, "unknown key seeds.weight"),
        ({"batch": {"max_requests": 60_000}}, "batch.max_requests=60000"),
        ({"strategi": "x"}, "unknown key strategi; did you mean strategy?"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, said):
    tree = {"out": "x", "seeds": {"task": "gsm8k"}, "teacher": {"model": "m"}, "budget": 1}
    tree["teacher"] = tree["teacher"] | changes.pop("teacher", {})
    with pytest.raises(UsageError, match=re.escape(said)):
        validated(SynthesisSettings, tree | changes, where="")


@pytest.mark.parametrize("name", ["demo", "gsm8k_brand_new", "math_brand_new"])
def test_every_config_is_one(name):
    settings = load_settings(SynthesisSettings, f"configs/synthesis/{name}.yaml")
    assert settings.teacher.prices() is not None and load_strategy(settings.strategy)


def test_a_model_with_json_schemas_is_asked_for_json_and_read(server, settings_of):
    class Json(Teacher):
        def complete(self, body, prompt):
            names = body["response_format"]["json_schema"]["schema"]["required"]
            values = {"solution": "3 + 4 = 7", "final_answer": "7"}
            question = f"How much are 3 and 4, {body['seed']}?"
            self.answer(200, completion(json.dumps({n: values.get(n, question) for n in names}), body, prompt))

    url, _ = server(Json)
    settings = settings_of(url, num_items=4, teacher={"json_schema": True})
    synthesize(settings)
    rows = rows_in(settings.out)
    assert len(rows) == 4 and all((r["solution"], r["answer"]) == ("3 + 4 = 7", "7") for r in rows)


def test_mathematics_is_answered_in_latex(server, settings_of, tmp_path):
    class Latex(Teacher):
        def complete(self, body, prompt):
            text = r"SOLUTION: Since $2x=1$, we have $x=\frac12$. Done." + "\nFINAL ANSWER: $\\boxed{\\frac{1}{2}}$"
            if "FINAL CREATED QUESTION" in prompt:
                text = f"CREATED QUESTION: Solve $2x=1$ for the {body['seed']}th time."
            self.answer(200, completion(text, body, prompt))

    rows = [{"problem": "Solve $x=1$.", "solution": r"$\boxed{1}$", "level": "Level 2", "type": "Algebra"}]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url, _ = server(Latex)
    settings = settings_of(url, seeds={"task": "math", "path": str(tmp_path / "math.jsonl")}, num_items=3)
    report = synthesize(settings)
    made = rows_in(settings.out)
    assert [row["answer"] for row in made] == [r"\frac{1}{2}"] * 3 and report["num_kept"] == 3
    assert all((row["num_steps"], row["level"], row["subject"]) == (2, "2", "Algebra") for row in made)


def test_the_command_runs_from_seeds_to_a_dataset_with_the_rule_based_teacher(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["prepare", "demo", "--out", "runs/demo/data", "--num-train", "40", "--num-test", "5"])
    teacher = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline", "teacher", "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://[\d.:]+/v1", teacher.stderr.readline())[0]
        assert json.load(urllib.request.urlopen(f"{url}/models"))["data"][0]["id"] == "rules"
        for more in (["--dry-run"], []):
            with pytest.raises(SystemExit) as ended:
                main(
                    [
                        "synthesize",
                        "--config",
                        "configs/synthesis/demo.yaml",
                        *more,
                        f"teacher.base_url={url}",
                        "num_items=40",
                    ]
                )
            assert ended.value.code == 0
    finally:
        teacher.terminate()
        teacher.communicate()
    said = capfd.readouterr()
    assert "Nothing was sent" in said.out and "rows are kept of 40 items" in said.err
    assert (tmp_path / "runs/demo/synthesis/dataset/dataset_info.json").exists()


def test_help_names_strategies_and_settings(capsys):
    with pytest.raises(SystemExit):
        main(["synthesize", "--help"])
    said = capsys.readouterr().out
    assert "brand_new_unverified" in said and "teacher.base_url (default: https://api.openai.com/v1)" in said
    assert "--dry-run" in said
