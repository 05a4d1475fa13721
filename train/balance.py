"""Balance among the experts of `E` layers without a loss for it (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2):
after each step the bias by which a router chooses rises for experts with few tokens, and falls for those with many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hybridlm.mixers.moe import Router


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def expert_loads(found: list[Router], over_ranks: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Counts in the forward passes within, of all micro-batches: int64 (layers experts), the tokens that each expert got, which
    are summed over the ranks when the context ends. (0 0) where there are no routers.

    Routers keep nothing of it, so that no pass but those of a step counts: no validation, and no rerun of a step that failed.
    Positions of padding count as tokens do, for they go to experts too. A layer that gradient checkpointing runs again counts all
    its experts twice, which changes neither who has more than the mean nor the ratio of two loads.

    Args:
        over_ranks: the sum of a tensor over the ranks; all must call it.
    """
    bias = torch.stack([router.e_score_correction_bias for router in found]) if found else torch.empty(0, 0)
    loads = torch.zeros_like(bias, dtype=torch.int64)
    hooks = [router.register_forward_hook(partial(_count, layer)) for router, layer in zip(found, loads, strict=True)]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        loads.copy_(over_ranks(loads))


@torch.no_grad()
def balance(found: list[Router], loads: Tensor, rate: float) -> None:
    """Moves the bias of every router by `rate`, as `direction` says; on all ranks by the same, for their loads are the same."""
    for router, step in zip(found, direction(loads), strict=True):
        router.e_score_correction_bias.add_(step, alpha=rate)


def direction(loads: Tensor) -> Tensor:
    """int64 (layers experts) -> 1 for an expert below the mean of its layer, -1 above it, 0 at it."""
    return (loads.sum(-1, keepdim=True) - loads.shape[-1] * loads).sign()  # in whole numbers: no mean is rounded


def load_figures(loads: Tensor) -> dict[str, float]:
    """For a line of metrics.jsonl; {} for a model without `E`.

    Returns:
        `moe/max_violation`: the largest load over the mean load, less 1 (arXiv 2408.15664's MaxVio), of the worst layer: 0 where
        all are alike. `moe/idle_experts`: experts of all layers together that got no token.
    """
    if not len(loads):
        return {}
    worst = (loads.amax(-1) / loads.double().mean(-1)).max() - 1
    return {"moe/max_violation": worst.item(), "moe/idle_experts": int((loads == 0).sum())}


def _count(layer: Tensor, router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    chosen = output[1].flatten()
    layer.index_add_(0, chosen, torch.ones_like(chosen))  # unlike bincount it waits for no device
