"""The specification of SSD: the recurrence itself, one token after the other."""

import torch
from torch import Tensor

from hybridlm.ops.precision import without_autocast


def ssd(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None, chunk_size=None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t; `chunk_size` plays no part."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    dtype = dt.dtype
    B, C = (m.to(dtype).repeat_interleave(h // g, dim=2) for m in (B, C))
    state = torch.zeros(b, h, p, n, dtype=dtype, device=x.device) if initial_state is None else initial_state
    outputs = []
    for i in range(t):
        if seq_idx is not None and i > 0:
            same_document = seq_idx[:, i] == seq_idx[:, i - 1]
            state = torch.where(same_document[:, None, None, None], state, torch.zeros_like(state))
        decay = torch.exp(dt[:, i] * A)
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, i], x[:, i].to(dtype), B[:, i])
        state = decay[:, :, None, None] * state + update
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, i]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D[:, None] * x.to(dtype)
    return y.to(x.dtype), state


def ssd_step(x, dt, A, B, C, state, *, D=None, overwrite=False) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        y, state = ssd(x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D, initial_state=state)
    return y[:, 0], state
