"""The specification of the grouped gated RMSNorm: one group after the other."""

import torch
from torch import Tensor


def gated_norm(x, z, weight, *, groups: int, eps: float) -> Tensor:
    """Per group of channels: u = x silu(z), y = weight u / sqrt(mean(u^2) + eps), with the gate before the norm."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = z.to(dtype) / (1 + torch.exp(-z.to(dtype)))
    outputs = []
    for u, w in zip((x.to(dtype) * gate).chunk(groups, dim=-1), weight.to(dtype).chunk(groups), strict=True):
        outputs.append(w * u / torch.sqrt((u * u).mean(-1, keepdim=True) + eps))
    return torch.cat(outputs, dim=-1).to(x.dtype)
