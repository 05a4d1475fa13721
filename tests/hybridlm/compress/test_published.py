"""What NVIDIA did with its 56B (arXiv 2504.03624, section 4), by its published shapes."""

from pathlib import Path

import pytest
import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.compress import search
from hybridlm.compress.importance import Importance
from hybridlm.compress.search import Budget, candidates, counted, default_axis, most_important, shape_of, uniform_depth
from hybridlm.compress.surgery import PARTS, Kept, prune, smaller_config
from hybridlm.memory import GIB, inference_bytes
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import count_parameters

MODELS = Path(__file__).parents[3] / "configs" / "model"
AT = {"context": 1_000_000, "weight_bits": 4, "cache_bits": 8}
TOY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "mamba_num_heads": 6, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 8,
}  # fmt: skip


def published(size):
    return HybridLMConfig.from_strict_dict(load_yaml(MODELS / f"nemotron-h-{size}.yaml"))


@pytest.fixture(scope="module")
def big():
    return published("56b")


@pytest.fixture(scope="module")
def small():
    return published("47b")


@pytest.fixture(scope="module")
def stayed(big, small):
    """The layers of the 56B that are the 47B, the first that can be."""
    layers, place = [], -1
    for symbol in small.hybrid_override_pattern:
        place = big.hybrid_override_pattern.index(symbol, place + 1)
        layers.append(place)
    return layers


def pretend(config, dropped=()):
    """Importance in which these layers matter least; parts that matter the less the later they come."""
    layers = torch.ones(config.num_hidden_layers, dtype=torch.float64)
    layers[list(dropped)] = 0.01
    sizes = [getattr(config, PARTS[symbol]) for symbol in config.hybrid_override_pattern]
    parts = [1 / torch.arange(1, size + 1, dtype=torch.float64) for size in sizes]
    return Importance(layers, parts, torch.ones(config.hidden_size, dtype=torch.float64))


def test_the_patterns(big, small):
    ends = {pattern[0] + pattern[-1] for pattern in (big.hybrid_override_pattern, small.hybrid_override_pattern)}
    assert ends == {"M-"}
    counts = [[c.hybrid_override_pattern.count(symbol) for symbol in PARTS] for c in (big, small)]
    assert counts == [[54, 10, 54], [45, 5, 48]]
    assert "*" not in small.hybrid_override_pattern.replace("*-", "")  # attention stands directly before an FFN


def test_the_47b_is_cut_out_of_the_56b(big, small, stayed):
    neurons = list(range(30720))
    cut = smaller_config(big, Kept(stayed, {i: neurons for i in stayed if big.hybrid_override_pattern[i] == "-"}))
    assert cut.to_dict() == small.to_dict()
    assert count_parameters(cut) == 46_791_554_816


@torch.no_grad()
def test_at_toy_width_the_search_finds_the_47b(big, small, stayed, relative):
    """Asked for its counts, and 60 of 64 neurons, as 30,720 of 32,768."""
    pattern = big.hybrid_override_pattern
    torch.manual_seed(0)
    parent = HybridLMForCausalLM(HybridLMConfig(hybrid_override_pattern=pattern, **TOY)).eval()
    dropped = set(range(len(pattern))) - set(stayed)
    importance = pretend(parent.config, dropped)
    wanted = shape_of(parent.config) | {"mamba_layers": 45, "attention_layers": 5, "ffn_layers": 48, "intermediate_size": 60}
    (found,), _ = candidates(parent.config, importance, {axis: [value] for axis, value in wanted.items()}, Budget(), 3)
    kept = most_important(parent.config, importance, found.shape)
    assert kept.layers == stayed and kept.parts[1] == list(range(60))
    student = prune(parent, kept)
    assert student.config.hybrid_override_pattern == small.hybrid_override_pattern
    assert student.num_parameters() == count_parameters(student.config)
    ids = torch.arange(9)[None]
    assert student(ids).logits.shape == (1, 9, 61)
    # The same as the parent whose other layers and neurons do nothing.
    for i, block in enumerate(parent.backbone.layers):
        if i in dropped:
            for p in block.mixer.get_submodule({"M": "out_proj", "*": "o_proj", "-": "down_proj"}[pattern[i]]).parameters():
                p.zero_()
        elif pattern[i] == "-":
            block.mixer.up_proj.weight[60:] = 0
    assert relative(student(ids).logits, parent(ids).logits) < 1e-4


def test_memory_at_a_million_tokens(big, small):
    assert [round(inference_bytes(c, 1_000_000, 4, 8) / GIB, 2) for c in (big, small)] == [46.15, 32.03]


def test_the_memory_filter_leaves_shapes_of_the_published_kind(big, small, monkeypatch):
    around = {
        "mamba_layers": list(range(45, 55)), "attention_layers": list(range(5, 11)), "ffn_layers": list(range(48, 55)),
        "intermediate_size": list(range(28672, 32769, 1024)),
    }  # fmt: skip
    axes = {axis: [value] for axis, value in shape_of(big).items()} | around
    budget = Budget(memory=32.1 * GIB, **AT)
    assert budget.admits(small) and not budget.admits(big)
    monkeypatch.setattr(search, "best_parts", None)  # thousands of shapes are judged without lists of their neurons
    found, funnel = candidates(big, pretend(big), axes, budget, 10_000)
    assert funnel["grid"] == 10 * 6 * 7 * 5 - 1 and 0 < len(found) < 100
    shapes = [one.shape for one in found]
    assert shape_of(small) in shapes
    # A key-value cache of a million tokens weighs much: only the fewest attention layers are left, and narrower FFN layers.
    assert all(shape["attention_layers"] == 5 and shape["intermediate_size"] <= 30720 for shape in shapes)


def test_a_uniform_cut_of_the_56b(big, small):
    kept = uniform_depth(big, pretend(big), count_parameters(small))
    assert 0 <= count_parameters(small) - count_parameters(smaller_config(big, kept)) < 2 * 8192 * 54


@torch.no_grad()
def test_the_8b_at_toy_width():
    pattern = published("8b").hybrid_override_pattern
    torch.manual_seed(0)
    parent = HybridLMForCausalLM(HybridLMConfig(hybrid_override_pattern=pattern, **TOY)).eval()
    axes = {axis: default_axis(parent.config, axis) for axis in shape_of(parent.config)}
    assert axes["mamba_layers"] == list(range(24, 15, -1)) and axes["attention_layers"] == [4, 3]
    budget = Budget(parameters=0.7 * count_parameters(parent.config))
    importance = pretend(parent.config, [4, 5, 29, 30])
    found, funnel = candidates(parent.config, importance, axes, budget, 5)
    assert funnel["grid"] > funnel["within_budget"] > funnel["scored"] == 5
    student = prune(parent, most_important(parent.config, importance, found[0].shape))
    assert not set(found[0].shape.items()) >= set(shape_of(parent.config).items())
    assert student.num_parameters() == count_parameters(counted(parent.config, found[0].shape)) <= budget.parameters
    assert student(torch.arange(9)[None]).logits.isfinite().all()
