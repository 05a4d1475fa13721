"""Trainings in processes of their own, by a stand-in that is started in the place of Python and needs no model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from tests.train.conftest import SHAPE
from train import trainings
from train.config import dump, parse
from train.run import is_locked
from train.trainings import is_done, train_all

# Trains as the file `what` beside the settings says, and writes down that it began, was asked to stop, and ended.
STAND_IN = """
import fcntl, json, os, pathlib, signal, sys, time, yaml

file = pathlib.Path(sys.argv[-1])
assert sys.argv[1:-1] == ["-m", "train", "--config"]
settings = yaml.safe_load(file.read_text())
run, steps = pathlib.Path(settings["run_dir"]), settings["train"]["steps"]
what = (file.parent / "what").read_text()

def say(word):
    with open(file.parent / "said", "a") as out:
        out.write(f"{word} {run.name}\\n")

def stop(*_):
    if what == "linger":
        say("stopping")
        time.sleep(0.3)
    say("stopped")
    sys.exit()

signal.signal(signal.SIGTERM, stop)
say("began")
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "hold":
    run.mkdir()
    held = (run / ".lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    while (file.parent / "what").read_text() == "hold":
        time.sleep(0.01)
    time.sleep(0.1)
if what == "fail":
    sys.exit("12%|#  |error: no luck\\n  at all\\n 13%|#  |")
if what in ("wait", "linger"):
    time.sleep(60)
if what == "leave":
    stop()
(run / "checkpoints" / f"step-{steps}" / "model").mkdir(parents=True)
(run / "metrics.jsonl").write_text(json.dumps({"step": steps, "val_loss": 1.0}) + "\\n")
(run / "model").symlink_to(f"checkpoints/step-{steps}/model")
say("ended")
"""


@pytest.fixture
def runs(tmp_path):
    """Two, of 3 and 5 steps."""

    def run(name: str, steps: int):
        values = {"run_dir": str(tmp_path / "runs" / name), "model": {"config": SHAPE}, "train": {"steps": steps}}
        return parse(values)

    return [run("first", 3), run("second", 5)]


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """What trains as it is told; and what it has said so far."""
    script, folder = tmp_path / "stand-in.py", tmp_path / "runs"
    script.write_text(STAND_IN)
    folder.mkdir()
    monkeypatch.setattr(trainings, "POLL", 0.01)

    def tell(what: str) -> str:
        (folder / "what").write_text(what)
        return f"{sys.executable} {script}"

    return tell


def said(tmp_path) -> list[str]:
    file = tmp_path / "runs" / "said"
    return file.read_text().splitlines() if file.exists() else []


def test_with_a_launcher_one_comes_after_the_other_and_what_is_done_is_not_done_again(runs, launcher, tmp_path):
    train_all(runs[:1], "training", launcher("train"))
    assert said(tmp_path) == ["began first", "ended first"] and is_done(runs[0])
    train_all(runs, "training", launcher("train"))
    train_all(runs, "training", launcher("train"))
    assert said(tmp_path) == ["began first", "ended first", "began second", "ended second"]


def test_a_failure_names_the_log_and_what_it_says_last(runs, launcher, tmp_path):
    with pytest.raises(ChildProcessError, match=r"training .*runs/first failed; .*runs/first\.log says why: no luck\n  at all$"):
        train_all(runs, "training", launcher("fail"))
    assert said(tmp_path) == ["began first"]
    train_all(runs, "training", launcher("train"))
    assert all(map(is_done, runs))


def test_of_one_that_was_killed_it_is_said(runs, launcher):
    with pytest.raises(ChildProcessError, match=r"training .*runs/first was killed, .*memory.* .*runs/first\.log has what"):
        train_all(runs, "training", launcher("die"))


def test_what_a_call_that_was_killed_left_at_work_is_waited_for(runs, launcher, tmp_path):
    file = trainings.settings_file(runs[0])
    file.write_text(dump(runs[0]))
    launcher("hold")
    left = subprocess.Popen([sys.executable, str(tmp_path / "stand-in.py"), "-m", "train", "--config", str(file)])
    while not is_locked(Path(runs[0].run_dir)):
        time.sleep(0.01)
    train_all(runs, "training", launcher("train"))
    assert left.wait() == 0
    assert said(tmp_path) == ["began first", "ended first", "began second", "ended second"]


def test_interrupted_it_stops_the_training_at_work_and_goes_on_when_called_again(runs, launcher, tmp_path):
    def interrupt():
        while "began first" not in said(tmp_path):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background would ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_all(runs, "training", launcher("wait"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert said(tmp_path) == ["began first", "stopped first"]
    train_all(runs, "training", launcher("train"))
    assert said(tmp_path)[2:] == ["began first", "ended first", "began second", "ended second"]


def test_who_asks_twice_leaves_no_training_behind(runs, launcher, tmp_path):
    def interrupt():
        for word in ("began first", "stopping first"):
            while word not in said(tmp_path):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_all(runs, "training", launcher("linger"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert said(tmp_path) == ["began first", "stopping first", "stopped first"]


def test_one_that_was_stopped_from_elsewhere_is_not_taken_for_done(runs, launcher, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"first, .*second stopped before the end"):
        train_all(runs, "training", launcher("leave"))
    assert said(tmp_path) == ["began first", "stopped first", "began second", "stopped second"]


def test_one_that_was_stopped_in_its_last_validation_is_not_done(runs, launcher, tmp_path):
    """It has its last checkpoint, and the loss is of an earlier step."""
    train_all(runs, "training", launcher("train"))
    metrics = tmp_path / "runs" / "first" / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 0, "val_loss": 9.0}) + "\n" + json.dumps({"step": 3, "loss": 1.0}) + "\n")
    assert [is_done(run) for run in runs] == [False, True]


def test_a_line_of_metrics_that_is_being_written_is_not_looked_at(runs, tmp_path):
    folder = Path(runs[0].run_dir)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert trainings.steps_done(runs[0]) == 2


def test_the_settings_of_all_are_there_from_the_start(runs, launcher, tmp_path):
    with pytest.raises(ChildProcessError):
        train_all(runs, "training", launcher("fail"))
    assert [(tmp_path / "runs" / f"{name}.yaml").exists() for name in ("first", "second")] == [True, True]


@pytest.mark.parametrize("asked", [None, "7"])
def test_threads_are_shared_out_but_where_the_environment_says_how_many(asked, runs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(trainings.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainings.subprocess, "Popen", lambda command, env, **_: seen.append(env["OMP_NUM_THREADS"]))
    Path(runs[0].run_dir).parent.mkdir(parents=True)
    trainings.start(runs[0], 3, None)
    assert seen == [asked or "3"]


def test_where_a_failure_is_fine_the_others_go_on(runs, launcher, tmp_path, monkeypatch):
    """And what is fine is asked of each that ended, once it has; the steps it lacks are no longer waited for."""
    told, bars = [], []
    monkeypatch.setattr(trainings, "tqdm", lambda **named: bars.append(tqdm(**named)) or bars[-1])

    def fine(run, status):
        told.append((Path(run.run_dir).name, status, trainings.last_error(run)))
        return True

    train_all(runs, "training", launcher("fail"), fine)
    assert told == [("first", 1, ": no luck\n  at all"), ("second", 1, ": no luck\n  at all")]
    assert bars[0].total == 0
    train_all(runs, "training", launcher("train"), lambda run, status: told.append((status, trainings.last_error(run))) or True)
    assert told[2:] == [(0, "."), (0, ".")]  # in the log, the error of the start before is above the new one's
