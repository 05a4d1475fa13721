"""What every layer of one forward pass shares."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Positions that are no tokens, wherever in a row they stand: nothing of them passes to a token.

    Attributes:
        absent: (b t) True at padding.
        order: (b t) the positions of each row, its tokens first. place: (b t) the inverse of `order`.
        count: (b 1) tokens of each row.
        last: (b t) the token at or before each position, -1 for none.
    """

    absent: Tensor
    order: Tensor
    place: Tensor
    count: Tensor
    last: Tensor

    @classmethod
    def where(cls, absent: Tensor) -> "Padding":
        order = absent.long().argsort(dim=1, stable=True)
        positions = torch.arange(absent.shape[1], device=absent.device).expand_as(absent)
        last = positions.masked_fill(absent, -1).cummax(1).values
        return cls(absent, order, order.argsort(dim=1), (~absent).sum(1, keepdim=True), last)

    def repeat_tokens(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x (b t d) with that of the token before it at each padding; `before` (b d) is the one before this call, if any."""
        if before is None:
            return pick(x, torch.where(self.last < 0, torch.arange(x.shape[1], device=x.device), self.last))
        return pick(torch.cat([before[:, None], x], dim=1), self.last + 1)


@dataclass(frozen=True)
class Context:
    """Computed once a pass, handed to each mixer.

    Attributes:
        inference: no gradient is asked for: states may be written over, and a long input taken in pieces.
        past: positions that the cache has seen.
        seq_idx: (b t) the document of each token, or None where every row is one document.
        documents: of each row, the lengths of its documents; None where every row is one.
        padding: None where every position is a token.
        mask: what the attention implementation takes: boolean or additive (b 1 t s) over the s keys of cache and call together,
            a block mask; None: causal.
        rotary: cosine and sine (b t head_dim) of the positions, or None without RoPE.
        reverse: in a bidirectional model the same for the rows read from their ends, for mixers without attention.
        attentions: attention layers put their weights (b h t s) here, where the list is wanted.
    """

    inference: bool = False
    past: int = 0
    seq_idx: Tensor | None = None
    documents: list[list[int]] | None = None
    padding: Padding | None = None
    mask: Any = None
    rotary: tuple[Tensor, Tensor] | None = None
    attentions: list[Tensor] | None = None
    reverse: "Context | None" = None

    def to(self, device, non_blocking: bool = False) -> "Context":
        """For layers that are spread over devices: accelerate's hooks call it, as they call it of a tensor."""

        def move(value):
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        padding = None if self.padding is None else Padding(*(move(getattr(self.padding, f.name)) for f in fields(Padding)))
        reverse = None if self.reverse is None else self.reverse.to(device, non_blocking)
        moved = {name: move(getattr(self, name)) for name in ("seq_idx", "mask", "rotary")}
        return replace(self, padding=padding, reverse=reverse, **moved)

    def reversed(self) -> "Context":
        """For the rows read from their ends, where documents are numbered from there."""
        return Context(
            self.inference,
            seq_idx=None if self.seq_idx is None else self.seq_idx[:, -1:] - self.seq_idx.flip(1),
            documents=None if self.documents is None else [lengths[::-1] for lengths in self.documents],
            padding=None if self.padding is None else Padding.where(self.padding.absent.flip(1)),
        )


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """x (b t …) at positions (b s) of each row: (b s …)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], positions]
