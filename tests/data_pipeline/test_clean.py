"""Cleaning: what is planted is found, what is kept is untouched, each row that goes is told with its reason."""

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

import data_pipeline.clean.job
from data_pipeline.__main__ import main
from data_pipeline.clean.contamination import TestSets
from data_pipeline.clean.duplicates import exact_duplicates, near_duplicates
from data_pipeline.clean.job import CleanSettings, clean
from data_pipeline.clean.shingles import NAME, jaccard, shingles, words
from data_pipeline.dataset import dataset_splits, read_dataset, write_dataset
from data_pipeline.problem import Problem
from data_pipeline.settings import UsageError
from data_pipeline.tasks import read_problems

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")

PROBLEM = Problem("p", "1 + 1?", "1 + 1 = 2", "2", 1)
QUESTION = "Ann has 12 red pens and buys 3 boxes of 5 pens each. How many pens does Ann have in the end?"


def test_words_are_small_numbers_are_masked_and_names_if_asked():
    text = "Mary's café sold 1,200 buns to Tom and twenty-five to Mary. Then Tom left."
    plain = "mary cafe sold 1,200 buns to tom and twenty five to mary then tom left".split()
    masked = [NAME, *f"cafe sold 0 buns to {NAME} and 0 0 to {NAME} then {NAME} left".split()]
    assert words(text) == (masked, plain)


def test_signs_and_commands_of_a_formula_are_words():
    text = r"Simplify $\frac{x^2-9}{x+3}$ for $x>10.5$."
    assert words(text)[0] == [*r"simplify \frac x ^ 0 - 0 x + 0 for x > 0".split()]


def test_shingles_are_the_sets_of_n_grams():
    """Against a set of tuples, for texts longer and shorter than n, with repeats."""
    rng = random.Random(0)
    texts = [[rng.choice("abcde") for _ in range(rng.randint(0, 12))] for _ in range(200)]
    for n in (1, 3, 5):
        found = shingles(texts, n)
        grams = [
            {tuple(text[i : i + n]) for i in range(max(1, len(text) - n + 1))} if text else set() for text in texts
        ]
        assert [len(found[i]) for i in range(200)] == [len(of) for of in grams]
        for a, b in ((rng.randrange(200), rng.randrange(200)) for _ in range(300)):
            union = len(grams[a] | grams[b])
            assert jaccard(found[a], found[b]) == pytest.approx(len(grams[a] & grams[b]) / union if union else 0)


def test_near_duplicates_are_all_found_and_nothing_else():
    """Against every pair compared: 300 texts of which 60 are others with a few words changed."""
    rng = random.Random(1)
    base = [[rng.choice("abcdefghijklmnopqrst") for _ in range(60)] for _ in range(240)]
    changed = []
    for text in base[:60]:
        copy = list(text)
        for _ in range(rng.randint(1, 5)):
            copy[rng.randrange(60)] = "z"
        changed.append(copy)
    texts = shingles(base + changed, 3)
    wanted = {
        row: next(other for other in range(row) if jaccard(texts[row], texts[other]) >= 0.7)
        for row in range(1, 300)
        if any(jaccard(texts[row], texts[other]) >= 0.7 for other in range(row))
    }
    found = near_duplicates(texts, 0.7)
    assert set(found) <= set(wanted) and all(wanted[row] == like for row, (like, _) in found.items())
    grams = [{tuple(text[i : i + 3]) for i in range(58)} for text in base + changed]
    for row, (like, similarity) in found.items():
        assert similarity == pytest.approx(len(grams[row] & grams[like]) / len(grams[row] | grams[like]))
    assert len(wanted) > 30 and len(found) >= len(wanted) - 1  # of a hundred pairs as similar one may be missed


def test_exact_duplicates_name_the_first():
    digests = np.array([[1, 1], [2, 2], [1, 1], [1, 2], [2, 2], [1, 1]], np.uint64)
    assert exact_duplicates(digests) == {2: 0, 4: 1, 5: 0}


def renumbered(text):
    return re.sub(r"\d+", lambda match: str(int(match[0]) + 7), text)


@pytest.mark.parametrize(
    ("row", "caught"),
    [
        (QUESTION, True),
        (QUESTION.upper(), True),
        (renumbered(QUESTION), True),
        (QUESTION.replace("Ann", "Roberta"), True),
        (QUESTION.replace("12", "twelve").replace("3", "three"), True),
        ("Here is a riddle for you.\n" + QUESTION + "\nThink step by step.", True),
        (QUESTION.replace("in the end", "after that").replace("red", "blue"), True),
        ("Ann has 12 red pens. She gives 5 of them to Tom. How many pens does Ann have left?", False),
        ("A train goes 60 miles in 2 hours. How far does it go in 5 hours?", False),
        ("", False),
    ],
)
def test_a_row_that_holds_a_test_question_is_caught(row, caught):
    tests = TestSets([[QUESTION, "How many legs do 5 cows and 7 hens have together on the farm of Bob?"]])
    matches = tests.matches(tests.grams([row]), 0.4)
    assert [match.problem for match in matches] == ([0] if caught else [])


def test_boilerplate_makes_nothing_contaminated():
    """Twenty test questions end alike; a row that only ends so is no copy of any of them."""
    ending = "How much money does he have left after he has paid for everything he bought?"
    questions = [
        f"{word} cost {i} dollars and {word}s were on sale. {ending}" for i, word in enumerate("abcdefghijklmnopqrst")
    ]
    tests = TestSets([questions])
    assert tests.matches(tests.grams([f"Hats are dear. {ending}"]), 0.4) == []
    assert [match.problem for match in tests.matches(tests.grams([questions[3]]), 0.4)] == [3]


def row(i, **changes):
    question = f"Eva reads {i} pages of book {i}. Pages now, please?"
    return {"id": f"r{i}", "question": question, "solution": f"{i} + 1 = {i + 1}", "answer": str(i + 1)} | changes


@pytest.fixture
def dirty(write_rows):
    """A file with one row of each fault, and what is to be kept of it."""
    test = write_rows({"question": QUESTION, "answer": "so\n#### 27"}, name="test.jsonl")
    good = [row(i, question=" ".join(f"w{i}{j}" for j in range(12)) + "?") for i in range(6)]
    near = good[2]["question"].replace("w23 ", "w23 very ")
    rows = [
        *good[:3],
        "{broken",
        row(0, id="r0", question="another text with the id of the first one"),
        row(7, question=renumbered(QUESTION)),
        row(8, question=good[1]["question"].upper(), solution=good[1]["solution"], answer=good[1]["answer"]),
        row(9, question=near, solution=good[2]["solution"], answer=good[2]["answer"]),
        row(10, question="Hm?"),
        row(11, solution="The answer is: 5.\n" * 3000),
        good[3],
        row(12, question=""),
        *good[4:],
    ]
    return write_rows(*rows), f"gsm8k:test={test}", [each["id"] for each in good]


def test_each_fault_is_removed_with_its_reason_and_the_rest_is_kept(dirty, tmp_path, capsys):
    source, against, good = dirty
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["clean", "--source", source, "--against", against, "--out", str(out), "--similarity", "0.7"])
    assert caught.value.code == 0 and "6 of 14 rows are left" in capsys.readouterr().err
    assert [problem.id for problem in read_dataset(str(out), "train")] == good
    removed = {line["row"]: line for line in map(json.loads, (out / "removed.jsonl").read_text().splitlines())}
    reasons = {number: (line["reason"], line["like"]) for number, line in removed.items()}
    assert reasons == {
        4: ("malformed", None),
        5: ("id there already", 1),
        6: ("in a test set", removed[6]["like"]),
        7: ("there already", 2),
        8: ("nearly there already", 3),
        9: ("question too short", None),
        10: ("solution too long", None),
        12: ("malformed", None),
    }
    assert removed[6]["like"].startswith("gsm8k/test/") and removed[6]["question"] == renumbered(QUESTION)
    assert "not valid JSON" in removed[4]["detail"] and removed[5]["id"] == "r0"
    assert removed[7]["detail"] == "exactly"
    assert removed[8]["detail"] == "72 % alike"  # 13 of 18 n-grams: of 15 and 16, two and three are their own
    report = json.loads((out / "report.json").read_text())
    assert report["num_kept"] == 6 and report["removed"]["malformed"] == 2
    page = (out / "report.html").read_text()
    assert "6 of 14 rows are left" in page and "the test problem" in page and QUESTION in page


def test_processes_decide_as_one_does(dirty, tmp_path, monkeypatch):
    source, against, _ = dirty
    one = clean(CleanSettings(source=source, against=against, out=str(tmp_path / "one")))
    monkeypatch.setattr(data_pipeline.clean.job, "_CHUNK", 3)
    monkeypatch.setattr(data_pipeline.clean.job, "_ROWS_A_PROCESS", 3)
    two = clean(CleanSettings(source=source, against=against, out=str(tmp_path / "two")))
    assert {**one, "settings": 0} == {**two, "settings": 0}
    for name in ("removed.jsonl",):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rows_that_differ_in_their_solution_are_two_unless_asked_otherwise(write_rows, tmp_path):
    source = write_rows(
        row(1), row(1, id="b", solution="One more than 1 is 2, as we count on from 1 by one.", answer="2")
    )
    assert clean(CleanSettings(source=source, out=str(tmp_path / "a")))["num_kept"] == 2
    assert clean(CleanSettings(source=source, out=str(tmp_path / "b"), duplicates="question"))["num_kept"] == 1


def test_questions_that_say_little_are_found_word_by_word_and_only_so():
    """Of nine alike no n-gram tells one from another; each is found as it is, and a tenth is none of them."""
    questions = [f"What is {i} plus {i + 1}?" for i in range(9)]
    tests = TestSets([questions])
    rows = [*questions, "what is 3  PLUS 4", "What is 30 plus 31?", "What is three?"]
    found = {match.row: match.problem for match in tests.matches(tests.grams(rows), 0.4)}
    assert found == {i: i for i in range(9)} | {9: 3}
    assert TestSets([["Why?"] * 20]).matches(tests.grams(["Because."]), 0.4) == []


def test_a_short_question_is_found_with_other_numbers_and_reworded_in_part():
    question = "Expand the product $6(x+2)(x+3)$."
    tests = TestSets([[question, "What is the value of $\\sqrt{49}$?"]])
    rows = [
        "Expand the product $3(x+4)(x+5)$.",
        "Write out the product $6(x+2)(x+3)$.",
        "Expand the product $6y(2-y)$.",
        "What is the value of $\\sqrt{36}$?",  # too short to be known by anything but all of it
    ]
    found = {match.row: (match.problem, match.told) for match in tests.matches(tests.grams(rows), 0.4)}
    assert found == {0: (0, "100 % alike but for numbers and names"), 1: (0, "91 % of its n-grams")}


def test_short_questions_are_told_as_three_rules_say():
    """Against every pair compared as sets of tuples: questions of eight to eleven words, rows with up to two others."""
    rng = random.Random(3)
    vocabulary = [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
    questions = [" ".join(rng.choice(vocabulary) for _ in range(rng.randint(7, 10))) + " 5" for _ in range(150)]
    rows = []
    for question in questions * 3:
        text = question.split()
        for _ in range(rng.randint(0, 2)):
            text[rng.randrange(len(text))] = rng.choice(vocabulary)
        rows.append(" ".join(text).replace("5", str(rng.choice((5, 12, 99)))))

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    def is_told(row, question):
        masked = [grams(re.sub(r"\d+", "0", text)) for text in (row, question)]
        if len(masked[1]) >= 6 and len(masked[0] & masked[1]) >= 0.8 * len(masked[0] | masked[1]):
            return True
        own = grams(question)
        return len(grams(row) & own) >= (0.7 if len(own) >= 8 else 1) * len(own)

    wanted = {n for n, row in enumerate(rows) if any(is_told(row, question) for question in questions)}
    tests = TestSets([questions])
    matches = tests.matches(tests.grams(rows), 0.4)
    assert {match.row for match in matches} == wanted and 100 < len(wanted) < 400
    assert len({match.told.partition("%")[2] for match in matches}) == 2


@pytest.mark.slow
def test_another_test_set_never_hides_a_row(test_data):
    """The same rows are found in one test set whatever others are named, as often as itself."""
    gsm8k, svamp = (
        [p.question for p in read_problems(task, "test", str(test_data / f"{task}_test.jsonl.gz"))]
        for task in ("gsm8k", "svamp")
    )
    alone, beside = TestSets([gsm8k]), TestSets([svamp, *[gsm8k] * 9])
    rows = alone.grams([renumbered(question) for question in gsm8k[:400]])
    found = {match.row: match.problem for match in alone.matches(rows, 0.4)}
    assert len(found) >= 0.99 * 400
    together = {match.row: match.problem - len(svamp) for match in beside.matches(rows, 0.4)}
    assert found.items() <= together.items()


def test_variants_of_a_question_make_no_boilerplate_of_it():
    """Twelve variants, which differ in a word, and a row that says it in part with other numbers."""
    kinds = "red blue green yellow orange purple brown black white grey pink golden".split()
    variants = [QUESTION.replace("red", kind) for kind in kinds]
    row = renumbered(QUESTION).replace("in the end", "then").replace("red", "old")
    tests = TestSets([variants])
    assert len(tests.matches(tests.grams([row]), 0.4)) == 1


@pytest.mark.slow
def test_every_question_of_math_is_found_as_it_is_and_few_training_questions_are_taken_for_one(test_data):
    train, test = (
        [p.question for p in read_problems("math", split, str(test_data / f"math_{split}.jsonl.gz"))]
        for split in ("train", "test")
    )
    tests = TestSets([test])
    assert len(tests.matches(tests.grams(test), 0.4)) == len(test)
    # A good part of MATH's training problems are test problems with other numbers.
    assert len(tests.matches(tests.grams(train), 0.4)) < 0.17 * len(train)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_pairs_at_any_threshold_are_found(threshold):
    rng = random.Random(1)
    words = [f"w{i}" for i in range(5000)]
    texts = []
    for _ in range(600):
        text = [rng.choice(words) for _ in range(80)]
        other = list(text)
        for _ in range(int(80 * (1 - threshold) / (1 + threshold) / 3)):
            other[rng.randrange(80)] = rng.choice(words)
        texts += [text, other]
    grams = shingles(texts, 3)
    sets = [{tuple(text[i : i + 3]) for i in range(78)} for text in texts]
    alike = [len(sets[i] & sets[i + 1]) / len(sets[i] | sets[i + 1]) >= threshold for i in range(0, len(texts), 2)]
    assert sum(alike) > 300
    assert len(near_duplicates(grams, threshold)) >= 0.98 * sum(alike)


def test_rows_that_begin_alike_take_no_time_that_grows_with_their_square():
    """Sixty words in common and fourteen of their own: J = 0.67, so each is a candidate for every other."""
    rng = random.Random(2)
    words = [f"w{i}" for i in range(5000)]
    common = [rng.choice(words) for _ in range(60)]
    grams = shingles([common + [rng.choice(words) for _ in range(14)] for _ in range(8000)], 3)
    started = time.process_time()
    assert near_duplicates(grams, 0.8) == {}
    assert time.process_time() - started < 30  # 32 million comparisons, one after another, take ten minutes


def test_rows_beside_what_is_there_already(write_rows, tmp_path):
    there = [row(i, question=" ".join(f"w{i}{j}" for j in range(12)) + "?") for i in range(3)]
    near = there[1]["question"].replace("w13 ", "w13 very ")
    new = [there[0] | {"id": "again"}, row(7, id="near", question=near, solution="1 + 1 = 2", answer="2"), row(8)]
    beside = f"jsonl:train={write_rows(*there, name='there.jsonl')}"
    out = tmp_path / "out"
    settings = CleanSettings(
        source=write_rows(*new), out=str(out), beside=beside, duplicates="question", similarity=0.6
    )
    report = clean(settings)
    assert report["removed"] == {"there beside it": 1, "nearly there beside it": 1}
    removed = [json.loads(line) for line in (out / "removed.jsonl").read_text().splitlines()]
    assert [(line["id"], line["like"]) for line in removed] == [("again", "r0"), ("near", "r1")]
    assert there[1]["question"] in (out / "report.html").read_text()


def test_an_id_counts_among_rows_that_are_kept(write_rows, tmp_path):
    rows = [row(1, id="x", question="Hm?"), row(2, id="x"), row(3, id="x", question="Another one, of its own?")]
    clean(CleanSettings(source=write_rows(*rows), out=str(tmp_path / "out")))
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"], line["like"]) for line in removed] == [
        (1, "question too short", None), (3, "id there already", 2)
    ]  # fmt: skip


def test_rows_that_are_none_are_kept_apart_as_they_are(write_rows, tmp_path):
    source = write_rows(row(1), "{broken", row(2) | {"answer": "two"})
    Path(source).write_bytes(Path(source).read_bytes() + b'{"question": "caf\xe9"}\n')
    clean(CleanSettings(source=source, out=str(tmp_path / "out")))
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in removed] == ["malformed"] * 3
    assert removed[0]["found"] == {"line": "{broken"} and removed[1]["found"]["answer"] == "two"
    assert "line 4: is not UTF-8 text (byte 18 of the line)" in removed[2]["detail"]


def test_a_solution_that_announces_another_answer_goes(write_rows, tmp_path):
    rows = [row(1), row(2, solution="2 + 1 = 4\nThe answer is: 4."), row(3, solution="so \\boxed{9}")]
    report = clean(CleanSettings(source=write_rows(*rows), out=str(tmp_path / "out")))
    assert report["removed"] == {"its text is graded wrong": 2}


def test_what_is_read_is_never_written_over(write_rows, tmp_path):
    source = str(tmp_path / "set")
    write_dataset(source, "jsonl", {"train": [PROBLEM], "test": [PROBLEM]})
    for out in (source, f"{source}/clean"):
        with pytest.raises(UsageError, match="is, or lies in, what is read"):
            clean(CleanSettings(source=source, out=out))
    with pytest.raises(UsageError, match="holds the split test, which would be lost"):
        clean(CleanSettings(source=write_rows(row(1)), out=source))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file: name a folder"):
        clean(CleanSettings(source=write_rows(row(1)), out=str(tmp_path / "file")))
    assert dataset_splits(source) == ["train", "test"]


@pytest.mark.slow
def test_gsm8k_planted_in_itself_is_found(gsm8k_train, gsm8k_test, tmp_path, write_rows):
    """A hundred test questions with other numbers and names among 2,000 training rows."""
    rng = random.Random(3)
    rows = [
        {"id": p.id, "question": p.question, "solution": p.solution, "answer": p.answer} for p in gsm8k_train[:2000]
    ]
    for index, problem in enumerate(rng.sample(gsm8k_test, 100)):
        text = re.sub(r"\b\d+\b", lambda match: str(int(match[0]) + 3), problem.question)
        text = re.sub(r"\b(?:Mary|John|James|Tom|Janet|Sarah|Kim|Carl|Jill|Mike)\b", "Quentin", text)
        rows.append(
            {"id": f"planted{index}", "question": text, "solution": "so\n" + problem.solution, "answer": problem.answer}
        )
    rng.shuffle(rows)
    test = write_rows(*[{"question": p.question, "answer": f"#### {p.answer}"} for p in gsm8k_test], name="test.jsonl")
    clean(CleanSettings(source=write_rows(*rows), against=f"gsm8k:test={test}", out=str(tmp_path / "out")))
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    caught = [line["id"].startswith("planted") for line in removed if line["reason"] == "in a test set"]
    assert sum(caught) >= 98 and len(caught) - sum(caught) <= 60  # of 2,000: GSM8K itself has some


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"against": "gsm8k"}, "must look like gsm8k:test=FILE"),
        ({"against": "gsm9k:test=x"}, "task='gsm9k' is unknown"),
        ({"against": "gsm8k:test=nowhere"}, "'nowhere' does not exist"),
        ({"source": "nowhere"}, "'nowhere' does not exist"),
        ({"task": "hungarian"}, "graded by people"),
    ],
)
def test_what_cannot_be_cleaned_is_one_message(write_rows, tmp_path, changes, said):
    with pytest.raises(UsageError) as caught:
        clean(CleanSettings(**({"source": write_rows(row(1)), "out": str(tmp_path / "out")} | changes)))
    assert said in str(caught.value) and not (tmp_path / "out").exists()


def test_nothing_left_and_nothing_there_are_said(write_rows, tmp_path):
    with pytest.raises(UsageError, match=r"nothing is left of 2 rows; they were 2 malformed"):
        clean(CleanSettings(source=write_rows("{", "["), out=str(tmp_path / "out")))
    with pytest.raises(UsageError, match="there are no rows"):
        clean(CleanSettings(source=write_rows(""), out=str(tmp_path / "out")))
