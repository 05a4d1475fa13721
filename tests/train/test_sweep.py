"""The command as a whole; trainings run in this process, or are made up."""

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from accelerate.state import AcceleratorState

import train.__main__
from hybridlm.strict_yaml import load_yaml, parse_yaml
from tests.train.conftest import SHAPE
from tests.train.test_sweep_report import finish
from train.config import dump, parse
from train.incidents import MOST_SKIPS, Spikes
from train.loop import train as train_here
from train.settings import RunConfig
from train.sweep import DIVERGED
from train.trainings import is_done


@pytest.fixture
def settings(text_folder, tmp_path):
    """The file of a sweep, or of a run where it has no `sweep`."""

    def write(**changes) -> Path:
        values = {
            "run_dir": str(tmp_path / "out"),
            "model": {"config": SHAPE},
            "data": {"source": str(text_folder), "seq_len": 32, "cache_dir": str(tmp_path / "cache")},
            "train": {"steps": 3, "global_batch": 2, "val_every": 2, "val_sequences": 2},
            "log": {"sample_tokens": 0, "every": 1},
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values | changes))
        return tmp_path / "sweep.yaml"

    return write


@pytest.fixture
def trained(monkeypatch):
    """In the place of trainings: the loss is the learning rate, which diverges above 1, and 2 is another failure. The run
    directories of those that were trained, which this gives."""
    names = []

    def make_up(runs, told, launcher, fine):
        for run in runs:
            if is_done(run):
                continue
            names.append("/".join(Path(run.run_dir).parts[-2:]))
            Path(run.run_dir).mkdir(parents=True, exist_ok=True)
            said = f"error: step 3: loss nan and gradient norm nan {DIVERGED[0]}.\n" if run.optim.lr > 2 else "error: disk full\n"
            Path(f"{run.run_dir}.log").write_text(said)
            if run.optim.lr <= 1:
                finish(run, [5.0, run.optim.lr + run.seed / 1000])
                (Path(run.run_dir) / "config.yaml").write_text(dump(run))
            if not fine(run, int(run.optim.lr > 1)):
                raise ChildProcessError(f"the training {run.run_dir} failed")

    monkeypatch.setattr("train.sweep.train_all", make_up)
    monkeypatch.setattr("train.sweep_charts.draw", lambda found, unit, path: path.touch())
    return names


@pytest.fixture
def sweep(run_main):
    return lambda file, *arguments: run_main(train.__main__.main, "sweep", "--config", file, *arguments)


def test_a_sweep_of_real_runs(settings, sweep, tmp_path, monkeypatch):
    def all_here(runs, told, launcher, fine):
        for run in runs:
            AcceleratorState._reset_state(reset_partial_state=True)
            train_here(parse(parse_yaml(dump(run)), RunConfig))
            fine(run, 0)

    monkeypatch.setattr("train.sweep.train_all", all_here)
    status, out, err = sweep(settings(), "--grid", "optim.lr=1e-3,3e-2", "seed=1", "--sweep.target", "9")
    assert status == 0, err
    folder = tmp_path / "out"
    found = json.loads((folder / "results.json").read_text())
    last = [
        json.loads((folder / f"runs/{name}/seed-1/metrics.jsonl").read_text().splitlines()[-1]) for name in ("base", "lr-0.03")
    ]
    assert [row["val_loss"] for row in found["rows"]] == [line["val_loss"] for line in last] and found["unit"] == "nats/token"
    assert all(row["seconds"] > row["seconds_to_target"] == 0 for row in found["rows"])  # 9 is above what nothing learned
    assert (folder / "table.md").read_text() in out and str(folder / "plot.png") in out
    assert (folder / "plot.png").exists()


def test_rows_and_seeds_may_be_added_and_nothing_is_trained_twice(settings, trained, sweep, tmp_path):
    file = settings(sweep={"grid": {"optim.lr": [0.1, 0.2]}, "seeds": [0]})
    assert sweep(file)[0] == 0 and trained == ["lr-0.1/seed-0", "lr-0.2/seed-0"]
    assert sweep(file)[0] == 0 and len(trained) == 2
    status, out, _ = sweep(file, "--grid", "optim.lr=0.05,0.1", "--grid", "seed=0,1", "optim.beta1=0.5")
    assert status == 0 and trained[2:] == [f"beta1-0.5_lr-{lr}/seed-{seed}" for lr in (0.05, 0.1) for seed in (0, 1)]
    assert "**0.0505 ± 0.0005**" in out
    assert sweep(file, "--grid", "optim.lr=0.1", "seed=0,1")[0] == 0 and trained[6:] == ["lr-0.1/seed-1"]
    assert load_yaml(tmp_path / "out" / "config.yaml")["sweep"]["seeds"] == [0, 1]


def test_the_table_is_there_while_it_works(settings, trained, sweep, tmp_path, monkeypatch):
    seen = []
    write = train.sweep.write
    monkeypatch.setattr(
        "train.sweep.write", lambda *a: (write(*a), seen.append((tmp_path / "out/table.md").read_text().count("to come")))[0]
    )
    assert sweep(settings(), "--grid", "optim.lr=0.1,0.2", "seed=0")[0] == 0
    assert seen == [2, 1, 0, 0]


def test_a_run_that_diverges_stops_no_other_and_is_not_tried_again(settings, trained, sweep, tmp_path):
    status, out, err = sweep(settings(), "--grid", "optim.lr=3.0,0.1", "seed=0")
    assert status == 0, err
    assert out.splitlines()[2].split("|")[3].strip() == "diverged" and "**0.1000**" in out
    assert (tmp_path / "out/runs/lr-3.0/seed-0.diverged").read_text().startswith("step 3: loss nan and")
    assert sweep(settings(), "--grid", "optim.lr=3.0,0.1", "seed=0")[0] == 0 and len(trained) == 2
    (tmp_path / "out/runs/lr-3.0/seed-0").rmdir()  # deleted, it is tried again
    assert sweep(settings(), "--grid", "optim.lr=3.0,0.1", "seed=0")[0] == 0 and len(trained) == 3


def test_no_plot_of_other_rows_is_left_beside_the_table(settings, trained, sweep, tmp_path, monkeypatch):
    assert sweep(settings(), "--grid", "optim.lr=0.1", "seed=0")[0] == 0 and (tmp_path / "out/plot.png").exists()
    monkeypatch.setattr("train.sweep.train_all", Mock(side_effect=KeyboardInterrupt))
    assert sweep(settings(), "--grid", "optim.lr=0.1,0.2", "seed=0")[0] == 1 and not (tmp_path / "out/plot.png").exists()


def test_any_other_failure_ends_it(settings, trained, sweep, tmp_path):
    status, _, err = sweep(settings(), "--grid", "optim.lr=2.0,0.1", "seed=0")
    assert status == 1 and "lr-2.0/seed-0 failed" in err and len(trained) == 1
    assert not list(tmp_path.rglob("*.diverged"))


def test_what_diverges_says_the_words_that_are_looked_for(quiet_config):
    with pytest.raises(FloatingPointError, match=DIVERGED[0]):
        train_here(quiet_config(train__steps=1), loss=lambda module, inputs: module(**inputs).loss * math.nan)
    spikes = Spikes(1.0, 8, [1.0], MOST_SKIPS - 1)
    with pytest.raises(FloatingPointError, match=DIVERGED[1]):
        spikes.skip(9.0)


def test_another_sweep_or_run_is_not_overwritten(settings, trained, sweep, run_main, tmp_path):
    grid = ("--grid", "optim.lr=0.1", "seed=0")
    assert sweep(settings(), *grid)[0] == 0

    def content():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"}

    before = content()
    status, _, err = sweep(settings(), *grid, "--train.steps", "4")
    assert status == 2 and "holds a sweep with other settings:\n  train.steps: 3 -> 4\n" in err
    assert run_main(train.__main__.main, "--config", settings())[0] == 2
    assert sweep(settings(run_dir=str(tmp_path / "out/runs/lr-0.1/seed-0")), *grid)[2].strip().endswith("with --run_dir.")
    assert before == content()


def test_a_variant_that_has_changed_is_told(settings, trained, sweep):
    assert sweep(settings(sweep={"variants": {"a": {"optim.lr": 0.1}}, "seeds": [0]}))[0] == 0
    status, _, err = sweep(settings(sweep={"variants": {"a": {"optim.lr": 0.2}}, "seeds": [0]}))
    assert status == 2 and "runs/a/seed-0 was trained with other settings: optim.lr: 0.1 -> 0.2." in err


BAD = {
    "nothing varies": ((), "there is nothing to compare; give values of a setting, such as --grid optim.lr=1e-3,3e-3"),
    "a name": (("--grid", "optim.rl=1"), "unknown setting optim.rl; did you mean optim.lr?"),
    "no value": (("--grid", "optim.lr"), "it must be KEY=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_nothing(case, settings, trained, sweep, tmp_path):
    arguments, words = BAD[case]
    status, _, err = sweep(settings(), *arguments)
    assert status == 2 and words in err and not trained and not (tmp_path / "out").exists()


def test_it_is_one_process(settings, trained, sweep, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = sweep(settings(), "--grid", "optim.lr=0.1")
    assert status == 2 and "--launcher" in err


def test_interrupted_it_keeps_what_is_done(settings, trained, sweep, tmp_path, monkeypatch):
    whole = train.sweep.train_all

    def cut(runs, *arguments):
        whole(runs[:1], *arguments)
        raise KeyboardInterrupt("run X stopped before the end")

    with monkeypatch.context() as patch:
        patch.setattr("train.sweep.train_all", cut)
        status, _, err = sweep(settings(), "--grid", "optim.lr=0.1,0.2", "seed=0")
    assert status == 1 and err.startswith("interrupted: run X stopped before the end; what is finished is kept")
    assert "0.1000" in (tmp_path / "out/table.md").read_text()
    assert sweep(settings(), "--grid", "optim.lr=0.1,0.2", "seed=0")[0] == 0 and len(trained) == 2


def test_help_explains_and_settings_can_be_printed(settings, sweep, run_main, tmp_path):
    assert "sweep,status}" in run_main(train.__main__.main, "--help")[1]
    out = sweep(settings(), "--help")[1]
    assert "KEY=V,V" in out and "(mapping, default {})" in out and "every combination is a row" in out
    status, out, _ = sweep(settings(), "--grid", "optim.lr=0.1,0.2", "--print_config")
    assert status == 0 and yaml.safe_load(out)["sweep"]["grid"] == {"optim.lr": [0.1, 0.2]} and not (tmp_path / "out").exists()
