import pytest
import torch

from eval import ceiling
from eval.ceiling import DTYPES, PRODUCTS


def test_every_end_is_measured():
    try:
        ends = ceiling.ceiling(2, products=((8, 8, 8), (16, 8, 4)), copied=2**12, read=2**12)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert ends["flops_per_second"].keys() == ends["read_bytes_per_second"].keys() == DTYPES.keys()
    assert all(value > 0 for value in (*ends["flops_per_second"].values(), *ends["read_bytes_per_second"].values()))
    assert ends["copy_bytes_per_second"] > 0


@pytest.fixture
def at_rate(monkeypatch):
    """Products that take the seconds which a rate in FLOP/s, or one for each of them, says; the sizes that were tried."""

    def set_rate(*rates):
        tried = []

        def seconds(work):
            (m, k), (_, n) = work.__defaults__[0].shape, work.__defaults__[1].shape
            tried.append((m, k, n))
            assert work().shape == (m, n)
            return 2 * m * k * n / rates[min(len(tried), len(rates)) - 1]

        monkeypatch.setattr(ceiling, "median_seconds", seconds)
        return tried

    return set_rate


def test_the_largest_rate_of_all_sizes(at_rate):
    tried = at_rate(1e4, 3e4, 2e4)
    sizes = ((2, 2, 2), (2, 2, 4), (4, 2, 2))
    assert ceiling.fastest_product(torch.float32, sizes) == pytest.approx(3e4)
    assert tried == list(sizes)


def test_no_product_that_would_take_long(at_rate):
    """At 16,000 FLOP/s the third size would take more than a second; nothing after it is tried either. The first always is."""
    tried = at_rate(16_000)
    sizes = ((2, 2, 2), (10, 10, 10), (30, 30, 30), (2, 2, 2))
    assert ceiling.fastest_product(torch.float32, sizes) == pytest.approx(16_000)
    assert tried == [(2, 2, 2), (10, 10, 10)]
    tried = at_rate(1)
    ceiling.fastest_product(torch.float32, sizes)
    assert tried == [(2, 2, 2)]


def test_bytes(monkeypatch):
    seen = []

    def two_seconds(work):
        seen.append(work())
        return 2.0

    monkeypatch.setattr(ceiling, "median_seconds", two_seconds)
    assert ceiling.matrix_vector(torch.bfloat16, 2**14) == 2**13
    assert ceiling.copy(2**14) == 2**14  # read and written
    assert (len(seen[0]), seen[0].dtype) == (8, torch.bfloat16)
    assert seen[0].unique().item() == 1024  # the whole matrix was multiplied
    assert seen[1].unique().item() == 1  # and the whole was copied


def test_the_median_without_the_first(monkeypatch):
    now = iter([0, 1, 10, 19, 20, 23])
    monkeypatch.setattr(ceiling, "TIMES", 3)
    monkeypatch.setattr(ceiling.time, "perf_counter", lambda: next(now))
    calls = []
    assert ceiling.median_seconds(lambda: calls.append(1)) == 3
    assert len(calls) == 4


def test_sizes_are_past_every_cache_and_rise():
    flops = [m * k * n for m, k, n in PRODUCTS]
    assert flops == sorted(flops)
    assert ceiling.READ >= 2**28
    assert ceiling.COPIED >= 2**28
