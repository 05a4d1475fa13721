"""`r`, `l`, `g`: Elman's network, LSTM and GRU, as layers of the same stack (`ops.recurrent` has their equations)."""

from torch import Tensor, nn

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import IntoResidual
from hybridlm.ops import Ops


class Recurrent(nn.Module):
    """The cell over the sequence, then out_proj from its state into the residual stream.

    The cell is torch's own for its weights and their names; its state stays fp32 whatever the model is cast to.
    """

    hands_on = True

    def __init__(self, kind: str, cell: nn.RNNCellBase, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.kind, self.cell, self.op = kind, cell, ops.recurrent
        self.out_proj = IntoResidual(cell.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        c, absent = self.cell, None if context.padding is None else context.padding.absent
        weights = c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh
        y, state = self.op(self.kind, x, weights, initial_state=state, seq_idx=context.seq_idx, absent=absent)
        return self.out_proj(y), state


class Elman(Recurrent):
    def __init__(self, config: HybridLMConfig, ops: Ops):
        activation = config.rnn_activation
        cell = nn.RNNCell(config.hidden_size, config.recurrent_state_size, nonlinearity=activation)
        super().__init__(f"rnn_{activation}", cell, config, ops)


class LSTM(Recurrent):
    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__("lstm", nn.LSTMCell(config.hidden_size, config.recurrent_state_size), config, ops)


class GRU(Recurrent):
    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__("gru", nn.GRUCell(config.hidden_size, config.recurrent_state_size), config, ops)
