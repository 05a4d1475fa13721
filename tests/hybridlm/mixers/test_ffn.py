import pytest
import torch

from hybridlm.mixers.context import Context
from hybridlm.mixers.ffn import FFN, SquaredReLU
from hybridlm.ops import build_ops


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_squared_relu_between_two_projections(bias, tiny_config):
    m, x = FFN(tiny_config(mlp_bias=bias), build_ops()).double(), torch.randn(2, 3, 32, dtype=torch.float64)
    y, state = m(x, Context(), None)
    torch.testing.assert_close(y, m.down_proj(torch.clamp(m.up_proj(x), min=0) ** 2), rtol=1e-9, atol=1e-9)
    assert state is None and (m.up_proj.bias is not None) == bias


def test_inference_gives_what_training_gives(tiny_config):
    m, x = FFN(tiny_config(), build_ops()).double(), torch.randn(2, 3, 32, dtype=torch.float64)
    with torch.no_grad():
        alone, _ = m(x, Context(), None)
    torch.testing.assert_close(alone, m(x, Context(), None)[0], rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_squared_relu():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-9, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SquaredReLU.apply, x.detach()[[0, 4, 5]].requires_grad_())
    (grad,) = torch.autograd.grad(SquaredReLU.apply(x), x, torch.arange(1.0, 7, dtype=torch.float64))
    torch.testing.assert_close(grad, torch.tensor([0, 0, 0, 8e-9, 5, 36], dtype=torch.float64), rtol=1e-9, atol=0)
