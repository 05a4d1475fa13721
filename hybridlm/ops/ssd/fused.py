"""SSD on mamba_ssm's Triton kernels (package mamba-ssm, 2.2 or later)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridlm.ops import kernels
from hybridlm.ops.ssd import eager


def load():
    import mamba_ssm  # noqa: F401  else what of it did import before its own import failed would pass for a package that works
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined, selective_state_update


def kernel_chunk(chunk_size: int) -> int:
    """The nearest chunk that the kernel is made for, a power of two from 16 to 256: the result does not depend on it."""
    return min(max(1 << (chunk_size - 1).bit_length(), 16), 256)


def refusal(x, dt, B, C, *, chunk_size: int, backend: str) -> str | None:
    """Why the kernel cannot take this call, or why `auto` does not, or None."""
    if backend == "auto" and x.dtype == torch.float32:
        return "multiplies float32 in TF32, which only ops.backend=fused asks for"
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    q = kernel_chunk(chunk_size)
    states, scores = h * p * n * -(-t // q), g * q * t
    return kernels.refusal(x, dt, B, C, largest_inside=b * max(states, scores))


def ssd(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None, chunk_size: int = 128) -> tuple[Tensor, Tensor]:
    t, q = x.shape[1], kernel_chunk(chunk_size)
    rest = -t % q
    if seq_idx is not None:
        # The kernel takes the initial state for that of document 0, and drops it without a word where a row begins with another.
        seq_idx = kernels.number_documents(torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, rest)], dim=1))
    if rest:  # full chunks only, since gradients past a ragged end have been NaN; dt = 0 passes the state through
        x, dt, B, C = (pad(m, (0, 0) * (m.dim() - 2) + (0, rest)) for m in (x, dt, B, C))
    B, C, D = (m if m is None or m.stride(-1) == 1 else m.contiguous() for m in (B, C, D))  # backward asserts it
    chunk_scan, _ = load()
    y, state = chunk_scan(x, dt, A, B, C, q, D=D, initial_states=initial_state, seq_idx=seq_idx, return_final_states=True)
    return y[:, :t], state


def ssd_step(x, dt, A, B, C, state, *, D=None, overwrite=False) -> tuple[Tensor, Tensor]:
    if kernels.records_gradient(x, dt, A, B, C, state, D):
        # The kernel writes the state in place and has no backward: what it returned would be cut off from its inputs. A
        # single step under autograd is too rare for a backward of our own, and exact in PyTorch.
        return eager.ssd_step(x, dt, A, B, C, state, D=D)
    _, state_update = load()
    p, n = state.shape[2:]
    if not overwrite:
        state = state.clone()
    # Of dt_bias and D the kernel's wrapper reads the strides even where they are None. It takes one dt, A, dt_bias a head,
    # not one of each element, where they are expanded from it.
    bias, D = torch.zeros_like(A), torch.zeros_like(A) if D is None else D
    dt, D, bias = (m[..., None].expand(*m.shape, p) for m in (dt, D, bias))
    y = state_update(state, x, dt, A[:, None, None].expand(-1, p, n), B, C, D=D, dt_bias=bias)
    return y, state
