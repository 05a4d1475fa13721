import pytest
import torch

from hybridlm.mixers.context import Context
from hybridlm.mixers.ffn import FFN
from hybridlm.ops import build_ops


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_squared_relu_between_two_projections(bias, tiny_config):
    m, x = FFN(tiny_config(mlp_bias=bias), build_ops()).double(), torch.randn(2, 3, 32, dtype=torch.float64)
    y, state = m(x, Context(), None)
    torch.testing.assert_close(y, m.down_proj(torch.clamp(m.up_proj(x), min=0) ** 2), rtol=1e-9, atol=1e-9)
    assert state is None and (m.up_proj.bias is not None) == bias
