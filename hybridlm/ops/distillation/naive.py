"""The specification of the loss: all logits, both distributions, and the sum over their classes."""

import torch
from torch import Tensor

from hybridlm.ops.cross_entropy.constants import IGNORE
from hybridlm.ops.distillation.teacher import TopK


def distillation(hidden, weight, targets, teacher, temperature) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_q = torch.log_softmax((hidden @ weight.T).to(wide) / temperature, dim=-1)
    if isinstance(teacher, TopK):
        log_p, log_q = _classes(teacher.ids.long(), teacher.log_probs.detach().to(wide), log_q)
    else:
        logits = (teacher.hidden.detach() @ teacher.weight.detach().T).to(wide)
        log_p = torch.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0)
    return torch.where(targets != IGNORE, temperature**2 * terms.sum(-1), 0)


def _classes(ids: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the teacher and the student for the classes (b t k + 1): the k tokens, and the rest."""
    chosen = log_q.gather(-1, ids)
    if ids.shape[-1] == log_q.shape[-1]:
        return log_p - log_p.logsumexp(-1, keepdim=True), chosen
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0)
    every = torch.cat([log_p, rest.log()], dim=-1)
    others = log_q.masked_fill(torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, ids, True), -torch.inf)
    return every - every.logsumexp(-1, keepdim=True), torch.cat([chosen, others.logsumexp(-1, keepdim=True)], dim=-1)
