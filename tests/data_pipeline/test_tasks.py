"""Tasks: GSM8K against its published figures, own rows, and errors that name the line."""

import collections
import gzip
import json
from pathlib import Path

import pytest

from data_pipeline.settings import UsageError
from data_pipeline.tasks import get_task, gsm8k, read_problems
from data_pipeline.tasks.base import count_lines

ROW = {"question": "1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}
PUBLIC_ROW = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}


def without_marks(text):
    """Drops what stands between << and >>, without a regular expression."""
    head, *parts = text.split("<<")
    assert all(part.count(">>") == 1 for part in parts)
    return head + "".join(part.partition(">>")[2] for part in parts)


def refusal(task, path, split="train"):
    with pytest.raises(UsageError) as caught:
        read_problems(task, split, path)
    return str(caught.value)


def test_gsm8k_has_the_published_number_of_rows(gsm8k_train, gsm8k_test):
    assert (len(gsm8k_train), len(gsm8k_test)) == (7473, 1319)


def test_steps_of_the_gsm8k_test_set_have_the_published_histogram(gsm8k_test):
    steps = collections.Counter(problem.num_steps for problem in gsm8k_test)
    assert steps == {2: 326, 3: 371, 4: 297, 5: 175, 6: 87, 7: 40, 8: 20, 9: 2, 11: 1}  # arXiv 2403.04706


def test_gsm8k_solutions_are_the_public_ones_without_calculator_marks(test_data, gsm8k_train):
    with gzip.open(test_data / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert sum("<<" in row["answer"] for row in rows) > 7000
    for row, problem in zip(rows, gsm8k_train, strict=True):
        body, _, gold = row["answer"].partition("\n#### ")
        assert problem.solution == without_marks(body).strip()
        assert problem.answer == gold.replace(",", "")
        assert problem.question == row["question"].strip()


def test_a_public_row_becomes_a_problem():
    answer = "He has 48/2 = <<48/2=24>>24.\n\nIn all 1,000 + 24 = $<<1000+24=1024>>1,024.\n#### 1,024"
    problem = gsm8k.parse({"question": " How many? ", "answer": answer})
    assert problem.question == "How many?"
    assert problem.solution == "He has 48/2 = 24.\n\nIn all 1,000 + 24 = $1,024."
    assert (problem.answer, problem.num_steps) == ("1024", 2)


def test_a_gsm8k_problem_has_one_id_wherever_it_stands_and_another_in_another_split(write_rows):
    rows = [PUBLIC_ROW | {"question": f"{i} + 1?"} for i in range(5)]
    forward = {p.question: p.id for p in read_problems("gsm8k", "train", write_rows(*rows))}
    backward = {p.question: p.id for p in read_problems("gsm8k", "train", write_rows(*rows[::-1]))}
    assert forward == backward and len(set(forward.values())) == 5
    test = {p.question: p.id for p in read_problems("gsm8k", "test", write_rows(*rows))}
    assert not set(test.values()) & set(forward.values())


def test_steps_are_the_lines_that_are_not_blank():
    assert count_lines("a\n\n  \nb\n") == 2
    assert count_lines("") == 0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("task", ["jsonl", "demo"])
def test_own_rows_are_read_plain_or_compressed(tmp_path, task, name):
    rows = [
        ROW | {"id": "own-1", "level": 3, "subject": "sums", "extra": [1]},
        ROW | {"answer": 2, "solution": "one\n\ntwo\u2028still two"},
        ROW | {"answer": 2.5, "id": None},
    ]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\r\n  \n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    first, second, third = read_problems(task, "mine", str(tmp_path / name))
    assert (first.id, first.level, first.subject, first.num_steps) == ("own-1", "3", "sums", 1)
    assert (first.question, first.solution, first.answer) == ("1 + 1?", "1 + 1 = 2", "2")
    assert (second.id, second.answer, second.level, second.subject) == ("mine/2", "2", None, None)
    assert second.solution == "one\n\ntwo\u2028still two"
    assert (third.id, third.answer) == ("mine/4", "2.5")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"question": ', "is not valid JSON"),
        ("[1, 2]", "must be a JSON object, not list"),
        ("7", "must be a JSON object, not int"),
        ({"question": "q", "solution": "s"}, "there is no 'answer'; the row has question, solution"),
        ({"solution": "s", "answer": "1"}, "there is no 'question'; the row has solution, answer"),
        ({"question": "q", "answer": "1"}, "there is no 'solution'; the row has question, answer"),
        (ROW | {"answer": ""}, "'answer' must be a non-empty text, got ''"),
        (ROW | {"answer": " \n"}, "'answer' must be a non-empty text"),
        (ROW | {"question": ["q"]}, "'question' must be a non-empty text, got ['q']"),
        (ROW | {"answer": True}, "'answer' must be a non-empty text, got True"),
        (ROW | {"answer": "seven"}, "'answer' must be a number such as 72, 3.5 or 1/2, got 'seven'"),
        (ROW | {"answer": "1 1/2"}, "'answer' must be a number such as 72, 3.5 or 1/2, got '1 1/2'"),
        ('{"question": "q", "solution": "s", "answer": NaN}', "'answer' must be a number"),
    ],
)
def test_a_malformed_own_row_names_its_line(write_rows, bad, said):
    path = write_rows(ROW, "", bad, ROW)
    message = refusal("jsonl", path)
    assert message.startswith(f"{path}, line 3") and said in message


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"question": "q"}, "there is no 'answer'; the row has question"),
        ({"question": "q", "answer": "1 + 1 = 2"}, "no last line of the form '#### 72'"),
        ({"question": "q", "answer": "1 + 1 = 2\n####"}, "no last line of the form '#### 72'"),
        ({"question": "q", "answer": "1 + 1 = 2\n#### two"}, "must be a number, got 'two'"),
        ({"question": "q", "answer": "1 + 1 = 2\n#### 2\nbye"}, "must be a number"),
    ],
)
def test_a_malformed_gsm8k_row_names_its_line(write_rows, bad, said):
    path = write_rows(PUBLIC_ROW, bad)
    message = refusal("gsm8k", path)
    assert message.startswith(f"{path}, line 2: ") and said in message


def test_text_that_is_not_utf_8_is_refused_with_its_place(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    assert refusal("jsonl", str(tmp_path / "latin.jsonl")).endswith(
        "latin.jsonl, line 1: is not UTF-8 text (byte 18 of the line)"
    )


def test_a_gzip_file_damaged_anywhere_is_never_read_as_if_whole(tmp_path):
    content = "".join(json.dumps(ROW | {"id": i, "question": f"{i * i}?"}) + "\n" for i in range(30)).encode()
    whole = gzip.compress(content, mtime=0)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole)
    expected = read_problems("jsonl", "train", str(path))
    for position in range(10, len(whole)):  # the ten bytes of the header carry no content
        path.write_bytes(whole[:position])
        assert "is not a whole gzip file" in refusal("jsonl", str(path))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        assert "is not a whole gzip file" in refusal("jsonl", str(path))
    path.write_bytes(whole)
    assert read_problems("jsonl", "train", str(path)) == expected


def test_a_file_that_only_claims_to_be_gzip_is_refused(write_rows):
    assert "is not a whole gzip file" in refusal("jsonl", write_rows(ROW, name="rows.jsonl.gz"))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    message = refusal("jsonl", str(tmp_path / "empty.jsonl"))
    assert "empty.jsonl" in message and "no problem was read" in message


def test_an_id_that_occurs_twice_is_named(write_rows):
    path = write_rows(ROW | {"id": "a"}, ROW | {"id": 7}, ROW | {"id": "7"})
    assert "line 3: the id '7' was there before" in refusal("jsonl", path)


def test_a_file_of_another_split_by_its_name_is_told(write_rows, caplog):
    row = {"question": "1 + 1?", "answer": "#### 2"}
    read_problems("gsm8k", "train", write_rows(row, name="gsm8k_train.jsonl"))
    assert not caplog.messages
    path = write_rows(row, name="gsm8k_test.jsonl")
    read_problems("gsm8k", "train", path)
    assert caplog.messages == [f"{path}: its name says test, and it is read as train"]


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(UsageError, match=r"task='gsm9k' is unknown; allowed: gsm8k, math, svamp, asdiv, .*jsonl"):
        get_task("gsm9k")
    with pytest.raises(UsageError, match="task='gsm9k' is unknown"):
        read_problems("gsm9k", "train", None)


@pytest.mark.parametrize("task", ["jsonl", "gsm8k"])
def test_a_missing_file_is_named(tmp_path, task):
    assert "none.jsonl' does not exist" in refusal(task, str(tmp_path / "none.jsonl"))


def test_a_folder_without_the_split_is_refused(tmp_path):
    assert "is a folder without the split 'train'" in refusal("jsonl", str(tmp_path))


def test_own_rows_need_a_file():
    assert "name it with data.sources.0.path in training, --source elsewhere" in refusal("jsonl", None)


def test_an_unknown_split_of_gsm8k_names_the_known_ones(write_rows):
    assert "split='validation': gsm8k has train and test" in refusal(
        "gsm8k", write_rows(PUBLIC_ROW), split="validation"
    )


@pytest.mark.slow
def test_gsm8k_through_tensorflow_datasets_is_gsm8k_from_its_file(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TFDS's own builder, with its four downloads answered from the files at hand; it shuffles, so order differs."""
    import tensorflow_datasets as tfds

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(gzip.decompress((test_data / f"gsm8k_{split}.jsonl.gz").read_bytes()))

    def from_files(self: object, urls: dict[str, str]) -> dict[str, str]:
        return {name: str(tmp_path / f"{name.removesuffix('_socratic')}.jsonl") for name in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", from_files)
    monkeypatch.setattr("requests.head", lambda *_, **__: None)  # the network is there
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    through_tfds = read_problems("gsm8k", "test", None)
    from_file = read_problems("gsm8k", "test", str(test_data / "gsm8k_test.jsonl.gz"))
    assert sorted(through_tfds, key=lambda p: p.id) == sorted(from_file, key=lambda p: p.id)


def test_without_a_network_gsm8k_is_said_at_once_to_be_out_of_reach(tmp_path, monkeypatch):
    import requests
    import tensorflow_datasets as tfds

    def unreachable(*_, **__):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr("requests.head", unreachable)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda *_: pytest.fail("was tried"))
    with pytest.raises(UsageError, match=r"could not be had.*give a downloaded .jsonl file instead"):
        read_problems("gsm8k", "test", None)
