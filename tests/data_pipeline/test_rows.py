"""Rows out of every layout that public data sets come in; each file here is written by somebody else's library."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.rows import holds_split, read_rows
from data_pipeline.settings import UsageError

ROWS = [{"question": f"{i} + 1?\nSay it.", "answer": str(i + 1)} for i in range(3)]


def write_jsonl(path):
    path.write_text("\n".join(map(json.dumps, ROWS)))


def write_jsonl_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\r\n" for row in ROWS).encode()))


def write_bom(path):
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode())


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=2))


def write_columns(path):
    path.write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)


def write_xml(path):
    problems = "".join(
        f"<Problem><question>{row['question']}</question><answer> {row['answer']} </answer></Problem>" for row in ROWS
    )
    path.write_text(f"<Set><ProblemSet>{problems}</ProblemSet></Set>")


LAYOUTS = {
    "train.jsonl": write_jsonl, "train.jsonl.gz": write_jsonl_gz, "marked.jsonl": write_bom, "rows.json": write_json,
    "columns.json": write_columns, "train-00000-of-00001.parquet": write_parquet, "rows.csv": write_csv,
    "rows.xml": write_xml,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_gives_its_rows_with_their_numbers_and_places(tmp_path, name):
    LAYOUTS[name](tmp_path / name)
    located = list(read_rows(str(tmp_path / name), "train"))
    assert [each.row for each in located] == ROWS
    assert [each.number for each in located] == [1, 2, 3]
    assert all(each.error is None for each in located)
    unit = "line" if "jsonl" in name else "row"
    assert located[1].where == f"{tmp_path / name}, {unit} 2"
    assert [each.row for each in read_rows(str(tmp_path), "anything")] == ROWS  # the only file of a folder


def test_a_file_a_problem_in_folders_of_subjects(tmp_path):
    for split, subject, number in (
        ("train", "algebra", 1),
        ("train", "algebra", 2),
        ("train", "geometry", 1),
        ("test", "algebra", 7),
    ):
        folder = tmp_path / split / subject
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.json").write_text(json.dumps({"problem": f"{split} {subject} {number}"}))
    located = list(read_rows(str(tmp_path), "train"))
    assert [each.row["problem"] for each in located] == ["train algebra 1", "train algebra 2", "train geometry 1"]
    assert [each.number for each in located] == [1, 2, 3]
    assert located[2].where == str(tmp_path / "train" / "geometry" / "1.json")


def test_a_split_in_several_files_of_several_folders(tmp_path):
    for place in (
        "a/train-00000-of-00002",
        "a/train-00001-of-00002",
        "b/train-00000-of-00001",
        "a/test-00000-of-00001",
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{place}.parquet")
    located = list(read_rows(str(tmp_path), "train"))
    assert [each.number for each in located] == list(range(1, 10))
    assert located[4].where == f"{tmp_path / 'a/train-00001-of-00002.parquet'}, row 2"
    assert len(list(read_rows(str(tmp_path), "test"))) == 3
    assert holds_split(str(tmp_path), "train") and not holds_split(str(tmp_path), "dev")
    with pytest.raises(UsageError, match=r"without the split 'dev': it must hold dev\.jsonl"):
        list(read_rows(str(tmp_path), "dev"))


def test_a_split_among_the_words_of_names_where_no_file_is_named_for_it(tmp_path):
    shards = ["data-train-00000-of-00002-b21158d3.jsonl", "data-train-00001-of-00002-0c7e0f9a55.jsonl"]
    for name in ("gsm8k_test.jsonl", "restrain.jsonl", *shards):
        (tmp_path / name).write_text(json.dumps({"file": name}) + "\n")
    assert [each.row["file"] for each in read_rows(str(tmp_path), "train")] == shards
    assert [each.row["file"] for each in read_rows(str(tmp_path), "test")] == ["gsm8k_test.jsonl"]
    (tmp_path / "math_train.jsonl").write_text("{}\n")
    for owner in ("", "gsm8k"):
        with pytest.raises(
            UsageError, match=r"several files for the split 'train': name one of data-train-0.*math_trai"
        ):
            list(read_rows(str(tmp_path), "train", owner))
    assert next(read_rows(str(tmp_path), "train", "math")).where == f"{tmp_path / 'math_train.jsonl'}, line 1"
    (tmp_path / "train.jsonl").write_text('{"file": "train.jsonl"}\n')  # as GSM8K has, beside train_socratic.jsonl
    assert [each.row["file"] for each in read_rows(str(tmp_path), "train")] == ["train.jsonl"]


def test_the_main_configuration_of_several_and_no_file_that_is_about_them(tmp_path):
    for place in ("main", "socratic"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train-00000-of-00001.jsonl").write_text(json.dumps({"of": place}) + "\n")
    assert [each.row["of"] for each in read_rows(str(tmp_path), "train")] == ["main"]
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "dataset_infos.json").write_text("{}")
    (tmp_path / "other" / "data" / "validation.jsonl").write_text('{"of": "validation"}\n')
    assert [each.row["of"] for each in read_rows(str(tmp_path / "other"), "test")] == ["validation"]  # the only file


def test_json_lines_may_be_called_json(tmp_path):
    path = tmp_path / "full_test.json"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    located = list(read_rows(str(path), "test"))
    assert [each.row for each in located if each.error is None] == [{"a": 1}, {"a": 2}]
    assert located[1].where == f"{path}, line 2"
    path.write_text('{"a": 1}\n')
    assert [each.row for each in read_rows(str(path), "test")] == [{"a": 1}]


def test_what_is_no_text_is_kept_as_its_bytes_are_written(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "caf\xe9"}\n')
    (located,) = read_rows(str(tmp_path / "rows.jsonl"), "train")
    assert located.row == {"line": '{"a": "caf\\xe9"}'} and "is not UTF-8 text (byte 11" in located.error


def test_a_line_that_is_no_row_does_not_hide_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnonsense\n[1]\n\n' + "[" * 100_000 + '\n{"a": 2}\n')
    located = list(read_rows(str(path), "train"))
    assert [each.row for each in located if each.error is None] == [{"a": 1}, {"a": 2}]
    assert [each.where for each in located if each.error] == [f"{path}, line {n}" for n in (2, 3, 5)]
    assert "not valid JSON" in located[1].error and "JSON object, not list" in located[2].error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.parquet", b"PAR1 no", "is not a whole Parquet file"),
        ("rows.json", b"{", "is not valid JSON"),
        ("rows.json", b"[" + b"1" * 5000 + b"]", "is not valid JSON"),
        ("rows.json", b"7", "must hold a list of objects, not int"),
        ("rows.xml", b"<a><b></a>", "is not valid XML"),
        ("rows.csv", b"a\n" + b"x" * 200_000, "is not valid CSV"),
        ("rows.csv", b"a,b\n1,2\nx, and y,3\n", "row 2: it has more fields than the header"),
        ("rows.zip", b"PK", "what it holds is told by its name, which must end in .jsonl, .jsonl.gz"),
        ("rows.jsonl", b'{"a": "caf\xe9"}', "line 1: is not UTF-8 text (byte 11 of the line)"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}', "line 2: is not UTF-8 text (byte 11 of the line)"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_message(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        for located in read_rows(str(tmp_path / name), "train"):
            if located.error is not None:  # what a task makes of it
                raise UsageError(f"{located.where}: {located.error}")
    assert str(tmp_path / name) in str(caught.value) and said in str(caught.value)


def test_a_source_that_is_missing_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gsm8k source '.*none' does not exist"):
        list(read_rows(str(tmp_path / "none"), "train", "gsm8k"))
