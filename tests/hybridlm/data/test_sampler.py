import collections
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data.packing import BestFit
from hybridlm.data.preparation import documents_to_shards
from hybridlm.data.sampler import Sampler, permute
from hybridlm.data.sources import Documents
from hybridlm.tokenizer import byte_tokenizer


def shards_of(texts, folder):
    documents = Documents("test", repr(texts), len(texts), lambda i: texts[i])
    return documents_to_shards(documents, byte_tokenizer(), folder / "shards", quiet=True)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 300), key=st.integers(0, 2**40))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_depends_on_its_key_and_moves_most():
    a, b = ([permute(i, 1000, key) for i in range(1000)] for key in (0, 1))
    assert a != b
    assert sum(i == x for i, x in enumerate(a)) < 20


@pytest.mark.parametrize("seq_len", [1, 3, 7, 16, 50])
def test_every_document_offset_is_a_target_exactly_once_an_epoch(tmp_path, seq_len):
    lengths = [5, 1, 12, 3, 20]
    # Every byte of the corpus is another, so a target tells where it is from.
    numbers = iter(range(32, 128))
    texts = ["".join(chr(next(numbers)) for _ in range(n)) for n in lengths]
    shards = shards_of(texts, tmp_path)
    sampler = Sampler(shards, seq_len, 3, 258)
    epochs = 4
    seen = collections.Counter()
    for number in range(sampler.first_window(epochs)):
        sample = sampler.sample(number)
        # The predicted token follows its input in one and the same document.
        for token, target, _ in zip(sample["input_ids"], sample["targets"], sample["seq_idx"], strict=True):
            if target >= 0:
                seen[target if target != 256 else ("end", token)] += 1
    want = {t: epochs for text in texts for t in text.encode()[1:]} | {("end", text.encode()[-1]): epochs for text in texts}
    spill = sampler.first_window(epochs) * seq_len - epochs * len(shards)  # the last window reaches into the next epoch
    assert 0 <= spill < seq_len
    assert all(seen[key] >= count for key, count in want.items())
    assert sum(seen.values()) - sum(want.values()) <= spill
    assert set(seen) == set(want)


def test_no_window_predicts_across_a_boundary_and_seq_idx_counts_documents(tmp_path):
    sampler = Sampler(shards_of(["abc", "de"], tmp_path), 7, 0, 258)
    sample = next(s for s in map(sampler.sample, range(8)) if s["input_ids"][0] == ord("a"))
    assert sample["input_ids"].tolist() == [*b"abc", 256, *b"de", 256]
    assert sample["seq_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert sample["targets"].tolist() == [*b"bc", 256, -100, *b"e", 256, -100]


def test_the_order_depends_on_the_seed_alone_and_a_sample_on_its_number_alone(tmp_path):
    shards = shards_of(["x" * 50, "abcdefgh" * 20], tmp_path)
    one, same, other = (Sampler(shards, 8, seed, 258) for seed in (1, 1, 2))
    assert [one.window(i) for i in range(60)] == [same.window(i) for i in range(60)]
    assert [one.window(i) for i in range(60)] != [other.window(i) for i in range(60)]
    for number in range(60):
        again = one.sample(number)
        assert all(np.array_equal(array, again[name]) for name, array in same.sample(number).items())


def test_data_shorter_than_a_window_wraps_around_as_new_documents(tmp_path):
    sample = Sampler(shards_of(["ab"], tmp_path), 8, 0, 258).sample(0)
    assert sample["input_ids"].tolist() == [97, 98, 256, 97, 98, 256, 97, 98]
    assert sample["seq_idx"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("wrong", [-1, 258, 70_000])
def test_a_damaged_token_is_an_error_that_names_its_place(tmp_path, monkeypatch, wrong):
    shards = shards_of(["abcdef", "ghijkl"], tmp_path)
    tokens = np.asarray(shards.read(np.arange(len(shards))))
    tokens[9] = wrong  # offset 2 of the second document
    monkeypatch.setattr(type(shards), "read", lambda self, positions: tokens[positions])
    sampler = Sampler(shards, 5, 0, 258)
    with pytest.raises(ValueError, match=f"test: token id {wrong} at offset 2 of document 1 .*vocab_size=258"):
        for number in range(5):
            sampler.sample(number)


def test_the_origin_of_a_sample_is_the_documents_that_it_predicts(numbered):
    sampler = Sampler(numbered([6, 1, 5, 20]), 8, 0, 5000)
    by_window = {sampler.window(n): sampler.origin(n) for n in range(4)}
    assert by_window[0] == [{"document": 0, "offset": 0}, {"document": 2, "offset": 0}]
    assert by_window[1] == [{"document": 2, "offset": 1}, {"document": 3, "offset": 0}]
    assert by_window[2] == [{"document": 3, "offset": 4}]


def test_a_window_without_a_target_is_no_error(numbered):
    sampler = Sampler(numbered([1] * 20 + [2]), 4, 0, 5000)
    without = [n for n in range(5) if (sampler.sample(n)["targets"] == -100).all()]
    assert len(without) >= 4
    assert sampler.origin(without[0]) == []


def in_the_middle_of_a_thousand_million(numbered):
    lengths = np.full(1_000_003, 1001)
    shards = numbered(lengths)
    assert len(shards) > 10**9
    return shards


@pytest.mark.parametrize("kind", [Sampler, pytest.param(BestFit, marks=pytest.mark.faults)])
def test_seeking_to_token_a_thousand_million_reads_one_window(numbered, kind):
    shards = in_the_middle_of_a_thousand_million(numbered)
    sampler = kind(shards, 512, 0, 2 * 10**9)
    sample = sampler.sample(10**9 // 512)
    assert sum(shards.asked) <= 2 * 512
    predicts = sample["targets"] >= 0
    assert np.array_equal(sample["targets"][predicts], sample["input_ids"][predicts] + 1)


@pytest.mark.faults
@pytest.mark.parametrize("kind", [Sampler, BestFit])
def test_seeking_to_token_a_thousand_million_takes_less_than_a_tenth_of_a_second(numbered, kind, record_property):
    shards = in_the_middle_of_a_thousand_million(numbered)
    kind(shards, 512, 0, 2 * 10**9)  # the index of best-fit is made once
    sampler = kind(shards, 512, 0, 2 * 10**9)
    start = time.perf_counter()
    sampler.sample(10**9 // 512)
    seconds = time.perf_counter() - start
    record_property(f"seconds to token 10^9, {kind.__name__}", seconds)
    assert seconds < 0.1
