"""Padding and packed documents: from what a caller passes to what the layers of one pass share."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from hybridlm.cache import HybridCache
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.attention import rotary
from hybridlm.mixers.context import Context, Padding
from hybridlm.ops.checks import check_seq_idx


def find_tokens(b: int, t: int, attention_mask: Tensor | None, cache: HybridCache | None) -> Tensor | None:
    """(b s) which positions, cached and new together, are tokens and no padding; None where all are.

    Raises:
        ValueError: a mask of another shape or one that contradicts the cache, or a cache of other rows.
    """
    past = 0 if cache is None else cache.seen
    if cache is not None and cache.batch_size not in (-1, b):
        raise ValueError(
            f"the cache has {cache.batch_size} row(s) and the input {b}; choose its rows (batch_select_indices, "
            "batch_repeat_interleave) or reset it."
        )
    known = None if cache is None else cache.tokens
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor; got {type(attention_mask).__name__}.")
    if attention_mask is None:
        return known if known is None else torch.cat([known, known.new_ones(b, t)], dim=1)
    if tuple(attention_mask.shape) != (b, past + t):
        raise ValueError(
            f"attention_mask must have shape ({b}, {past + t}): {past} cached and {t} new positions; "
            f"got {tuple(attention_mask.shape)}."
        )
    if attention_mask.is_floating_point() and (attention_mask < 0).any():
        raise ValueError(
            "attention_mask must be ones for tokens and zeros for padding; got an additive mask, with values below 0."
        )
    tokens = attention_mask.bool()
    if past and not torch.equal(tokens[:, :past], torch.ones_like(tokens[:, :past]) if known is None else known):
        raise ValueError(
            "attention_mask marks other cached positions as padding than the calls that read them; a recurrent state cannot "
            "forget what it has read. Pass the same ones and zeros again, then those of the new positions."
        )
    return None if tokens.all() else tokens


def build_context(
    config: HybridLMConfig,
    x: Tensor,
    tokens: Tensor | None,
    seq_idx: Tensor | None,
    cache: HybridCache | None,
    attentions: list[Tensor] | None,
) -> Context:
    """
    Args:
        x: (b t d) the embedded input. tokens: as `find_tokens` gives it. seq_idx: (b t), see `HybridLMModel.forward`.

    Raises:
        ValueError: padding and documents together, documents behind a cache, or a seq_idx that is none.
    """
    b, t = x.shape[:2]
    past = 0 if cache is None else cache.seen
    if seq_idx is not None:
        if tokens is not None:
            raise ValueError("pass padding (attention_mask) or documents (seq_idx), not both: padding can be a document.")
        if past and "*" in config.hybrid_override_pattern:
            raise ValueError(
                f"seq_idx does not go with a cache that has seen {past} positions where layers attend to them: these keys and "
                "values know no documents. Start a new cache."
            )
        check_seq_idx(seq_idx, b, t)
        if (seq_idx.diff() < 0).any():
            raise ValueError("seq_idx must never fall along a row: it numbers the documents in their order.")
        if (seq_idx[:, 0] == seq_idx[:, -1]).all():
            seq_idx = None  # every row is one document
    padding = None if tokens is None or tokens[:, past:].all() else Padding.where(~tokens[:, past:])
    mask = rotation = documents = None
    if "*" in config.hybrid_override_pattern:
        if seq_idx is not None:
            documents = [row.unique_consecutive(return_counts=True)[1].tolist() for row in seq_idx]
        mask = attention_mask(config, x, tokens, seq_idx, cache)
        if config.rope_theta is not None:
            # Only differences of positions matter, so packed documents need no positions of their own.
            every = torch.arange(past + t, device=x.device)[None] if tokens is None else tokens.cumsum(1) - 1
            positions = every[:, past:]
            rotation = rotary(positions, config.head_dim, config.rope_theta)
    context = Context(not torch.is_grad_enabled(), past, seq_idx, documents, padding, mask, rotation, attentions)
    return context if config.bidirectional is None else replace(context, reverse=context.reversed())


def attention_mask(
    config: HybridLMConfig, x: Tensor, tokens: Tensor | None, seq_idx: Tensor | None, cache: HybridCache | None
) -> Any:
    """What the attention implementation takes: causal, but in a bidirectional model, and among the tokens of one document.

    A query sees itself even at padding: a softmax over nothing would be NaN, and reach the gradients.

    Raises:
        ValueError: the attention implementation has no mask, and this input needs one; or is not for both directions.
    """
    kind, t, past = config._attn_implementation, x.shape[1], 0 if cache is None else cache.seen
    both = config.bidirectional is not None
    if both and kind not in ("sdpa", "eager"):
        raise ValueError(f"a bidirectional model takes attn_implementation 'sdpa' or 'eager'; got {kind!r}.")
    plain = tokens is None and seq_idx is None
    if kind == "sdpa" and tokens is None and (past == 0 or t == 1):
        return None  # plainly causal, or all of it, each document by itself
    if kind in ("sdpa", "eager"):  # as create_causal_mask gives, at a fraction of its time
        every = torch.ones(t, past + t, dtype=torch.bool, device=x.device)[None]
        mask = every if both else every.tril(past)
        if tokens is not None:
            itself = every.tril(past).triu(past)
            mask = mask & tokens[:, None] | itself
        elif seq_idx is not None:
            mask = mask & (seq_idx[:, :, None] == seq_idx[:, None])
        mask = mask[:, None]
        return mask if kind == "sdpa" else torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    if not plain and kind not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={kind!r} has no mask, which padding and packed documents need; register one "
            "(transformers.AttentionMaskInterface), or take 'sdpa'."
        )

    def visible(row, head, query, key):
        if tokens is not None:
            return tokens[row, key] | (query == key)
        return cast(Tensor, seq_idx)[row, query] == cast(Tensor, seq_idx)[row, key]

    return create_causal_mask(config, x, None, cache, and_mask_function=None if plain else visible, layer_idx=0)
