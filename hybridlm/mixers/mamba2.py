"""`M`: the Mamba-2 layer (arXiv 2405.21060, section 7.1 and figure 6), as Nemotron-H has it."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hybridlm.cache import State
from hybridlm.configuration import NO_LIMIT, HybridLMConfig
from hybridlm.mixers.context import Context, pick
from hybridlm.mixers.parts import IntoResidual, KeepsWide, Linear
from hybridlm.ops import Ops


class Mamba2(KeepsWide, nn.Module):
    """in_proj -> (z, x, B, C, dt); x, B, C through the convolution; SSD; gated norm; out_proj.

    A_log, D and dt_bias stay in fp32 whatever the model is cast to: the decay exp(-dt exp(A_log)) compounds their error
    over the whole sequence.
    """

    hands_on = True
    WIDE = ("A_log", "D", "dt_bias")

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        inner, conv, heads = config.mamba_inner_size, config.mamba_conv_size, config.mamba_num_heads
        # Read once: every token of a generation passes here.
        self.ops, self.groups, self.heads, self.chunk_size = ops, config.n_groups, heads, config.chunk_size
        self.projected, self.convolved = [inner, conv, heads], [inner, *[config.n_groups * config.ssm_state_size] * 2]
        self.limit = None if list(config.time_step_limit) == NO_LIMIT else config.time_step_limit
        self.in_proj = Linear(config.hidden_size, inner + conv + heads, bias=config.use_bias)
        self.conv1d = Convolution(conv, config, ops)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = GatedNorm(config, ops)
        self.out_proj = IntoResidual(inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        ops = self.ops
        conv_state, ssm_state = (None, None) if state is None else state
        b, t, _ = x.shape
        step = t == 1 and ssm_state is not None
        z, xBC, dt = self.in_proj(x).split(self.projected, dim=-1)
        xBC, conv_state = self.conv1d(xBC, context, conv_state)
        dt = softplus(dt + self.dt_bias)  # in the dtype of dt_bias, which is fp32 at least
        if self.limit is not None:
            dt = dt.clamp(*self.limit)
        if context.padding is not None:  # a step of length 0 neither decays the state nor adds to it
            dt = dt.masked_fill(context.padding.absent[..., None], 0)
        A = -torch.exp(self.A_log)
        u, B, C = xBC.split(self.convolved, dim=-1)
        leading = (b,) if step else (b, t)
        u, B, C = u.reshape(*leading, self.heads, -1), B.reshape(*leading, self.groups, -1), C.reshape(*leading, self.groups, -1)
        if step:
            dt = dt.squeeze(1)
            y, ssm_state = ops.ssd_step(u, dt, A, B, C, ssm_state, D=self.D, overwrite=context.inference)
        else:
            y, ssm_state = ops.ssd(
                u, dt, A, B, C, D=self.D, initial_state=ssm_state, seq_idx=context.seq_idx, chunk_size=self.chunk_size
            )
        return self.out_proj(self.norm(y.reshape(b, t, -1), z)), (conv_state, ssm_state)


class Convolution(nn.Conv1d):
    """The short causal convolution of `size` channels with SiLU, its weights under their usual names."""

    def __init__(self, size: int, config: HybridLMConfig, ops: Ops):
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
