"""The head and the loss in blocks of tokens: the logits of one block exist at a time, and backward computes them again.

With q the student's probabilities and p the teacher's, d loss / d logits = temperature (q - p). Where only the k largest of p are
known, the loss is that of a p which outside of them is as q is there, scaled to what they leave: the sum over the others is then
rest (log rest - log q(others)), and the same formula gives the gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridlm.ops.cross_entropy.constants import IGNORE
from hybridlm.ops.cross_entropy.eager import block_rows
from hybridlm.ops.distillation.teacher import TopK
from hybridlm.ops.precision import product_dtype


def distillation(hidden, weight, targets, teacher, temperature) -> Tensor:
    counted, rows = targets.flatten() != IGNORE, hidden.flatten(0, -2)
    if isinstance(teacher, TopK):
        log_p, log_rest = _whole_mass(teacher.log_probs.detach().flatten(0, -2).to(_wide(hidden)), len(weight))
        flat = FromTopK.apply(rows, weight, counted, teacher.ids.flatten(0, -2), log_p, log_rest, temperature)
    else:
        flat = FromWhole.apply(rows, weight, counted, teacher.hidden.flatten(0, -2), teacher.weight, temperature)
    return flat.view(targets.shape)


class FromWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, counted, taught, head, temperature):
        w, h = _narrow(weight), _narrow(head)
        loss = torch.zeros(len(hidden), dtype=_wide(hidden), device=hidden.device)
        sums = loss.new_empty(2, len(hidden))  # log of the student's and of the teacher's sum of exponentials
        for rows in _blocks(hidden, weight, 2):
            log_q, log_p = _logits(hidden[rows], w, temperature), _logits(taught[rows], h, temperature)
            sums[0, rows], sums[1, rows] = log_q.logsumexp(-1), log_p.logsumexp(-1)
            log_q, log_p = log_q.sub_(sums[0, rows, None]), log_p.sub_(sums[1, rows, None])
            apart = torch.sub(log_p, log_q, out=log_q)
            loss[rows] = temperature**2 * apart.mul_(log_p.exp_()).sum(-1)
        ctx.save_for_backward(hidden, weight, counted, taught, head, sums)
        ctx.temperature = temperature
        return loss.where(counted, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, counted, taught, head, sums = ctx.saved_tensors
        h = _narrow(head)

        def minus_teacher(rows: slice, log_q: Tensor) -> Tensor:
            log_p = _logits(taught[rows], h, ctx.temperature).sub_(sums[1, rows, None])
            return log_q.exp_().sub_(log_p.exp_())

        return *_gradients(ctx, grad, hidden, weight, counted, sums[0], minus_teacher, 2), None, None, None, None


class FromTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, counted, ids, log_p, log_rest, temperature):
        w = _narrow(weight)
        loss = torch.zeros(len(hidden), dtype=_wide(hidden), device=hidden.device)
        sums = loss.new_empty(2, len(hidden))  # log of the student's sum of exponentials, of all and of the others
        for rows in _blocks(hidden, weight, 1):
            s, index = _logits(hidden[rows], w, temperature), ids[rows].long()
            sums[0, rows], chosen = s.logsumexp(-1), s.gather(-1, index)
            sums[1, rows] = s.scatter_(-1, index, -torch.inf).logsumexp(-1)
            known = (log_p[rows].exp() * (log_p[rows] - chosen + sums[0, rows, None])).sum(-1)
            rest = log_rest[rows].exp() * (log_rest[rows] - sums[1, rows] + sums[0, rows])
            loss[rows] = temperature**2 * (known + rest.where(log_rest[rows] > -torch.inf, 0))
        ctx.save_for_backward(hidden, weight, counted, ids, log_p, log_rest, sums)
        ctx.temperature = temperature
        return loss.where(counted, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, counted, ids, log_p, log_rest, sums = ctx.saved_tensors

        def minus_teacher(rows: slice, log_q: Tensor) -> Tensor:
            index = ids[rows].long()
            known = log_q.gather(-1, index).exp_() - log_p[rows].exp()
            # of the others, each has the same share of q as of p
            others = (sums[1, rows] - sums[0, rows]).exp() - log_rest[rows].exp()
            shares = log_q.add_((sums[0, rows] - sums[1, rows])[:, None]).exp_()
            return shares.mul_(others[:, None]).scatter_(-1, index, known)

        return *_gradients(ctx, grad, hidden, weight, counted, sums[0], minus_teacher, 1), None, None, None, None, None


def largest(hidden, weight, k, temperature) -> tuple[Tensor, Tensor]:
    """Which tokens (rows k), and their log-probabilities."""
    w = _narrow(weight)
    blocks = [_logits(hidden[rows], w, temperature).log_softmax(-1).topk(k) for rows in _blocks(hidden, weight, 2)]
    log_probs, ids = map(torch.cat, zip(*blocks))
    return ids, log_probs


def _gradients(ctx, grad, hidden, weight, counted, log_sum, minus_teacher, tables) -> tuple[Tensor, Tensor, None]:
    """Of `hidden` and `weight`, and none of `counted`. `minus_teacher(rows, log q)` gives q - p, and may write to log q."""
    w = _narrow(weight)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=log_sum.dtype, device=weight.device)
    grad = ctx.temperature * grad.where(counted, 0)[:, None]
    for rows in _blocks(hidden, weight, tables):
        log_q = _logits(hidden[rows], w, ctx.temperature).sub_(log_sum[rows, None])
        dlogits = minus_teacher(rows, log_q).mul_(grad[rows]).to(w.dtype)
        grad_hidden[rows] = dlogits @ w
        grad_weight += dlogits.T @ hidden[rows].to(w.dtype)
    return grad_hidden, grad_weight.to(weight.dtype), None


def _whole_mass(log_p: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """log p (tokens k) of the entries and (tokens) of the rest, which together are 1; -inf where nothing is left."""
    rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
    if log_p.shape[-1] == vocabulary:
        rest.zero_()
    log_rest = rest.log()
    total = torch.logaddexp(log_p.logsumexp(-1), log_rest)
    return log_p - total[:, None], log_rest - total


def _blocks(hidden: Tensor, weight: Tensor, tables: int) -> list[slice]:
    """With `tables` of logits at a time."""
    size = block_rows(tables * len(weight))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(tokens v), fp32 or wider, divided by the temperature."""
    logits = (hidden.to(weight.dtype) @ weight.T).to(_wide(hidden))
    return logits if temperature == 1 else logits.div_(temperature)


def _narrow(weight: Tensor) -> Tensor:
    """In the dtype that products run in."""
    return weight.to(product_dtype(weight))


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
