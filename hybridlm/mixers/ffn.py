"""`-`: the feed-forward layer with squared ReLU (Primer, arXiv 2109.08668)."""

from torch import Tensor, nn

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import IntoResidual
from hybridlm.ops import Ops


class MLP(nn.Module):
    """down(relu(up(x))^2): (… d) -> (… d)."""

    def __init__(self, size: int, width: int, bias: bool, down: type[nn.Linear] = IntoResidual):
        super().__init__()
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = down(width, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu().square())


class FFN(MLP):
    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None
