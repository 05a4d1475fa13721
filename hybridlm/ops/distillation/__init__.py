"""The language-model head and its distance from a teacher's predictions in one: the logits of all tokens never need to exist at
once, neither the student's nor the teacher's."""

import math

import torch
from torch import Tensor

from hybridlm.ops.backend import resolve
from hybridlm.ops.checks import check_shape, check_shapes
from hybridlm.ops.distillation import eager, naive
from hybridlm.ops.distillation.teacher import Teacher, TopK, Whole
from hybridlm.ops.precision import has_autocast, without_autocast

__all__ = ["Teacher", "TopK", "Whole", "distillation", "largest"]

IMPLEMENTATIONS = {"eager": eager.distillation, "naive": naive.distillation}


def distillation(
    hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Teacher, *, temperature: float = 1.0, backend: str = "auto"
) -> Tensor:
    """temperature^2 KL(teacher || student) of every token, in nats (Hinton et al. 2015, arXiv 1503.02531; as Minitron and
    Nemotron-H distil, arXiv 2407.14679): of the softmax of all logits divided by `temperature`. The factor keeps the size of the
    gradient what it is at 1.

    Letters: b batch, t time, d and e width of the student and the teacher, v vocabulary, k entries.

    Args:
        hidden: (b t d). Under autocast, hidden and weight, the teacher's too, are taken in autocast's dtype; both softmaxes are
            always fp32 or wider.
        weight: (v d).
        targets: (b t) integers; only whether they are `IGNORE` counts.
        teacher: `Whole`, or `TopK` at this temperature. No gradient reaches it.

    Returns:
        (b t) in fp32 (fp64 with fp64 inputs): nats, 0 where the target is `IGNORE`.

    Raises:
        ValueError: shapes that disagree, or a temperature that is not positive.
    """
    sizes = check_shapes(("hidden", hidden, "b t d"), ("weight", weight, "v d"))
    check_shape("targets", targets, "b t", sizes)
    letters = ("b t e", "v e") if isinstance(teacher, Whole) else ("b t k", "b t k")
    for name, tensor, shape in zip(teacher._fields, teacher, letters, strict=True):
        check_shape(f"teacher.{name}", tensor, shape, sizes)
    if sizes.get("k", 1) > sizes["v"]:
        raise ValueError(f"teacher has {sizes['k']} entries a token, and the vocabulary only {sizes['v']}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number above 0; got {temperature}.")
    if has_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        if isinstance(teacher, Whole):
            teacher = Whole(teacher.hidden.to(dtype), teacher.weight.to(dtype))
    run = IMPLEMENTATIONS[resolve("distillation", IMPLEMENTATIONS, backend)]
    with without_autocast(hidden):
        return run(hidden, weight, targets, teacher, temperature)


@torch.no_grad()
def largest(teacher: Whole, k: int, temperature: float = 1.0) -> TopK:
    """The `k` largest log-probabilities that a teacher gives at each position at this temperature, the most likely first; in
    blocks, and in the dtypes of `distillation`."""
    hidden, weight = teacher
    if has_autocast(hidden):
        hidden, weight = (one.to(torch.get_autocast_dtype(hidden.device.type)) for one in (hidden, weight))
    with without_autocast(hidden):
        ids, log_probs = eager.largest(hidden.flatten(0, -2), weight, k, temperature)
    return TopK(*(one.view(*hidden.shape[:-1], k) for one in (ids, log_probs)))
