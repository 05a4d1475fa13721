"""The classical recurrences, with torch's own weights: Elman's network, LSTM and GRU.

With i = W_ih x_t + b_ih and r = W_hh h_{t-1} + b_hh, cut into the gates that a kind has:

    rnn_tanh, rnn_relu   h_t = tanh(i + r), max(i + r, 0)                                        Elman 1990
    lstm                 i, f, g, o: c_t = s(f) c_{t-1} + s(i) tanh(g), h_t = s(o) tanh(c_t)    Hochreiter & Schmidhuber 1997;
                         each letter the sum of its parts of i and r, s the logistic function    Gers et al. 2000 (forget gate)
    gru                  r, z, n: h_t = (1 - s(z)) tanh(n_i + s(r) n_r) + s(z) h_{t-1}           Cho et al. 2014 (arXiv 1406.1078)

A kind has `GATES` times the parameters n (d + n + 1) of Elman's network, and n more for each gate: torch keeps two biases, of
which only the GRU's n_r needs both.
"""

import torch
from torch import Tensor

from hybridlm.ops.backend import pick
from hybridlm.ops.checks import check_seq_idx, check_shape
from hybridlm.ops.precision import without_autocast
from hybridlm.ops.recurrent import eager, naive

IMPLEMENTATIONS = {"eager": eager.recurrent, "naive": naive.recurrent}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}

Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def recurrent(
    kind: str,
    x: Tensor,
    weights: Weights,
    *,
    initial_state: tuple[Tensor, ...] | None = None,
    seq_idx: Tensor | None = None,
    absent: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The whole sequence at once; a step is the same call with t = 1.

    Letters: b batch, t time, d input, n state, k gates of the kind.

    Args:
        kind: a key of `GATES`.
        x: (b t d), any floating dtype. Everything is computed in fp32 at least, for a state in bf16 would forget what is small;
            but cuDNN rounds the factors of fp32 products to TF32, as torch lets it unless torch.backends.cudnn.allow_tf32 is
            False.
        weights: W_ih (k n, d), W_hh (k n, n), b_ih and b_hh (k n), the gates in torch's order.
        initial_state: h (b n), of an LSTM also c (b n), in fp32 at least; of the row's first document. Zeros if absent.
        seq_idx: (b t) integers that never fall along t: the document of each token. No state crosses from one to the next.
        absent: (b t) True at positions that are no tokens: the state passes them unchanged, and their y is 0.
        backend: `auto`, or a key of `IMPLEMENTATIONS`.

    Returns:
        y (b t n), every h, in the dtype of x, and the final state of the row's last document, as `initial_state`.

    Raises:
        ValueError: an unknown kind, a shape that breaks the above, or an empty sequence.
    """
    if kind not in GATES:
        raise ValueError(f"recurrent: kind must be one of {', '.join(GATES)}; got {kind!r}.")
    w_ih, w_hh, b_ih, b_hh = weights
    sizes = {"n": w_hh.shape[-1], "kn": GATES[kind] * w_hh.shape[-1]}
    check_shape("x", x, "b t d", sizes)
    for name, weight, letters in (("W_ih", w_ih, "kn d"), ("W_hh", w_hh, "kn n"), ("b_ih", b_ih, "kn"), ("b_hh", b_hh, "kn")):
        check_shape(name, weight, letters, sizes)
    if sizes["t"] == 0:
        raise ValueError(f"recurrent: x has no time steps (shape {tuple(x.shape)}); pass at least one token.")
    parts = ("h", "c") if kind == "lstm" else ("h",)
    if initial_state is not None:
        if len(initial_state) != len(parts):
            raise ValueError(f"recurrent: the state of {kind} is ({', '.join(parts)}); got {len(initial_state)} tensors.")
        for name, part in zip(parts, initial_state):
            check_shape(name, part, "b n", sizes)
    if seq_idx is not None:
        check_seq_idx(seq_idx, sizes["b"], sizes["t"])
    if absent is not None:
        check_shape("absent", absent, "b t", sizes)
        if seq_idx is not None:
            raise ValueError("recurrent: pass seq_idx or absent, not both; what is no token can be a document.")
    run = pick("recurrent", IMPLEMENTATIONS, backend, x, lambda: None)
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = tuple(x.new_zeros(sizes["b"], sizes["n"], dtype=wide) for _ in parts)
    with without_autocast(x):
        y, state = run(
            kind,
            x.to(wide),
            [weight.to(wide) for weight in weights],
            tuple(part.to(wide) for part in initial_state),
            seq_idx,
            absent,
        )
    return y.to(x.dtype), state
