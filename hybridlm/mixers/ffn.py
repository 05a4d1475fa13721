"""`-`: the feed-forward layer with squared ReLU (Primer, arXiv 2109.08668)."""

from torch import Tensor, nn

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.ops import Ops


class FFN(nn.Module):
    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, None]:
        return self.down_proj(self.up_proj(x).relu().square()), None
