import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh

from train import sharding, telemetry
from train.telemetry import gradient_norms, kinds, mamba_statistics, probe, rank_figures

PATTERNS = ["M-M*-M-", "MEM*-ME", "*-*-", "M", "mM-"]
WINDOW = 16


def backward(model, ids, scale=1.0):
    (model(ids, targets=ids).loss.mean() * scale).backward()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_parameter_is_of_exactly_one_kind(tiny_model, pattern):
    model = tiny_model(hybrid_override_pattern=pattern)
    found = kinds(model)
    names = {p: name for name, p in model.named_parameters()}
    assert sorted(names[p] for parameters in found.values() for p in parameters) == sorted(names.values())
    layers = {"M": "mamba", "*": "attention", "-": "ffn", "E": "moe", "m": "mamba1"}
    assert found.keys() == {"embedding", "head", "norm"} | {layers[symbol] for symbol in pattern}


def test_a_kind_has_the_parameters_that_its_name_says(tiny_model):
    model = tiny_model(hybrid_override_pattern="M*-E")
    names = {p: name for name, p in model.named_parameters()}
    found = {kind: {names[p].removeprefix("backbone.") for p in parameters} for kind, parameters in kinds(model).items()}
    assert found["embedding"] == {"embeddings.weight"} and found["head"] == {"lm_head.weight"}
    assert found["norm"] == {"norm_f.weight", *(f"layers.{i}.norm.weight" for i in range(4))}
    for i, kind in enumerate(["mamba", "attention", "ffn", "moe"]):
        assert found[kind] and all(name.startswith(f"layers.{i}.mixer.") for name in found[kind])
    assert "layers.0.mixer.norm.weight" in found["mamba"]


def test_the_norms_are_those_of_the_kinds_gradients_laid_end_to_end(tiny_model, draw_ids):
    model = tiny_model(hybrid_override_pattern="MEM*-ME")
    backward(model, draw_ids(2, 13))
    norms = gradient_norms(model)
    assert norms.keys() == kinds(model).keys()
    for kind, parameters in kinds(model).items():
        direct = torch.cat([p.grad.double().flatten() for p in parameters]).norm().item()
        assert norms[kind] == pytest.approx(direct, rel=1e-5) and direct > 0
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert math.hypot(*norms.values()) == pytest.approx(whole, rel=1e-5)


def test_a_kind_that_is_not_trained_has_no_norm(tiny_model, draw_ids):
    model = tiny_model()
    assert gradient_norms(model) == {}
    model.backbone.embeddings.requires_grad_(False)
    backward(model, draw_ids(1, 5))
    assert gradient_norms(model).keys() == kinds(model).keys() - {"embedding"}


def naive_statistics(model, passes, window):
    """From the definitions, a pass, a layer and a head at a time: what enters a layer is what the model itself says."""
    found = {}
    for number, symbol in enumerate(model.config.hybrid_override_pattern):
        if symbol != "M":
            continue
        block = model.backbone.layers[number]
        mixer, each = block.mixer, []
        for ids in passes:
            x = model(ids, output_hidden_states=True).hidden_states[number]
            x = x / (x.pow(2).mean(-1, keepdim=True) + model.config.layer_norm_epsilon).sqrt() * block.norm.weight
            raw = x @ mixer.in_proj.weight[-model.config.mamba_num_heads :].T + mixer.dt_bias
            each.append((1 + raw.exp()).log())
        for head, a_log in enumerate(mixer.A_log):
            dt = torch.stack([one[:, :, head] for one in each])
            decay = torch.exp(-a_log.exp() * dt)
            found[number, head] = (dt, decay, 1 / (a_log.exp() * dt.mean()))
    dt, decay, memory = ([values[i] for values in found.values()] for i in range(3))
    dt, decay, memory = torch.stack(dt), torch.stack(decay), torch.stack(memory)
    result = {
        "dt/mean": dt.mean(), "dt/min": dt.min(), "dt/max": dt.max(), "decay/mean": decay.mean(),
        "memory/p5": memory.quantile(0.05), "memory/median": memory.quantile(0.5), "memory/p95": memory.quantile(0.95),
        "memory/beyond_window": sum(m.item() > window for m in memory) / len(memory),
    }  # fmt: skip
    for layer in dict.fromkeys(number for number, _ in found):
        own = [i for i, (number, _) in enumerate(found) if number == layer]
        result[f"dt_mean/layer_{layer}"], result[f"memory_median/layer_{layer}"] = dt[own].mean(), memory[own].quantile(0.5)
    return {name: float(value) for name, value in result.items()}


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2], [1, 2, 0], [2, 0, 1]])
def test_the_statistics_are_those_of_a_forward_by_hand_in_float64(tiny_model, draw_ids, seeds):
    model = tiny_model().double()
    batches = [draw_ids(2, 11, seed) for seed in seeds]
    with torch.no_grad():
        expected = naive_statistics(model, batches, WINDOW)
        with mamba_statistics(model, WINDOW) as statistics:
            for ids in batches:
                model(ids)
    assert statistics == pytest.approx(expected, rel=1e-12)
    assert 0 < statistics["memory/beyond_window"] < 1


def test_dt_is_the_one_after_the_models_own_limits(tiny_model, draw_ids):
    model = tiny_model(time_step_limit=(0.005, 0.02))
    with mamba_statistics(model, WINDOW) as statistics:
        model(draw_ids(2, 11))
    assert (statistics["dt/min"], statistics["dt/max"]) == pytest.approx((0.005, 0.02))


def test_watching_changes_no_bit_and_leaves_no_hook(tiny_model, draw_ids):
    ids = draw_ids(2, 13)
    plain, watched = tiny_model().train(), tiny_model().train()
    backward(plain, ids)
    with mamba_statistics(watched, WINDOW):
        backward(watched, ids)
    for (name, a), b in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert not any(module._forward_hooks for module in watched.modules())
    assert torch.equal(plain(ids).logits, watched(ids).logits)


def test_the_hooks_go_when_a_step_fails_too(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="outside the vocabulary"), mamba_statistics(model, WINDOW):
        model(torch.full((1, 3), 10**6))
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_checkpointing_gives_the_same_figures(tiny_model, draw_ids):
    ids, model = draw_ids(2, 13), tiny_model().train()
    with mamba_statistics(model, WINDOW) as expected:
        backward(model, ids)
    model.gradient_checkpointing_enable()
    with mamba_statistics(model, WINDOW) as statistics:
        backward(model, ids)
    assert statistics == pytest.approx(expected, rel=1e-6)


def test_nothing_is_said_of_a_model_without_mamba_or_without_a_pass(tiny_model, draw_ids):
    with mamba_statistics(tiny_model(hybrid_override_pattern="*-*-"), WINDOW) as statistics:
        pass
    assert statistics == {}
    model = tiny_model(hybrid_override_pattern="*-*-")
    with mamba_statistics(model, WINDOW) as statistics:
        model(draw_ids(1, 5))
    assert statistics == {}
    with mamba_statistics(tiny_model(), WINDOW) as statistics:
        pass
    assert statistics == {}


def test_a_step_of_no_length_is_a_long_memory_and_still_json(tiny_model, draw_ids):
    model = tiny_model()
    with torch.no_grad():
        model.backbone.layers[0].mixer.dt_bias.fill_(-1000)
    with mamba_statistics(model, WINDOW) as statistics:
        model(draw_ids(1, 5))
    assert statistics["dt/min"] == 0 and statistics["memory_median/layer_0"] > 1e30
    assert json.loads(json.dumps(statistics, allow_nan=False)) == statistics


def test_under_bf16_the_figures_are_of_fp32(tiny_model, draw_ids):
    """What dt is made of is rounded; dt itself and its means are not."""
    model, ids = tiny_model(), draw_ids(2, 13)
    with mamba_statistics(model, WINDOW) as wide:
        model(ids)
    with mamba_statistics(model, WINDOW) as narrow, torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert narrow == pytest.approx(wide, rel=0.05)
    assert torch.tensor(narrow["dt/mean"]).bfloat16().item() != narrow["dt/mean"]


def test_one_rank_has_nothing_to_be_set_apart_from():
    assert rank_figures(Accelerator(cpu=True), 1, 2.0) == {}


def test_ranks_are_set_apart_by_memory_wait_and_speed(run_ranks):
    AcceleratorState._reset_state(reset_partial_state=True)

    def work(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(telemetry, "probe", lambda device: [0.002, 0.001, 0.005][rank])
            figures = rank_figures(Accelerator(cpu=True), 2**40 + rank, [0.5, 0.25, 0.125][rank])
        assert figures == {
            "ranks/memory_least": 2.0**40, "ranks/memory_most": 2.0**40 + 2, "ranks/data_wait": 0.5, "ranks/spread": 2.5,
            "ranks/slowest": 2,
        }  # fmt: skip

    ended = run_ranks(3, work)
    assert [one.status for one in ended] == [0, 0, 0], ended


def test_of_two_ranks_the_slow_one_is_held_against_the_other(run_ranks, monkeypatch):
    def work(rank):
        monkeypatch.setattr("train.telemetry.probe", lambda device: [1.0, 50.0][rank])
        assert rank_figures(Accelerator(cpu=True), 1, 0.0)["ranks/spread"] == 50

    assert [one.status for one in run_ranks(2, work)] == [0, 0]


def test_the_probe_takes_time_the_least_of_five_counts(monkeypatch):
    assert 0 < probe(torch.device("cpu")) < 1
    clock = iter([0, 9, 10, 13, 20, 21, 30, 32, 40, 44])
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    assert probe(torch.device("cpu")) == 1


def test_a_shared_model_has_the_norms_and_statistics_of_the_whole(run_ranks, tiny_model, draw_ids):
    ids = draw_ids(2, 13)
    config = tiny_model(hybrid_override_pattern="M*-EM").config

    def figures(model):
        with mamba_statistics(model.train(), WINDOW) as statistics:
            backward(model, ids)
        return gradient_norms(model), statistics

    def build(mesh=None):
        with torch.device("meta"):
            model = type(tiny_model())(config)
        if mesh:
            sharding.shard(model, mesh, torch.float32)
        model.to_empty(device="cpu")
        sharding.initialise(model, 0)
        return model

    alone = figures(build())

    def work(rank):
        torch.distributed.init_process_group("gloo")
        norms, statistics = figures(build(init_device_mesh("cpu", (2,))))
        assert norms == pytest.approx(alone[0], rel=1e-5) and statistics == alone[1]
        torch.distributed.destroy_process_group()

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [0, 0], ended
