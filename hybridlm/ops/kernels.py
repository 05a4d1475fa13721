"""What the adapters to the GPU packages share."""

import torch
from torch import Tensor
from torch.nn.functional import pad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = 2**31  # that an offset of 32 bits reaches


def refusal(*tensors: Tensor, largest_inside: int = 0) -> str | None:
    """Why the kernels cannot take these tensors, or None. `largest_inside`: elements of the largest that they make themselves.

    The kernels compute offsets in 32 bits: past them they read and write elsewhere in memory, mostly without an error
    (state-spaces/mamba, issue 1015).
    """
    for m in tensors:
        if m.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16; got {m.dtype}"
    reach = max(1 + sum((size - 1) * stride for size, stride in zip(m.shape, m.stride())) for m in tensors)
    if max(reach, largest_inside) > ELEMENTS:
        return f"takes up to 2^31 elements; got a batch of shape {tuple(tensors[0].shape)}: take fewer rows or shorter pieces"
    return None


def number_documents(seq_idx: Tensor) -> Tensor:
    """(b t) int32: the documents of each row, counted from 0."""
    return pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1, dtype=torch.int32), (1, 0))


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is done with these."""
    return torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in tensors)
