import pytest

from hybridlm.pages.blocks import Shown, column_leaders, leaders


@pytest.mark.parametrize(
    ("values", "pick", "best"),
    [
        ([1, 3, 2], max, {1}),
        ([1, 3, 2], min, {0}),
        ([3, Shown("three", 3), 2], max, {0, 1}),  # a tie at the top
        ([2, 2.0], max, set()),  # equals
        ([None, 2], max, set()),  # nothing beside it
        ([None, 2, "-", 5], min, {1}),
    ],
)
def test_the_best_of_a_column(values, pick, best):
    rows = [{"x": value, "y": 1} for value in values]
    assert column_leaders(rows, {"x": pick, "y": max}) == {(i, "x") for i in best}
    assert leaders(rows, [], pick) == set()
