"""From datasets to the rows of an epoch: read, tokenised, counted, resampled, mixed; and what is refused."""

import collections
import json

import numpy as np
import pytest

import data_pipeline.sources
from data_pipeline.dataset import write_dataset
from data_pipeline.problem import Problem
from data_pipeline.settings import UsageError, validated
from data_pipeline.sources import DataSettings, load_epoch, load_rows
from data_pipeline.tasks import get_task, read_problems
from data_pipeline.templates import Template
from data_pipeline.tokenized import tokenize

SHORT = {"question": "Ann?", "solution": "1", "answer": "1"}
LONG = {"question": "Ann has 3 pens. " * 5, "solution": "3 + 1 = 4", "answer": "4", "id": "the long one"}


@pytest.fixture
def load(tmp_path, write_rows, small_tokenizer):
    def load_with(*rows, **changes):
        source = {"task": "jsonl", "path": write_rows(*rows)}
        cache = str(tmp_path / "cache")
        data = DataSettings(**({"sources": [source], "cache_dir": cache} | changes))
        return load_rows(data, small_tokenizer, Template())

    return load_with


def test_overlong_examples_are_dropped_and_counted(load, caplog):
    lengths = load(SHORT, LONG).input_lengths.tolist()
    assert lengths[0] < lengths[1]
    rows = load(SHORT, LONG, LONG | {"id": "another"}, SHORT, context=lengths[1] - 1)
    assert rows.input_lengths.tolist() == [lengths[0]] * 2
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"2 of 4 examples are longer than data.context={lengths[1] - 1}" in warning
    assert f"'the long one' with {lengths[1]} tokens" in warning and warning.endswith("dropped")


def test_an_overlong_example_is_refused_by_name_where_asked(load):
    with pytest.raises(UsageError, match=r"1 of 2 .*'the long one' with \d+ tokens.*raise data\.context"):
        load(SHORT, LONG, context=40, overlong="refuse")


def test_no_example_left_is_a_usage_error(load):
    with pytest.raises(UsageError, match=r"no example is left that fits data\.context=2"):
        load(SHORT, LONG, context=2)


def test_sources_are_read_one_after_another(tmp_path, write_rows, small_tokenizer):
    first = write_rows(SHORT, SHORT | {"answer": "2"}, name="first.jsonl")
    second = write_rows(LONG, name="second.jsonl")
    data = DataSettings(
        sources=[{"task": "jsonl", "path": second}, {"task": "demo", "path": first}],
        cache_dir=str(tmp_path / "cache"),
    )
    rows = load_rows(data, small_tokenizer, Template())
    texts = [small_tokenizer.decode(rows[i]) for i in range(3)]
    assert ["the answer is: 4" in t.lower() for t in texts] == [True, False, False]
    assert [text.rstrip(".")[-1] for text in texts] == ["4", "1", "2"]


def test_a_broken_source_is_a_usage_error_that_names_the_line(load):
    with pytest.raises(UsageError, match="line 2: 'answer' must be a number"):
        load(SHORT, SHORT | {"answer": "x"})


def test_the_small_and_the_cached_way_agree(load, small_tokenizer):
    problem = Problem("p", SHORT["question"], SHORT["solution"], SHORT["answer"])
    np.testing.assert_array_equal(load(SHORT).tokens, tokenize([problem], small_tokenizer, Template()).tokens)


def test_an_example_that_just_fits_is_kept_whole(load, caplog):
    lengths = load(SHORT, LONG).input_lengths.tolist()
    rows = load(SHORT, LONG, context=lengths[1], overlong="refuse")
    assert rows.input_lengths.tolist() == lengths
    assert "longer" not in caplog.text


def numbered(count, steps=1, start=0):
    """Rows that are told apart by their ids, with solutions of `steps` lines."""
    return [
        {"question": f"{i} + 1?", "solution": "\n".join(["so"] * steps), "answer": str(i), "id": f"{steps}-{i}"}
        for i in range(start, start + count)
    ]


@pytest.fixture
def epoch_of(tmp_path, write_rows, small_tokenizer):
    """The epoch of several lists of rows, each with settings of its source."""

    def load(*sources, **changes):
        listed = [
            {"task": "jsonl", "path": write_rows(*rows, name=f"{index}.jsonl")} | settings
            for index, (rows, settings) in enumerate(sources)
        ]
        data = DataSettings(sources=listed, cache_dir=str(tmp_path / "cache"), **changes)
        return load_epoch(data, small_tokenizer, Template())

    return load


def names(rows):
    return [rows.name(i) for i in range(len(rows))]


def test_counts_are_nested_subsets_by_seed(epoch_of):
    rows = numbered(200)
    small, large, other = (
        names(epoch_of((rows, {"count": count}), seed=seed).rows) for count, seed in ((20, 1), (90, 1), (20, 2))
    )
    assert len(small) == 20 and len(large) == 90 and set(small) < set(large)
    assert set(small) != set(other)
    with pytest.raises(UsageError, match="count=201, and there are 200 rows that fit"):
        epoch_of((rows, {"count": 201}))


def test_weights_mix_what_they_say_and_the_report_counts_tokens(epoch_of):
    epoch = epoch_of((numbered(60), {"weight": 1.0, "name": "easy"}), (numbered(40, steps=3), {"weight": 3.0}))
    assert len(epoch.rows) == 53  # 40 of the second, which is 3 of 4, and 13 of the first
    assert np.bincount(epoch.rows.sources).tolist() == [13, 40]
    assert len(set(names(epoch.rows))) == 53
    easy, hard = epoch.sources
    assert (easy.label, easy.num_read, easy.num_examples) == ("easy", 60, 13)
    assert easy.num_tokens + hard.num_tokens == epoch.rows.lengths.sum()
    assert hard.num_tokens == sum(len(row) for row in list(epoch.rows)[13:])
    assert "easy: 60 problems read; 13 examples" in epoch.table()


def test_a_larger_epoch_repeats_rows_evenly_and_says_so(epoch_of, caplog):
    epoch = epoch_of((numbered(10), {"weight": 1.0}), (numbered(100, 2), {"weight": 1.0}), num_examples=50)
    times = np.unique(names(epoch.rows)[:25], return_counts=True)[1]
    assert len(times) == 10 and set(times.tolist()) == {2, 3}
    assert "10 rows make 25 examples of an epoch, so they repeat" in caplog.text


def test_resampling_comes_after_counting_and_is_reported(epoch_of):
    rows = numbered(100, steps=2) + numbered(100, steps=6)
    epoch = epoch_of((rows, {"count": 150, "resample": {"power": 1.0, "num_rows": 120}}))
    (report,) = epoch.sources
    assert len(epoch.rows) == 120 == report.num_examples
    assert sum(report.resampled["before"].values()) == 150 and set(report.resampled["after"]) == {2, 6}
    assert report.resampled["after"][6] > 2 * report.resampled["after"][2]
    assert json.loads(json.dumps(report.resampled))
    assert names(epoch.rows) == names(epoch_of((rows, {"count": 150, "resample": {"num_rows": 120}})).rows)


def test_of_a_resampled_dataset_in_a_mixture_the_report_is_that_of_the_epoch(epoch_of):
    rows = numbered(100, steps=2) + numbered(100, steps=6)
    epoch = epoch_of(
        (rows, {"weight": 3.0, "resample": {"power": 2.0}}), (numbered(30, 4), {"weight": 1.0}), num_examples=80
    )
    resampled, other = epoch.sources
    assert other.resampled is None and resampled.num_examples == 60
    mine = [(name, steps) for name, steps, source in zip(
        names(epoch.rows), epoch.rows.num_steps.tolist(), epoch.rows.sources.tolist(), strict=True
    ) if source == 0]  # fmt: skip
    assert resampled.resampled["before"] == {2: 100, 6: 100}
    assert resampled.resampled["after"] == collections.Counter(steps for _, steps in mine)
    copies = collections.Counter(mine).values()  # ids repeat between the numbers of steps
    assert resampled.resampled["different_rows"] == len(copies)
    assert resampled.resampled["effective_sample_size"] == pytest.approx(60**2 / sum(c * c for c in copies))


def test_a_dataset_that_is_not_there_is_named_before_another_is_read(write_rows, small_tokenizer, monkeypatch):
    monkeypatch.setattr(data_pipeline.sources, "_tokenized", lambda *_: pytest.fail("a dataset was read"))
    there = {"task": "jsonl", "path": write_rows(SHORT)}
    for path, said in (
        ("none.jsonl", r"data\.sources\.1\.path='none\.jsonl' does not exist"),
        (None, r"jsonl is read from a file of rows: name it with data\.sources\.1\.path"),
    ):
        data = DataSettings(sources=[there, {"task": "jsonl", "path": path}])
        with pytest.raises(UsageError, match=said):
            load_epoch(data, small_tokenizer, Template())


def test_a_dataset_gives_the_rows_of_the_file_it_was_made_of(tmp_path, test_data, large_tokenizer):
    source = str(test_data / "gsm8k_test.jsonl.gz")
    write_dataset(str(tmp_path / "set"), "gsm8k", {"test": read_problems("gsm8k", "test", source)})
    rows = [
        load_rows(
            DataSettings(sources=[{"task": "gsm8k", "split": "test", "path": path}], cache_dir=str(tmp_path / "cache")),
            large_tokenizer,
            Template(),
        )
        for path in (source, str(tmp_path / "set"))
    ]
    assert rows[0].sha256 == rows[1].sha256 and names(rows[0]) == names(rows[1])
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_a_changed_file_is_read_again(tmp_path, write_rows, small_tokenizer, caplog):
    data = DataSettings(sources=[{"task": "jsonl", "path": write_rows(SHORT)}], cache_dir=str(tmp_path / "cache"))
    before = load_rows(data, small_tokenizer, Template())
    write_rows(SHORT | {"answer": "2"})
    after = load_rows(data, small_tokenizer, Template())
    assert before.sha256 != after.sha256
    task, path = get_task("jsonl"), data.sources[0].path
    assert task.fingerprint("train", path) == task.fingerprint("train", path) != task.fingerprint("test", path)


def test_what_has_no_solution_is_not_trained_on(tmp_path, write_rows, small_tokenizer):
    path = write_rows({"Body": "b.", "Question": "q?", "Answer": 1.0, "ID": "chal-1"})
    data = DataSettings(sources=[{"task": "svamp", "split": "test", "path": path}], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="'chal-1' has no worked solution to learn from"):
        load_rows(data, small_tokenizer, Template())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sources": []}, "sources: name at least one dataset"),
        ({"sources": [{"task": "jsonl", "weight": 1}, {"task": "demo"}]}, "sources.1.weight is missing"),
        ({"sources": [{"task": "jsonl"}], "num_examples": 5}, "num_examples is that of weighted datasets"),
        ({"sources": [{"task": "jsonl", "weight": 0}]}, "sources.0.weight=0: Input should be greater than 0"),
        ({"sources": [{"task": "jsonl", "weight": -1}]}, "sources.0.weight=-1: Input should be greater than 0"),
        (
            {"sources": [{"task": "jsonl", "weight": float("inf")}]},
            "sources.0.weight=inf: Input should be a finite number",
        ),
        ({"sources": [{"task": "jsonl", "path": "a"}, {"task": "jsonl", "path": "a"}]}, "'a' is there twice"),
        ({"sources": [{"task": "jsonl", "path": "a"}], "seed": 2**64}, "seed="),
        ({"sources": [{"task": "jsonl", "count": 0}]}, "sources.0.count=0"),
        ({"sources": [{"task": "asdiv", "split": "test"}]}, "sources.0.allow_evaluation_only=true"),
        (
            {"sources": [{"task": "jsonl", "name": "a"}, {"task": "demo", "name": "a"}]},
            "'a' is there twice: give each a name",
        ),
        ({"sources": [{"task": "jsonl", "wieght": 1}]}, "did you mean sources.0.weight"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(settings, said):
    with pytest.raises(UsageError) as caught:
        validated(DataSettings, settings, where="config")
    assert said in str(caught.value)
    allowed = {"sources": [{"task": "asdiv", "split": "test", "allow_evaluation_only": True}]}
    assert validated(DataSettings, allowed, where="config").sources[0].label == "asdiv/test"
