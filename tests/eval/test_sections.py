"""Tables of the report; what becomes of them on a page is in test_report.py."""

from eval.sections import accuracy, configuration
from hybridlm.pages.blocks import Shown


def row(label, task="piqa", value=0.5, **fields):
    return {"label": label, "task": task, "metric": "acc", "value": value, "questions": 8, **fields}


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
