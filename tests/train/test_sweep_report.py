"""Figures, table and plot of a sweep, of made-up metrics."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.output import write_json
from tests.train.conftest import SHAPE
from train.config import parse
from train.sweep_charts import draw
from train.sweep_config import SweepConfig, table_of_runs
from train.sweep_report import best_of, diverged_file, duration, outcome, results, seconds, spread, table


def finish(run, losses, speed=100.0):
    """Writes what a training leaves: steps of 10 tokens, a validation before each of the equal parts and one after the last."""
    folder, steps = Path(run.run_dir), run.train.steps
    (folder / "checkpoints" / f"step-{steps}" / "model").mkdir(parents=True)
    (folder / "model").symlink_to(f"checkpoints/step-{steps}/model")
    (folder / "checkpoints" / f"step-{steps}" / "state.json").write_text(json.dumps({"validation": ["5a6b"]}))
    lines = []
    for i, loss in enumerate(losses):
        step = i * steps // (len(losses) - 1)
        if step:
            lines.append({"step": step, "tokens": 10 * step, "loss": 1.0, "tokens_per_second": speed})
        lines.append({"step": step, "tokens": 10 * step, "val_loss": loss, "val_bits_per_byte": loss / math.log(2)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def rows(tmp_path):
    """Three with two seeds each: 0.001, which is the best, 0.01, and 0.1, of which a run diverged."""
    values = {
        "run_dir": str(tmp_path), "model": {"config": SHAPE}, "data": {"seq_len": 5}, "train": {"steps": 20, "global_batch": 2},
        "sweep": {"grid": {"optim.lr": [1e-3, 1e-2, 1e-1]}, "seeds": [0, 1]},
    }  # fmt: skip
    made = table_of_runs(parse(values, SweepConfig))
    for row, losses in zip(made, [(1.0, 1.2), (1.5, 1.9), (1.1,)]):
        for run, loss in zip(row.runs, losses):
            finish(run, [5.0, 3.0, loss], speed=100.0 + run.seed)
    diverged_file(made[2].runs[1]).write_text("step 3: loss nan")
    return made


def test_figures_of_a_row(rows, tmp_path):
    found = results(rows, target=3.0)
    write_json(found, tmp_path / "results.json")  # JSON it is
    best, second, third = found
    assert best["settings"] == {"optim.lr": 1e-3} and best["tokens"] == 200 and best["parameters"] == rows[0].parameters
    assert best["val_loss"] == pytest.approx(1.1) and best["stderr"] == pytest.approx(0.1)
    assert best["val_bits_per_byte"] == pytest.approx(1.1 / math.log(2))
    assert best["seconds"] == pytest.approx((2 + 200 / 101) / 2) and best["seconds_to_target"] == pytest.approx(
        (1 + 100 / 101) / 2
    )
    # Of a pair of one seed: 0.5 and 0.7, which differ less than the seeds do.
    assert second["difference"] == pytest.approx(0.6) and second["difference_stderr"] == pytest.approx(0.1)
    assert second["stderr"] == pytest.approx(0.2)
    assert [run["state"] for run in third["runs"].values()] == ["done", "diverged"]
    assert third["difference"] == pytest.approx(0.1) and third["difference_stderr"] is None
    assert best["runs"]["0"]["validations"] == [[0, 5.0], [10, 3.0], [20, 1.0]]


def test_the_table(rows):
    lines = table(results(rows, 1.5), "nats/token", 1.5).splitlines()
    assert lines[0].split("|")[1:-1] == [
        f" {name.ljust(len(cell) - 2)} "
        for name, cell in zip(
            ["lr", "parameters", "nats/token", "− best", "bits/byte", "seconds", "seconds to 1.5"], lines[1].split("|")[1:-1]
        )
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    size = f"{rows[0].parameters:,}"
    assert cells == [
        ["0.001", size, "**1.1000 ± 0.1000**", "", "1.5870", "1.99", "1.78"],  # half-way and further from 3.0 at 1 s
        ["0.01", size, "1.7000 ± 0.2000", "+0.6000 ± 0.1000", "2.4526", "1.99", "never"],  # one seed of two
        ["0.1", size, "1.1000, 1 of 2 diverged", "+0.1000", "1.5870", "2", "1.79"],
    ]


def test_before_all_is_done(rows, tmp_path):
    (Path(rows[0].runs[0].run_dir) / "model").unlink()
    diverged_file(rows[2].runs[0]).touch()
    found = results(rows, None)
    cells = [line.split("|")[3].strip() for line in table(found, "nats/token", None).splitlines()[2:]]
    assert cells == ["1.2000, 1 of 2 to come", "**1.7000 ± 0.2000**", "diverged"]
    for row in rows:
        for run in row.runs:
            (Path(run.run_dir) / "model").unlink(missing_ok=True)
            diverged_file(run).unlink(missing_ok=True)
    found = results(rows, None)
    assert table(found, "nats/token", None).count("2 of 2 to come") == 3
    draw(found, "nats/token", tmp_path / "plot.png")


def test_a_last_loss_that_is_no_number_is_no_loss(rows):
    run = rows[0].runs[0]
    file = Path(run.run_dir) / "metrics.jsonl"
    file.write_text(file.read_text().replace('"val_loss": 1.0,', '"val_loss": NaN,'))
    found = outcome(run, None)
    assert found["state"] == "diverged" and found["val_loss"] is None and found["validations"][-1] == [10, 3.0]


def test_seconds_are_those_of_the_steps_until_then():
    lines = [
        {"tokens": 100, "tokens_per_second": 50.0},
        {"tokens": 100, "val_loss": 1.0},
        {"tokens": 300, "tokens_per_second": 20.0},
    ]
    assert [seconds(lines, tokens) for tokens in (0, 50, 100, 200, math.inf)] == [0, 1, 2, 7, 12]
    assert [duration(value) for value in (None, "never", 7.034, 1234.6)] == ["-", "never", "7.03", "1,235"]
    assert spread([]) == (None, None) and spread([2.0]) == (2.0, None)


def test_text_in_a_table_stays_what_it_is(rows):
    found = results(rows, None)
    for entry, value in zip(found, ["*-M", [0.6, 0.8], None]):
        entry["settings"] = {"model.config.hybrid_override_pattern": value, "variant": "a b"}
    lines = table(found, "nats/token", None).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`*-M`", "[0.6, 0.8]", "null"]
    assert lines[0].split("|")[1].strip() == "hybrid_override_pattern"


def test_the_plot_is_drawn_with_diverged_rows_and_long_names(rows, tmp_path):
    found = results(rows, None)
    found[0]["settings"] = {"variant": "a name that is far too long to stand beside a plot, and $more"}
    draw(found, "nats/token", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("other", ["tokens", "length", "number"])
def test_runs_that_are_validated_on_other_tokens_or_windows_have_no_best(rows, other):
    assert best_of(results(rows[:2], target=None))["name"] == rows[0].name
    run = rows[1].runs[1]
    if other == "tokens":  # the text may have changed between two calls
        (Path(run.run_dir) / "checkpoints" / "step-20" / "state.json").write_text(json.dumps({"validation": ["c7d8"]}))
    changed = {"length": {"data": replace(run.data, seq_len=6)}, "number": {"train": replace(run.train, val_sequences=3)}}
    rows[1].runs[1] = replace(run, **changed.get(other, {}))
    found = results(rows[:2], target=None)
    assert best_of(found) is None
    assert "**" not in table(found, "nats/token", None) and "best" not in table(found, "nats/token", None)
