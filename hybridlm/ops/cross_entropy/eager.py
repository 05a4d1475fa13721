"""The head and its loss in blocks of tokens: the logits of one block exist at a time, and backward computes them again."""

import torch
from torch import Tensor

from hybridlm.ops.cross_entropy.constants import IGNORE

BLOCK_BYTES = 2**25  # of fp32 logits


def cross_entropy(hidden, weight, labels) -> Tensor:
    flat = LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten())
    return flat.view(labels.shape)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        ctx.save_for_backward(hidden, weight, labels)
        return torch.cat([_block(hidden[rows], weight, labels[rows])[0] for rows in _blocks(hidden, weight)])

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for rows in _blocks(hidden, weight):
            _, logits, log_sum, label, counted = _block(hidden[rows], weight, labels[rows])
            # d nll / d logits = softmax - one_hot(label), in place of the logits
            logits = torch.exp(logits.sub_(log_sum[:, None]))
            logits[torch.arange(len(label), device=label.device), label] -= 1
            logits = logits.mul_(torch.where(counted, grad[rows], 0)[:, None]).to(hidden.dtype)
            grad_hidden[rows] = logits @ weight
            grad_weight += logits.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _blocks(hidden, weight) -> list[slice]:
    size = max(1, BLOCK_BYTES // (4 * len(weight)))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]


def _block(hidden, weight, labels):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    log_sum = torch.logsumexp(logits, dim=-1)
    counted = labels != IGNORE
    label = labels.where(counted, 0)
    nll = torch.where(counted, log_sum - logits.gather(-1, label[:, None])[:, 0], 0)
    return nll, logits, log_sum, label, counted
