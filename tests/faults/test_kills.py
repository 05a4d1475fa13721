"""A run that is killed at any moment goes on, with the same command, to the very end that it would have had."""

import random
import shutil
import signal
import time

import pytest

from tests.faults import harness
from train import checkpoint

PARTS = 8  # of a sweep, so that processes can share it


def recover(config, expected, ranks):
    """The same command again: it ends well, and as if nothing had happened."""
    again = harness.run(config, lambda rank: harness.without_waiting_for_the_disk(), ranks)
    assert again == [0] * ranks, harness.log_of(config)
    assert harness.end_of(config) == expected
    assert harness.steps_of(harness.run_of(config)) == [harness.STEPS - 2, harness.STEPS]
    shutil.rmtree(harness.run_of(config))


def kill_after(lab, reference, number, ranks=1, checkpoint_async=True):
    """Kills a run after its file operation of this number, and recovers. Of two ranks sometimes only the one that saves."""
    expected, operations = reference(ranks, checkpoint_async)
    config = harness.write_config(lab, f"killed-{ranks}-{checkpoint_async}-{number}", checkpoint_async=checkpoint_async)
    alone = ranks > 1 and number % 4 == 0

    def disturb(rank):
        harness.without_waiting_for_the_disk()
        if rank == 0:
            harness.after_operation(number, harness.die if alone else harness.die_with_all_ranks)

    first, *others = harness.end(harness.start(config, disturb, ranks), limit=20)
    assert first == -signal.SIGKILL, harness.log_of(config)
    assert 0 not in others
    # Renamed is complete: that checkpoint, and no older one, is where it goes on.
    complete = [line.split()[1] for line in operations[:number] if line.startswith("replace step-")]
    found = checkpoint.newest(harness.run_of(config))
    assert (found and found.name) == (complete[-1] if complete else None)
    recover(config, expected, ranks)


def test_a_run_killed_in_a_save_at_its_end_or_in_a_pruning_goes_on_bit_for_bit(lab, reference):
    _, operations = reference()
    save = operations.index("mkdir .step-4.unfinished") + 1
    for number in (save + 40, operations.index("replace step-4") + 1, operations.index("replace .step-2.deleted") + 4):
        kill_after(lab, reference, number)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_after_any_file_operation_goes_on_bit_for_bit(lab, reference, record_property, part):
    _, operations = reference()
    assert len(operations) > 200
    kill_after_each(lab, reference, record_property, range(1 + part, len(operations) + 1, PARTS))


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "checkpoint_async"), [(1, False), (2, True)])
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_after_any_file_operation_of_a_save_goes_on_bit_for_bit(
    lab, reference, record_property, part, ranks, checkpoint_async
):
    _, operations = reference(ranks, checkpoint_async)
    # The last one: only there is an older checkpoint pruned.
    first = operations.index(f"mkdir .step-{harness.STEPS}.unfinished") + 1
    numbers = range(first + part, len(operations) + 1, PARTS)
    assert len(numbers) > 5
    kill_after_each(lab, reference, record_property, numbers, ranks, checkpoint_async)


def kill_after_each(lab, reference, record_property, numbers, ranks=1, checkpoint_async=True):
    for number in numbers:
        record_property(f"kill points tried, {ranks} rank(s)", 1)
        kill_after(lab, reference, number, ranks, checkpoint_async)
        record_property(f"kill points recovered, {ranks} rank(s)", 1)


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "kills"), [(1, 25), (2, 8)])
@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_random_moments_up_to_three_times_goes_on_bit_for_bit(
    lab, reference, record_property, part, ranks, kills
):
    expected, _ = reference(ranks)
    began = time.perf_counter()
    assert harness.run(harness.write_config(lab, f"timed-{ranks}-{part}"), ranks=ranks) == [0] * ranks
    seconds = time.perf_counter() - began
    seed = 100 * ranks + part
    record_property("seeds", str(seed))
    rng, delivered = random.Random(seed), 0
    for number in range(10 * kills):  # a child may end before its moment comes, which is no kill
        config = harness.write_config(lab, f"random-{ranks}-{part}-{number}")
        times = 0
        for _ in range(rng.choice([1, 1, 2, 3])):
            children = harness.start(config, ranks=ranks)
            time.sleep(rng.uniform(0, seconds))
            harness.kill(children if rng.random() < 0.7 else [rng.choice(children)])
            times += -signal.SIGKILL in harness.end(children, limit=20)
        record_property(f"random kills tried, {ranks} rank(s)", times)
        recover(config, expected, ranks)
        record_property(f"random kills recovered, {ranks} rank(s)", times)
        delivered += times
        if delivered >= kills:
            return
    pytest.fail(f"only {delivered} of {number + 1} runs were killed before they ended")
