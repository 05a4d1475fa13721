"""The language-model head and its loss in one: the logits of all tokens never need to exist at once."""

import torch
from torch import Tensor

from hybridlm.ops.backend import resolve
from hybridlm.ops.checks import check_shape, check_shapes
from hybridlm.ops.cross_entropy import eager, naive
from hybridlm.ops.cross_entropy.constants import IGNORE
from hybridlm.ops.precision import has_autocast, without_autocast

__all__ = ["IGNORE", "cross_entropy"]

IMPLEMENTATIONS = {"eager": eager.cross_entropy, "naive": naive.cross_entropy}


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0, backend: str = "auto") -> Tensor:
    """-log softmax(weight hidden)[label] of every token, in nats.

    Letters: b batch, t time, d width, v vocabulary.

    Args:
        hidden: (b t d). Under autocast, hidden and weight are taken in autocast's dtype; the softmax is always fp32 or wider.
        weight: (v d).
        labels: (b t) integers; `IGNORE` (-100) where a position is no target.
        z_loss: weight of (log of the sum of exp(logits))^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5).
            It is in the gradients alone: the value stays what the text costs.

    Returns:
        (b t) in fp32 (fp64 with fp64 inputs): nats, 0 where the label is `IGNORE`.

    Raises:
        ValueError: shapes that disagree.
    """
    sizes = check_shapes(("hidden", hidden, "b t d"), ("weight", weight, "v d"))
    check_shape("labels", labels, "b t", sizes)
    if has_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    run = IMPLEMENTATIONS[resolve("cross_entropy", IMPLEMENTATIONS, backend)]
    with without_autocast(hidden):
        return run(hidden, weight, labels, z_loss)
