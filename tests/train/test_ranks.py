"""Ranks are real processes here, forked by `run_ranks`; the loop is a stand-in of one collective a step."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed, nn

from train import ranks
from train.ranks import RanksError, agree, check_equal, digest, everywhere, first_on_main, gather, group_timeout, watch
from train.signals import stop_signals

STEPS = 40


def accelerate(timeout=20):
    return Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=group_timeout(timeout))])


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


def loop(run_dir, fault, timeout=20):
    """Trains nothing; `fault(step)` comes before each step's collective."""
    accelerator = accelerate(timeout)
    with stop_signals(), watch(accelerator, run_dir, timeout) as watching:
        for step in range(1, STEPS + 1):
            watching.step, watching.phase = step, "training"
            fault(step)
            assert accelerator.reduce(torch.ones(1)).item() == accelerator.num_processes
            time.sleep(0.01)


def sign(run_dir, rank):
    return json.loads((run_dir / "ranks" / f"rank-{rank}.json").read_text())


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def test_with_one_process_nothing_is_written_or_compared(run_dir):
    accelerator = Accelerator(cpu=True)
    with watch(accelerator, run_dir, 1) as watching:
        watching.step = 1
        agree(accelerator, {"seed": 0})
        check_equal(accelerator, nn.Linear(2, 2), 1)
        assert first_on_main(accelerator, lambda: 3) == 3
    assert not (run_dir / "ranks").exists()
    with pytest.raises(ZeroDivisionError):
        everywhere(accelerator, lambda: 1 / 0)


def test_collectives_wait_longer_than_the_watch(run_ranks):
    def work(rank):
        accelerate(60).wait_for_everyone()  # with rank 0 ends the place where the others would meet
        print(torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout)

    for ended in run_ranks(2, work):
        assert ended.out == "0:01:30.500000\n", ended.err


def test_ranks_exchange_json_of_any_length(run_ranks):
    def work(rank):
        print(json.dumps(gather(accelerate(), {"é" * rank: [rank, None]})))

    for ended in run_ranks(3, work):
        assert json.loads(ended.out) == [{"": [0, None]}, {"é": [1, None]}, {"éé": [2, None]}]


@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_with_another_configuration_is_named_on_all(run_ranks, count):
    def work(rank):
        lr = 1e-3 if rank < count - 1 else 2e-3
        agree(accelerate(), {"config": {"seed": 0, "optim": {"lr": lr}}, "versions": {"torch": "2.13"}, "arguments": ["--a"]})

    for ended in run_ranks(count, work):
        assert ended.status == 1
        assert "ValueError: the ranks of this run were not started alike (rank 0 -> the other):\n  rank" in ended.err
        assert f"rank {count - 1}: config.optim.lr: 0.001 -> 0.002\nStart all" in ended.err


def test_ranks_that_were_started_alike_go_on(run_ranks):
    def work(rank):
        agree(accelerate(), {"config": {"seed": 0}, "arguments": ("--a",)})

    assert [ended.status for ended in run_ranks(2, work)] == [0, 0]


@pytest.mark.parametrize(
    ("fault", "name", "text"),
    [
        (ValueError("no such data"), "ValueError", "rank 0: no such data"),
        (OSError(28, "No space left on device"), "OSError", "rank 0: [Errno 28] No space left on device"),
        (KeyError("text"), "train.ranks.RanksError", "rank 0: KeyError: 'text'"),
    ],
)
def test_what_fails_on_rank_0_before_a_barrier_fails_on_all(run_ranks, fault, name, text):
    def fail():
        raise fault

    def work(rank):
        accelerator = accelerate()
        first_on_main(accelerator, fail if rank == 0 else lambda: print("worked"))

    for ended in run_ranks(2, work):
        assert ended.status == 1
        assert ended.err.endswith(f"\n{name}: {text}\n")
        assert "worked" not in ended.out


def test_what_fails_on_another_rank_fails_on_all_after_all_have_worked(run_ranks):
    def work(rank):
        def act():
            print("worked")
            if rank > 0:
                raise ValueError("a file is missing here")

        everywhere(accelerate(), act)

    for ended in run_ranks(3, work):
        assert ended.out == "worked\n"
        assert ended.err.endswith("\nValueError: rank 1, 2: a file is missing here\n")


def test_the_main_process_works_first_and_all_have_their_own_result(run_ranks, tmp_path):
    def work(rank):
        def act():
            (tmp_path / "cache").mkdir(exist_ok=rank > 0)
            time.sleep(0.2 * (rank == 0))
            others_waited = rank > 0 or not (tmp_path / "other").exists()
            (tmp_path / "other").touch() if rank > 0 else None
            return rank, others_waited

        print(first_on_main(accelerate(), act))

    assert [ended.out for ended in run_ranks(2, work)] == ["(0, True)\n", "(1, True)\n"]


@pytest.mark.faults
def test_work_may_take_longer_than_any_collective(run_ranks):
    """As when rank 0 tokenises for hours while the others wait."""

    def work(rank):
        accelerator = accelerate(timeout=-28)
        print(first_on_main(accelerator, lambda: time.sleep(4 * (rank == 0)) or "ready"))
        if rank == 0:
            time.sleep(4)
        accelerator.wait_for_everyone()

    ended = run_ranks(2, work)
    assert [e.out for e in ended] == ["ready\n", "ready\n"]
    assert "timed out" in ended[1].err.lower()  # the second wait was too long for the group, as was the first


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Embedding(4, 6, dtype=torch.bfloat16), nn.BatchNorm1d(2))
    return model


def flip(tensor, element, bit):
    """Flips one bit in place."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    view = tensor.detach().view(-1).view(integers)
    mask = 1 << bit
    view[element] ^= mask if bit < 8 * tensor.element_size() - 1 else -mask


@pytest.mark.parametrize(
    ("count", "flipped", "who"),
    [(2, 0, "rank 0, which may itself be the wrong one"), (2, 1, "rank 0, which may itself be the wrong one"), (3, 1, "most")],
)
def test_a_rank_whose_weights_differ_in_one_bit_is_named_with_the_tensor(run_ranks, count, flipped, who):
    def work(rank):
        accelerator, model = accelerate(), small_model()
        check_equal(accelerator, model, 1)
        if rank == flipped:
            flip(model[1].weight, 7, 0)
        print("equal until here", flush=True)
        check_equal(accelerator, model, 500)

    for ended in run_ranks(count, work):
        assert ended.out == "equal until here\n"
        assert "RanksError: step 500: the weights of the ranks are no longer equal; nothing was saved." in ended.err
        assert f"These differ from {who}:\n" in ended.err
        assert f"  rank 1 ({ranks.platform.node()}): 1.weight\nSuspect" in ended.err


def test_where_rank_0_differs_from_most_it_is_the_one_named(run_ranks):
    def work(rank):
        accelerator, model = accelerate(), small_model()
        if rank == 0:
            for tensor in model.parameters():
                flip(tensor, 0, 3)
            flip(model[2].num_batches_tracked, 0, 3)
        check_equal(accelerator, model, 500)

    for ended in run_ranks(3, work):
        assert "from most:\n  rank 0" in ended.err
        assert "0.weight, 0.bias, 1.weight, 2.weight, 2.bias and 1 more\nSuspect" in ended.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_flipped_bit_changes_the_digest(dtype):
    tensor = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = digest(tensor)
    for element in range(4):
        for bit in range(8 * tensor.element_size()):
            flip(tensor, element, bit)
            assert digest(tensor) != before
            flip(tensor, element, bit)
    assert digest(tensor) == before
    assert before.dtype == torch.int64


def test_the_digest_tells_order_within_and_across_blocks():
    numbers = torch.randn(ranks.BLOCK + 10, generator=torch.Generator().manual_seed(0))
    for i, j in [(0, 1), (5, ranks.BLOCK + 5), (ranks.BLOCK, ranks.BLOCK + 1)]:
        swapped = numbers.clone()
        swapped[i], swapped[j] = numbers[j], numbers[i]
        assert digest(swapped) != digest(numbers)
    late = numbers.clone()
    flip(late, ranks.BLOCK + 9, 31)
    flip(numbers[:1], 0, 31)
    assert len({digest(late).item(), digest(numbers).item()}) == 2
    assert digest(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_digests_of_parts_add_up_to_that_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr(ranks, "BLOCK", 7)
    whole = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for cut in (0, 1, 7, 13, 50):
        assert digest(whole[:cut]) + digest(whole[cut:], cut) == digest(whole)
    integers = whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]).tolist()
    weighted = sum(value * (2 * ranks.FACTOR * i + 1) for i, value in enumerate(integers))
    assert (weighted - digest(whole).item()) % 2**64 == 0
    monkeypatch.setattr(ranks, "BLOCK", 1000)
    assert (weighted - digest(whole).item()) % 2**64 == 0
    far = 2**40  # past what the product of the factor and a number can hold
    assert (digest(whole[:1], far).item() - integers[0] * (2 * ranks.FACTOR * far + 1)) % 2**64 == 0


def test_what_one_of_a_group_could_not_do_is_raised_on_all_and_says_who(run_ranks):
    kinds = {0: ValueError("no such thing"), 1: OSError(28, "full", "/disk"), 2: KeyError("x")}

    def work(rank):
        distributed.init_process_group("gloo")
        group = ranks.patient_group()
        assert ranks.together(group, lambda: {"rank": rank, "text": "ä" * rank}) == [
            {"rank": i, "text": "ä" * i} for i in range(3)
        ]
        for broken, (kind, says) in {
            0: (ValueError, "rank 0: no such thing"),
            1: (OSError, r"^rank 1: \[Errno 28\] full: '/disk'$"),
            2: (RanksError, "rank 2: KeyError: 'x'"),
        }.items():
            with pytest.raises(kind, match=says) as caught:
                ranks.together(group, lambda: (_ for _ in ()).throw(kinds[rank]) if rank == broken else None)  # noqa: B023
            assert getattr(caught.value, "errno", None) == (28 if broken == 1 else None)
        assert ranks.together(group, lambda: rank) == [0, 1, 2]

    assert [one.status for one in run_ranks(3, work)] == [0, 0, 0]
    with pytest.raises(KeyError):  # alone: as it is
        ranks.together(None, lambda: {}["x"])
    assert ranks.together(None, lambda: {1}) == [{1}]


def test_ranks_show_where_they_are_and_that_they_are_done(run_ranks, run_dir):
    def work(rank):
        def look(step):
            if rank == 0 and step == STEPS:
                until = time.monotonic() + 20
                while not (run_dir / "ranks" / "rank-1.json").exists() and time.monotonic() < until:
                    time.sleep(0.05)
                print(json.dumps(sign(run_dir, 1)))

        loop(run_dir, look)

    first, second = run_ranks(2, work)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    during, after = json.loads(first.out), sign(run_dir, 1)
    assert (during["state"], after["state"]) == ("running", "done")
    assert (after["rank"], after["step"], after["phase"], after["host"]) == (1, STEPS, "training", ranks.platform.node())
    assert " in " in during["where"] and ".py:" in during["where"]
    assert sorted(p.name for p in (run_dir / "ranks").iterdir()) == ["rank-0.json", "rank-1.json"]


def test_nothing_is_written_before_the_directory_is_a_runs(run_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.01)

    def work(rank):
        with watch(accelerate(), tmp_path / "run", 20):
            time.sleep(0.1)

    (tmp_path / "run").mkdir()
    assert [(ended.status, ended.err) for ended in run_ranks(2, work)] == [(0, "")] * 2
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("count", [2, 3])
def test_a_killed_rank_is_named_by_the_others_which_end(run_ranks, run_dir, count):
    def work(rank):
        loop(run_dir, lambda step: die() if (rank, step) == (1, 20) else None)

    ended = run_ranks(count, work, launcher=True)
    killed = ended.pop(1)
    assert killed.status == -signal.SIGKILL
    for survivor in ended:
        assert survivor.status != 0
        assert survivor.at - killed.at < 5
        assert survivor.err.count("error: rank 1 (") == 1 and "ended without a word (killed?). Rank" in survivor.err
        assert "stops too, at step 20 (training). The same command goes on" in survivor.err
    assert sign(run_dir, 0)["state"].startswith("followed: rank ")


def test_without_files_a_rank_of_the_same_machine_is_named_too(run_ranks, tmp_path):
    def work(rank):
        loop(tmp_path / f"disk-of-{rank}", lambda step: die() if (rank, step) == (1, 3) else None)

    survivor, _ = run_ranks(2, work)
    assert survivor.status == 1
    assert "error: rank 1 (" in survivor.err and "ended without a word (killed?). Rank 0 stops too, at step 3" in survivor.err


@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_that_raises_is_named_with_its_message(run_ranks, run_dir, count):
    def fail(step):
        if step == 20:
            raise OSError("disk on fire")

    def work(rank):
        loop(run_dir, fail if rank == 1 else lambda step: None)

    ended = run_ranks(count, work, launcher=True)
    failed = ended.pop(1)
    assert failed.status == 1 and "OSError: disk on fire" in failed.err and "error: rank" not in failed.err
    for survivor in ended:
        assert survivor.status != 0
        assert survivor.at - failed.at < 5
        assert "seen at step 20 (training), ended with OSError: disk on fire. Rank" in survivor.err
    assert sign(run_dir, 1)["state"] == "failed: OSError: disk on fire"


def test_files_of_an_earlier_start_say_nothing(run_ranks, run_dir):
    (run_dir / "ranks").mkdir()
    for rank in range(2):
        old = {"host": ranks.platform.node(), "pid": 1, "started": 0.0, "step": 3, "phase": "training", "state": "failed: then"}
        (run_dir / "ranks" / f"rank-{rank}.json").write_text(json.dumps(old))

    def work(rank):
        accelerator = accelerate()
        with watch(accelerator, run_dir, 20) as watching:
            assert watching.ended([0, 1]) is None
            (run_dir / "ranks" / f"rank-{rank}.json").write_text("[]")
            assert watching.ended([0, 1]) is None

    ended = run_ranks(2, work)
    assert [e.status for e in ended] == [0, 0], ended


def test_who_followed_another_is_not_named_but_quoted():
    watching = ranks.Watch(Accelerator(cpu=True), Path("none"), 1)
    watching.who = [{"host": "here", "pid": pid} for pid in range(3)]
    states = ["followed: rank 2 ended.", "followed: rank 2 ended.", "failed: OSError: on fire"]
    watching.read = lambda rank: {"step": 7, "phase": "saving", "state": states[rank]}
    assert watching.ended([0, 1]) == "rank 2 ended."
    assert watching.ended([0, 1, 2]).startswith(
        "rank 2 (here, pid 2), seen at step 7 (saving), ended with OSError: on fire. Rank 0 stops too"
    )


def test_a_process_that_nobody_has_waited_for_is_gone():
    watching = ranks.Watch(Accelerator(cpu=True), Path("none"), 1)
    child = subprocess.Popen(["sleep", "60"])
    watching.near[0] = psutil.Process(child.pid)
    assert not watching._gone(0)
    child.kill()
    until = time.monotonic() + 20
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.01)
    assert watching._gone(0)
    child.wait()
    assert watching._gone(0)
    watching.near.clear()
    assert not watching._gone(0)


def test_a_pid_of_another_machine_or_another_process_is_not_looked_at():
    watching = ranks.Watch(Accelerator(cpu=True), Path("none"), 1)
    own = watching.who[0]
    assert watching._process(0).pid == os.getpid()
    for change in ({"host": "elsewhere"}, {"started": own["started"] - 60}, {"pid": 2**22 + 1}):
        watching.who[0] = own | change
        assert watching._process(0) is None


def busy(seconds=60):
    """In place of a collective that never returns, as NCCL's do not when a peer has died."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.parametrize("silently", [True, False])
def test_a_rank_that_is_in_no_collective_ends_too(run_ranks, run_dir, silently):
    def fault(step):
        if step == 20:
            die() if silently else 1 / 0

    def work(rank):
        loop(run_dir, fault if rank == 1 else lambda step: busy() if step == 20 else None)

    survivor, dead = run_ranks(2, work, launcher=True)
    assert survivor.status == 1
    assert survivor.at - dead.at < 5
    why = "without a word (killed?)" if silently else "with ZeroDivisionError: division by zero"
    assert f"ended {why}. Rank 0 stops too, at step 20" in survivor.err


@pytest.mark.faults
def test_a_rank_that_failed_but_does_not_end_holds_up_nobody(run_ranks, run_dir):
    def fail(step):
        if step == 20:
            raise OSError("disk on fire")

    def work(rank):
        try:
            loop(run_dir, fail if rank == 1 else lambda step: None)
        except OSError:
            die(signal.SIGSTOP)

    survivor, _ = run_ranks(2, work)
    assert survivor.status == 1
    assert "ended with OSError: disk on fire" in survivor.err


@pytest.mark.faults
def test_a_rank_of_another_machine_is_named_by_its_silence(run_ranks, run_dir, monkeypatch):
    """Its pid cannot be asked after there; the collective fails all the same."""

    def work(rank):
        monkeypatch.setattr(ranks.platform, "node", lambda: f"machine-{rank}")
        loop(run_dir, lambda step: time.sleep(1) if step == 2 else die() if (rank, step) == (2, 3) else None)

    *survivors, dead = run_ranks(3, work)
    for survivor in survivors:
        assert survivor.status == 1
        assert survivor.at - dead.at < 5
        assert "rank 2 (machine-2, pid " in survivor.err and "gives no sign of life any more. Rank" in survivor.err


@pytest.mark.faults
@pytest.mark.parametrize("count", [2, 3])
def test_a_stopped_rank_ends_the_others_at_the_timeout(run_ranks, run_dir, count):
    def work(rank):
        loop(run_dir, lambda step: time.sleep(1) or die(signal.SIGSTOP) if (rank, step) == (1, 20) else None, timeout=3)

    began = time.monotonic()
    ended = run_ranks(count, work)
    ended.pop(1)
    for survivor in ended:
        assert survivor.status == 1
        assert 3 < survivor.at - began < 10
        assert "error: rank 1 (" in survivor.err and "gives no sign of life, and train.timeout (3 s) is over." in survivor.err
        assert " last at step 20 (training), test_ranks.py:" in survivor.err
        assert "stops too, at step 20 (training)" in survivor.err  # its own, or that of the one that spoke first


@pytest.mark.faults
def test_a_step_that_hangs_ends_all_and_says_where_each_rank_is(run_ranks, run_dir):
    def work(rank):
        loop(run_dir, lambda step: busy() if (rank, step) == (1, 20) else None, timeout=3)

    ended = run_ranks(2, work)
    assert [e.status for e in ended] == [1, 1]
    both = ended[0].err + ended[1].err
    assert "error: step 20 has taken more than 3 s (train.timeout). Where the ranks are:" in both
    assert "step 20 (training), test_ranks.py:" in both and " in busy\n" in both
    assert "step 20 (training), distributed_c10d.py:" in both


@pytest.mark.faults
def test_outside_of_training_a_rank_that_lives_may_take_its_time(run_ranks, run_dir):
    def work(rank):
        accelerator = accelerate()
        with watch(accelerator, run_dir, 1) as watching:
            watching.phase = "validation"
            busy(2.5)

    assert [e.status for e in run_ranks(2, work)] == [0, 0]


@pytest.mark.faults
def test_a_job_that_is_suspended_whole_goes_on_afterwards(run_ranks, run_dir):
    script = "kill -STOP {0} {1}; sleep 7; kill -CONT {0} {1}"

    def work(rank):
        accelerator = accelerate()
        with watch(accelerator, run_dir, 2) as watching:
            for step in range(1, 5):
                watching.step, watching.phase = step, "training"
                time.sleep(1)
                if (rank, step) == (0, 2):
                    pids = [watching.who[k]["pid"] for k in range(2)]
                    subprocess.Popen(["sh", "-c", script.format(*pids)], start_new_session=True)
                accelerator.reduce(torch.ones(1))

    began = time.monotonic()
    ended = run_ranks(2, work)
    assert [e.status for e in ended] == [0, 0], ended
    assert ended[0].at - began > 9


@pytest.mark.faults
def test_a_rank_that_cannot_write_accuses_nobody_and_says_so(run_ranks, run_dir):
    """A disk that is full silences all ranks, and is no reason for them to end."""

    def work(rank):
        accelerator = accelerate()
        with watch(accelerator, run_dir, 1) as watching:
            time.sleep(1)
            watching.folder = run_dir / "config.yaml"  # a file: nothing can be made in it
            watching.read = lambda rank: {"state": "running", "step": 1, "phase": "", "where": ""}
            time.sleep(3)

    for ended in run_ranks(2, work):
        assert ended.status == 0, ended
        assert "config.yaml cannot be written: " in ended.err
