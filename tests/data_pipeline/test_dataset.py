"""Datasets of ours, read again and by TensorFlow Datasets itself; and `prepare`, from files, folders and a server."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import threading

import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from data_pipeline.__main__ import main
from data_pipeline.cli import RunError
from data_pipeline.dataset import dataset_splits, dataset_task, is_dataset, read_dataset, write_dataset
from data_pipeline.problem import Problem
from data_pipeline.settings import UsageError
from data_pipeline.tasks import read_problems

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")

PROBLEMS = [
    Problem("a", "1 + 1?", "1 + 1 = 2", "2", num_steps=1, level="3", subject="sums", lineage='{"seed": "b"}'),
    Problem("ü\u2028", "Line\nbreaks, “quotes”\u0000", "", r"\frac{1}{2}"),
]


def prepare(*argv):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *argv])
    return caught.value.code


def test_problems_come_back_as_they_were_in_their_order(tmp_path):
    out = str(tmp_path / "new" / "set")
    many = [dataclasses.replace(PROBLEMS[0], id=str(i)) for i in range(2500)]
    assert write_dataset(out, "jsonl", {"train": iter(PROBLEMS), "test": iter(many)}) == {"train": 2, "test": 2500}
    assert list(read_dataset(out, "train")) == PROBLEMS
    assert list(read_dataset(out, "test")) == many
    assert is_dataset(out) and dataset_task(out) == "jsonl" and dataset_splits(out) == ["train", "test"]
    assert read_problems("jsonl", "train", out) == PROBLEMS


def test_tensorflow_datasets_reads_them(tmp_path):
    write_dataset(str(tmp_path / "set"), "jsonl", {"train": PROBLEMS}, {"licence": "MIT"})
    builder = tfds.builder_from_directory(str(tmp_path / "set"))
    assert builder.info.metadata == {"task": "jsonl", "licence": "MIT"}
    first, second = builder.as_data_source(split="train")
    assert first["question"] == b"1 + 1?" and first["num_steps"] == 1
    assert second["answer"] == rb"\frac{1}{2}" and second["num_steps"] == -1


def test_a_dataset_is_replaced_by_another_and_nothing_else_is(tmp_path):
    out = tmp_path / "set"
    write_dataset(str(out), "jsonl", {"train": PROBLEMS})
    with pytest.raises(UsageError, match="holds the split train, which would be lost"):
        write_dataset(str(out), "jsonl", {"dev": PROBLEMS[:1]})
    write_dataset(str(out), "jsonl", {"train": PROBLEMS[:1], "dev": PROBLEMS[:1]})
    assert dataset_splits(str(out)) == ["train", "dev"] and len(list(read_dataset(str(out), "train"))) == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    for _ in range(2):
        with pytest.raises(UsageError, match="exists and is no dataset of ours"):
            write_dataset(str(other), "jsonl", {"train": PROBLEMS})
        (other / "dataset_info.json").write_text("{}")  # as Hugging Face's save_to_disk leaves one, too
    assert (other / "chapter.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "thesis"]  # nothing of the making is left


def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path):
    out = str(tmp_path / "set")
    write_dataset(out, "jsonl", {"train": PROBLEMS})

    def broken():
        yield PROBLEMS[1]
        raise UsageError("line 2 is wrong")

    with pytest.raises(UsageError, match="line 2 is wrong"):
        write_dataset(out, "jsonl", {"train": broken()})
    with pytest.raises(UsageError, match="the split 'test' would be empty"):
        write_dataset(out, "jsonl", {"train": PROBLEMS, "test": []})
    assert list(read_dataset(out, "train")) == PROBLEMS
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_dataset_of_another_task_or_without_the_split_is_refused(tmp_path):
    out = str(tmp_path / "set")
    write_dataset(out, "jsonl", {"train": PROBLEMS})
    with pytest.raises(UsageError, match="holds problems of the task 'jsonl'"):
        read_problems("gsm8k", "train", out)
    with pytest.raises(UsageError, match=r"split='dev': the dataset .* has train"):
        read_problems("jsonl", "dev", out)


def test_a_damaged_dataset_is_named(tmp_path):
    out = tmp_path / "set"
    write_dataset(str(out), "jsonl", {"train": PROBLEMS})
    (records,) = out.glob("*array_record*")
    whole = records.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:40] + b"\x00" * 40 + whole[80:]):
        records.write_bytes(damaged)
        with pytest.raises(RunError, match="is damaged"):
            list(read_dataset(str(out), "train"))
    (out / "dataset_info.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        list(read_dataset(str(out), "train"))


def test_gsm8k_prepared_is_gsm8k_read(tmp_path, test_data, gsm8k_train, capsys):
    source = test_data / "gsm8k_train.jsonl.gz"
    assert prepare("gsm8k", "--source", str(source), "--out", str(tmp_path / "set")) == 0
    said = capsys.readouterr().err
    assert "train: 7,473 problems, word for word as published" in said and "MIT licence" in said
    assert read_problems("gsm8k", "train", str(tmp_path / "set")) == gsm8k_train
    metadata = json.loads((tmp_path / "set" / "metadata.json").read_text())
    assert metadata["sha256"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}


def test_gsm8k_is_known_by_its_words_in_any_order_and_layout(tmp_path, test_data, capsys):
    published = gzip.decompress((test_data / "gsm8k_test.jsonl.gz").read_bytes())
    # the checksum by which the test set is known: https://github.com/openai/grade-school-math at 3101c7d
    assert hashlib.sha256(published).hexdigest() == "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
    rows = [json.loads(line) for line in published.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), tmp_path / "test.parquet")
    assert prepare("gsm8k", "--source", str(tmp_path / "test.parquet"), "--out", str(tmp_path / "set")) == 0
    assert "test: 1,319 problems, word for word as published" in capsys.readouterr().err
    rows[700]["question"] = rows[700]["question"].replace("?", "??", 1)
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert prepare("gsm8k", "--source", str(tmp_path / "test.json"), "--out", str(tmp_path / "set")) == 0
    assert "test: 1,319 problems, but not in the words that are published" in capsys.readouterr().err


def test_a_folder_gives_the_splits_that_it_holds(tmp_path, capsys):
    row = json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text(row)
    (tmp_path / "in" / "test.jsonl").write_text(row)
    assert prepare("gsm8k", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "both")) == 0
    assert "test: 1 problems, where 1,319 are published\n" in capsys.readouterr().err
    assert dataset_splits(str(tmp_path / "both")) == ["train", "test"]
    assert prepare("gsm8k", "--source", str(tmp_path / "in"), "--split", "test", "--out", str(tmp_path / "one")) == 0
    assert dataset_splits(str(tmp_path / "one")) == ["test"]


def test_math500_that_is_taken_for_the_test_set_is_pointed_to_its_split(tmp_path, capsys):
    row = {"solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra", "level": 1}
    rows = [row | {"problem": f"What is {i} - {i - 2}?", "unique_id": f"test/algebra/{i}.json"} for i in range(500)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ("--source", str(tmp_path / "in"))
    assert prepare("math", *source, "--out", str(tmp_path / "test")) == 0
    assert "where 5,000 are published (as many as math500 has: --split math500?)" in capsys.readouterr().err
    assert prepare("math", *source, "--split", "math500", "--out", str(tmp_path / "math500")) == 0
    assert "math500: 500 problems\n" in capsys.readouterr().err
    assert dataset_splits(str(tmp_path / "math500")) == ["math500"]


def test_what_cannot_be_prepared_is_one_message(tmp_path, capsys, write_rows):
    rows = write_rows({"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 1?", "answer": "three"})
    out = str(tmp_path / "set")
    assert prepare("gsm8k", "--source", rows, "--out", out) == 2
    assert "its name does not say which split it is: give --split train|test" in capsys.readouterr().err
    assert prepare("gsm8k", "--source", rows, "--split", "train", "--out", out) == 2
    assert f"{rows}, line 2: the answer has no last line" in capsys.readouterr().err
    twice = write_rows(*[{"question": "1 + 1?", "answer": "#### 2"}] * 2, name="train.jsonl")
    assert prepare("gsm8k", "--source", twice, "--out", out) == 2
    assert "line 2: the id" in capsys.readouterr().err
    assert prepare("math", "--out", out) == 2
    assert "math is read from a file of rows" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    asked = []
    folder = tmp_path / "served"
    folder.mkdir()
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{serving.server_port}", asked
    serving.shutdown()


def test_a_url_is_fetched_once_and_what_is_not_there_is_said(tmp_path, monkeypatch, capsys, server):
    folder, url, asked = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    for _ in range(2):
        assert prepare("gsm8k", "--source", f"{url}/test.jsonl", "--out", str(tmp_path / "set")) == 0
    assert asked == ["/test.jsonl"]
    assert [p.answer for p in read_problems("gsm8k", "test", str(tmp_path / "set"))] == ["2"]
    assert prepare("gsm8k", "--source", f"{url}/train.jsonl", "--out", str(tmp_path / "none")) == 1
    assert "404" in (said := capsys.readouterr().err) and "download it yourself, and give --source FILE" in said
