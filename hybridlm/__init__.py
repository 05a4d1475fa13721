"""Hybrid Mamba-2/Transformer language models: train, evaluate, load anywhere."""

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridlm.auto import register_nemotron_h
    from hybridlm.classification import HybridLMForSequenceClassification
    from hybridlm.configuration import HybridLMConfig
    from hybridlm.modeling import HybridLMForCausalLM, HybridLMModel

__version__ = "0.1.0"
__all__ = ["HybridLMConfig", "HybridLMForCausalLM", "HybridLMForSequenceClassification", "HybridLMModel", "register_nemotron_h"]

# transformers imports torchao where it is installed, which tells of kernels and types that nothing here uses.
_NOISE = ("Failed to load ", "<enum 'KernelPreference'> is an Enum", "<enum 'ScaleCalculationMode'> is an Enum")
for _source in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_source).addFilter(lambda record: not record.getMessage().startswith(_NOISE))


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hybridlm import auto

    globals().update({known: getattr(auto, known) for known in __all__})
    return globals()[name]


# `python -m hybridlm` and `python -m eval` come here first: their --help should not wait for torch, and `doctor` must run where
# torch does not. They register when they know that a model is wanted.
if sys.orig_argv[1:3] not in (["-m", "hybridlm"], ["-m", "eval"]):
    from hybridlm.auto import register_hybridlm

    register_hybridlm()
