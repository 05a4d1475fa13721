from dataclasses import replace

import pytest
import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMModel
from hybridlm.cluster import NIC, NVLINK, SUSTAINED, communication, matrices, sent_bytes, step_flops
from hybridlm.flops import forward_flops, training_flops
from hybridlm.fp8 import convert, linear_class
from hybridlm.memory import Plan
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import parameters_by_kind

SHARDED = Plan(gpus=256, sharding="fsdp2", micro_batch=1, global_batch=768)


@pytest.fixture(scope="module")
def largest():
    return HybridLMConfig.from_strict_dict(load_yaml("configs/model/nemotron-h-56b.yaml"))


def test_what_is_sent(largest):
    total, embedding = 56_324_350_464, 131072 * 8192
    sent = sent_bytes(largest, SHARDED)
    assert sent["reduced"] == 4 * total * 255 / 256
    # Twice in bf16, the embedding twice in fp32; what else is fp32 is under a thousandth.
    assert sent["gathered"] == pytest.approx((2 * 2 * total + 2 * 2 * embedding) * 255 / 256, rel=1e-3)
    wide = sent_bytes(largest, replace(SHARDED, precision="fp32"))
    assert wide["gathered"] == pytest.approx(2 * 4 * total * 255 / 256)
    assert sent_bytes(largest, replace(SHARDED, sharding="none")) == {"gathered": 0, "reduced": 8 * total * 255 / 256}
    narrow = sent_bytes(largest, replace(SHARDED, precision="fp8"))
    assert narrow["reduced"] == sent["reduced"]
    # Half for what is neither embedding, head nor in the four layers at the ends, M or FFN: 256 divides all rows.
    ends = 2 * (parameters_by_kind(largest)["M"] + parameters_by_kind(largest)["-"])
    saved = sent["gathered"] - narrow["gathered"]
    assert saved == pytest.approx(2 * (total - 2 * embedding - ends) * 255 / 256, rel=1e-3)
    plans = [replace(SHARDED, gpus=768, precision=precision) for precision in ("bf16", "fp8")]
    wide, narrow = (sent_bytes(largest, plan)["gathered"] for plan in plans)
    # 768 = 3 x 256 divides the rows of no matrix of this model.
    assert wide == narrow


@pytest.mark.parametrize("gpus", [2, 3, 7])
def test_what_fp8_narrows_is_what_is_converted(gpus):
    """In the demo 16 does not divide the 580 rows of in_proj; 3 divides no rows, 7 the 448 of an FFN."""
    config = HybridLMConfig.from_strict_dict(load_yaml("configs/model/demo.yaml"))
    with torch.device("meta"):
        model = HybridLMForCausalLM(config)
    convert(model, "cpu", unfit="bf16", emulate=True, ranks=gpus)
    layers = [module for module in model.modules() if isinstance(module, linear_class())]
    narrow = sum(layer.weight.numel() for layer in layers if layer.config.enable_fsdp_float8_all_gather)
    wide, fp8 = (sent_bytes(config, replace(SHARDED, gpus=gpus, precision=name))["gathered"] for name in ("bf16", "fp8"))
    assert wide - fp8 == pytest.approx(2 * narrow * (gpus - 1) / gpus)


@pytest.mark.parametrize("file", ["nemotron-h-8b", "nemotron-3-nano-30b", "tiny"])
def test_matrices_are_those_of_the_model(file):
    shape = load_yaml(f"configs/model/{file}.yaml")
    config = HybridLMConfig.from_strict_dict(shape | {"hybrid_override_pattern": shape["hybrid_override_pattern"] + "rlgm"})
    with torch.device("meta"):
        model = HybridLMForCausalLM(config)
    for symbol, block in zip(config.hybrid_override_pattern, model.backbone.layers, strict=True):
        built = [tuple(m.weight.shape) for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert sorted(matrices(config)[symbol]) == sorted(built), symbol


@pytest.mark.parametrize("bidirectional", ["sum", "concat"])
def test_matrices_of_both_directions(bidirectional):
    changes = {"bidirectional": bidirectional, "hybrid_override_pattern": "M*-rlgm"}
    config = HybridLMConfig.from_strict_dict(load_yaml("configs/model/tiny.yaml") | changes)
    with torch.device("meta"):
        model = HybridLMModel(config)
    for symbol, block in zip(config.hybrid_override_pattern, model.layers, strict=True):
        built = [tuple(m.weight.shape) for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert sorted(matrices(config)[symbol]) == sorted(built), symbol


def test_recomputing_costs_a_forward_pass_of_those_layers(largest):
    plain = training_flops(largest, 8192)
    forward = forward_flops(largest, 8192)
    every = step_flops(largest, replace(SHARDED, recompute="M*-"))
    assert every - plain == pytest.approx(sum(forward.values()) - forward["head"])
    once = step_flops(largest, replace(SHARDED, recompute="M"))
    assert plain < once == step_flops(largest, replace(SHARDED, recompute="MM")) < every


def test_communication_hides_behind_enough_tokens(largest):
    found = communication(largest, SHARDED, 3_178_914)
    sent = sum(found["bytes"].values())
    assert found["seconds_best"] == sent / 400e9 and found["seconds_worst"] == sent / NIC
    # At that number of tokens both take as long.
    for case in ("best", "worst"):
        seconds = found[f"tokens_to_hide_{case}"] * step_flops(largest, SHARDED) / SUSTAINED
        assert seconds == pytest.approx(found[f"seconds_{case}"])
    assert found["compute_seconds"] == 8192 * training_flops(largest, 8192) / SUSTAINED
    longer = communication(largest, replace(SHARDED, micro_batch=2), None)
    assert longer["compute_seconds"] == pytest.approx(2 * found["compute_seconds"])
    assert found["sequences_per_gpu"] == 3 and found["most_gpus"] == 768


def test_a_run_takes_as_long_as_the_slower_of_the_two(largest):
    steps = 3_178_914
    found = communication(largest, SHARDED, steps)
    assert found["tokens"] == pytest.approx(20e12, rel=1e-6)
    assert found["days_best"] == pytest.approx(steps * 3 * found["compute_seconds"] / 86400)
    assert found["days_worst"] == pytest.approx(steps * 3 * found["seconds_worst"] / 86400)  # 9.1 against 6.9 s
    # Three sequences at a time take as long to compute, and are sent for once.
    three = communication(largest, replace(SHARDED, micro_batch=3), steps)
    assert three["days_worst"] == pytest.approx(found["days_best"])
    whole = communication(largest, replace(SHARDED, sharding="none"), steps)  # gradients once a step, not three times
    assert whole["days_worst"] == pytest.approx(steps * max(3 * whole["compute_seconds"], whole["seconds_worst"]) / 86400)
    assert "days_best" not in communication(largest, SHARDED, None)
    assert "most_gpus" not in communication(largest, replace(SHARDED, global_batch=None), None)


def test_within_a_machine_nvlink_carries_all(largest):
    found = communication(largest, replace(SHARDED, gpus=8), None)
    assert found["seconds_best"] == found["seconds_worst"] == sum(found["bytes"].values()) / NVLINK
