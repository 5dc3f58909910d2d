"""The command `python -m data_pipeline`, and what the package may import."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import scipy.stats

import data_pipeline
from data_pipeline.__main__ import main
from data_pipeline.tasks import read_problems
from data_pipeline.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")

NAMES = ["test.jsonl", "tokenizer.model", "train.jsonl"]


def exit_code(*argv):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", "demo", *argv])
    return caught.value.code


def test_prepare_demo_writes_rows_that_can_be_read_and_a_tokenizer(tmp_path, capsys):
    out = tmp_path / "new" / "data"
    assert exit_code("--out", str(out), "--num-train", "60", "--num-test", "20", "--vocab-size", "360") == 0
    assert "wrote 60 training and 20 held-out problems and a tokenizer of 360 pieces" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == NAMES
    train, test = (read_problems("demo", name, str(out / f"{name}.jsonl")) for name in ("train", "test"))
    assert (len(train), len(test)) == (60, 20)
    assert not {p.question for p in train} & {p.question for p in test}
    assert not {p.id for p in train} & {p.id for p in test}
    assert Tokenizer.load(str(out / "tokenizer.model")).vocab_size == 360


def test_prepare_demo_writes_the_same_bytes_for_the_same_seed(tmp_path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = ("--num-train", "60", "--num-test", "5", "--vocab-size", "360", "--seed", str(seed))
        assert exit_code("--out", str(tmp_path / out), *arguments) == 0
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def test_prepare_demo_of_stories_says_no_subject_and_takes_it_for_granted(tmp_path):
    for out, more in (("a", ()), ("b", ("--style", "stories", "--vocab-size", "512"))):
        assert exit_code("--out", str(tmp_path / out), "--num-train", "300", *more) == 0
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    keys = {tuple(json.loads(line)) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()}
    assert keys == {("id", "question", "solution", "answer")}


@pytest.mark.parametrize(
    ("style", "size", "subjects"),
    [("expressions", 384, {"expression": 1}), ("both", 512, {"story": 0.5, "expression": 0.5})],
)
def test_prepare_demo_of_another_style_says_of_each_problem_what_it_is(tmp_path, style, size, subjects):
    assert exit_code("--out", str(tmp_path), "--style", style, "--num-test", "40") == 0
    train, test = (read_problems("demo", name, str(tmp_path / f"{name}.jsonl")) for name in ("train", "test"))
    assert (len(train), len(test)) == (800, 40)
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer.model"))
    assert tokenizer.vocab_size == size
    for part in (train, test, train[:20]):
        assert Counter(p.subject for p in part) == {name: share * len(part) for name, share in subjects.items()}
        for problem in part:
            assert (problem.subject == "expression") == ("$" in problem.question)
            assert tokenizer.decode(tokenizer.encode_response(problem.question)) == problem.question
    asked = [re.sub(r"[^$]*(\$.+\$).*", r"\1", p.question) for p in (*train, *test)]  # in whatever words
    assert len(set(asked)) == len({p.id for p in (*train, *test)}) == 840


def test_long_stories_are_rare_in_training_and_as_frequent_as_short_ones_in_the_test_set(tmp_path):
    flags = ("--num-train", "3000", "--num-test", "400", "--max-steps", "5", "--rarer", "3")
    assert exit_code("--out", str(tmp_path), *flags) == 0
    rows = {name: read_problems("demo", name, str(tmp_path / f"{name}.jsonl")) for name in ("train", "test")}
    counts = {name: Counter(problem.num_steps for problem in of) for name, of in rows.items()}
    assert set(counts["train"]) == set(counts["test"]) == {2, 3, 4, 5}
    expected = [3000 * share / (27 + 9 + 3 + 1) for share in (27, 9, 3, 1)]
    assert scipy.stats.chisquare([counts["train"][steps] for steps in (2, 3, 4, 5)], expected).pvalue > 1e-4
    assert min(counts["test"].values()) > 70  # of 100 each
    assert not {p.question for p in rows["train"]} & {p.question for p in rows["test"]}
    assert not {p.id for p in rows["train"]} & {p.id for p in rows["test"]}
    assert exit_code("--out", str(tmp_path), "--rarer", "3", "--style", "both") == 2
    assert exit_code("--out", str(tmp_path), "--max-value", "99", "--style", "expressions") == 2


def test_prepare_demo_of_both_styles_shares_odd_numbers_out(tmp_path):
    arguments = ("--style", "both", "--num-train", "41", "--num-test", "4", "--vocab-size", "340")
    assert exit_code("--out", str(tmp_path), *arguments) == 0
    train, test = (read_problems("demo", name, str(tmp_path / f"{name}.jsonl")) for name in ("train", "test"))
    assert Counter(p.subject for p in train) == {"story": 21, "expression": 20}
    assert Counter(p.subject for p in test) == {"story": 2, "expression": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--out"),
        (("--out", "x", "--num-train", "0"), "--num-train '0': Input should be greater than or equal to 1"),
        (("--out", "x", "--num-train", "many"), "--num-train 'many'"),
        (("--out", "x", "--vocab-size", "5"), "--vocab-size '5'"),
        (("--out", "x", "--num-train", "2", "--vocab-size", "9999"), "no tokenizer of 9999 pieces"),
        (("--out", "x", "--colour", "red"), "--colour"),
        (("--out", "x", "--style", "poems"), "--style 'poems'"),
        (("--out", "x", "--style", "expressions", "--num-train", "1000000"), "and 1,000,060 were asked for"),
    ],
)
def test_a_usage_error_ends_with_exit_code_2_and_names_the_flag(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_the_data_pipeline_imports_neither_jax_nor_the_packages_above_it():
    folder = Path(data_pipeline.__file__).parent
    imported = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    assert {"data_pipeline", "numpy"} <= imported
    assert not imported & {"jax", "jaxlib", "flax", "optax", "orbax", "mathscale_jax", "eval"}
