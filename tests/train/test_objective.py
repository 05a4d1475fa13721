"""The loss is what the configuration says."""

import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from tests.train.conftest import SHAPE
from train.objective import objective


def test_z_loss_of_the_settings_is_in_the_gradients(make_config):
    model = HybridLMForCausalLM(HybridLMConfig(**SHAPE))
    batch = {"input_ids": torch.arange(8)[None], "targets": torch.arange(1, 9)[None]}
    values, gradients = [], []
    for weight in (0.0, 0.5):
        loss = objective(make_config(optim__z_loss=weight), model, None, None, None, None)(model, batch)
        loss.sum().backward()
        values.append(loss.detach())
        gradients.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    assert torch.equal(*values) and not torch.allclose(*gradients, rtol=0.1)
