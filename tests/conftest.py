"""Shared by all tests: one thread, and a model small enough to take anywhere."""

import pytest
import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM

torch.set_num_threads(1)

# Every kind of layer, 1 < groups < heads, 1 < KV heads < query heads, odd sizes; a wide init makes every layer matter.
TINY = {
    "hybrid_override_pattern": "M-M*-M-",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "initializer_range": 0.3,
}


@pytest.fixture
def tiny():
    """The fields of the tiny configuration, changed by keyword."""
    return lambda **changes: TINY | changes


@pytest.fixture
def tiny_config():
    return lambda **changes: HybridLMConfig(**TINY | changes)


@pytest.fixture
def tiny_model(tiny_config):
    """Builds the tiny model, always with the same weights."""

    def build(backend="auto", **changes):
        torch.manual_seed(0)
        return HybridLMForCausalLM(tiny_config(**changes), backend=backend).eval()

    return build
