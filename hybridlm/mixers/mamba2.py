"""`M`: the Mamba-2 layer (arXiv 2405.21060, section 7.1 and figure 6), as Nemotron-H has it."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hybridlm.cache import State
from hybridlm.configuration import NO_LIMIT, HybridLMConfig
from hybridlm.mixers.context import Context, pick
from hybridlm.mixers.parts import IntoResidual, KeepsWide
from hybridlm.ops import Ops


class Mamba2(KeepsWide, nn.Module):
    """in_proj -> (z, x, B, C, dt); x, B, C through the convolution; SSD; gated norm; out_proj.

    A_log, D and dt_bias stay in fp32 whatever the model is cast to: the decay exp(-dt exp(A_log)) compounds their error
    over the whole sequence.
    """

    WIDE = ("A_log", "D", "dt_bias")

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        inner, conv, heads = config.mamba_inner_size, config.mamba_conv_size, config.mamba_num_heads
        self.in_proj = nn.Linear(config.hidden_size, inner + conv + heads, bias=config.use_bias)
        self.conv1d = Convolution(config, ops)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = GatedNorm(config, ops)
        self.out_proj = IntoResidual(inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        c, ops = self.config, self.ops
        conv_state, ssm_state = (None, None) if state is None else state
        z, xBC, dt = self.in_proj(x).split([c.mamba_inner_size, c.mamba_conv_size, c.mamba_num_heads], dim=-1)
        xBC, conv_state = self.conv1d(xBC, context, conv_state)
        bc_size = c.n_groups * c.ssm_state_size
        u, B, C = xBC.split([c.mamba_inner_size, bc_size, bc_size], dim=-1)
        u = u.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        B, C = B.unflatten(-1, (c.n_groups, -1)), C.unflatten(-1, (c.n_groups, -1))
        dt = softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        if list(c.time_step_limit) != NO_LIMIT:
            dt = dt.clamp(*c.time_step_limit)
        if context.padding is not None:  # a step of length 0 neither decays the state nor adds to it
            dt = dt.masked_fill(context.padding.absent[..., None], 0)
        A = -torch.exp(self.A_log)
        if x.shape[1] == 1 and ssm_state is not None:
            y, ssm_state = ops.ssd_step(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], ssm_state, D=self.D)
            y = y[:, None]
        else:
            y, ssm_state = ops.ssd(
                u, dt, A, B, C, D=self.D, initial_state=ssm_state, seq_idx=context.seq_idx, chunk_size=c.chunk_size
            )
        return self.out_proj(self.norm(y.flatten(-2), z)), (conv_state, ssm_state)


class Convolution(nn.Conv1d):
    """The short causal convolution with SiLU, its weights under their usual names."""

    def __init__(self, config: HybridLMConfig, ops: Ops):
        size = config.mamba_conv_size
        super().__init__(size, size, config.conv_kernel, groups=size, bias=config.use_conv_bias)
        self.op = ops.conv1d

    def forward(self, x: Tensor, context: Context, state: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x (b t d) -> y (b t d) and the last k - 1 inputs (b k-1 d): over tokens, as if no padding stood between them."""
        weight, padding = self.weight.squeeze(1), context.padding
        if padding is None:
            return self.op(x, weight, self.bias, initial_state=state, seq_idx=context.seq_idx)
        x, k = pick(x, padding.order), weight.shape[1]
        y, _ = self.op(x, weight, self.bias, initial_state=state)
        before = x.new_zeros(x.shape[0], k - 1, x.shape[2]) if state is None else state
        inputs = torch.cat([before, x], dim=1)
        return pick(y, padding.place), pick(inputs, padding.count + torch.arange(k - 1, device=x.device))


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z), for each group of heads."""

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.mamba_inner_size))
        self.op = partial(ops.gated_norm, groups=config.n_groups, eps=config.layer_norm_epsilon)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return self.op(y, z, self.weight)
