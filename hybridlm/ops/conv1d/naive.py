"""The specification of the causal depthwise convolution: one output at a time."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def conv1d(x, weight, bias, *, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_j weight_j x_{t-k+1+j}) over the positions of the same document."""
    b, t, d = x.shape
    k = weight.shape[1]
    before = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state
    seen = torch.cat([before, x], dim=1)
    document = torch.zeros(b, t, dtype=torch.long, device=x.device) if seq_idx is None else seq_idx
    document = torch.cat([document[:, :1].expand(-1, k - 1), document], dim=1)
    outputs = []
    for i in range(t):
        same = document[:, i : i + k] == document[:, i + k - 1, None]
        window = torch.where(same[..., None], seen[:, i : i + k], 0)
        outputs.append((window * weight.T).sum(1) + (0 if bias is None else bias))
    same = document[:, t:] == document[:, -1:]
    return silu(torch.stack(outputs, dim=1)).to(x.dtype), torch.where(same[..., None], seen[:, t:], 0)
