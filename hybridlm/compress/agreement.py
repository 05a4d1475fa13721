"""How well a model predicts, and how often as its parent does."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hybridlm.modeling import HybridLMForCausalLM
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.ops.cross_entropy.eager import block_rows

Batch = dict[str, Tensor]  # `input_ids`, `targets` (IGNORE for none), and of packed documents `seq_idx`, each (b t)


@torch.inference_mode()
def predict(model: HybridLMForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the positions that have a target, row after row: (n) nats, float64, and (n) the most likely token, on the CPU."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
    wanted = batch["targets"] != IGNORE
    hidden, targets = model.backbone(**inputs, use_cache=False).last_hidden_state[wanted], batch["targets"][wanted]
    nats, choices = [], []
    for some, right in zip(*(t.split(block_rows(model.config.vocab_size)) for t in (hidden, targets))):
        logits = model.lm_head(some).float()
        nats.append(cross_entropy(logits, right, reduction="none"))
        choices.append(logits.argmax(-1))
    return torch.cat(nats).double().cpu(), torch.cat(choices).cpu()


def score(model: HybridLMForCausalLM, batches: Iterable[Batch], parents: Sequence[Tensor]) -> dict[str, float]:
    """
    Args:
        parents: for each batch the most likely tokens of the parent, as `predict` gives them.

    Returns:
        `loss`, nats per token; `accuracy`, the share of tokens that were most likely; `agreement`, that of most likely tokens
        which are the parent's.
    """
    nats = right = same = count = 0.0
    for batch, parent in zip(batches, parents, strict=True):
        lost, chosen = predict(model, batch)
        targets = batch["targets"][batch["targets"] != IGNORE].cpu()
        nats += math.fsum(lost.tolist())
        right += (chosen == targets).sum().item()
        same += (chosen == parent).sum().item()
        count += len(targets)
    return {"loss": nats / count, "accuracy": right / count, "agreement": same / count}
