"""`m`: the Mamba-1 layer (Gu & Dao 2023, arXiv 2312.00752, section 3.4 and figure 3)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from hybridlm.cache import State
from hybridlm.configuration import NO_LIMIT, HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.mamba2 import Convolution
from hybridlm.mixers.parts import IntoResidual, KeepsWide, Linear
from hybridlm.ops import Ops


class Mamba(KeepsWide, nn.Module):
    """in_proj -> (x, z); x through the convolution; x_proj -> (dt at low rank, B, C); the scan; times silu(z); out_proj.

    Unlike in Mamba-2, dt, B and C come from x behind the convolution, and every channel has a step size of its own and a decay
    for each row of its state. A_log, D and dt_bias stay in fp32, as there; dt_bias is the bias of dt_proj, and its own
    parameter for that reason.
    """

    hands_on = True
    WIDE = ("A_log", "D", "dt_bias")

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        inner, n, rank = config.mamba_inner_size, config.ssm_state_size, config.mamba_rank
        self.ops, self.projected = ops, [rank, n, n]
        self.limit = None if list(config.time_step_limit) == NO_LIMIT else config.time_step_limit
        self.in_proj = Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv1d = Convolution(inner, config, ops)
        self.x_proj = Linear(inner, sum(self.projected), bias=False)
        self.dt_proj = FromRank(rank, inner, bias=False)
        self.A_log = nn.Parameter(torch.empty(inner, n, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.out_proj = IntoResidual(inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        ops = self.ops
        conv_state, ssm_state = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = self.conv1d(u, context, conv_state)
        low, B, C = self.x_proj(u).split(self.projected, dim=-1)
        dt = softplus(self.dt_proj(low) + self.dt_bias)  # in the dtype of dt_bias, which is fp32 at least
        if self.limit is not None:
            dt = dt.clamp(*self.limit)
        if context.padding is not None:  # a step of length 0 neither decays the state nor adds to it
            dt = dt.masked_fill(context.padding.absent[..., None], 0)
        A = -torch.exp(self.A_log)
        if x.shape[1] == 1 and ssm_state is not None:
            u, dt, B, C = (m.squeeze(1) for m in (u, dt, B, C))
            y, ssm_state = ops.selective_scan_step(u, dt, A, B, C, ssm_state, D=self.D, overwrite=context.inference)
            y = y.unsqueeze(1)
        else:
            y, ssm_state = ops.selective_scan(u, dt, A, B, C, D=self.D, initial_state=ssm_state, seq_idx=context.seq_idx)
        return self.out_proj(y * silu(z)), (conv_state, ssm_state)


class FromRank(Linear):
    """The projection of dt: it starts wider, so that steps differ between channels, see `_init_weights`."""
