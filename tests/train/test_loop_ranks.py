"""The loop on two processes: they stop together, fail together, and say who it was."""

import errno
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.__main__
from tests.train.conftest import SHAPE
from train import checkpoint, loop
from train.config import dump
from train.loop import train as train_run
from train.objective import next_token_loss
from train.validation import sample_text


def checkpoints(config):
    return sorted(p.name for p in (Path(config.run_dir) / "checkpoints").iterdir())


def at_step(step, action, rank):
    """A loss that does `action` on one rank in this step."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training
        nats = next_token_loss(model, batch)
        if calls == step and model.training and int(os.environ["RANK"]) == rank:
            calls += 100
            return action(nats)
        return nats

    return loss


def start(config, loss=next_token_loss, **arguments):
    """What `python -m train` does, with its exit status, on a rank of its own."""

    def work(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.__main__, "train", lambda *a: train_run(*a, loss=loss))
            file = Path(config.run_dir).with_suffix(f".{rank}.yaml")
            file.write_text(dump(config))
            status = train.__main__.main(["--config", str(file)])
            sys.stdout.flush(), sys.stderr.flush()
            if status:
                os._exit(status)

    return work


def killed(number):
    return lambda nats: os.kill(os.getpid(), number) or nats


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_makes_all_save_the_same_step_and_exit_0(make_config, run_ranks, rank):
    config = make_config()
    ended = run_ranks(2, start(config, at_step(3, killed(signal.SIGTERM), rank)))
    assert [one.status for one in ended] == [0, 0], ended
    assert checkpoints(config) == ["step-3"]
    assert "stopped at step 3 of 8" in ended[0].out
    signs = [json.loads((Path(config.run_dir) / f"ranks/rank-{k}.json").read_text()) for k in (0, 1)]
    assert [(sign["state"], sign["step"]) for sign in signs] == [("done", 4), ("done", 4)]


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_ranks_warm_up_as_one_process_does(make_config, run_ranks, text_folder, sharding):
    """Batch and rows grow, the blend changes while they do, a worker reads ahead, and matrices are Muon's."""
    blend = {str(text_folder): [1.0, 0.5], str(text_folder / "00.txt"): [0.0, 0.5]}
    common = {
        "optim__name": "muon", "schedule__batch_start": 2, "schedule__batch_warmup": 0.5, "schedule__length_start": 8,
        "schedule__length_warmup": 0.5, "data__workers": 1, "data__phases": [0.25], "data__source": None, "log__sample_tokens": 0,
        "data__blend": [{"source": source, "weight": weight} for source, weight in blend.items()],
    }  # fmt: skip
    two = make_config(**common, train__sharding=sharding)
    one = make_config(**common, run_dir=two.run_dir + "-one")
    ended = run_ranks(2, start(two))
    assert [end.status for end in ended] == [0, 0], ended
    train_run(one)
    files = [(Path(config.run_dir) / "metrics.jsonl").read_text().splitlines() for config in (one, two)]
    a, b = ([line for line in map(json.loads, file) if "loss" in line] for file in files)
    assert [line["tokens"] // 32 for line in a] == [line["tokens"] // 32 for line in b] == [2, 4, 6, 8, 12, 16, 20, 24]
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], abs=1e-3)


def test_ranks_draw_the_masks_that_one_draws_for_the_same_rows(make_config, run_ranks):
    common = {"model__config": SHAPE | {"hidden_dropout": 0.3}, "train__steps": 2, "log__sample_tokens": 0}
    two = make_config(**common)
    one = make_config(**common, train__micro_batch=2, run_dir=two.run_dir + "-one")
    ended = run_ranks(2, start(two))
    assert [end.status for end in ended] == [0, 0], ended
    train_run(one)
    files = [(Path(config.run_dir) / "metrics.jsonl").read_text().splitlines() for config in (one, two)]
    a, b = ([line["loss"] for line in map(json.loads, file) if "loss" in line] for file in files)
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_with_its_name(make_config, run_ranks, rank):
    config = make_config(train__checkpoint_every=2)
    ended = run_ranks(2, start(config, at_step(4, killed(signal.SIGKILL), rank)))
    other = ended[1 - rank]
    assert (ended[rank].status, other.status) == (-signal.SIGKILL, 1)
    # Where it was comes with the first of the signs, which are half a second apart.
    assert re.search(rf"rank {rank} \(.*\)(, seen at step [0-4] \(.*\),)? ended without a word", other.err)
    assert other.at - ended[rank].at < 5
    whole = make_config(run_dir=config.run_dir + "-whole")
    assert [one.status for one in run_ranks(2, start(config))] == [0, 0]
    assert [one.status for one in run_ranks(2, start(whole))] == [0, 0]
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(Path(c.run_dir) / "checkpoints/step-8" / file) for c in (config, whole))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.faults
def test_a_rank_that_is_stopped_ends_the_other_at_the_timeout(make_config, run_ranks):
    config = make_config(train__timeout=3)
    ended = run_ranks(2, start(config, at_step(4, killed(signal.SIGSTOP), 1)))
    assert ended[0].status == 1
    # As silent, or, where its own step is found to be late first, among those that it waits for.
    assert re.search(r"train\.timeout \(3 s\)|3 s \(train\.timeout\)", ended[0].err)
    assert re.search(r"rank 1 \(.*pid \d+\)", ended[0].err)


@pytest.mark.faults
def test_what_is_not_finite_on_one_rank_changes_the_weights_of_none_and_the_rank_is_named(make_config, run_ranks):
    config = make_config(train__on_nonfinite="skip", train__checkpoint_every=1, train__keep_checkpoints=8)
    ended = run_ranks(2, start(config, at_step(3, lambda nats: nats * math.nan, 1)))
    assert [one.status for one in ended] == [0, 0], ended
    (incident,) = map(json.loads, (Path(config.run_dir) / "incidents.jsonl").read_text().splitlines())
    assert (incident["step"], incident["rank"], incident["repeatable"]) == (3, 1, False)
    before, after = (load_file(Path(config.run_dir) / f"checkpoints/step-{step}/model/model.safetensors") for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.faults
def test_weights_that_part_by_one_bit_are_not_saved(make_config, run_ranks):
    config = make_config()

    def flipping(model, batch):
        calls.append(model.training)
        if calls.count(True) == 3 and os.environ["RANK"] == "1":
            weight = dict(model.named_parameters())["module.backbone.norm_f.weight"]
            weight.data.view(torch.int32)[0] ^= 1
        return next_token_loss(model, batch)

    calls = []
    ended = run_ranks(2, start(config, flipping))
    assert [one.status for one in ended] == [1, 1]
    for one in ended:
        assert re.search(r"(?s)no longer equal; nothing was saved.*rank 1 .*: backbone\.norm_f\.weight", one.err)
    assert checkpoints(config) == [] if (Path(config.run_dir) / "checkpoints").exists() else True


@pytest.mark.faults
def test_ranks_with_other_settings_are_told_apart_before_anything_is_done(make_config, run_ranks):
    config = make_config()

    def work(rank):
        start(make_config(optim__lr=0.01 + rank))(rank)

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [2, 2]
    assert "rank 1: settings.optim.lr: 0.01 -> 1.01" in ended[0].err
    assert not Path(config.run_dir).exists()


@pytest.mark.faults
def test_a_disk_that_is_full_ends_all_ranks_and_leaves_the_older_checkpoint(make_config, run_ranks):
    config = make_config(train__checkpoint_every=2)

    def work(rank):
        from train import files

        perform, count = files.perform, 0

        def full(operation, *arguments):
            nonlocal count
            count += ".step-4" in str(arguments[0])
            if count > 5:
                raise OSError(28, "No space left on device", str(arguments[0]))
            return perform(operation, *arguments)

        files.perform = full
        start(config)(rank)

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [1, 1]
    assert "checkpoint of step 4 could not be written (No space left on device)" in ended[0].err
    assert "step-2" in checkpoints(config) and "step-4" not in checkpoints(config)


@pytest.mark.faults
@pytest.mark.parametrize(("slow", "step", "saved"), [("write", 4, ["step-4"]), ("sample_text", 5, ["step-4", "step-5"])])
def test_what_takes_longer_than_a_step_may_is_waited_for(make_config, run_ranks, monkeypatch, slow, step, saved):
    config = make_config(train__timeout=2, train__val_every=100)
    real = {"write": checkpoint.write, "sample_text": loop.sample_text}[slow]
    monkeypatch.setattr({"write": checkpoint, "sample_text": loop}[slow], slow, lambda *a: time.sleep(5) or real(*a))
    ended = run_ranks(2, start(config, at_step(step, killed(signal.SIGTERM), 0)))
    assert [one.status for one in ended] == [0, 0], ended
    assert checkpoints(config) == saved


@pytest.mark.faults
@pytest.mark.parametrize("what", ["data", "run_dir"])
def test_ranks_that_do_not_share_a_disk_are_told(make_config, run_ranks, tmp_path, what):
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "text.txt").write_text(("cats ", "dogs ")[rank if what == "data" else 0] * 300)
    shared = {
        "data__source": "text.txt",
        "data__cache_dir": "cache",
        "run_dir": "run" if what == "run_dir" else str(tmp_path / "run"),
    }

    def work(rank, **changes):
        os.chdir(tmp_path / f"{rank}")
        start(make_config(**shared, schedule__decay=0.0, **changes))(rank)

    if what == "run_dir":
        assert [one.status for one in run_ranks(2, work)] == [0, 0]
    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [2, 2], ended
    says = {"data": r"rank 1: data\.sources: .* -> ", "run_dir": r"is run_dir on a disk that all share\?.*: 'step-8, .*' -> None"}
    assert re.search(says[what], ended[0].err)


@pytest.mark.faults
def test_ranks_that_share_a_model_must_share_the_disk_too(make_config, run_ranks, tmp_path):
    def work(rank):
        (tmp_path / f"{rank}").mkdir()
        os.chdir(tmp_path / f"{rank}")
        start(make_config(run_dir="run", train__sharding="fsdp2", log__sample_tokens=0))(rank)

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [2, 2], ended
    assert re.search(r"rank 1: .* is in run_dir \(is that on a disk that all share\?\): True -> False", ended[0].err)
    assert not (tmp_path / "0/run/metrics.jsonl").exists()


def test_one_rank_hashes_the_checkpoint_that_all_go_on_from(make_config, run_ranks, monkeypatch):
    config, validate = make_config(train__val_every=100), checkpoint.validate

    def noted(folder, tensors=True):
        print(f"hashed {tensors}, {folder.name}")
        return validate(folder, tensors)

    monkeypatch.setattr(checkpoint, "validate", noted)
    assert [one.status for one in run_ranks(2, start(config, at_step(5, killed(signal.SIGTERM), 0)))] == [0, 0]
    ended = run_ranks(2, start(config))
    assert [one.status for one in ended] == [0, 0], ended
    found = [re.findall("hashed (.*), step-5", one.out) for one in ended]
    assert found == [["True", "False"], ["False"]]


@pytest.mark.faults
def test_a_batch_that_does_not_divide_on_one_rank_is_told_as_a_difference(make_config, run_ranks):
    ended = run_ranks(2, lambda rank: start(make_config(train__global_batch=4 - rank))(rank))
    assert [one.status for one in ended] == [2, 2]
    assert "rank 1: settings.train.global_batch: 4 -> 3" in ended[0].err


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=pytest.mark.scale)])
def test_ranks_that_share_a_narrow_model_train_validate_and_write(make_config, run_ranks, precision):
    shape = SHAPE | {"hybrid_override_pattern": "M-M*-M-", "mamba_num_heads": 16, "mamba_head_dim": 2}
    config = make_config(
        model__config=shape, train__sharding="fsdp2", train__precision=precision, train__fp8_emulate=True, train__steps=2
    )
    ended = run_ranks(2, start(config))
    assert [one.status for one in ended] == [0, 0], ended
    samples = [json.loads(line) for line in (Path(config.run_dir) / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 2]


@pytest.mark.faults
def test_metrics_that_do_not_reach_the_disk_end_all_ranks_that_share_a_model(make_config, run_ranks):
    config = make_config(train__sharding="fsdp2", train__checkpoint_every=2)

    def work(rank):
        from train import files

        def sync(path, before=files.sync):
            if path.name == "metrics.jsonl":
                raise OSError(errno.EIO, "broken")
            before(path)

        files.sync = sync
        start(config)(rank)

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [1, 1]
    assert "rank 0: [Errno 5] broken" in ended[0].err


@pytest.mark.faults
def test_ranks_that_compute_other_last_bits_write_one_sample(make_config, run_ranks):
    """As other devices or kernels do: one would draw an end where the other goes on and waits for it."""
    config = make_config(train__sharding="fsdp2", train__steps=1, log__sample_tokens=40)

    def work(rank):
        def sample(model, *arguments):
            model.generation_config.eos_token_id = list(range(3, 100))
            noise = torch.Generator().manual_seed(rank)
            moved = model.lm_head.register_forward_hook(lambda m, i, out: out + torch.randn(out.shape, generator=noise))
            try:
                return sample_text(model, *arguments)
            finally:
                moved.remove()

        loop.sample_text = sample
        start(config)(rank)

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [0, 0], ended


@pytest.mark.faults
def test_a_signal_to_another_rank_that_cuts_a_sample_off_has_it_written_again(make_config, run_ranks):
    config = make_config(train__sharding="fsdp2", train__steps=4, log__sample_tokens=30)

    def work(rank):
        asked = 0

        def any_rank(accelerator, flag, before=loop.any_rank):
            nonlocal asked
            asked += 1
            if (rank, asked) == (1, 5):
                os.kill(os.getpid(), signal.SIGTERM)
            return before(accelerator, flag)

        loop.any_rank = any_rank
        start(config)(rank)

    samples = Path(config.run_dir) / "samples.jsonl"
    assert [one.status for one in run_ranks(2, work)] == [0, 0]
    assert not samples.exists()
    assert [one.status for one in run_ranks(2, start(config))] == [0, 0]
    assert [json.loads(line)["step"] for line in samples.read_text().splitlines()] == [0, 4]


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, nats):
        return nats.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.faults
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_laid_to_it(make_config, run_ranks, sharding):
    config = make_config(train__sharding=sharding, train__on_nonfinite="skip", train__steps=3, log__sample_tokens=0)

    def loss(model, batch):
        calls.append(model.training)
        nats = next_token_loss(model, batch)
        return Overflow.apply(nats) if os.environ["RANK"] == "1" and len(calls) in (2, 3) else nats  # the step, and its rerun

    calls = []
    assert [one.status for one in run_ranks(2, start(config, loss))] == [0, 0]
    (incident,) = map(json.loads, (Path(config.run_dir) / "incidents.jsonl").read_text().splitlines())
    assert (incident["step"], incident["rank"], incident["repeatable"]) == (2, 1, True)
