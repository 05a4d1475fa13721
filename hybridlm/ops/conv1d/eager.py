"""The convolution as k shifted multiply-adds: no transposes, and no im2col as in `torch.nn.functional.conv1d`."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def conv1d(x, weight, bias, *, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    b, t, d = x.shape
    k = weight.shape[1]
    before = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state
    seen = torch.cat([before, x], dim=1)
    final_state = seen[:, t:].clone()  # a view would keep all of x for as long as the state lives
    if seq_idx is not None:
        document = torch.cat([seq_idx[:, :1].expand(-1, k - 1), seq_idx], dim=1)[..., None]
        final_state = final_state * (document[:, t:] == document[:, -1:])
    y = x * weight[:, -1]
    if bias is not None:
        y = y + bias
    for back in range(1, k):
        first = k - 1 - back
        past = seen[:, first : first + t]
        if seq_idx is not None:
            past = past * (document[:, first : first + t] == document[:, k - 1 :])
        y = torch.addcmul(y, past, weight[:, first])
    return silu(y).to(x.dtype), final_state
