"""Registration with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hybridlm.classification import HybridLMForSequenceClassification
from hybridlm.configuration import HybridLMConfig
from hybridlm.modeling import HybridLMForCausalLM, HybridLMModel


class NemotronHConfig(HybridLMConfig):
    """HybridLMConfig under the model type by which the Auto classes look it up."""

    model_type = "nemotron_h"


class NemotronHModel(HybridLMModel):
    config_class = NemotronHConfig


class NemotronHForCausalLM(HybridLMForCausalLM):
    config_class = NemotronHConfig


def register_hybridlm() -> None:
    AutoConfig.register("hybridlm", HybridLMConfig, exist_ok=True)
    AutoModel.register(HybridLMConfig, HybridLMModel, exist_ok=True)
    AutoModelForCausalLM.register(HybridLMConfig, HybridLMForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(HybridLMConfig, HybridLMForSequenceClassification, exist_ok=True)


def register_nemotron_h() -> None:
    """Makes the Auto classes open `nemotron_h` folders with this library instead of transformers' own model."""
    AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
    AutoModel.register(NemotronHConfig, NemotronHModel, exist_ok=True)
    AutoModelForCausalLM.register(NemotronHConfig, NemotronHForCausalLM, exist_ok=True)
