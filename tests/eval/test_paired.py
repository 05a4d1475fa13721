"""The statistics against values counted by hand or by brute force, and how often they cry wolf."""

from itertools import product

import numpy as np
import pytest

from eval import paired


def test_signs_are_all_tried():
    assert paired.sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8  # +++ and ---
    assert paired.sign_flip_p([1.0, 2.0, -3.0]) == 1  # a sum of 0 is reached by all
    assert paired.sign_flip_p([0.0, 0.0]) == 1
    assert paired.sign_flip_p([0.1, 0.2, 0.3, 0.0]) == 2 / 8  # a tie has no sign
    d = np.array([7, 6, -5, 3, -6, -5])  # a sum of 0, which is not quite that in floats
    assert paired.sign_flip_p(d / 10) == paired.sign_flip_p(d) == 1
    d = np.array([0.3, -0.1, 0.25, 0.4, -0.05, 0.2, 0.1])
    brute = np.mean([abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12 for signs in product((1, -1), repeat=len(d))])
    assert paired.sign_flip_p(d) == brute


def test_drawn_signs_come_near_all_signs(monkeypatch):
    d = np.random.default_rng(1).normal(0.4, 1, 12)
    exact = paired.sign_flip_p(d)
    monkeypatch.setattr(paired, "EXACT_PAIRS", 0)
    monkeypatch.setattr(paired, "AT_A_TIME", 1000)  # several blocks of draws
    drawn = paired.sign_flip_p(d)
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / paired.RESAMPLES) ** 0.5)
    assert drawn != exact
    assert paired.sign_flip_p(np.ones(100)) == 1 / paired.RESAMPLES  # never 0


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1), (5, 0, 2 / 32), (1, 9, 2 * (1 + 10) / 1024), (3, 3, 1), (2, 1, 1)],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    a = [1] * only_a + [0] * only_b + [1, 1, 0]
    b = [0] * only_a + [1] * only_b + [1, 1, 0]
    assert paired.mcnemar_p(a, b) == pytest.approx(p)
    assert paired.mcnemar_p(b, a) == pytest.approx(p)


def test_mcnemar_is_the_test_of_signs_of_right_and_wrong():
    """Two ways to the same p: answers that differ are +1 or -1."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 20))
    assert 3 < abs(a - b).sum() <= paired.EXACT_PAIRS
    assert paired.mcnemar_p(a, b) == pytest.approx(paired.sign_flip_p(a - b))


def test_the_interval_of_a_mean_difference():
    d = np.random.default_rng(2).normal(1.0, 2.0, 400)
    columns = np.stack([d, np.zeros(400)], axis=1)
    low, high = paired.bootstrap_interval(columns, paired.difference_of_means)
    half = 1.96 * d.std(ddof=1) / 20
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.1 * half)


def test_what_pairs_share_is_no_spread():
    """Documents differ by far more than the models do."""
    hard = np.random.default_rng(3).uniform(100, 900, 50)
    columns = np.stack([hard, np.full(50, 100.0), hard * 1.01, np.full(50, 100.0)], axis=1)
    low, high = paired.bootstrap_interval(columns, paired.ratio_of_sums)
    assert -0.07 < low < -0.01 * hard.mean() / 100 < high < -0.03


def test_ratios_by_hand():
    drawn = np.array([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]])
    assert paired.ratio_of_sums(drawn) == pytest.approx(6 / 8 - 10 / 12)
    assert paired.ratio_of_medians(np.array([[[1.0, 2.0], [3.0, 4.0], [9.0, 30.0]]])) == pytest.approx(3 / 4)


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 (no less than what came before), 0.9 x 1.
    assert paired.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert paired.holm([0.6, 0.7]) == [1, 1]
    assert paired.holm([]) == []


def test_models_that_are_alike_are_rarely_told_apart(monkeypatch):
    """Of 300 pairs of equal models one in twenty is called different by a single test, and no more by four corrected ones."""
    monkeypatch.setattr(paired, "RESAMPLES", 400)
    rng = np.random.default_rng(4)
    single = corrected = answers = covered = 0
    for seed in range(300):
        hard = rng.gamma(2, size=(4, 30))  # shared by both models
        d = (hard * rng.normal(1, 0.2, (4, 30))) - (hard * rng.normal(1, 0.2, (4, 30)))
        p = [paired.sign_flip_p(row, seed) for row in d]
        single += p[0] < paired.LEVEL
        corrected += min(paired.holm(p)) < paired.LEVEL
        answers += paired.mcnemar_p(*(rng.random((2, 40)) < 0.6)) < paired.LEVEL
        low, high = paired.bootstrap_interval(np.stack([d[0], np.zeros(30)], 1), paired.difference_of_means, seed)
        covered += low <= 0 <= high
    bound = 300 * 0.05 + 3 * (300 * 0.05 * 0.95) ** 0.5
    assert 3 <= single <= bound and corrected <= bound and answers <= bound
    assert covered >= 300 * 0.88  # percentiles of 30 pairs are somewhat narrow


def test_a_model_that_is_better_is_told():
    rng = np.random.default_rng(5)
    assert paired.sign_flip_p(rng.normal(-1, 1, 30)) < 0.01
    assert paired.mcnemar_p(rng.random(200) < 0.8, rng.random(200) < 0.5) < 0.001
