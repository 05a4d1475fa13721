"""A recurrent layer that reads its documents in both directions (Schuster & Paliwal 1997, "Bidirectional recurrent neural
networks"), of any kind of recurrent mixer."""

import torch
from torch import Tensor, nn

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import IntoResidual
from hybridlm.ops import Ops


class Bidirectional(nn.Module):
    """Two mixers of one kind, each with weights of its own: one over the sequence, one over its reverse.

    What they give is added ("sum"), or put side by side and projected back to hidden_size ("concat").
    """

    hands_on = False  # the one that reads from the end would need what comes after the piece

    def __init__(self, kind: type[nn.Module], config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.from_start, self.from_end = kind(config, ops), kind(config, ops)
        concat, d = config.bidirectional == "concat", config.hidden_size
        self.merge = IntoResidual(2 * d, d, bias=False) if concat else None

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, None]:
        assert context.reverse is not None and state is None, "a bidirectional model has no cache"
        first, _ = self.from_start(x, context, None)
        second, _ = self.from_end(x.flip(1), context.reverse, None)
        second = second.flip(1)
        return (first + second if self.merge is None else self.merge(torch.cat([first, second], dim=-1))), None
