import lzma
import math

import numpy as np
import pytest

from eval.baselines import ORDER, count, order3_bits_per_byte, probabilities, strings, xz_bits_per_byte


def bits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


@pytest.mark.parametrize("before", range(ORDER + 1))
@pytest.mark.parametrize("context", ["abr", "zzz", "bra", "\0\0\0", "xab"])
def test_the_probabilities_of_all_bytes_sum_to_one(context, before):
    model = count(["abracadabra", "abra\0", "", "zab"])
    last = np.arange(256, dtype=np.uint32)
    code = sum(byte << 8 * (3 - i) for i, byte in enumerate(context.encode()))
    p = probabilities(model, last | np.uint32(code), np.full(256, before))
    assert p.min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)


def test_by_hand():
    # Trained on "aab" and "b": n(a) = 2, n(b) = 2, d() = 2; after a: a once, b once; after aa: b.
    # First byte: (2 + 2/256) / 6. Then, after a: (1 + 2 p0) / 4; after aa: (1 + 1 p1) / 2.
    p0 = (2 + 2 / 256) / 6
    p1 = (1 + 2 * p0) / 4
    p2 = (1 + p1) / 2
    expected = -(math.log2(p0) + math.log2(p1) + math.log2(p2)) / 3
    assert order3_bits_per_byte(["aab", "b"], ["aab"]) == pytest.approx(expected, rel=1e-12)


def test_contexts_stop_at_the_start_of_a_document():
    one = order3_bits_per_byte(["abcabc"], ["ab", "cab"])
    split = [order3_bits_per_byte(["abcabc"], [text]) for text in ("ab", "cab")]
    assert one == pytest.approx((2 * split[0] + 3 * split[1]) / 5)
    _, before = strings([bits("abcde"), bits("xy")])
    assert before.tolist() == [0, 1, 2, 3, 3, 0, 1]


def test_counting_in_blocks_changes_nothing(monkeypatch):
    texts = ["abracadabra", "x", "", "alakazam", "abra"]
    whole = count(texts)
    monkeypatch.setattr("eval.baselines.BLOCK_BYTES", 10)
    for one, other in zip(whole, count(texts)):
        for field in ("codes", "counts", "contexts", "totals", "distinct"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_without_training_text_every_byte_is_equally_likely():
    assert order3_bits_per_byte([], ["any text"]) == 8


def test_xz_is_that_of_the_lzma_module_per_file():
    texts = ["abc" * 100, "naïve text"]
    compressed = sum(len(lzma.compress(text.encode(), preset=9)) for text in texts)
    assert xz_bits_per_byte(texts) == 8 * compressed / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("baseline", [xz_bits_per_byte, lambda texts: order3_bits_per_byte(["a"], texts)])
def test_nothing_to_compare(baseline):
    with pytest.raises(ValueError, match="no byte"):
        baseline([""])
