from pathlib import Path

import pytest
import torch
import yaml

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification, HybridLMModel
from hybridlm.twin import active_parameters, count_parameters, transformer_twin

SHAPES = Path(__file__).parents[2] / "configs" / "model"
PARAMETERS = {  # as published, to the digits that are
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-h-8b": 8.101e9,
    "nemotron-h-47b": 46.792e9,
    "nemotron-h-56b": 56.324e9,
    "nemotron-t-8b": 8_053_329_920,
    "nemotron-3-nano-30b": 31.578e9,
}
LAYERS = {  # Mamba-2, FFN, attention
    "nemotron-h-4b": (24, 24, 4),
    "nemotron-h-8b": (24, 24, 4),
    "nemotron-h-47b": (45, 48, 5),
    "nemotron-h-56b": (54, 54, 10),
    "nemotron-t-8b": (0, 32, 32),
    "bench-28m": (6, 6, 1),
    "bench-1b": (13, 13, 2),
}


def shape(name):
    return HybridLMConfig.from_strict_dict(yaml.safe_load((SHAPES / f"{name}.yaml").read_text()))


def parameters_of_the_model(config):
    """Of the language model; of a bidirectional shape, which is none, of its stack, and of a head as large as the embedding."""
    with torch.device("meta"):
        if config.bidirectional is None:
            return sum(p.numel() for p in HybridLMForCausalLM(config).parameters())
        stack = HybridLMModel(config)
    return sum(p.numel() for p in stack.parameters()) + stack.embeddings.weight.numel()


@pytest.mark.parametrize("name", sorted(path.stem for path in SHAPES.glob("*.yaml")))
def test_every_shape_builds_and_is_counted_right(name):
    config = shape(name)
    assert parameters_of_the_model(config) == count_parameters(config)


@pytest.mark.parametrize(("name", "published"), PARAMETERS.items())
def test_the_published_sizes_come_out(name, published):
    counted = count_parameters(shape(name))
    assert counted == published if isinstance(published, int) else round(counted / 1e9, 3) == published / 1e9


@pytest.mark.parametrize(("name", "layers"), LAYERS.items())
def test_the_published_layers_come_out(name, layers):
    assert tuple(map(shape(name).hybrid_override_pattern.count, "M-*")) == layers


@pytest.mark.parametrize("name", ["nemotron-h-4b", "nemotron-h-8b", "nemotron-h-47b", "nemotron-h-56b"])
def test_the_published_rules_hold(name):
    pattern = shape(name).hybrid_override_pattern
    assert pattern[0] == "M" and pattern[-1] == "-" and pattern.count("*-") == pattern.count("*")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"use_conv_bias": False},
        {"conv_kernel": 3},
        {"rope_theta": 1e4},
        {"hybrid_override_pattern": "MM**--M"},
        {"hybrid_override_pattern": "ME*EE"},
        {"hybrid_override_pattern": "mM-m", "use_bias": True},
        {"hybrid_override_pattern": "m", "time_step_rank": 7, "use_conv_bias": False},
        {"hybrid_override_pattern": "ME", "moe_latent_size": 12},
        {"hybrid_override_pattern": "ME", "moe_latent_size": 12, "mlp_bias": True},
        {"hybrid_override_pattern": "ME", "mlp_bias": True},
        {"hybrid_override_pattern": "rlg"},
        {"hybrid_override_pattern": "rrlg", "recurrent_size": 20, "use_bias": True},
    ],
)
def test_the_count_follows_every_choice(changes, tiny_config):
    config = tiny_config(**changes)
    assert parameters_of_the_model(config) == count_parameters(config)


@pytest.mark.parametrize("bidirectional", ["sum", "concat"])
@pytest.mark.parametrize("pattern", ["M-M*-M-", "*-", "ME", "rlgm"])
def test_both_directions_are_counted_and_the_head_is_that_of_a_language_model(pattern, bidirectional, tiny_config):
    config = tiny_config(hybrid_override_pattern=pattern, bidirectional=bidirectional, num_labels=5)
    with torch.device("meta"):
        own = sum(p.numel() for p in HybridLMForSequenceClassification(config).parameters())
    assert own - 5 * config.hidden_size == count_parameters(config) - config.vocab_size * config.hidden_size


@pytest.mark.parametrize("changes", [{}, {"moe_latent_size": 12}])
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_go_to(changes, tiny_config):
    everything = tiny_config(hybrid_override_pattern="ME*E", **changes)
    alone = tiny_config(hybrid_override_pattern="ME*E", n_routed_experts=2, num_experts_per_tok=2, **changes)
    routers = 2 * (6 - 2) * 32
    assert active_parameters(everything) == count_parameters(alone) + routers
    assert active_parameters(tiny_config()) == count_parameters(tiny_config())


def test_nemotron_3_nano_is_a_30b_a3b():
    assert active_parameters(shape("nemotron-3-nano-30b")) == pytest.approx(3.58e9, rel=1e-3)
    assert tuple(map(shape("nemotron-3-nano-30b").hybrid_override_pattern.count, "ME*")) == (23, 23, 6)


@pytest.mark.parametrize("name", ["nemotron-h-4b", "nemotron-h-8b", "nemotron-h-47b", "nemotron-h-56b", "bench-28m", "bench-1b"])
def test_the_twin_is_a_transformer_of_equal_size_width_and_depth(name):
    config = shape(name)
    twin = transformer_twin(config)
    pairs = round(config.num_hidden_layers / 2)
    assert twin.hybrid_override_pattern == "*-" * pairs
    assert twin.rope_theta == 10000.0
    assert (twin.hidden_size, twin.vocab_size) == (config.hidden_size, config.vocab_size)
    assert twin.intermediate_size % 8 == 0
    assert parameters_of_the_model(twin) == pytest.approx(count_parameters(config), rel=0.02)


def test_the_twin_runs_and_trains(tiny_config):
    model = HybridLMForCausalLM(transformer_twin(tiny_config(hidden_size=64)))
    model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_hybrid_too_small_for_a_twin_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="take fewer attention heads"):
        transformer_twin(tiny_config(num_attention_heads=64))
