"""The specification of RMSNorm."""

import torch
from torch import Tensor


def rms_norm(x, weight, *, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)
