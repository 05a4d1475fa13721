"""The specification of the selective scan: the recurrence itself, one token after the other."""

import torch
from torch import Tensor

from hybridlm.ops.precision import without_autocast


def selective_scan(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t."""
    (b, t, d), n, dtype = x.shape, A.shape[1], dt.dtype
    wide, B, C = (m.to(dtype) for m in (x, B, C))
    state = torch.zeros(b, d, n, dtype=dtype, device=x.device) if initial_state is None else initial_state
    outputs = []
    for i in range(t):
        if seq_idx is not None and i > 0:
            same_document = seq_idx[:, i] == seq_idx[:, i - 1]
            state = torch.where(same_document[:, None, None], state, torch.zeros_like(state))
        decay = torch.exp(dt[:, i, :, None] * A)
        state = decay * state + torch.einsum("bd,bd,bn->bdn", dt[:, i], wide[:, i], B[:, i])
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, i]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D * wide
    return y.to(x.dtype), state


def selective_scan_step(x, dt, A, B, C, state, *, D=None, overwrite=False) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        y, state = selective_scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D, initial_state=state)
    return y[:, 0], state
