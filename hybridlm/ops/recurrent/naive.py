"""The specification of the recurrences: one token after the other."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def cell(kind: str, x: Tensor, weights: list[Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The state after one token: x (b d), each part of the state (b n)."""
    w_ih, w_hh, b_ih, b_hh = weights
    i, r = linear(x, w_ih, b_ih), linear(state[0], w_hh, b_hh)
    if kind == "lstm":
        enter, forget, new, out = (i + r).chunk(4, dim=-1)
        c = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
        return out.sigmoid() * c.tanh(), c
    if kind == "gru":
        (reset_i, keep_i, new_i), (reset_r, keep_r, new_r) = i.chunk(3, dim=-1), r.chunk(3, dim=-1)
        keep = (keep_i + keep_r).sigmoid()
        return ((1 - keep) * torch.tanh(new_i + (reset_i + reset_r).sigmoid() * new_r) + keep * state[0],)
    return (torch.tanh(i + r) if kind == "rnn_tanh" else torch.relu(i + r),)


def recurrent(kind, x, weights, state, seq_idx, absent) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            same_document = seq_idx[:, t] == seq_idx[:, t - 1]
            state = tuple(torch.where(same_document[:, None], part, 0.0) for part in state)
        here = x.new_ones(len(x), 1, dtype=torch.bool) if absent is None else ~absent[:, t, None]
        after = cell(kind, x[:, t], weights, state)
        state = tuple(torch.where(here, new, old) for new, old in zip(after, state, strict=True))
        outputs.append(torch.where(here, after[0], 0.0))
    return torch.stack(outputs, dim=1), state
