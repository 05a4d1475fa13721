import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMModel


@torch.no_grad()
def test_hidden_states_are_every_layers_and_the_last_is_normed(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    output = model.backbone(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 7 + 1
    assert torch.equal(output.hidden_states[0], model.backbone.embeddings(ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert len(model(ids, return_dict=False)) == 2  # logits and cache


@torch.no_grad()
def test_embeddings_and_head_can_be_exchanged(tiny_config):
    model = HybridLMForCausalLM(tiny_config())
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)


def test_the_backbone_alone_builds(tiny_config):
    assert isinstance(HybridLMModel(tiny_config()).config, HybridLMConfig)
