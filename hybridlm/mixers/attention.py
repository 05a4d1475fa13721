"""`*`: self-attention, causal but in a bidirectional model, with grouped key-value heads (arXiv 2305.13245), and RoPE (arXiv
2104.09864) where configured."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.parts import IntoResidual, Linear
from hybridlm.ops import Ops
from hybridlm.ops.precision import product_dtype, without_autocast


class Attention(nn.Module):
    """`attn_implementation` chooses the product: torch's scaled_dot_product_attention ("sdpa"), or another one that transformers'
    attention interface knows."""

    hands_on = False  # pieces behind a cache need a mask, which takes longer

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        self.is_causal = config.bidirectional is None
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = IntoResidual(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, State]:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        kept = (k, v)
        if state is not None:
            kept = extend(state[0], k, context), extend(state[1], v, context)
            k, v = (m[:, :, : context.past + x.shape[1]] for m in kept)
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "sdpa":
            with without_autocast(x):  # q, k and v have its dtype, or a wider one on purpose
                y = sdpa(q, k, v, context, self.is_causal, dropout)
            return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype)), kept
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        wanted = {"output_attentions": True} if context.attentions is not None else {}
        y, weights = attend(self, q, k, v, context.mask, dropout=dropout, scaling=self.head_dim**-0.5, **wanted)
        if context.attentions is not None and weights is not None:
            context.attentions.append(weights)
        return self.o_proj(y.flatten(2)), kept


def extend(kept: Tensor, new: Tensor, context: Context) -> Tensor:
    """The positions of `kept` (b h s d) that the cache has seen, then `new` (b h t d); positions after them are free.

    At inference they are written where there is room, and room is made for more than is needed: to move all that is kept for
    every token would take longer than to attend to it.
    """
    past, need = context.past, context.past + new.shape[2]
    if not context.inference:
        return torch.cat([kept[:, :, :past], new], dim=2)
    if kept.shape[2] < need or (kept.is_inference() and not torch.is_inference_mode_enabled()):
        larger = kept.new_empty(*kept.shape[:2], need + need // 8 + 64, kept.shape[3])
        larger[:, :, :past] = kept[:, :, :past]
        kept = larger
    kept[:, :, past:need] = new
    return kept


def sdpa(q: Tensor, k: Tensor, v: Tensor, context: Context, causal: bool = True, dropout: float = 0.0) -> Tensor:
    """q (b h t d), k and v (b g s d) -> (b h t d): causal or not, or as the mask says; packed documents each by itself."""
    q, k, v = (m.to(product_dtype(m)) for m in (q, k, v))
    if context.documents is not None:
        attend = partial(scaled_dot_product_attention, is_causal=causal, enable_gqa=True, dropout_p=dropout)
        rows = zip(*(m.unbind() for m in (q, k, v)), context.documents, strict=True)
        parts = [[m.split(lengths, dim=1) for m in row] for *row, lengths in rows]
        return torch.stack([torch.cat([attend(*document) for document in zip(*row, strict=True)], dim=1) for row in parts])
    if q.shape[2] > 1 or context.mask is not None or q.element_size() < 4 or dropout:
        alone = causal and context.mask is None and q.shape[2] > 1
        return scaled_dot_product_attention(q, k, v, context.mask, dropout, is_causal=alone, enable_gqa=True)
    # One token: the heads of a group in one product with its keys, which are read once. Its scores would not be fp32 in bf16.
    by_group = q.reshape(*k.shape[:2], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    return ((by_group @ k.mT).softmax(-1) @ v).view(q.shape)


def eager_attention(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, dropout: float, **kwargs
) -> tuple[Tensor, Tensor]:
    """Attention written out, so that its weights (b h t s) can be looked at; softmax in at least fp32."""
    k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    weights = drop(weights, dropout) if dropout else weights
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
