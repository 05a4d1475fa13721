"""Wherever a run stops, by whatever, and on however many ranks it goes on: the same samples, the same losses."""

import json
import os
import signal
from hashlib import sha256

import pytest

from tests.faults import harness
from train import checkpoint


def crash():
    raise RuntimeError("a fault of the user's")


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


# How to stop, in the middle of a step, and the exit status of a single rank.
WAYS = {"signal": (interrupt, 0), "kill": (harness.die_with_all_ranks, -signal.SIGKILL), "exception": (crash, 1)}


def leg(config, ranks, stop=None, way="signal"):
    """Runs `config` on `ranks` until `way` happens in step `stop` (0: before the first). Notes who took what in each step."""
    done = checkpoint.newest(harness.run_of(config))
    done = int(done.name.removeprefix("step-")) if done else 0
    act = WAYS[way][0]
    for step in range(done + 1, harness.STEPS + 1):  # an earlier leg took what does not count, perhaps on more ranks
        for file in config.parent.glob(f"{config.stem}-{step}-*.taken"):
            file.unlink()

    def disturb(rank):
        harness.without_waiting_for_the_disk()

        def note(number, batch):
            rows = [sha256(row.numpy().tobytes()).hexdigest() for row in batch["input_ids"]]
            config.with_name(f"{config.stem}-{done + number}-{rank}.taken").write_text(json.dumps(rows))

        harness.before_each_step(note)
        if stop == 0:
            harness.after_operation(2, act)
        elif stop:
            harness.in_step(stop - done, act)

    return harness.run(config, disturb, ranks)


def taken(config):
    """Samples in the order in which they were taken, by what is in them, of the steps that count."""
    steps = [sorted(config.parent.glob(f"{config.stem}-{step}-*.taken")) for step in range(1, harness.STEPS + 1)]
    return [row for files in steps for file in files for row in json.loads(file.read_text())]


@pytest.fixture(scope="module")
def whole(lab):
    """A run on one rank that nothing disturbed."""
    config = harness.write_config(lab, "whole")
    assert leg(config, 1) == [0]
    rows = taken(config)
    assert len(rows) == harness.STEPS * harness.BATCH
    # 446 tokens are 13.9 windows: in the first epoch none comes twice, in the next they come again in another order and place.
    assert len(set(rows[:13])) == 13
    return config


def resume(lab, whole, ranks, stop, way):
    config = harness.write_config(lab, f"legs-{'-'.join(map(str, ranks))}-{way}-{stop}")
    stops = [stop + i for i in range(len(ranks) - 1)]
    for count, at in zip(ranks, stops):
        statuses = leg(config, count, at, way)
        if count == 1 and at > 0:
            assert statuses == [WAYS[way][1]], harness.log_of(config)
        assert None not in statuses
        if way == "signal" and at > 0:
            assert harness.steps_of(harness.run_of(config))[-1] == at
    assert leg(config, ranks[-1]) == [0] * ranks[-1], harness.log_of(config)
    assert taken(config) == taken(whole)
    if set(ranks) == {1}:
        assert harness.end_of(config) == harness.end_of(whole)
    for mine, other in zip(*(harness.lines_of(harness.run_of(c)) for c in (config, whole)), strict=True):
        assert mine.keys() == other.keys()
        assert mine["step"] == other["step"]
        for key in mine.keys() & {"loss", "val_loss"}:
            assert abs(mine[key] - other[key]) < 1e-6 * other[key]


def test_a_run_stopped_by_a_signal_in_its_middle_goes_on_bit_for_bit_with_the_next_samples(lab, whole):
    resume(lab, whole, (1, 1), 2, "signal")


# Before the first step, the first, the middle, the end of the first epoch (in step 4), the last but one, the last.
@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 6])
def test_a_run_stopped_in_any_way_at_any_step_goes_on_bit_for_bit(lab, whole, way, stop, record_property):
    resume(lab, whole, (1, 1), stop, way)
    record_property("resumes equal bit for bit", 1)


@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
@pytest.mark.parametrize("ranks", [(1, 2, 1), (2, 1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks_and_no_sample_is_lost_or_repeated(
    lab, whole, ranks, way, stop, record_property
):
    resume(lab, whole, ranks, stop, way)
    record_property("resumes on another number of ranks, losses within 1e-6", 1)
