"""The head and its loss in blocks of tokens: the logits of one block exist at a time, and backward computes them again."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridlm.ops.cross_entropy.constants import IGNORE
from hybridlm.ops.precision import product_dtype

BLOCK_BYTES = 2**23  # of fp32 logits: they stay in a processor's cache
LEAST_ROWS = 256  # of a block: products of fewer read the weight more often than they compute with it


def cross_entropy(hidden, weight, labels, z_loss=0.0) -> Tensor:
    flat = LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), z_loss)
    return flat.view(labels.shape)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss):
        narrow, wide = product_dtype(hidden), torch.promote_types(hidden.dtype, torch.float32)
        log_sum = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        chosen = torch.empty_like(log_sum)
        index = labels.where(labels != IGNORE, 0)[:, None]
        w = weight.to(narrow)
        for rows in _blocks(hidden, weight):
            logits = _logits(hidden[rows], w)
            log_sum[rows] = torch.logsumexp(logits, dim=-1)
            chosen[rows] = logits.gather(-1, index[rows])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.z_loss = z_loss
        return torch.where(labels != IGNORE, log_sum - chosen, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, labels, log_sum = ctx.saved_tensors
        narrow = product_dtype(hidden)
        w = weight.to(narrow)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=log_sum.dtype, device=weight.device)
        counted = labels != IGNORE
        index, grad = labels.where(counted, 0)[:, None], grad.where(counted, 0)[:, None]
        for rows in _blocks(hidden, weight):
            # d nll / d logits = softmax - one_hot(label), in place of the logits; d log_sum / d logits = softmax
            into_softmax = grad[rows] * (1 + 2 * ctx.z_loss * log_sum[rows, None])
            dlogits = _logits(hidden[rows], w).sub_(log_sum[rows, None]).exp_().mul_(into_softmax)
            dlogits = dlogits.scatter_add_(-1, index[rows], -grad[rows]).to(narrow)
            grad_hidden[rows] = dlogits @ w
            grad_weight += dlogits.T @ hidden[rows].to(narrow)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = block_rows(len(weight))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]


def block_rows(vocabulary: int) -> int:
    """Tokens whose logits exist at a time."""
    return max(LEAST_ROWS, BLOCK_BYTES // (4 * vocabulary))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(tokens v), fp32 or wider."""
    return (hidden.to(weight.dtype) @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
