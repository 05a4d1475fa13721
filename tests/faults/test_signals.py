"""A run that is told to stop, and a disk that is slow or full."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import harness
from train import checkpoint


def newest_step(config):
    found = checkpoint.newest(harness.run_of(config))
    return int(found.name.removeprefix("step-")) if found else 0


def step_of(config):
    """The last step that metrics.jsonl has."""
    file = harness.run_of(config) / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in file.read_text().splitlines()), default=0) if file.exists() else 0


def wait_until(condition):
    deadline = time.monotonic() + harness.LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.003)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def finish(config, reference):
    assert harness.run(config) == [0], harness.log_of(config)
    assert harness.end_of(config) == reference()[0]


@pytest.mark.faults
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("save", [2, 4, 6])
def test_a_signal_in_a_save_leaves_a_valid_one_and_the_run_goes_on(lab, reference, save, again):
    """The step at hand is saved and the run ends well, however often it is told."""
    _, operations = reference()
    begin = operations.index(f"mkdir .step-{save}.unfinished") + 1
    end = operations.index(f"replace step-{save}") + 1
    for number in (begin, begin + 20, (begin + end) // 2, end - 1, end):
        config = harness.write_config(lab, f"told-in-save-{save}-{number}-{again}")

        def disturb(rank, number=number):
            harness.after_operation(number, interrupt)
            if again:
                harness.after_operation(number + 5, interrupt)

        (status,) = harness.run(config, disturb)
        assert status == 0, harness.log_of(config)
        assert newest_step(config) == step_of(config) >= save
        finish(config, reference)


@pytest.mark.faults
@pytest.mark.parametrize("checkpoint_async", [True, False])
def test_two_seconds_of_grace_on_a_slow_disk_leave_the_checkpoint_before(lab, reference, checkpoint_async):
    _, operations = reference(checkpoint_async=checkpoint_async)
    config = harness.write_config(lab, f"grace-{checkpoint_async}", checkpoint_async=checkpoint_async)
    first_save = operations.index("mkdir .step-4.unfinished")
    numbers = itertools.count()

    def slow(perform, operation, *arguments):
        if next(numbers) > first_save:
            time.sleep(0.2)  # the next save takes a quarter of a minute
        return perform(operation, *arguments)

    (child,) = harness.start(config, lambda rank: harness.around_operations(slow))
    wait_until((harness.run_of(config) / "checkpoints" / ".step-4.unfinished").exists)
    os.kill(child, signal.SIGTERM)
    assert harness.end([child], limit=2) == [None]
    assert newest_step(config) == 2
    finish(config, reference)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_a_signal_at_a_random_moment_ends_the_run_with_the_step_at_hand(lab, ranks, seed, record_property):
    """To one of two ranks is enough."""
    rng = random.Random(seed)
    config = harness.write_config(lab, f"told-{ranks}-{seed}", steps=2000, checkpoint_every=10)
    children = harness.start(config, ranks=ranks)
    at = rng.randrange(1, 25)
    wait_until(lambda: step_of(config) >= at)
    time.sleep(rng.uniform(0, 0.1))
    began = time.monotonic()
    os.kill(rng.choice(children), signal.SIGTERM)
    assert harness.end(children) == [0] * ranks, harness.log_of(config)
    record_property("seconds from SIGTERM to exit", time.monotonic() - began)
    record_property("seeds", str(seed))
    assert newest_step(config) == step_of(config) < 2000


def wait_for_training(config, seconds=1.0):
    """Holds the writing of each checkpoint's tensors until training has gone a step past it, where it may."""

    def wrapped(perform, operation, *arguments):
        if operation is os.open and Path(arguments[0]).name == "model.safetensors":
            saved = int(Path(arguments[0]).parts[-3].split("-")[1].split(".")[0])
            deadline = time.monotonic() + seconds
            while step_of(config) <= saved < harness.STEPS and time.monotonic() < deadline:
                time.sleep(0.003)
            with config.with_suffix(".overtaken").open("a") as out:
                out.write(f"{saved} {step_of(config)}\n")
        return perform(operation, *arguments)

    harness.around_operations(wrapped)


@pytest.mark.faults
def test_a_checkpoint_that_training_overtakes_is_of_its_own_step(lab):
    waiting, behind = (
        harness.write_config(lab, name, checkpoint_async=name == "behind", keep_checkpoints=9) for name in ("waiting", "behind")
    )
    assert harness.run(waiting) == [0], harness.log_of(waiting)
    assert harness.run(behind, lambda rank: wait_for_training(behind)) == [0], harness.log_of(behind)
    for step in (2, 4, 6):
        for name in ("model/model.safetensors", "optimizer.safetensors", "state.json"):
            a, b = (harness.run_of(config) / "checkpoints" / f"step-{step}" / name for config in (waiting, behind))
            assert a.read_bytes() == b.read_bytes(), f"{name} of step {step}"
    overtaken = [line.split() for line in behind.with_suffix(".overtaken").read_text().splitlines()]
    assert [saved for saved, _ in overtaken] == ["2", "4", "6"]
    assert [int(now) - int(saved) > 0 for saved, now in overtaken] == [True, True, False], "training waited for the disk"


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "checkpoint_async"), [(1, True), (1, False), (2, True)])
def test_a_full_disk_ends_the_run_soon_with_a_clear_error_and_keeps_the_older_checkpoints(
    lab, reference, ranks, checkpoint_async
):
    _, operations = reference(checkpoint_async=checkpoint_async)
    begin, end = (operations.index(line) for line in ("mkdir .step-4.unfinished", "replace step-4"))
    for room in (begin, begin + 30, (begin + end) // 2, end - 8):
        config = harness.write_config(lab, f"full-{ranks}-{checkpoint_async}-{room}", checkpoint_async=checkpoint_async, steps=12)
        numbers = itertools.count()

        def full(perform, operation, *arguments, numbers=numbers, room=room):
            if next(numbers) >= room and operation in (os.open, os.write, os.mkdir):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return perform(operation, *arguments)

        first, *others = harness.run(config, lambda rank, full=full: rank or harness.around_operations(full), ranks)
        assert first == 1, harness.log_of(config)
        assert not {0, None} & set(others)
        assert "No space left on device" in harness.log_of(config)
        assert step_of(config) <= 6  # the next save at the latest has the news
        assert newest_step(config) == 2
        assert harness.run(config, ranks=ranks) == [0] * ranks
        assert [line["step"] for line in harness.lines_of(harness.run_of(config)) if "loss" in line] == list(range(1, 13))


@pytest.mark.faults
def test_a_ctrl_c_that_ends_the_reader_of_the_output_too_costs_no_checkpoint(lab):
    """As under `| tee`, which the same Ctrl-C kills."""
    config = harness.write_config(lab, "tee", steps=100_000, checkpoint_every=100_000)
    command = [sys.executable, "-m", "train", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while b"step/s, loss" not in process.stdout.read1():
        assert process.poll() is None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert len(harness.steps_of(harness.run_of(config))) == 1
