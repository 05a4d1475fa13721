import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data.blend import Blend
from hybridlm.data.lanes import Lanes
from tests.hybridlm.data.conftest import Numbered

LENGTHS = [6, 1, 13, 4, 21, 2]  # 47 tokens, a prime


def lanes_of(shards, seq_len=8, seed=0, lanes=4):
    return Lanes(shards, seq_len, seed, 5000, lanes)


def batch(lanes, step):
    return [lanes.sample(step * lanes.lanes + row) for row in range(lanes.lanes)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 1),
    seq_len=st.integers(1, 23), lanes=st.integers(1, 9), seed=st.integers(0, 9),
)  # fmt: skip
def test_no_target_is_ever_seen_more_than_once_more_often_than_another(lengths, seq_len, lanes, seed):
    ends = np.cumsum(lengths)
    one = lanes_of(shards := Numbered(np.stack([ends, np.ones_like(ends)], axis=-1), None), seq_len, seed, lanes)
    seen = collections.Counter()
    for step in range(2 * len(shards) // (seq_len * lanes) + 2):
        for sample in batch(one, step):
            predicts = sample["targets"] >= 0
            assert np.array_equal(sample["targets"][predicts], sample["input_ids"][predicts] + 1)
            seen.update(sample["targets"][predicts].tolist())
        counts = [seen[target] for target in shards.predicted]
        assert max(counts) - min(counts) <= 1
    assert set(seen) == set(shards.predicted)


@pytest.mark.parametrize(("seq_len", "lanes"), [(1, 1), (7, 3), (8, 4), (60, 2)])
def test_a_row_goes_on_where_the_one_before_it_ended(numbered, seq_len, lanes):
    one = lanes_of(numbered(LENGTHS), seq_len, lanes=lanes)
    starts = set(np.cumsum([0, *LENGTHS]).tolist())
    last = None
    for step in range(30):
        now = batch(one, step)
        for row, sample in enumerate(now):
            ids, piece = sample["input_ids"], sample["seq_idx"]
            # Within a window and from one to the next: the place behind it, or the beginning of a document.
            joined = ids if last is None else np.concatenate([last[row]["input_ids"][-1:], ids])
            begins = np.diff(joined) != 1
            assert set(joined[1:][begins].tolist()) <= starts
            assert np.array_equal(np.diff(piece), begins[-len(piece) + 1 :] if len(piece) > 1 else [])
            assert sample["continues"] == (last is not None and not begins[0])
        last = now


def test_documents_of_one_token_begin_anew_each_time_that_they_come(numbered):
    one = lanes_of(numbered([1, 1, 2]), seq_len=1, lanes=1)
    samples = [one.sample(n) for n in range(8)]
    assert [bool(sample["continues"]) for sample in samples] == [sample["input_ids"][0] == 3 for sample in samples]


def test_a_single_document_begins_anew_in_the_next_epoch(numbered):
    one = lanes_of(numbered([10]), seq_len=4, lanes=1)
    samples = [one.sample(n) for n in range(6)]
    assert [bool(sample["continues"]) for sample in samples] == [False, True, True, True, True, False]
    assert samples[2]["seq_idx"].tolist() == [0, 0, 1, 1]


def test_lanes_begin_evenly_spread_and_nothing_is_left_from_before(numbered):
    one = lanes_of(shards := numbered([100]), seq_len=5)
    assert [sample["input_ids"][0] for sample in batch(one, 0)] == [0, 25, 50, 75]
    assert not any(sample["continues"] for sample in batch(one, 0))
    assert all(sample["continues"] for sample in batch(one, 1))
    assert len(shards.asked) == 2 * 12  # inputs and targets of a window, and no other token


def test_documents_come_in_the_order_of_the_seed(numbered):
    shards = numbered(range(2, 40))
    orders = []
    for seed in (1, 1, 2):
        ids = np.concatenate([lanes_of(shards, 8, seed, lanes=1).sample(n)["input_ids"] for n in range(len(shards) // 8)])
        orders.append([i for i in ids.tolist() if i in {0, *shards.documents[:, 0].tolist()}])
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_the_origin_of_a_window_is_the_documents_that_it_predicts(numbered):
    one = lanes_of(numbered([100]), seq_len=5)
    assert one.origin(4 + 2) == [{"document": 0, "offset": 55}]


def test_another_number_of_lanes_is_another_order(numbered):
    shards = numbered(LENGTHS)
    four, eight = (Blend([lanes_of(shards, lanes=lanes)], [[1.0]], []) for lanes in (4, 8))
    assert eight.changed(four.identity(8), 8) == ["packing: stream in 4 lanes -> stream in 8 lanes"]
    assert four.changed(four.identity(8), 8) == []
    rows = four.batch(4, 8)
    assert rows["continues"].shape == (4,) and rows["continues"].dtype == bool
