"""`-`: the feed-forward layer with squared ReLU (Primer, arXiv 2109.08668)."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import IntoResidual, Linear
from hybridlm.ops import Ops


class MLP(nn.Module):
    """down(relu(up(x))^2): (… d) -> (… d)."""

    def __init__(self, size: int, width: int, bias: bool, down: type[Linear] = IntoResidual):
        super().__init__()
        self.up_proj = Linear(size, width, bias=bias)
        self.down_proj = down(width, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(SquaredReLU.apply(up) if up.requires_grad else up.relu().square_())


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2. Backward needs its result alone, which the next product keeps anyway: relu(x) is the root of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.relu().square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.sqrt().mul_(grad).mul_(2)


class FFN(MLP):
    hands_on = True

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None
