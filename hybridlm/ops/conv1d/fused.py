"""The convolution on causal_conv1d's CUDA kernels (package causal-conv1d, 1.4 or later)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridlm.ops import kernels


def load():
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    return causal_conv1d_fn, causal_conv1d_update


def refusal(x, weight) -> str | None:
    """Why the kernel cannot take this call, or None."""
    d, k = weight.shape
    if not 2 <= k <= 4:
        return f"takes windows of 2 to 4 positions; got {k}"
    if d % 8:
        return f"takes channels in multiples of 8; got {d}"
    return kernels.refusal(x, weight)


def conv1d(x, weight, bias, *, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    convolve, update = load()
    t, before = x.shape[1], weight.shape[1] - 1
    if t == 1 and initial_state is not None and not kernels.records_gradient(x, weight, bias, initial_state):
        state = initial_state.to(x.dtype, copy=True)  # the kernel writes the next one in its place
        return update(x[:, 0], state.mT, weight, bias, activation="silu")[:, None], state

    document = None if seq_idx is None else kernels.number_documents(seq_idx)
    if initial_state is not None:
        # As inputs of the first document before x: not every version of the kernel takes a state together with documents.
        x = torch.cat([initial_state.to(x.dtype), x], dim=1)
        document = None if document is None else pad(document, (before, 0))
    y = convolve(aligned(x).mT, weight, bias, seq_idx=document, activation="silu").mT
    if y.requires_grad:
        y.register_hook(aligned)  # backward reads the gradient as forward reads x
    # The kernel gives no final state together with documents.
    short = max(0, before - x.shape[1])
    state = torch.cat([x.new_zeros(x.shape[0], short, x.shape[2]), x[:, -before:]], dim=1)
    if document is not None:
        document = pad(document[:, -before:], (short, 0))
        state = state.masked_fill((document != document[:, -1:])[..., None], 0)
    return y[:, x.shape[1] - t :], state


def aligned(x: Tensor) -> Tensor:
    """x (b t d) with each row of channels in one piece that begins at a multiple of 8: the kernel reads 16 bytes at a time."""
    starts = (x.storage_offset(), x.stride(0), x.stride(1))
    if x.stride(2) == 1 and x.stride(1) > 0 and not any(start % 8 for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)
