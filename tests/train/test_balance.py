"""The biases of routers move load from experts with many tokens to those with few."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridlm import HybridLMConfig
from hybridlm.mixers.moe import Router
from tests.train.conftest import SHAPE
from tests.train.test_loop_ranks import start
from train.balance import balance, direction, expert_loads, load_figures, routers
from train.loop import train
from train.objective import next_token_loss
from train.sharding import recompute

EXPERTS = {"n_routed_experts": 6, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8}
SHAPE_E = SHAPE | EXPERTS | {"hybrid_override_pattern": "ME*E"}


def biases(config, step):
    tensors = load_file(Path(config.run_dir) / f"checkpoints/step-{step}/model/model.safetensors")
    found = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert len(found) == 2
    return torch.stack(found)


def lines(config):
    return [line for line in map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()) if "lr" in line]


def test_the_bias_rises_below_the_mean_falls_above_it_and_stays_at_it():
    assert direction(torch.tensor([[4, 0, 2], [3, 3, 3]])).tolist() == [[-1, 1, 0], [0, 0, 0]]
    large = 2**60 // 3  # where fp32 knows no neighbours
    assert direction(torch.tensor([[large, large + 2, large + 1]])).tolist() == [[1, -1, 0]]


def test_the_figures_are_of_the_worst_layer_and_of_all():
    figures = load_figures(torch.tensor([[4, 0, 2], [9, 0, 0], [1, 1, 1]]))
    assert figures == {"moe/max_violation": pytest.approx(2.0), "moe/idle_experts": 3}
    assert load_figures(torch.zeros(0, 8, dtype=torch.int64)) == {}


def test_a_router_that_sends_all_to_few_becomes_balanced():
    torch.manual_seed(0)
    router = Router(HybridLMConfig(**SHAPE_E))
    torch.nn.init.normal_(router.weight, std=0.05)
    common = 4 * router.weight.detach()[:2].sum(0) / router.weight[:2].norm()  # what all tokens have, and two experts look for
    worst = []
    for _ in range(80):
        with expert_loads([router], torch.clone) as loads:
            router(torch.randn(200, router.config.hidden_size) + common)
        worst.append(load_figures(loads)["moe/max_violation"])
        balance([router], loads, 0.01)
    assert worst[0] > 1.0
    assert max(worst[-10:]) < 0.35


@pytest.mark.parametrize("again", ["", "E"])
def test_loads_are_those_of_the_routers_own_choices_of_all_passes(tiny_model, draw_ids, again):
    model, chosen = tiny_model(hybrid_override_pattern="ME*E").train(), []
    recompute(model, again)
    for router in routers(model):
        router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
    model(draw_ids(3, 5))  # not within
    chosen.clear()
    with expert_loads(routers(model), lambda loads: 10 * loads) as loads:
        for seed in (0, 1):
            model(ids := draw_ids(2, 13, seed), targets=ids).loss.sum().backward()
    assert not any(len(router._forward_hooks) > 1 for router in routers(model))
    per_pass = [torch.stack([c.flatten().bincount(minlength=6) for c in chosen[i : i + 2]]) for i in range(0, len(chosen), 2)]
    # Backward begins with the last layer, forward with the first.
    expected = sum(counts.flip(0) if i % 2 and again else counts for i, counts in enumerate(per_pass))
    assert torch.equal(loads, 10 * expected)
    assert loads.sum().item() == 10 * 2 * (2 * 2 * 13 * 2) * (2 if again else 1)


def test_a_step_moves_biases_by_the_rate_a_skipped_one_does_not_and_a_resumed_run_has_the_same_ones(make_config, tmp_path):
    """The second step is not finite; the second run is cut off in its fourth."""

    def losses(cut):
        def loss(model, batch):
            calls.append(model.training)
            number = calls.count(True)
            if cut and number == 5:  # the second step is run twice
                raise KeyboardInterrupt
            return next_token_loss(model, batch) * (math.nan if number in (2, 3) else 1)

        calls = []
        return loss

    common = {"train__steps": 4, "train__on_nonfinite": "skip", "train__val_every": 4, "log__sample_tokens": 0}
    common |= {"model__config": SHAPE_E, "optim__moe_bias_rate": 0.125}
    whole = make_config(**common, train__checkpoint_every=1, train__keep_checkpoints=4)
    train(whole, loss=losses(False))
    first, second, third = (biases(whole, step) for step in (1, 2, 3))
    assert set(first.unique().tolist()) <= {-0.125, 0.0, 0.125} and (first > 0).any() and (first < 0).any()
    assert torch.equal(first, second) and not torch.equal(second, third)
    assert lines(whole)[0]["moe/max_violation"] > 0 and "moe/max_violation" not in lines(whole)[1]
    cut = make_config(**common, train__checkpoint_every=3, run_dir=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=losses(True))
    train(cut)
    assert torch.equal(biases(whole, 4), biases(cut, 4))
    assert lines(whole)[-1]["loss"] == lines(cut)[-1]["loss"]


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_ranks_have_the_biases_and_figures_of_one(make_config, run_ranks, sharding):
    common = {"model__config": SHAPE_E, "train__steps": 3, "log__sample_tokens": 0, "optim__moe_bias_rate": 0.01}
    one = make_config(**common, train__micro_batch=2)
    two = make_config(**common, train__sharding=sharding, train__recompute="E", run_dir=one.run_dir + "-two")
    ended = run_ranks(2, start(two))  # before this process has a state of Accelerate, which it would hand on
    assert [end.status for end in ended] == [0, 0] and len(list(Path(two.run_dir).glob("ranks/*"))) == 2, ended
    train(one)
    assert biases(one, 3).any() and torch.equal(biases(one, 3), biases(two, 3))
    for name in ("moe/max_violation", "moe/idle_experts"):
        assert [line[name] for line in lines(one)] == [line[name] for line in lines(two)]
