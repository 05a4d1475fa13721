import pytest

from hybridlm.pages.charts import POINTS, apart, brief, file_name, short_name, thinned


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.2, 0.8, 0.5], [0.2, 0.8, 0.5]),
        ([0.5, 0.5, 0.55], [0.5, 0.6, 0.7]),
        ([1.0, 0.95, 0.1], [1.0, 0.9, 0.1]),  # pushed down from the top
        ([0.98] * 4, [0.7, 0.8, 0.9, 1.0]),
    ],
)
def test_names_keep_apart(wanted, placed):
    assert apart(wanted, 0.1) == pytest.approx(placed)


def test_a_long_curve_is_averaged():
    x, y = thinned(range(10 * POINTS), [3.0] * (10 * POINTS))
    assert len(x) == len(y) == POINTS
    assert (x[0], x[-1]) == (4.5, 10 * POINTS - 5.5) and set(y) == {3.0}
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_words_for_a_picture():
    assert [brief(n) for n in (64, 1000, 1024, 65536)] == ["64", "1,000", "1k", "64k"]
    assert short_name("a" * 50) == "…" + "a" * 33
    assert file_name("NIAH/multi key (1)") == "niah-multi-key--1"
