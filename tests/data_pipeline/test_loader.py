"""Batches by hand, and the promises that a run rests on: each example once an epoch, whoever reads it."""

import collections
import itertools

import numpy as np
import pytest

from data_pipeline.loader import Batches, iterate
from data_pipeline.sources import DataSettings
from data_pipeline.tokenized import rows_of

KEYS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
# BOS 1, EOS 2. A has a prompt of three tokens, B of two, C of two and an empty-looking response of EOS alone.
A = [1, 10, 11, 20, 21, 2]
B = [1, 12, 22, 2]
C = [1, 13, 2]


def make_rows(rows, prompt_lengths):
    return rows_of(
        np.concatenate(rows).astype(np.int32), np.array([len(row) for row in rows]), np.array(prompt_lengths)
    )


def random_rows(count, seed=0, longest=14):
    """Rows that are told apart by their second token."""
    rng = np.random.default_rng(seed)
    rows = [[1, 1000 + i, *rng.integers(3, 900, rng.integers(1, longest - 2)), 2] for i in range(count)]
    return make_rows(rows, [rng.integers(2, len(row)) for row in rows])


def settings(**changes):
    return DataSettings(**({"sources": [{"task": "jsonl", "path": "-"}], "context": 16} | changes))


def make_batches(rows, batch_size=4, seed=0, num_epochs=1, rows_of_process=None, num_steps=None, **changes):
    return Batches(
        rows,
        settings(**changes),
        batch_size=batch_size,
        seed=seed,
        num_steps=num_steps,
        num_epochs=num_epochs,
        rows_of_process=rows_of_process,
    )


def assert_batches_equal(actual, expected):
    assert set(actual) == set(expected) == set(KEYS)
    for key in KEYS:
        assert actual[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


def unpack(batch, row):
    """(tokens with the last target, mask) of each example of a row, read off the segment ids one by one."""
    examples = []
    ids = batch["segment_ids"][row]
    for segment in range(1, ids.max() + 1):
        place = np.flatnonzero(ids == segment)
        assert place.tolist() == list(range(place[0], place[-1] + 1)), "an example is in one piece"
        tokens, targets = batch["tokens"][row, place].tolist(), batch["targets"][row, place].tolist()
        assert targets[:-1] == tokens[1:], "a target is the next token of the same example"
        assert batch["positions"][row, place].tolist() == list(range(len(place)))
        examples.append(([*tokens, targets[-1]], batch["loss_mask"][row, place].tolist()))
    return examples


def which(example):
    return example[0][1] - 1000


@pytest.mark.parametrize("first", ["A", "B"])
def test_a_packed_row_equals_the_one_computed_by_hand(first):
    rows = make_rows([A, B], [3, 2])
    found = (make_batches(rows, batch_size=1, seed=seed, context=10)[0] for seed in range(50))
    batch = next(b for b in found if b["tokens"][0, 1] == {"A": 10, "B": 12}[first])
    by_hand = {
        "A": {
            "tokens": [1, 10, 11, 20, 21, 1, 12, 22, 0, 0],
            "targets": [10, 11, 20, 21, 2, 12, 22, 2, 0, 0],
            "loss_mask": [0, 0, 1, 1, 1, 0, 1, 1, 0, 0],
            "segment_ids": [1, 1, 1, 1, 1, 2, 2, 2, 0, 0],
            "positions": [0, 1, 2, 3, 4, 0, 1, 2, 0, 0],
        },
        "B": {
            "tokens": [1, 12, 22, 1, 10, 11, 20, 21, 0, 0],
            "targets": [12, 22, 2, 10, 11, 20, 21, 2, 0, 0],
            "loss_mask": [0, 1, 1, 0, 0, 1, 1, 1, 0, 0],
            "segment_ids": [1, 1, 1, 2, 2, 2, 2, 2, 0, 0],
            "positions": [0, 1, 2, 0, 1, 2, 3, 4, 0, 0],
        },
    }[first]
    assert {key: batch[key][0].tolist() for key in KEYS} == by_hand
    assert batch["loss_mask"].dtype == bool
    assert all(batch[key].dtype == np.int32 for key in KEYS if key != "loss_mask")


def test_padded_rows_equal_those_computed_by_hand():
    batch = make_batches(make_rows([A, C], [3, 2]), batch_size=3, context=6, layout="padded")[0]
    by_hand = {
        10: {
            "tokens": [1, 10, 11, 20, 21, 0],
            "targets": [10, 11, 20, 21, 2, 0],
            "loss_mask": [0, 0, 1, 1, 1, 0],
            "segment_ids": [1, 1, 1, 1, 1, 0],
            "positions": [0, 1, 2, 3, 4, 0],
        },
        13: {
            "tokens": [1, 13, 0, 0, 0, 0],
            "targets": [13, 2, 0, 0, 0, 0],
            "loss_mask": [0, 1, 0, 0, 0, 0],
            "segment_ids": [1, 1, 0, 0, 0, 0],
            "positions": [0, 1, 0, 0, 0, 0],
        },
    }
    rows = {int(batch["tokens"][i, 1]): {key: batch[key][i].tolist() for key in KEYS} for i in range(2)}
    assert rows == by_hand
    assert not any(batch[key][2].any() for key in KEYS), "what is left of the last batch is empty"


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_is_on_the_response_and_eos_only_and_no_target_crosses_two_examples(layout):
    rows = random_rows(50)
    batches = make_batches(rows, layout=layout)
    for batch in batches:
        for row in range(4):
            for example, mask in unpack(batch, row):
                index = which((example, mask))
                assert example == rows[index].tolist()
                prompt = rows.prompt_lengths[index]
                # Position i predicts token i + 1: the response begins at token `prompt` and ends with EOS.
                assert mask == [i + 1 >= prompt for i in range(len(example) - 1)]
        outside = batch["segment_ids"] == 0
        assert not any(batch[key][outside].any() for key in KEYS)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_each_example_is_seen_exactly_once_in_each_epoch(layout, batch_size):
    num_epochs = 3
    batches = make_batches(random_rows(50), batch_size=batch_size, num_epochs=num_epochs, layout=layout)
    seen = [collections.Counter() for _ in range(num_epochs)]
    num_empty = 0
    for step in range(len(batches)):
        for row in range(batch_size):
            examples = unpack(batches[step], row)
            if not examples:
                num_empty += 1
                continue
            assert num_empty == 0, "empty rows come last"
            epoch = (step * batch_size + row) // batches.bins_per_epoch
            seen[epoch].update(which(example) for example in examples)
    assert seen == [dict.fromkeys(range(50), 1)] * num_epochs
    assert num_empty < batch_size


def test_a_batch_may_hold_the_end_of_one_epoch_and_the_beginning_of_the_next():
    batches = make_batches(random_rows(10), batch_size=4, num_epochs=2, layout="padded")
    straddling = [which(example) for row in range(4) for example in unpack(batches[2], row)]
    before = [which(e) for step in range(2) for row in range(4) for e in unpack(batches[step], row)]
    assert sorted(before + straddling[:2]) == list(range(10)), "rows 8 and 9 end the first epoch"
    after = [which(e) for step in (3, 4) for row in range(4) for e in unpack(batches[step], row)]
    assert sorted(straddling[2:] + after) == list(range(10)), "rows 10 and 11 begin the second"


def test_steps_instead_of_epochs_go_on_for_as_long_as_asked():
    batches = make_batches(random_rows(10), batch_size=4, num_epochs=None, num_steps=25, layout="padded")
    assert len(batches) == 25
    seen = collections.Counter(which(e) for batch in batches for row in range(4) for e in unpack(batch, row))
    assert seen == dict.fromkeys(range(10), 10)


def test_epochs_differ_in_order():
    batches = make_batches(random_rows(40), batch_size=40, num_epochs=2, layout="padded")
    orders = [[which(unpack(batches[epoch], row)[0]) for row in range(40)] for epoch in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_of_several_processes_together_are_the_global_batch(layout):
    rows = random_rows(37)
    whole = make_batches(rows, batch_size=6, num_epochs=2, layout=layout)
    for cuts in ([0, 3, 6], [0, 2, 4, 6], [0, 1, 6]):
        parts = [
            make_batches(rows, batch_size=6, num_epochs=2, layout=layout, rows_of_process=range(start, stop))
            for start, stop in itertools.pairwise(cuts)
        ]
        assert all(len(part) == len(whole) for part in parts)
        for step in range(len(whole)):
            pieces = [part[step] for part in parts]
            together = {key: np.concatenate([piece[key] for piece in pieces]) for key in KEYS}
            assert_batches_equal(together, whole[step])


def test_a_batch_is_a_function_of_the_step_alone():
    first, second = (make_batches(random_rows(30), num_epochs=5) for _ in range(2))
    in_order = [first[step] for step in range(len(first))]
    for step in np.random.default_rng(0).permutation(len(first)).tolist():
        assert_batches_equal(second[step], in_order[step])
    other = make_batches(random_rows(30), num_epochs=5, seed=1)
    assert any(not np.array_equal(other[i]["tokens"], in_order[i]["tokens"]) for i in range(len(first)))


def test_a_batch_that_was_changed_by_its_reader_is_made_anew():
    batches = make_batches(random_rows(30))
    expected = make_batches(random_rows(30))[0]
    batches[0]["tokens"][:] = -1
    assert_batches_equal(batches[0], expected)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterating_from_a_step_gives_the_batches_from_that_step(prefetch):
    batches = make_batches(random_rows(30), batch_size=3, num_epochs=2)
    expected = [batches[step] for step in range(len(batches))]
    assert len(expected) > 5
    for start in (0, 1, 4, len(batches) - 1, len(batches)):
        got = list(iterate(batches, start, prefetch))
        assert len(got) == len(batches) - start
        for actual, wanted in zip(got, expected[start:], strict=True):
            assert_batches_equal(actual, wanted)


def test_a_step_beyond_the_last_is_an_index_error_so_that_a_loop_ends():
    batches = make_batches(random_rows(10), num_epochs=1)
    assert len(list(batches)) == len(batches)
    for step in (len(batches), -1):
        with pytest.raises(IndexError):
            batches[step]


def test_neither_steps_nor_epochs_is_an_error():
    with pytest.raises(ValueError, match="num_steps or num_epochs"):
        make_batches(random_rows(3), num_epochs=None)


def test_fill_is_the_share_of_positions_that_hold_an_example():
    rows = make_rows([A, B, C], [3, 2, 2])  # 5 + 3 + 2 positions
    assert make_batches(rows, context=10).fill == 1.0
    assert make_batches(rows, context=10, layout="padded").fill == pytest.approx(10 / 30)
    batches = make_batches(random_rows(50), batch_size=1)
    used = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    assert batches.fill == pytest.approx(used / (len(batches) * 16))


def test_gsm8k_survives_packing_unchanged(gsm8k_rows):
    batches = Batches(gsm8k_rows, settings(context=2048), batch_size=64, seed=0, num_epochs=1)
    seen = np.zeros(len(gsm8k_rows), int)
    first_rows = {}
    for index in range(len(gsm8k_rows)):
        row = gsm8k_rows[index]
        first_rows.setdefault(row.astype(np.int32).tobytes(), []).append(index)
    for batch in batches:
        for row in range(64):
            for tokens, _ in unpack(batch, row):
                seen[first_rows[np.array(tokens, np.int32).tobytes()].pop()] += 1
    assert (seen == 1).all()
    num_targets = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert num_targets == int((gsm8k_rows.lengths - gsm8k_rows.prompt_lengths).sum())
