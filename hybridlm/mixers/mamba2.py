"""`M`: the Mamba-2 layer (arXiv 2405.21060, section 7.1 and figure 6), as Nemotron-H has it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hybridlm.cache import State
from hybridlm.configuration import NO_LIMIT, HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.ops import Ops


class Mamba2(nn.Module):
    """in_proj -> (z, x, B, C, dt); x, B, C through the convolution; SSD; gated norm; out_proj.

    A_log, D and dt_bias stay in fp32 whatever the model is cast to: the decay exp(-dt exp(A_log)) compounds their error
    over the whole sequence.
    """

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        inner, conv, heads = config.mamba_inner_size, config.mamba_conv_size, config.mamba_num_heads
        self.in_proj = nn.Linear(config.hidden_size, inner + conv + heads, bias=config.use_bias)
        # Holds the weights under their usual names; the operator reads them.
        self.conv1d = nn.Conv1d(conv, conv, config.conv_kernel, groups=conv, bias=config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = GatedNorm(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        c, ops = self.config, self.ops
        conv_state, ssm_state = (None, None) if state is None else state
        z, xBC, dt = self.in_proj(x).split([c.mamba_inner_size, c.mamba_conv_size, c.mamba_num_heads], dim=-1)
        xBC, conv_state = ops.conv1d(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, initial_state=conv_state, seq_idx=context.seq_idx
        )
        bc_size = c.n_groups * c.ssm_state_size
        u, B, C = xBC.split([c.mamba_inner_size, bc_size, bc_size], dim=-1)
        u = u.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        B, C = B.unflatten(-1, (c.n_groups, -1)), C.unflatten(-1, (c.n_groups, -1))
        dt = softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        if list(c.time_step_limit) != NO_LIMIT:
            dt = dt.clamp(*c.time_step_limit)
        A = -torch.exp(self.A_log)
        if x.shape[1] == 1 and ssm_state is not None:
            y, ssm_state = ops.ssd_step(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], ssm_state, D=self.D)
            y = y[:, None]
        else:
            y, ssm_state = ops.ssd(
                u, dt, A, B, C, D=self.D, initial_state=ssm_state, seq_idx=context.seq_idx, chunk_size=c.chunk_size
            )
        y = ops.gated_norm(y.flatten(-2), z, self.norm.weight, groups=c.n_groups, eps=c.layer_norm_epsilon)
        return self.out_proj(y), (conv_state, ssm_state)

    def _apply(self, fn, recurse: bool = True):
        """Lets `.to(bfloat16)` and `.half()` move A_log, D and dt_bias but never narrow them."""
        wide = {id(p) for p in (self.A_log, self.D, self.dt_bias)}

        def keep_wide(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in wide and moved.element_size() < t.element_size() else moved

        return super()._apply(keep_wide, recurse)


class GatedNorm(nn.Module):
    """The weight of the gated norm, under its name in the checkpoint."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
