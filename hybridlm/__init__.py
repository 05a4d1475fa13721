"""Hybrid Mamba-2/Transformer language models: train, evaluate, load anywhere."""

from hybridlm.auto import register_hybridlm, register_nemotron_h
from hybridlm.configuration import HybridLMConfig
from hybridlm.modeling import HybridLMForCausalLM, HybridLMModel

__version__ = "0.1.0"
__all__ = ["HybridLMConfig", "HybridLMForCausalLM", "HybridLMModel", "register_nemotron_h"]

register_hybridlm()
