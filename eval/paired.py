"""Is one model better than another? Paired tests and intervals: both models were given the same texts, questions or turns.

What differs from one document or question to the next hits both models alike; only the differences within the pairs count.
"""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000  # of a bootstrap, and signs drawn for a test: more would not change what is concluded
EXACT_PAIRS = 13  # up to as many, all 2^n ways to give the signs are tried
LEVEL = 0.05
AT_A_TIME = 2**22  # numbers drawn


def sign_flip_p(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a sum of paired differences: were the models alike, each of them could as well have the other sign.

    Exact up to EXACT_PAIRS pairs. Beyond, of signs drawn at random, the ones that came counted among them (Phipson & Smyth 2010).
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]  # no sign
    n, seen = len(d), abs(d.sum()) - 1e-9 * abs(d).sum()  # rounding must not make a tie a difference
    if n <= EXACT_PAIRS:
        every = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(abs(every @ d) >= seen))
    rng = np.random.default_rng(seed)
    hits, rows = 0, max(1, AT_A_TIME // n)
    for start in range(0, RESAMPLES - 1, rows):
        size = (min(rows, RESAMPLES - 1 - start), n)
        signs = 1.0 - 2.0 * rng.integers(0, 2, size, dtype=np.int8)
        hits += int((abs(signs @ d) >= seen).sum())
    return (1 + hits) / RESAMPLES


def mcnemar_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided exact p of right (1) and wrong (0) answers to the same questions (McNemar 1947, by the binomial distribution).

    Were the models alike, it would be a coin that says which of them alone has a question right.
    """
    x, y = np.asarray(a), np.asarray(b)
    only_a, only_b = int((x > y).sum()), int((x < y).sum())  # Python's integers, which 2^n does not overflow
    n, k = only_a + only_b, min(only_a, only_b)
    ways = tail = 1
    for i in range(k):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float]:
    """95% interval of a statistic over pairs drawn anew, with replacement, both halves together (percentiles; Efron 1979).

    Args:
        columns: (pairs k), what each pair has.
        statistic: maps (resamples pairs k) to (resamples).
    """
    rng = np.random.default_rng(seed)
    n, rows = len(columns), max(1, AT_A_TIME // columns.size)
    found = [statistic(columns[rng.integers(n, size=(min(rows, RESAMPLES - start), n))]) for start in range(0, RESAMPLES, rows)]
    low, high = np.percentile(np.concatenate(found), [100 * LEVEL / 2, 100 - 100 * LEVEL / 2])
    return float(low), float(high)


def ratio_of_sums(drawn: np.ndarray) -> np.ndarray:
    """Of (resamples pairs 4): sum of the first column over that of the second, less sum of the third over that of the fourth."""
    s = drawn.sum(1)
    return s[:, 0] / s[:, 1] - s[:, 2] / s[:, 3]


def difference_of_means(drawn: np.ndarray) -> np.ndarray:
    return drawn[..., 0].mean(1) - drawn[..., 1].mean(1)


def ratio_of_medians(drawn: np.ndarray) -> np.ndarray:
    a, b = np.median(drawn, axis=1).T
    return a / b


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values so adjusted that the chance of any false finding among all tests stays below the level (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
