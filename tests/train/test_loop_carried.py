"""Runs whose rows go on in the text from the state that was left there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hybridlm import HybridLMForCausalLM
from hybridlm.data.blend import Blend
from hybridlm.tokenizer import byte_tokenizer
from tests.train.conftest import SHAPE
from train.loop import train
from train.objective import next_token_loss
from train.settings import Model
from train.setup import build_model, open_data


@pytest.fixture
def carrying(make_config, tmp_path):
    def make(name="run", **changes):
        shape = SHAPE | {"hybrid_override_pattern": "M-M"}
        settings = {"data__carry_state": True, "model__config": shape, "log__sample_tokens": 0, "train__val_every": 100}
        return make_config(**{**settings, "run_dir": str(tmp_path / name), **changes})

    return make


def kept(config, step=8):
    """All tensors of a checkpoint: weights, optimiser, random numbers and states."""
    folder = Path(config.run_dir) / f"checkpoints/step-{step}"
    return load_file(folder / "model/model.safetensors") | load_file(folder / "optimizer.safetensors")


def states(config, step=8):
    return {name: one for name, one in kept(config, step).items() if name.startswith("carried.")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    """To 1e-6 of each tensor's greatest value, or of 1e-2 where that is smaller still."""
    return a.keys() == b.keys() and all(
        (a[name] - b[name]).abs().max() <= 1e-6 * max(b[name].abs().max(), 1e-2) for name in a if a[name].is_floating_point()
    )


def losses(config):
    lines = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def at_call(number, action):
    """A loss on which `action(nats, batch)` is done in the call of this number, counted in training."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training
        nats = next_token_loss(model, batch)
        return action(nats, batch) if calls == number and model.training else nats

    return loss


def crash(nats, batch):
    raise KeyboardInterrupt


def on_two(run_ranks, config, **arguments):
    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)  # of what this process has run alone
        train(config, **arguments)

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [0, 0], ended
    assert "2 process(es)" in ended[0].out


@pytest.fixture
def whole(carrying, finished=[]):  # noqa: B006  trained once
    if not finished:
        finished.append(carrying("whole"))
        train(finished[0])
    return finished[0]


def test_a_run_that_is_cut_off_ends_as_if_nothing_had_happened(carrying, whole):
    cut = carrying("cut")
    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=at_call(7, crash))
    train(cut)
    assert equal(kept(cut), kept(whole)) and losses(cut) == losses(whole)
    assert len(states(whole)) == 4 and all(len(one) == 4 and one.abs().max() > 0 for one in states(whole).values())
    assert not equal(states(whole, 4), states(whole))


def test_a_step_that_was_not_finite_has_not_advanced_the_states_that_a_stop_keeps(carrying, whole):
    config = carrying("stopped")
    with pytest.raises(FloatingPointError, match="step 7"):
        train(config, loss=at_call(7, lambda nats, batch: nats * math.nan))
    train(config)
    assert equal(kept(config), kept(whole))


def test_a_step_that_is_skipped_has_read_its_text_once(carrying, whole):
    settings = {"train__on_nonfinite": "skip", "train__checkpoint_every": 1, "train__keep_checkpoints": 8}
    skipped, clean = carrying("skipped", **settings), carrying("clean", **settings)
    train(skipped, loss=at_call(3, lambda nats, batch: nats * math.nan))
    train(clean)
    assert equal(kept(clean), kept(whole))
    assert len((Path(skipped.run_dir) / "incidents.jsonl").read_text().splitlines()) == 1
    assert equal(states(skipped, 3), states(clean, 3))  # the weights were still the same
    assert not equal(states(skipped, 4), states(clean, 4))


def test_a_state_that_is_not_finite_is_not_carried_on(carrying):
    def poison(nats, batch):
        batch["past_key_values"].states[0][1].data[1] = math.inf
        return nats

    config = carrying(train__checkpoint_every=1, train__keep_checkpoints=8)
    train(config, loss=at_call(3, poison))
    for one in states(config, 3).values():
        assert one.isfinite().all() and one[1].abs().max() == 0 and all(one[row].abs().max() > 0 for row in (0, 2, 3))
    assert not (Path(config.run_dir) / "incidents.jsonl").exists()


def test_micro_batches_carry_the_same_and_another_size_goes_on(carrying, whole):
    halves = carrying("halves", train__micro_batch=2)
    train(halves)
    assert close(states(halves), states(whole))
    assert losses(halves) == pytest.approx(losses(whole), rel=1e-6)
    other = carrying("other", train__micro_batch=1)
    train(other, resume=str(Path(whole.run_dir) / "checkpoints/step-4"))
    assert close(states(other), states(whole))


@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp2", marks=pytest.mark.faults)])
def test_any_number_of_ranks_carries_the_same_and_goes_on_from_any_other(carrying, whole, run_ranks, sharding):
    two, one = carrying("two", train__sharding=sharding), carrying("one")
    start = Path(two.run_dir) / "checkpoints/step-4"
    on_two(run_ranks, two)
    assert losses(two) == pytest.approx(losses(whole), rel=1e-6)
    assert close(states(two), states(whole))
    train(one, resume=str(start))
    assert close(states(one), states(whole))
    again = carrying("again", train__sharding=sharding)
    on_two(run_ranks, again, resume=str(start))
    assert equal(kept(again), kept(two))


def test_what_carries_and_what_does_not_are_other_data(carrying, whole):
    for name, change in [("off", {"data__carry_state": False}), ("more", {"train__global_batch": 8})]:
        with pytest.raises(ValueError, match=r"stream in 4 lanes -> stream\n|of 4 rows, and train\.global_batch is 8"):
            train(carrying(name, **change), resume=str(Path(whole.run_dir) / "checkpoints/step-4"), allow_config_change=True)
    off = carrying("off", data__carry_state=False)
    train(off)
    assert states(off) == {}
    with pytest.raises(ValueError, match="stream -> stream in 4 lanes"):
        train(carrying("on"), resume=str(Path(off.run_dir) / "checkpoints/step-4"), allow_config_change=True)


def test_attention_is_refused_and_says_why(carrying, tmp_path):
    config = carrying(model__config=SHAPE)
    with pytest.raises(ValueError, match=r"data\.carry_state: the pattern 'M\*-' has attention .* would grow with every step"):
        train(config)
    assert not Path(config.run_dir).exists()
    build_model(config_with := carrying(model__config=SHAPE, data__carry_state=False)).save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match=r"data\.carry_state: the pattern"):  # of weights to start from, too
        build_model(replace(config_with, model=Model(init_from=str(tmp_path / "with")), data=config.data))


def test_a_row_goes_on_from_the_state_that_it_was_left_in(carrying):
    """The losses of three steps that change next to nothing are those of the rows' texts, read in one pass."""
    batches = []

    def loss(model, batch):
        nats = next_token_loss(model, batch)
        batches.extend([(batch, nats.detach())] if model.training else [])
        return nats

    config = carrying(optim__lr=1e-30, train__steps=3, schedule__decay=0.0)
    train(config, loss=loss)
    assert len(batches) == 3 and all("continues" not in batch for batch, _ in batches)
    lanes, _ = open_data(config, byte_tokenizer(), 258, quiet=True)
    model = HybridLMForCausalLM.from_pretrained(Path(config.run_dir) / "model")
    sampler = replace(lanes.samplers[0], seq_len=3 * 32)  # the first windows of three times the length
    whole = {name: torch.from_numpy(array) for name, array in Blend([sampler], [[1.0]], []).batch(0, 4).items()}
    del whole["continues"]
    assert torch.equal(torch.cat([batch["input_ids"] for batch, _ in batches], 1), whole["input_ids"])
    parts = torch.cat([nats for _, nats in batches], 1)
    torch.testing.assert_close(parts, next_token_loss(model, whole).detach(), rtol=1e-4, atol=1e-4)
