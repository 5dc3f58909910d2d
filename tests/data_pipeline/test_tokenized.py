"""Rows are tokenised once, and a cache never gives anything else than tokenising would."""

import dataclasses
import logging
import os

import numpy as np
import pytest

import data_pipeline.tokenized
from data_pipeline.files import cache_folder
from data_pipeline.problem import Problem
from data_pipeline.templates import Template
from data_pipeline.tokenized import TokenizedRows, rows_of, tokenize, tokenize_cached
from data_pipeline.tokenizer import train_tokenizer

PROBLEMS = [Problem("a", "Ann has 3 pens.", "3 + 1 = 4", "4"), Problem("b", "Ben?", "2", "2")]


def cached(problems, tokenizer, template, cache_dir):
    """`tokenize_cached`, by a fingerprint of the texts."""
    texts = [(problem.question, problem.solution, problem.answer) for problem in problems]
    return tokenize_cached(lambda: problems, repr(texts), tokenizer, template, cache_dir)


def assert_same(actual, expected):
    for field in dataclasses.fields(TokenizedRows):
        got, wanted = getattr(actual, field.name), getattr(expected, field.name)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@pytest.fixture
def count_tokenizing(monkeypatch):
    """Counts how often rows are really tokenised."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return tokenize(*arguments)

    monkeypatch.setattr(data_pipeline.tokenized, "tokenize", counted)
    return calls


def test_a_row_is_bos_prompt_response_eos(small_tokenizer):
    rows = tokenize(PROBLEMS, small_tokenizer, Template())
    assert len(rows) == 2
    for i, (prompt, response) in enumerate(
        [
            ("Problem: Ann has 3 pens.\nSolution:", "3 + 1 = 4\nThe answer is: 4."),
            ("Problem: Ben?\nSolution:", "2\nThe answer is: 2."),
        ]
    ):
        row = rows[i].tolist()
        length = rows.prompt_lengths[i]
        assert row[0] == small_tokenizer.bos_id and row[-1] == small_tokenizer.eos_id
        assert small_tokenizer.decode(row[:length]) == prompt
        assert small_tokenizer.decode(row[length:]) == response
        assert rows.input_lengths[i] == len(row) - 1


def test_the_second_time_the_same_arrays_come_from_the_cache(tmp_path, small_tokenizer, count_tokenizing):
    first = cached(PROBLEMS, small_tokenizer, Template(), tmp_path)
    second = cached(list(PROBLEMS), small_tokenizer, Template(), tmp_path)
    assert len(count_tokenizing) == 1
    assert_same(first, tokenize(PROBLEMS, small_tokenizer, Template()))
    assert_same(second, first)


def test_a_cached_source_is_not_even_read(tmp_path, small_tokenizer):
    cached(PROBLEMS, small_tokenizer, Template(), tmp_path)
    texts = [(problem.question, problem.solution, problem.answer) for problem in PROBLEMS]
    again = tokenize_cached(lambda: 1 / 0, repr(texts), small_tokenizer, Template(), tmp_path)
    assert again.name(1) == "b"


def test_processes_make_the_arrays_that_one_makes(gsm8k_train, large_tokenizer):
    many = [dataclasses.replace(problem, id=f"{problem.id} ü") for problem in gsm8k_train[:2500]]
    by_two = tokenize(iter(many), large_tokenizer, Template(), num_processes=2)
    assert_same(by_two, tokenize(many, large_tokenizer, Template(), num_processes=1))
    assert by_two.tokens.dtype == np.uint16 and by_two.name(2499) == many[2499].id
    assert by_two.num_steps.tolist() == [problem.num_steps for problem in many]


def test_another_text_order_template_or_tokenizer_misses_the_cache(tmp_path, small_tokenizer, count_tokenizing):
    other_tokenizer = train_tokenizer(["Ann has 3 pens. Ben has 4 books."] * 9, 280)
    first, second = PROBLEMS
    requests = [
        (PROBLEMS, small_tokenizer, Template()),
        ([second, first], small_tokenizer, Template()),
        ([first], small_tokenizer, Template()),
        ([dataclasses.replace(first, question="Ann has 5 pens."), second], small_tokenizer, Template()),
        ([dataclasses.replace(first, solution="3 + 1 = 5"), second], small_tokenizer, Template()),
        ([dataclasses.replace(first, answer="5"), second], small_tokenizer, Template()),
        (PROBLEMS, other_tokenizer, Template()),
        (PROBLEMS, small_tokenizer, Template(prompt="{question}")),
        (PROBLEMS, small_tokenizer, Template(response="{answer}")),
    ]
    for times in (1, 1):  # the second round comes from the cache
        for problems, tokenizer, template in requests:
            assert_same(cached(problems, tokenizer, template, tmp_path), tokenize(problems, tokenizer, template))
        assert len(count_tokenizing) == times * len(requests)
    assert len(list((tmp_path / "tokens").iterdir())) == len(requests)


def test_texts_that_only_join_alike_are_told_apart(tmp_path, small_tokenizer, count_tokenizing):
    for question, solution in (("Ann has", "3 pens"), ("Ann has3", " pens"), ("Ann", " has3 pens")):
        cached([Problem("a", question, solution, "1")], small_tokenizer, Template(), tmp_path)
    assert len(count_tokenizing) == 3


def test_a_cache_file_damaged_anywhere_is_passed_over(tmp_path, small_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of files that nobody keeps
    caplog.set_level(logging.ERROR, logger="mathscale")
    expected = cached(PROBLEMS, small_tokenizer, Template(), tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole), 23)]
    damaged += [
        whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :] for i in range(0, len(whole), 5) for flip in (1, 255)
    ]
    for content in [*damaged, b"", b"\x93NUMPY", b"not a cache"]:
        path.write_bytes(content)
        assert_same(cached(PROBLEMS, small_tokenizer, Template(), tmp_path), expected)


def test_a_damaged_cache_file_is_named_and_mended(tmp_path, small_tokenizer, caplog, count_tokenizing):
    cached(PROBLEMS, small_tokenizer, Template(), tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    cached(PROBLEMS, small_tokenizer, Template(), tmp_path)
    assert f"token cache {path} is damaged" in caplog.text
    cached(PROBLEMS, small_tokenizer, Template(), tmp_path)
    assert len(count_tokenizing) == 2


def test_selected_rows_are_those_rows_in_that_order_as_often_as_they_are_named():
    rows = rows_of(
        np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32), np.array([2, 3, 4]), np.array([1, 2, 3]), [5, None, 7], "abc"
    )
    assert rows.input_lengths.tolist() == [1, 2, 3]
    selected = rows.select(np.array([2, 0, 2]))
    assert [row.tolist() for row in selected] == [[6, 7, 8, 9], [1, 2], [6, 7, 8, 9]]
    assert selected.prompt_lengths.tolist() == [3, 1, 3] and selected.num_steps.tolist() == [7, 5, 7]
    assert [selected.name(i) for i in range(3)] == ["c", "a", "c"]
    assert rows.select(np.array([1])).num_steps.tolist() == [-1]
    assert len(rows.select(np.array([], np.int64))) == 0


def test_joined_rows_know_where_they_come_from():
    first = rows_of(np.array([1, 2, 3], np.uint16), np.array([1, 2]), np.array([1, 1]), ids=["a", "b"])
    second = rows_of(np.array([7, 8, 9], np.uint16), np.array([3]), np.array([2]), ids=["long-name"])
    joined = TokenizedRows.join([first, second, first.select(np.array([1]))])
    assert [row.tolist() for row in joined] == [[1], [2, 3], [7, 8, 9], [2, 3]]
    assert joined.sources.tolist() == [0, 0, 1, 2]
    assert [joined.name(i) for i in range(4)] == ["a", "b", "long-name", "b"]


def test_rows_are_identified_by_tokens_order_and_prompts():
    rows = rows_of(np.array([1, 2, 3], np.int32), np.array([1, 2]), np.array([1, 1]))
    others = [
        rows_of(np.array([1, 2, 4], np.int32), np.array([1, 2]), np.array([1, 1])),
        rows_of(np.array([1, 2, 3], np.int32), np.array([2, 1]), np.array([1, 1])),
        rows_of(np.array([1, 2, 3], np.int32), np.array([1, 2]), np.array([1, 2])),
        rows.select(np.array([1, 0])),
        rows.select(np.array([0, 1, 1])),
    ]
    assert len({each.sha256 for each in [rows, *others]}) == 6
    named = rows_of(np.array([1, 2, 3], np.int32), np.array([1, 2]), np.array([1, 1]), ids=["x", "y"])
    assert named.sha256 == rows.sha256


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mathscale_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder()) == "/home/someone/.cache/mathscale_jax"
