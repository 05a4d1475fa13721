import json
import re
from collections import Counter
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data.blend import UNIT, Blend, fixed_point, split
from hybridlm.data.sampler import Sampler

weights_of = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda weights: sum(weights) > 0)


@settings(max_examples=150, deadline=None)
@given(weights=weights_of, count=st.integers(0, 10**12))
def test_counts_add_up_and_stay_within_a_few_samples_of_the_shares(weights, count):
    shares = fixed_point(weights)
    counts = split(count, shares)
    assert sum(counts) == count
    for share, got in zip(shares, counts, strict=True):
        assert abs(got - count * share / sum(shares)) < 2 + log(len(shares)) + count * 1e-15
        assert share or not got


@settings(max_examples=60, deadline=None)
@given(
    phases=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(any), min_size=1, max_size=4)
    ),
    lengths=st.lists(st.integers(0, 40), min_size=3, max_size=3),
)
def test_the_samples_of_each_source_come_in_order_with_no_gap_and_no_repeat_across_phases(phases, lengths):
    borders = np.cumsum(lengths)[: len(phases) - 1].tolist()
    blend = Blend([None] * len(phases[0]), phases, borders)
    places = [blend.where(number) for number in range(150)]
    for source in range(len(phases[0])):
        own = [number for s, number in places if s == source]
        assert own == list(range(len(own)))
    for number, (source, _) in enumerate(places):
        phase = sum(number >= border for border in borders)
        assert phases[phase][source] > 0


def test_the_shares_change_where_a_phase_begins():
    blend = Blend([None] * 2, [[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]], [6000, 8000])
    counts = np.array([blend.counts(n) for n in (6000, 8000, 10000)])
    assert np.abs(counts - [[4200, 1800], [5200, 2800], [5600, 4400]]).max() <= 3
    near = [blend.where(n)[0] for n in range(5900, 6000)]
    assert near.count(0) == pytest.approx(70, abs=1)


def test_weights_of_any_scale_are_the_same_shares():
    assert fixed_point([1, 3]) == fixed_point([0.25, 0.75]) == [UNIT // 4, 3 * UNIT // 4]


@pytest.mark.parametrize("seq_len", [1, 7, 16])
def test_every_offset_of_every_source_is_a_target_exactly_once_an_epoch_of_that_source(numbered, seq_len):
    a, b = numbered([5, 2, 13, 40], name="a"), numbered([9, 30, 3], name="b", first=1000)
    blend = Blend([Sampler(shards, seq_len, 3, 5000) for shards in (a, b)], [[3, 1]], [])
    epochs = 2
    stop = next(n for n in range(10**6) if all(m * seq_len >= epochs * len(s) for m, s in zip(blend.counts(n), (a, b))))
    seen = Counter()
    for number in range(stop):
        source, within = blend.where(number)
        if within < blend.samplers[source].first_window(epochs):  # later ones belong to the third epoch
            seen.update(blend.batch(number, number + 1)["targets"].ravel().tolist())
    del seen[-100]
    for shards in (a, b):
        counts = [seen[token] for token in shards.predicted]
        assert min(counts) == epochs
        assert sum(counts) - epochs * len(counts) < seq_len  # the last window reaches into the next epoch
    assert set(seen) == {*a.predicted, *b.predicted}


def test_a_batch_is_its_samples_and_tells_where_they_are_from(numbered):
    a, b = numbered([50, 2, 13], name="a"), numbered([90], name="b", first=1000)
    blend = Blend([Sampler(shards, 8, 0, 5000) for shards in (a, b)], [[1, 1]], [])
    batch, origin = blend.batch(3, 13), blend.origin(3, 13)
    assert list(batch) == ["input_ids", "targets", "seq_idx"]
    assert {(array.shape, array.dtype.name) for array in batch.values()} == {((10, 8), "int64")}
    assert json.loads(json.dumps(origin)) == origin
    assert [line["sample"] for line in origin] == list(range(3, 13))
    assert {line["source"] for line in origin} == {"a", "b"}
    for line, ids, targets in zip(origin, batch["input_ids"], batch["targets"], strict=True):
        shards = a if line["source"] == "a" else b
        starts = [0, *shards.documents[:, 0]]
        places = [shards.first + starts[piece["document"]] + piece["offset"] for piece in line["documents"]]
        assert [i for i in places if i not in ids] == []
        # Every target is of one of these documents, behind the place where it begins here.
        named = {shards.first + p for piece in line["documents"] for p in range(starts[piece["document"] + 1])}
        assert {t for t in targets.tolist() if t >= 0} <= named


def blend_of(numbered, *, seq_len=8, seed=0, names="ab", weights=((0.7, 0.3), (0.5, 0.5)), borders=(100,), sampler=Sampler):
    samplers = [sampler(numbered([50, 20], name=name), seq_len, seed, 5000) for name in names]
    return Blend(samplers, [list(w) for w in weights], list(borders))


@pytest.mark.parametrize(
    ("change", "position", "message"),
    [
        ({"seq_len": 16}, 10, "seq_len: 8 -> 16"),
        ({"seed": 1}, 10, "seed: 0 -> 1"),
        ({"names": "ac"}, 10, "data: b .* -> c"),
        ({"names": "ba"}, 10, "data: a .* -> b"),
        ({"weights": ((0.6, 0.4), (0.5, 0.5))}, 10, r"weights up to sample 10: \[0.7, 0.3\] .* -> \[0.6, 0.4\]"),
        ({"borders": (90,)}, 95, "weights up to sample 95"),
        ({"borders": (110,)}, 105, "weights up to sample 105"),
        ({"names": "a", "weights": ((1,), (1,))}, 10, "data: b .* -> no source"),
    ],
)
def test_what_gave_a_position_its_meaning_is_told_apart(numbered, change, position, message):
    identity = json.loads(json.dumps(blend_of(numbered).identity(position)))
    assert blend_of(numbered).changed(identity, position) == []
    lines = "\n".join(blend_of(numbered, **change).changed(identity, position))
    assert re.search(message, lines), lines


@pytest.mark.parametrize(
    "change",
    [
        {"borders": (200,)},
        {"weights": ((0.7, 0.3), (0.1, 0.9))},
        {"weights": ((7, 3), (5, 5))},
        {"weights": ((0.7, 0.3),), "borders": ()},
        {"names": "cab", "weights": ((0, 0.7, 0.3), (1, 0.5, 0.5))},
    ],
)
def test_phases_to_come_may_change_and_bring_new_sources(numbered, change):
    before, after = blend_of(numbered), blend_of(numbered, **change)
    assert after.changed(before.identity(100), 100) == []
    for number in range(100):
        one, other = before.batch(number, number + 1), after.batch(number, number + 1)
        assert all(np.array_equal(array, other[name]) for name, array in one.items())


def test_an_identity_of_another_kind_is_a_change_and_not_a_crash(numbered):
    assert blend_of(numbered).changed({"data": "1", "seq_len": 8, "seed": 0}, 10)[0] == "packing: None -> stream"


def test_shards_need_no_cursor(numbered):
    blend = blend_of(numbered)
    assert blend.cursor(10) == {}
    blend.seek(10, {})
    assert np.array_equal(blend.batch(10, 12)["targets"], blend_of(numbered).batch(10, 12)["targets"])


def test_the_summary_tells_how_often_each_source_is_seen(numbered):
    assert blend_of(numbered).summary(100) == ["a: 70 tokens, 7.89 epochs", "b: 70 tokens, 3.54 epochs"]
