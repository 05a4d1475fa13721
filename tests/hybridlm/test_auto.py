import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models import nemotron_h
from transformers.models.auto import configuration_auto, modeling_auto

import hybridlm
from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMModel, register_nemotron_h


@pytest.fixture
def auto_classes(monkeypatch):
    """Auto classes whose registrations end with the test."""
    for mapping in (configuration_auto.CONFIG_MAPPING, modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))


def test_importing_registers_hybridlm_and_leaves_nemotron_h_alone(tiny_config):
    assert type(AutoConfig.for_model("hybridlm")) is HybridLMConfig
    assert type(AutoModel.from_config(tiny_config())) is HybridLMModel
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is HybridLMForCausalLM
    assert type(AutoConfig.for_model("nemotron_h")) is nemotron_h.NemotronHConfig


def test_registering_nemotron_h_makes_the_auto_classes_return_ours(auto_classes, tiny_model, tmp_path):
    tiny_model(hybrid_override_pattern="MEM*-ME").save_pretrained(tmp_path / "ours")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is nemotron_h.NemotronHForCausalLM
    register_nemotron_h()
    register_nemotron_h()  # twice is once
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(model, HybridLMForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "ours"), HybridLMConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), HybridLMModel)
    model.save_pretrained(tmp_path / "again")
    ours, again = ((tmp_path / d / "config.json").read_text() for d in ("ours", "again"))
    assert ours == again


def test_the_names_of_the_contract_are_there():
    models = ("HybridLMForCausalLM", "HybridLMForSequenceClassification", "HybridLMModel")
    for name in ("HybridLMConfig", *models, "register_nemotron_h"):
        assert name in hybridlm.__all__ and hasattr(hybridlm, name)
