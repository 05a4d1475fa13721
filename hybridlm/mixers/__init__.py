"""The kinds of layer: one file each, one table for all.

A mixer is built as `Mixer(config, ops)` and called as `mixer(x, context, state) -> (y, state)`: x and y (b t d); `state`
None at the start of a sequence; the returned state is for the next call, and at inference may be `state`, written over.
`hands_on` says that calls on the pieces of a sequence, each with the state of the one before, are as good as one on the
whole. A projection into the residual stream is an `IntoResidual`: it starts smaller.
"""

from torch import nn

from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.attention import Attention
from hybridlm.mixers.bidirectional import Bidirectional
from hybridlm.mixers.ffn import FFN
from hybridlm.mixers.mamba import Mamba
from hybridlm.mixers.mamba2 import Mamba2
from hybridlm.mixers.moe import MoE
from hybridlm.mixers.recurrent import GRU, LSTM, Elman
from hybridlm.ops import Ops

MIXERS = {"M": Mamba2, "*": Attention, "-": FFN, "E": MoE, "r": Elman, "l": LSTM, "g": GRU, "m": Mamba}


def build_mixer(symbol: str, config: HybridLMConfig, ops: Ops) -> nn.Module:
    """The mixer of a layer; in a bidirectional model a recurrent one is a pair."""
    kind = MIXERS[symbol]
    return kind(config, ops) if config.directions(symbol) == 1 else Bidirectional(kind, config, ops)
