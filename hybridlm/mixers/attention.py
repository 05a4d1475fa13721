"""`*`: causal self-attention with grouped key-value heads (arXiv 2305.13245), and RoPE (arXiv 2104.09864) where configured."""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import IntoResidual
from hybridlm.ops import Ops


class Attention(nn.Module):
    """The product itself is transformers' attention interface: `attn_implementation` chooses it."""

    is_causal = True

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = IntoResidual(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        wanted = {"output_attentions": True} if context.attentions is not None else {}
        y, weights = attend(self, q, k, v, context.mask, dropout=0.0, scaling=self.head_dim**-0.5, **wanted)
        if context.attentions is not None and weights is not None:
            context.attentions.append(weights)
        return self.o_proj(y.flatten(2)), (k, v)


def eager_attention(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **kwargs
) -> tuple[Tensor, Tensor]:
    """Attention written out, so that its weights (b h t s) can be looked at; softmax in at least fp32."""
    k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (b t head_dim), fp32, of positions (b t).

    Channels i and i + head_dim/2 turn together by position * theta^(-2i / head_dim).
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    return torch.cat([angle, angle], dim=-1).cos(), torch.cat([angle, angle], dim=-1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b h t head_dim), turned in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return turned.to(x.dtype)
