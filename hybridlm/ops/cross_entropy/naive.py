"""The specification of the loss: all logits, then -log softmax at the label."""

import torch
from torch import Tensor

from hybridlm.ops.cross_entropy.constants import IGNORE


def cross_entropy(hidden, weight, labels, z_loss=0.0) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    counted = labels != IGNORE
    picked = logits.gather(-1, labels.where(counted, 0)[..., None])[..., 0]
    log_sum = torch.logsumexp(logits, dim=-1)
    penalty = z_loss * log_sum**2
    return torch.where(counted, log_sum - picked + penalty - penalty.detach(), 0)
