import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data.preparation import prepare_documents
from hybridlm.data.sampler import Sampler, permute
from hybridlm.data.sources import Documents
from hybridlm.tokenizer import byte_tokenizer


def shards_of(texts, folder):
    documents = Documents("test", repr(texts), len(texts), lambda i: texts[i])
    return prepare_documents(documents, byte_tokenizer(), folder, quiet=True)


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
    sampler = Sampler(shards, seq_len, seed=3)
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
    sampler = Sampler(shards_of(["abc", "de"], tmp_path), 7, seed=0)
    sample = next(s for s in map(sampler.sample, range(8)) if s["input_ids"][0] == ord("a"))
    assert sample["input_ids"].tolist() == [*b"abc", 256, *b"de", 256]
    assert sample["seq_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert sample["targets"].tolist() == [*b"bc", 256, -100, *b"e", 256, -100]


def test_the_order_depends_on_the_seed_alone_and_a_batch_on_its_numbers_alone(tmp_path):
    shards = shards_of(["x" * 50, "abcdefgh" * 20], tmp_path)
    one, same, other = Sampler(shards, 8, 1), Sampler(shards, 8, 1), Sampler(shards, 8, 2)
    assert [one.window(i) for i in range(60)] == [same.window(i) for i in range(60)]
    assert [one.window(i) for i in range(60)] != [other.window(i) for i in range(60)]
    whole, halves = one.batch(4, 12), [one.batch(4, 8), one.batch(8, 12)]
    for name in whole:
        assert np.array_equal(whole[name], np.concatenate([half[name] for half in halves]))


def test_data_shorter_than_a_window_wraps_around_as_new_documents(tmp_path):
    sample = Sampler(shards_of(["ab"], tmp_path), 8, seed=0).sample(0)
    assert sample["input_ids"].tolist() == [97, 98, 256, 97, 98, 256, 97, 98]
    assert sample["seq_idx"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
