"""The specification of the loss: all logits, then -log softmax at the label."""

import torch
from torch import Tensor

from hybridlm.ops.cross_entropy.constants import IGNORE


def cross_entropy(hidden, weight, labels) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    counted = labels != IGNORE
    picked = logits.gather(-1, labels.where(counted, 0)[..., None])[..., 0]
    return torch.where(counted, torch.logsumexp(logits, dim=-1) - picked, 0)
