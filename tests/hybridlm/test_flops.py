import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlm import HybridLMModel
from hybridlm.flops import forward_flops, peak_flops, training_flops
from hybridlm.ops import precision

aten = torch.ops.aten
CHUNK = 8


def operators_flops(model, b, t):
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(b, t, dtype=torch.long))
    return counter.get_flop_counts()["Global"]


@pytest.fixture(autouse=True)
def one_product_for_each_linear(monkeypatch):
    """Few rows go through a stack of products, which torch counts elsewhere."""
    monkeypatch.setattr(precision, "FEW_ROWS", 0)


@pytest.mark.parametrize(
    "changes",
    [
        *({"hybrid_override_pattern": pattern} for pattern in ("M-M*-M-", "M-", "*-", "MM-**", "MEM*E")),
        {"hybrid_override_pattern": "ME", "moe_latent_size": 12, "num_experts_per_tok": 3},
    ],
)
@pytest.mark.parametrize(("b", "t"), [(1, CHUNK), (2, 3 * CHUNK)])
def test_projections_and_ssd_count_as_the_operators_run(changes, b, t, tiny_model):
    model = tiny_model(chunk_size=CHUNK, **changes)
    counted, ran = forward_flops(model.config, t, chunk=CHUNK), operators_flops(model, b, t)
    assert (counted["linear"] + counted["head"]) * b * t == ran[aten.mm] + ran.get(aten.addmm, 0)
    assert counted["ssd"] * b * t == ran.get(aten.bmm, 0)


@pytest.mark.parametrize(("symbol", "gates"), [("r", 1), ("l", 4), ("g", 3)])
def test_recurrences_count_their_products(symbol, gates, tiny_config):
    counted = forward_flops(tiny_config(hybrid_override_pattern=symbol * 2, recurrent_size=20), 16)
    assert counted["linear"] == 2 * 2 * (gates * 20 * (32 + 20) + 20 * 32) and counted["ssd"] == counted["conv"] == 0


def test_the_scan_counts_three_multiply_adds_for_each_element_of_its_state(tiny_model):
    model = tiny_model(hybrid_override_pattern="mM-m", time_step_rank=3, chunk_size=CHUNK)
    counted, ran = forward_flops(model.config, CHUNK, chunk=CHUNK), operators_flops(model, 1, CHUNK)
    assert (counted["linear"] + counted["head"]) * CHUNK == ran[aten.mm]
    assert counted["scan"] == 2 * 2 * 3 * 48 * 5
    # Of the three the read-out is a matrix product.
    assert (counted["scan"] / 3 + counted["ssd"]) * CHUNK == ran[aten.bmm]
    assert counted["conv"] == 2 * 4 * (2 * 48 + 68)


@pytest.mark.parametrize("bidirectional", ["sum", "concat"])
@pytest.mark.parametrize(("b", "t"), [(1, CHUNK), (2, 3 * CHUNK)])
def test_both_directions_count_as_the_operators_run(bidirectional, b, t, tiny_config):
    model = HybridLMModel(tiny_config(chunk_size=CHUNK, bidirectional=bidirectional)).eval()
    counted, ran = forward_flops(model.config, t, chunk=CHUNK), operators_flops(model, b, t)
    assert counted["linear"] * b * t == ran[aten.mm] + ran.get(aten.addmm, 0)
    assert counted["ssd"] * b * t == ran.get(aten.bmm, 0)
    assert counted["conv"] == 2 * forward_flops(tiny_config(), t)["conv"]
    assert counted["attention"] * (t + 1) == 2 * t * forward_flops(tiny_config(), t)["attention"]


def test_biases_do_not_count(tiny_model):
    model = tiny_model(use_bias=True, mlp_bias=True, attention_bias=True)
    counted, ran = forward_flops(model.config, CHUNK, chunk=CHUNK), operators_flops(model, 1, CHUNK)
    assert (counted["linear"] + counted["head"]) * CHUNK == ran.get(aten.mm, 0) + ran[aten.addmm]


@pytest.mark.parametrize("t", [1, 9, 64])
def test_attention_counts_the_pairs_that_the_mask_lets_through(t, tiny_config):
    config = tiny_config(hybrid_override_pattern="M**-")
    pairs = torch.ones(t, t).tril().sum().item()
    of_a_pair = 2 * 2 * config.num_attention_heads * config.head_dim  # q k^T and the weights with v
    assert forward_flops(config, t)["attention"] * t == 2 * pairs * of_a_pair


def test_the_convolution_counts_its_window(tiny_config):
    config = tiny_config()
    assert forward_flops(config, 16)["conv"] == 3 * 2 * config.mamba_conv_size * config.conv_kernel


def test_the_configs_own_chunk_plays_no_part(tiny_config):
    assert forward_flops(tiny_config(chunk_size=8), 256) == forward_flops(tiny_config(chunk_size=64), 256)


def test_training_is_three_forwards(tiny_config):
    assert training_flops(tiny_config(), 64) == 3 * sum(forward_flops(tiny_config(), 64).values())


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "fp8", None),
        ("cpu", "fp32", None),
    ],
)
def test_the_peak_is_known_or_none(device, precision, peak):
    assert peak_flops(device, precision) == peak
