import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM

from hybridlm.timing import generate, mark, seconds_between

SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_a_request_writes_the_tokens_of_greedy_generation(tiny_model, monkeypatch):
    model, read = tiny_model(), []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    found = generate(model, 3, 7, 6, 2)
    hook.remove()
    expected = model.generate(read[0], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert read[0].shape == (2, 7)
    assert torch.cat(read, dim=1).equal(expected[:, :-1])
    assert len(found["steps"]) == 5
    assert sum(found["steps"]) <= found["total"] - found["first"]
    read.clear()
    generate(model, 4, 7, 1, 2)
    assert not read


def test_a_token_behind_a_cache_is_not_the_first():
    """Bamba counts positions from 0 where none are given."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    mamba = {
        "num_hidden_layers": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    }
    config = BambaConfig(**SMALL, **shape, **mamba, attn_layer_indices=[1], initializer_range=0.5)
    model, read = BambaForCausalLM(config).eval(), []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    generate(model, 3, 11, 8, 2)
    hook.remove()
    written = read[0].clone()
    for _ in read[1:]:
        written = torch.cat([written, model(input_ids=written, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.cat(read, dim=1).equal(written)


def test_without_a_cache_nothing_is_timed(tiny_model):
    model = tiny_model()
    forward = model.forward

    def forgetful(**inputs):
        return forward(**inputs | {"use_cache": False})

    model.forward = forgetful
    with pytest.raises(ValueError, match="HybridLMForCausalLM keeps no cache between tokens"):
        generate(model, 0, 4, 2, 1)


def test_moments_of_the_cpu_are_seconds():
    start = mark(torch.device("cpu"))
    assert 0 <= seconds_between(start, mark(torch.device("cpu"))) < 60
