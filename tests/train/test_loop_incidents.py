"""Batches that go wrong: losses and gradients that are not finite, spikes, and nothing to predict."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridlm.ops.cross_entropy import IGNORE
from train.loop import train
from train.objective import next_token_loss


def rows(config, name):
    file = Path(config.run_dir) / f"{name}.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def spoiled(steps, spoil, micro_batches=1):
    """A loss that is `spoil`ed in the steps of these numbers, and again when the same batch is looked at once more."""
    seen, bad = [], []

    def loss(model, batch):
        nats = next_token_loss(model, batch)
        if not model.training:
            return nats
        key = batch["input_ids"].numpy().tobytes()
        if key not in seen:
            seen.append(key)
            if math.ceil(len(seen) / micro_batches) in steps:
                bad.append(key)
        return spoil(nats) if key in bad else nats

    return loss


def bad_gradient(nats):
    """A finite loss whose gradient is not: d sqrt(x) at 0."""
    return nats + torch.sqrt(nats - nats.detach()).nan_to_num(0.0)


SPOILS = {"nan": lambda nats: nats * math.nan, "inf": lambda nats: nats * math.inf, "gradient": bad_gradient}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_batch_stops_the_run_with_what_was_known_and_what_was_learned_kept(make_config, spoil):
    config = make_config()
    with pytest.raises(FloatingPointError, match="step 7"):
        train(config, loss=spoiled([7], SPOILS[spoil]))
    (incident,) = rows(config, "incidents")
    assert (incident["step"], incident["kind"], incident["samples"], incident["repeatable"]) == (7, "not finite", 24, True)
    assert len(incident["documents"]) == 4
    assert incident["gradients"]["count"] > 0
    assert incident["weights"]["count"] == 0
    assert {"mamba", "attention", "ffn", "embedding", "head", "norm"} == set(incident["grad_norms"])
    # The step before it has a checkpoint, though none was due.
    assert (Path(config.run_dir) / "model").readlink() == Path("checkpoints/step-6/model")
    train(config)
    assert [line["step"] for line in rows(config, "metrics") if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_a_bad_batch_that_is_skipped_changes_nothing(make_config, spoil, micro_batch):
    config = make_config(
        train__on_nonfinite="skip", train__checkpoint_every=1, train__keep_checkpoints=8, train__micro_batch=micro_batch
    )
    train(config, loss=spoiled([5], SPOILS[spoil], micro_batches=4 // micro_batch))
    checkpoints = Path(config.run_dir) / "checkpoints"
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        before, after, later = (load_file(checkpoints / f"step-{step}" / file) for step in (4, 5, 6))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(before[name], later[name]) for name in before)
    states = [json.loads((checkpoints / f"step-{step}" / "state.json").read_text()) for step in (4, 5)]
    assert [state["samples"] for state in states] == [16, 20]  # its data is not read again
    line = rows(config, "metrics")
    (line,) = [line for line in line if line["step"] == 5 and "loss" in line]
    assert (line["loss"] is None) == (line["grad_norm"] is None) == True  # noqa: E712
    assert [incident["step"] for incident in rows(config, "incidents")] == [5]


def test_a_checkpoint_from_before_the_first_update_is_one_to_go_on_from(make_config, tmp_path):
    settings = {"train__on_nonfinite": "skip", "train__checkpoint_every": 1, "train__checkpoint_async": False}
    whole, cut = make_config(**settings), make_config(**settings, run_dir=str(tmp_path / "cut"))
    train(whole, loss=spoiled([1], SPOILS["nan"]))

    def crash(nats):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=spoiled([1, 2], lambda nats: crash(nats) if (Path(cut.run_dir) / "model").exists() else nats * math.nan))
    train(cut)
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(Path(config.run_dir) / "checkpoints/step-8" / file) for config in (whole, cut))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_fault_that_does_not_come_again_is_told_from_one_that_does(make_config):
    config = make_config(train__on_nonfinite="skip")
    calls = []

    def loss(model, batch):
        calls.append(model.training)
        return next_token_loss(model, batch) * (math.nan if calls.count(True) == 3 else 1.0)

    train(config, loss=loss)
    (incident,) = rows(config, "incidents")
    assert (incident["step"], incident["repeatable"]) == (3, False)


def test_a_spike_is_skipped_and_a_resumed_run_decides_alike(make_config, tmp_path):
    settings = {"train__steps": 24, "train__checkpoint_every": 12, "train__spike_sigma": 6.0, "train__spike_window": 8}
    whole, cut = make_config(**settings), make_config(**settings, run_dir=str(tmp_path / "cut"))
    train(whole, loss=spoiled([11, 15], lambda nats: nats * 10))
    assert [(i["step"], i["kind"]) for i in rows(whole, "incidents")] == [(11, "loss spike"), (15, "loss spike")]
    losses = [line["loss"] for line in rows(whole, "metrics") if "loss" in line]
    assert losses[10] > 5 * losses[9]
    assert losses[11] < losses[0]

    def crash(nats):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=spoiled([14], crash))
    train(cut, loss=spoiled([15 - 12], lambda nats: nats * 10))
    resumed = {line["step"]: line["loss"] for line in rows(cut, "metrics") if "loss" in line}
    assert [i["step"] for i in rows(cut, "incidents")] == [15]
    assert resumed[13] == pytest.approx(losses[12], abs=0.5)


def test_a_batch_without_targets_has_a_loss_of_0_and_changes_nothing(make_config, monkeypatch):
    from train import loop

    batches = loop.batches

    def emptied(*arguments):
        for number, parts in enumerate(batches(*arguments), 1):
            if number == 3:
                parts = [part | {"targets": torch.full_like(part["targets"], IGNORE)} for part in parts]
            yield parts

    monkeypatch.setattr(loop, "batches", emptied)
    config = make_config(train__checkpoint_every=1, train__keep_checkpoints=8)
    train(config)
    (incident,) = rows(config, "incidents")
    assert (incident["step"], incident["kind"]) == (3, "no targets")
    assert [line["loss"] for line in rows(config, "metrics") if line["step"] == 3 and "loss" in line] == [0.0]
    before, after = (load_file(Path(config.run_dir) / f"checkpoints/step-{step}/model/model.safetensors") for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
