"""Tables of the report; what becomes of them on a page is in test_report.py."""

import pytest

from eval.page import html_table, markdown_table
from eval.sections import Shown, Table, accuracy, column_leaders, configuration, leaders


def row(label, task="piqa", value=0.5, **fields):
    return {"label": label, "task": task, "metric": "acc", "value": value, "questions": 8, **fields}


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


def test_the_best_of_each_task_whichever_way_it_counts_and_whatever_a_model_is_called():
    """`task` and `questions` are columns of the table, too."""
    rows = [row("task", value=0.4), row("questions", value=0.6)]
    rows += [row(name, "text", value, metric="perplexity") for name, value in (("task", 9.0), ("questions", 12.0))]
    rows += [row(name, "even", 0.5) for name in ("task", "questions")]
    table = accuracy(rows, ["questions", "task"])[0]
    assert list(table.columns.values()) == ["task", "questions", "task", "questions"]
    assert table.best == {(0, "of questions"), (1, "of task")}
    assert [line["task"] for line in table.rows] == ["piqa, acc", "text, perplexity", "even, acc"]
    assert [line["questions"] for line in table.rows] == [8, 8, 8]
    assert table.rows[0]["of questions"] == Shown("0.600", 0.6)


def test_a_run_called_setting_stands_beside_the_settings():
    runs = [{"label": name, "config_text": f"seed: {seed}\nrun_dir: {name}\n"} for name, seed in (("setting", 1), ("b", 2))]
    table = configuration(runs)[0]
    assert table.rows == [{"setting": "seed", "of setting": "1", "of b": "2"}]
    assert list(table.columns.values()) == ["what differs", "setting", "b"]


def test_the_best_cells_are_set_off_and_numbers_are_sorted_by_their_values():
    table = Table({"a": "name", "b": "much"}, [{"a": "x", "b": Shown("1.0 k", 1000)}, {"a": "y"}], {(0, "b")})
    page = html_table(table)
    assert '<td class="text">x</td><td class="best" data-value="1000">1.0 k</td>' in page
    assert page.count("best") == 1
    assert markdown_table(table).splitlines()[2:] == ["| x | **1.0 k** |", "| y | - |"]
