import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.checkpoint import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    config = HybridLMConfig(
        vocab_size=20, hidden_size=16, hybrid_override_pattern="M-", intermediate_size=16, ssm_state_size=4, mamba_num_heads=2,
        mamba_head_dim=8, n_groups=1,
    )  # fmt: skip
    HybridLMForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_whole_folder_opens(folder):
    assert isinstance(HybridLMForCausalLM.from_pretrained(folder), HybridLMForCausalLM)


def test_missing_unknown_and_misshapen_weights_are_all_listed(folder):
    def change(tensors):
        del tensors["backbone.layers.0.mixer.A_log"]
        tensors["extra"] = torch.zeros(1)
        tensors["backbone.norm_f.weight"] = torch.zeros(3)

    edit(folder, change)
    with pytest.raises(ValueError, match=r"missing.*A_log.*unknown.*extra.*another shape.*norm_f"):
        HybridLMForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "runs/demo/model"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"no checkpoint folder {name}"):
        HybridLMForCausalLM.from_pretrained(name)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        HybridLMForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama'"):
        HybridLMForCausalLM.from_pretrained(tmp_path)


def test_a_missing_tokenizer_says_so(folder):
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(folder)
