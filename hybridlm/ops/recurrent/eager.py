"""The recurrences on torch's kernels, which are cuDNN's on a GPU and oneDNN's LSTM on a CPU.

Documents are run side by side, each as a sequence of its own. A kernel takes sequences of one length (of several, torch's LSTM is
ten times slower on a CPU), so they are cut into pieces of powers of two: first all that have 512 tokens, then, from where these
ended, all that have another 256, … Nothing is padded, and no call is needed more than once for a power.
"""

from collections.abc import Callable

import torch
from torch import Tensor

KERNELS: dict[str, Callable] = {"rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "lstm": torch.lstm, "gru": torch.gru}
CELLS: dict[str, Callable] = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
}


def recurrent(kind, x, weights, state, seq_idx, absent) -> tuple[Tensor, tuple[Tensor, ...]]:
    t = x.shape[1]
    if absent is not None or (seq_idx is not None and t > 1):
        return side_by_side(kind, x, weights, state, seq_idx, absent)
    if t > 1:
        return together(kind, x, weights, state)
    after = CELLS[kind](x[:, 0], state if len(state) > 1 else state[0], *weights)
    after = (after,) if isinstance(after, Tensor) else after
    return after[0][:, None], after


def together(kind: str, x: Tensor, weights: list[Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x (b t d) from state (b n): every h (b t n), and the state after."""
    begin = tuple(part[None] for part in state)
    biases, layers, dropout, bidirectional, batch_first = True, 1, 0.0, False, True
    y, *end = KERNELS[kind](
        x,
        begin if len(begin) > 1 else begin[0],
        weights,
        biases,
        layers,
        dropout,
        torch.is_grad_enabled(),
        bidirectional,
        batch_first,
    )
    return y, tuple(part[0] for part in end)


def side_by_side(kind, x, weights, state, seq_idx, absent) -> tuple[Tensor, tuple[Tensor, ...]]:
    b, t, _ = x.shape
    n = state[0].shape[1]
    tokens = torch.arange(b * t, device=x.device) if absent is None else (~absent).flatten().nonzero()[:, 0]
    if not len(tokens):
        return x.new_zeros(b, t, n), state
    row = tokens // t
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    first = begins.clone()  # of its row
    if seq_idx is not None:
        begins[1:] |= seq_idx.flatten().diff() != 0
    starts = begins.nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.full_like(starts[:1], len(tokens)))
    of, arriving = row[starts], first[starts]
    last = torch.cat([arriving[1:], arriving[:1]])
    now = tuple(torch.where(arriving[:, None], part[of], 0.0) for part in state)  # of every document
    parts, places = [], []
    for power in reversed(range(t.bit_length())):
        here = (lengths >> power & 1).nonzero()[:, 0]
        if len(here):
            done = lengths[here] >> power + 1 << power + 1
            place = tokens[(starts[here] + done)[:, None] + torch.arange(1 << power, device=x.device)]
            y, after = together(kind, x.flatten(0, 1)[place], weights, tuple(part[here] for part in now))
            now = tuple(old.index_copy(0, here, new) for old, new in zip(now, after, strict=True))
            parts.append(y.flatten(0, 1))
            places.append(place.flatten())
    y = x.new_zeros(b * t, n).index_copy(0, torch.cat(places), torch.cat(parts)).unflatten(0, (b, t))
    return y, tuple(old.index_copy(0, of[last], new[last]) for old, new in zip(state, now, strict=True))
