"""The page must say what is true in plain words, stand alone, and keep whatever a model wrote inert."""

import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from eval.figures import COLOURS, percent
from eval.metrics import answer_classes, compute_metrics
from eval.report import headline, write_report
from eval.step_law import step_law

HOSTILE = '</pre><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>'


class Page(HTMLParser):
    """Tags and visible words, read by an independent parser."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._in_style = [], "", False
        self.feed(text)
        self.words = re.sub(r"\s+", " ", self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if not self._in_style:
            self.words += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_eval(folder, answers, *, finished=None, question="What is 6 times 7?", text="The answer is: {}"):
    """An eval folder whose problems have 42 as their answer; `finished` of them count in the metrics."""
    ids = [f"problem-{i}" for i in range(len(answers))]
    samples, grades = [], []
    for problem_id, row in zip(ids, answers, strict=True):
        for sample_id, answer in enumerate(row):
            key = {"problem_id": problem_id, "sample_id": sample_id}
            samples.append({**key, "text": text.format(answer), "num_tokens": 5, "finish_reason": "eos"})
            grades.append({**key, "answer": answer, "rule": "integer", "correct": answer == "42", "seconds": 0.0})
    gold = {"question": question, "answer": "42", "solution": "6 * 7 = 42", "level": None, "subject": None}
    write_lines(folder / "problems.jsonl", [{"problem_id": i, "num_steps": 1} | gold for i in ids])
    write_lines(folder / "samples" / "part-00000-00000.jsonl", samples)
    write_lines(folder / "grades" / "part-00000-00000.jsonl", grades)
    run = {"task": "sums", "split": "test", "num_problems": len(answers), "num_samples": len(answers[0])}
    run |= {"temperature": 0.7, "top_p": 1.0, "seed": 0, "checkpoint": "run-a/702"}
    rows = answers[:finished]
    measured = compute_metrics(
        correct=[[answer == "42" for answer in row] for row in rows],
        classes=[answer_classes(row) for row in rows],
        finish_reasons=[["eos"] * len(row) for row in rows],
        groups={"steps": [1] * len(rows)},
        complete=True if finished is None else {"missing_samples": 5},
    )
    (folder / "metrics.json").write_text(json.dumps(run | {"grader_version": "math-1"} | measured))
    more = {"max_tokens": 64, "model": {}, "template": "plain", "hash": "abc", "made_with": {"jax": "0.12"}}
    (folder / "run.json").write_text(json.dumps(run | more))
    return folder


def metrics_of(ratio, passed, n=256, complete=True):
    def entry(value):
        return {str(n): {"value": value, "ci95": [value, value]}}

    shares = {"pass_ratio": entry(ratio), "pass_at": entry(passed)}
    return {"num_samples": n, "num_problems": 120, "complete": complete, **shares}


def plain(text):
    return text.replace("\N{NARROW NO-BREAK SPACE}", " ")


def told(metrics, **run):
    return plain(" ".join(headline(metrics, {"num_problems": 120, "temperature": 0.7} | run)))


MIXED = [["42", "41", "42", "7"], ["1", "2", "2", None], ["42", "42", "42", "42"]]


def test_a_hostile_sample_and_question_stay_inert_text(tmp_path):
    write_eval(tmp_path, MIXED, question=HOSTILE, text=HOSTILE + "{}")
    page = Page(write_report(tmp_path).read_text())
    assert page.count("script") == page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.words


def test_text_that_html_or_utf8_cannot_hold_does_not_stop_the_report(tmp_path):
    write_eval(tmp_path, MIXED, text="\ud800 \x00 \x1b[31m \u202eturned\u202c שלום {}")
    text = write_report(tmp_path).read_text()
    assert "שלום" in text and not re.search("[\x00\x1b\u202e]", text)


def test_an_endless_line_is_cut_in_the_middle_and_says_by_how_much(tmp_path):
    write_eval(tmp_path, MIXED, text="W" * 9000 + " so it is {}")
    path = write_report(tmp_path)
    assert len(path.read_bytes()) < 150_000
    assert re.search(r"\[… 6,4\d\d characters left out …\]", path.read_text())
    assert "so it is 42" in Page(path.read_text()).words


def test_the_page_needs_no_network_and_no_script(tmp_path):
    text = write_report(write_eval(tmp_path, MIXED)).read_text()
    page = Page(text)
    assert page.count("script") == page.count("link") == 0
    assert not any(name in ("src", "srcset", "action") for _, attributes in page.tags for name in attributes)
    assert "default-src 'none'" in text and "url(http" not in text and "@import" not in text


def test_the_numbers_on_the_page_are_those_computed_by_hand(tmp_path):
    # c = 2, 0, 4 of 4: PassRatio 6/12, Pass@4 2/3; the vote gets the first and the third right.
    words = plain(Page(write_report(write_eval(tmp_path, MIXED)).read_text()).words)
    assert "answers right in 50 % of its samples, yet for 67 % of the problems" not in words  # 17 points of 50
    assert "answers right in 50 % of its samples, and for 67 % of the problems" in words
    assert "for 33 % of the problems no sample is right" in words
    assert "PassRatio@4 50.0 %" in words and "maj@4 66.7 %" in words and "Pass@4 66.7 %" in words
    assert "run-a/702" in words and "math-1" in words and "0.12" in words


def test_figures_are_written_beside_the_page_and_themed_within_it(tmp_path):
    path = write_report(write_eval(tmp_path, MIXED))
    assert (tmp_path / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    alone = (tmp_path / "pass_at_k.svg").read_text()
    light, _ = COLOURS["pass"]
    assert light in alone and "var(--" not in alone
    inlined = re.findall(r"<svg.*?</svg>", path.read_text(), flags=re.DOTALL)
    assert len(inlined) == 2 and all("var(--pass)" in svg and light not in svg for svg in inlined)
    ids = re.findall(r'\bid="([^"]+)"', path.read_text())
    assert len(ids) == len(set(ids))


def test_the_same_folder_gives_the_same_page(tmp_path):
    write_eval(tmp_path, MIXED)
    names = ("report.html", "pass_at_k.svg", "pass_at_k.png")
    first, second = ([(write_report(tmp_path).parent / name).read_bytes() for name in names] for _ in range(2))
    assert first == second


def test_an_incomplete_run_says_so_first_and_is_not_called_pass_at_n(tmp_path):
    # The second problem has three of its samples; only the first is finished.
    write_eval(tmp_path, [["42", "41", "42", "7"], ["42", "2"]], finished=1)
    page = write_report(tmp_path).read_text()
    words = Page(page).words
    assert "This run is not finished: 1 of 2 problems have all their 4 samples." in words
    assert "missing samples: 5" in words and "unfinished: 2 of 4 samples" in words
    assert not re.search(r"Pass@|PassRatio|maj@", page)
    assert "Pass@" not in (tmp_path / "pass_at_k.svg").read_text()


def test_a_greedy_run_reports_accuracy_without_a_curve(tmp_path):
    path = write_report(write_eval(tmp_path, [["42"], ["41"]]))
    words = plain(Page(path.read_text()).words)
    assert "answers 50 % of 2 problems right" in words and "Accuracy 50.0 %" in words
    assert "<svg" not in path.read_text() and not (tmp_path / "pass_at_k.svg").exists()


def test_samples_shown_differ_and_start_with_the_most_frequent_wrong_answer(tmp_path):
    answers = [["9", "7", "8", "8", "42", "42", "42", None]]
    words = Page(write_report(write_eval(tmp_path, answers)).read_text()).words
    shown = re.findall(r"(Right|Wrong), answer (\d+) \((\d) of 8 samples\)", words)
    assert shown == [("Right", "42", "3"), ("Wrong", "8", "2"), ("Wrong", "9", "1")]


def test_of_duplicated_keys_the_first_wins(tmp_path):
    write_eval(tmp_path, MIXED)
    again = {
        "problem_id": "problem-1",
        "sample_id": 0,
        "answer": "42",
        "rule": None,
        "correct": True,
        "seconds": 0,
    }
    write_lines(tmp_path / "grades" / "part-00001-00001.jsonl", [again])
    assert "0 of 4" in Page(write_report(tmp_path).read_text()).words


def test_problems_go_from_hardest_to_easiest_and_can_be_filtered_by_the_keyboard(tmp_path):
    page = Page(write_report(write_eval(tmp_path, MIXED)).read_text())
    order = [a["class"].split()[1] for tag, a in page.tags if tag == "details" and "problem" in a["class"]]
    assert order == ["never", "often", "always"]
    radios = [attributes["id"] for tag, attributes in page.tags if tag == "input" and attributes["type"] == "radio"]
    assert radios == ["show-all", "show-never", "show-seldom", "show-often", "show-always"]


def test_a_page_keeps_to_its_size_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.browser.MAX_BYTES", 200_000)
    path = write_report(
        write_eval(
            tmp_path, [["42"]] * 150 + [["1"]] * 150, text="\u05e9\u05dc\u05d5\u05dd" * 20 + " The answer is: {}"
        )
    )
    page = Page(path.read_text())
    shown = sum("problem" in attributes.get("class", "") for tag, attributes in page.tags if tag == "details")
    assert 50 < shown < 200 and f"{shown} of 300 problems" in page.words
    bare_folder = tmp_path / "bare"
    bare_folder.mkdir()
    bare = len(write_report(write_eval(bare_folder, [["42"]])).read_bytes())
    assert len(path.read_bytes()) < 200_000 + bare


def test_the_answer_is_marked_in_the_samples(tmp_path):
    text = write_report(write_eval(tmp_path, [["42", "7", "42", "7"]])).read_text()
    assert re.findall(r"The answer is: <mark>(\d+)</mark>", text) == ["42", "7"]


def test_the_unstable_are_told_apart_and_what_was_left_out_is_said(tmp_path):
    write_eval(tmp_path, [["42", "7", "7", "7"], ["42"] * 4, ["7"] * 4])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    told = {"unstable": ["sums/0"], "rules": {"answer_line": 11, "no answer": 1}, "killed": 3, "problems_not_asked": 2,
            "left_out": {"malformed lines": 4}}  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | told))
    page = Page(write_report(tmp_path).read_text())
    assert [a["class"].split()[1] for tag, a in page.tags if tag == "details" and "problem" in a["class"]] == [
        "never", "seldom", "always",
    ]  # fmt: skip
    words = plain(page.words)
    for said in ("the 1 unstable ones", "answer line11 samples", "no answer1 sample", "3 answers, which count as",
                 "2 problems, which count as wrong", "4 malformed lines"):  # fmt: skip
        assert said in words, said


def test_mathematics_is_set_without_a_script(tmp_path):
    write_eval(tmp_path, [[r"\frac{1}{2}", "42"]], question="What is $x^2$?", text="It costs $5. The answer is: ${}$")
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace('"sums"', '"math"'))
    page = Page(write_report(tmp_path).read_text())
    assert page.count("math") == 1 + 2 * 1 + 1  # question; a formula in each sample; an answer
    assert page.count("mfrac") == 2 and page.count("script") == 0


def test_the_step_law_is_drawn_and_said(tmp_path):
    write_eval(tmp_path, MIXED)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rng = np.random.default_rng(0)
    steps = np.repeat([2, 3, 4, 5, 6, 7], 50)
    bent = np.where(steps > 5, 0.5, 1) * rng.binomial(16, 0.9**steps) / 16
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "step_law": step_law(steps, bent)}))
    path = write_report(tmp_path)
    assert "long solutions are worse than short ones promise" in Page(path.read_text()).words
    assert (tmp_path / "step_law.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "step_law.svg").exists()
    ids = re.findall(r'\bid="([^"]+)"', path.read_text())
    assert len(ids) == len(set(ids)) and path.read_text().count("<svg") == 4


def digest_of(folder):
    return hashlib.sha256((folder / "metrics.json").read_bytes()).hexdigest()


def with_shares(program):
    shares = {
        name: program[name] / (program["calculation"] + program["reasoning"]) for name in ("calculation", "reasoning")
    }
    return program | {
        "shares": {k: {"value": v, "ci95": [v - 0.05, v + 0.15 if v < 0.5 else v + 0.05]} for k, v in shares.items()}
    }


def test_runs_stand_beside_each_other_by_what_tells_them_apart(tmp_path):
    for name, answers in (("7k", MIXED), ("30k", [["42", "42", "42", "1"]] * 3)):
        folder = tmp_path / "runs" / name / "eval"
        folder.mkdir(parents=True)
        write_eval(folder, answers)
        program = {"num_wrong": 8, "calculation": 2, "reasoning": 4, "not_checkable": 2, "first_false_position": 0.5}
        (folder / "errors.json").write_text(
            json.dumps({"num_wrong_in_all": 8, "metrics_sha256": digest_of(folder), "program": with_shares(program)})
        )
    path = write_report(tmp_path / "runs/30k/eval", beside=[tmp_path / "runs/7k/eval"])
    words = plain(Page(path.read_text()).words)
    # Half, and a quarter, of the samples are wrong; a third of those that could be checked by calculation.
    assert re.search(r"7k4 50.0 %\S* 66.7 %\S* 16.7 %33.3 % 30k4 75.0 %\S* 100.0 %\S* 8.3 %16.7 %", words)
    assert (path.parent / "error_types.svg").exists() and path.read_text().count("<svg") == 4


def test_what_goes_wrong_is_shown(tmp_path, caplog):
    write_eval(tmp_path, MIXED)
    told = {
        "num_wrong_in_all": 1234,
        "metrics_sha256": digest_of(tmp_path),
        "program": with_shares(
            {"num_wrong": 10, "calculation": 2, "reasoning": 6, "not_checkable": 2, "first_false_position": 0.5}
        ),
        "judge": {"model": "<b>m", "num_judged": 4, "calculation": 1, "reasoning": 3, "first_error_position": 0.25},
        "agreement": {"num_both": 4, "same_type": 0.75, "kappa": 0.5, "same_step": None},
    }
    (tmp_path / "errors.json").write_text(json.dumps(told))
    words = plain(Page(write_report(tmp_path).read_text()).words)
    (tmp_path / "errors.json").write_text(json.dumps(told | {"metrics_sha256": "of other grades"}))
    assert "wrong samples were examined" not in Page(write_report(tmp_path).read_text()).words
    assert "run `python -m eval errors" in caplog.text
    assert "10 of 1,234 wrong samples were examined" in words
    assert "program82 not checkable 25 %20.0–40.075 %70.0–80.050 %of the steps, calculation" in words
    assert "<b>m4 25 %75 %25 %of the steps" in words and "name the same type for 75 % (Cohen's kappa 0.50)" in words


def test_the_headline_says_reliability_is_missing_only_where_most_problems_are_solved_sometimes():
    strong = told(metrics_of(0.33, 0.83))
    assert "right in 33 % of its samples, yet for 83 % of the problems at least one of 256 samples" in strong
    assert "not so much the ability as its reliability: of the 67 points" in strong and " 50 lie in" in strong
    assert "more reliability than ability" in told(metrics_of(0.30, 0.70))
    weak = told(metrics_of(0.02, 0.25))
    assert "Reliability is the smaller part" in weak and "for 75 % of the problems no sample is right" in weak


def test_the_headline_admits_when_the_two_are_close():
    words = told(metrics_of(0.61, 0.64))
    assert "the two are close" in words and "for 36 % of the problems no sample is right" in words
    assert "close" not in told(metrics_of(0.01, 0.04))  # it solves those 4 % only every fourth time


@pytest.mark.parametrize(
    ("metrics", "claim"),
    [
        (metrics_of(0.0, 0.0), "None of the 30,720 samples is right."),
        (metrics_of(0.8, 1.0), "No problem is beyond it"),
        (
            metrics_of(0.5, 0.9, complete={"samples": 3}),
            "not finished: 120 of 150 problems have all their 256",
        ),
        (
            metrics_of(0.5, 0.5, n=1),
            "With one greedy sample each, the model answers 50 % of 120 problems right.",
        ),
    ],
)
def test_the_headline_of_special_runs(metrics, claim):
    assert claim in told(metrics, num_problems=150, temperature=0)


def test_percent_never_rounds_to_a_nought_or_a_hundred_that_is_not_true():
    shares = [0, 0.0004, 0.004, 0.33, 0.996, 0.99961, 1]
    assert [plain(percent(s)) for s in shares] == [
        "0 %",
        "0.04 %",
        "0.4 %",
        "33 %",
        "99.6 %",
        "99.96 %",
        "100 %",
    ]
