"""What the inside of a model looks like while it trains: gradient norms by kind of layer, how far its Mamba-2 layers remember,
and what sets its ranks apart.

The figures are flat numbers, ready for a line of metrics.jsonl and for trackers:

    grad_norm/<kind>                   norm of the gradient of a kind's parameters (before clipping, if taken before it)
    dt/mean, dt/min, dt/max            step size, after softplus
    decay/mean                         what a token leaves of the state before it, exp(dt A)
    memory/p5, /median, /p95           tokens after which a head's state has shrunk to 1/e, over all heads
    memory/beyond_window               share of the heads that remember further than a training window reaches
    dt_mean/layer_<i>, memory_median/layer_<i>    the same of layer i of the pattern
    ranks/…                            memory, wait for data and speed of the ranks (`rank_figures`)
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus
from torch.nn.utils import get_total_norm

from hybridlm.classification import AnyModel
from hybridlm.mixers.mamba2 import Mamba2
from hybridlm.modeling import Block

KINDS = {"M": "mamba", "*": "attention", "-": "ffn", "E": "moe", "r": "rnn", "l": "lstm", "g": "gru", "m": "mamba1"}


def layers(model: AnyModel) -> list[tuple[str, Block]]:
    """(kind, block) of each layer, from the input up."""
    symbols = model.config.hybrid_override_pattern
    return [(KINDS[symbol], cast(Block, block)) for symbol, block in zip(symbols, model.backbone.layers, strict=True)]


def kinds(model: AnyModel) -> dict[str, list[nn.Parameter]]:
    """Every parameter once, by kind of layer: those of KINDS that the pattern has, embedding, head and norm.

    `norm` is what stands on the residual stream, the norm before each layer and the last one. The gated norm of a Mamba layer is
    a part of that layer.
    """
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    for kind, block in layers(model):
        found[kind] += block.mixer.parameters()
        found["norm"] += block.norm.parameters()
    found["norm"] += model.backbone.norm_f.parameters()
    return {**found, "embedding": [*model.backbone.embeddings.parameters()], "head": [*model.head.parameters()]}


def gradient_norms(model: AnyModel) -> dict[str, float]:
    """The norm of the gradient by kind; their squares add up to that of the whole. A kind without any gradient is left out."""
    gradients = {kind: [p.grad for p in parameters if p.grad is not None] for kind, parameters in kinds(model).items()}
    norms = {kind: get_total_norm(tensors) for kind, tensors in gradients.items() if tensors}
    values = torch.stack([over_ranks(norm) for norm in norms.values()]).tolist() if norms else []  # the one wait for the device
    return dict(zip(norms, values, strict=True))


def over_ranks(norm: Tensor) -> Tensor:
    """A norm of sharded tensors, each rank's part of it made the whole; all ranks must call it."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def mamba_statistics(model: AnyModel, window: int) -> Iterator[dict[str, float]]:
    """Watches the forward passes within: a dict that is filled when the context ends, {} for a model without Mamba-2 layers.

    Passes count alike, however many: micro-batches, and a layer that gradient checkpointing runs again. Their outputs are
    untouched. A head's memory is that of its mean step, 1 / (|A| mean dt): over t tokens its state shrinks by exp(-t / memory).

    Args:
        window: predictions in a training window, tokens.
    """
    mambas = {i: block.mixer for i, (_, block) in enumerate(layers(model)) if isinstance(block.mixer, Mamba2)}
    passes: dict[int, list[Tensor]] = {i: [] for i in mambas}
    hooks = [mamba.in_proj.register_forward_hook(partial(_note, mamba, passes[i])) for i, mamba in mambas.items()]
    statistics: dict[str, float] = {}
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()
    if any(passes.values()):
        statistics |= _summary(passes, window)


def rank_figures(accelerator: Accelerator, memory: int, waited: float) -> dict[str, float]:
    """What sets the ranks apart; {} for one alone.

    All ranks take part, and take a step in the same time, since they wait for each other. So each is timed at the same small
    product, which waits for none: a device that is throttled or shared takes longer.

    Args:
        memory: bytes of this rank. waited: seconds a step that it waited for its data.

    Returns:
        `ranks/memory_least`, `ranks/memory_most` (bytes), `ranks/data_wait` (seconds a step, the longest), `ranks/spread` (the
        time of the slowest for the product, over the median of all, of two the faster) and `ranks/slowest` (which it is).
    """
    if accelerator.num_processes == 1:
        return {}
    own = torch.tensor([memory, waited, probe(accelerator.device)], dtype=torch.float64, device=accelerator.device)
    memories, waits, seconds = accelerator.gather(own[None]).cpu().T
    return {
        "ranks/memory_least": memories.min().item(), "ranks/memory_most": memories.max().item(),
        "ranks/data_wait": waits.max().item(),
        "ranks/spread": (seconds.max() / seconds.median()).item(), "ranks/slowest": int(seconds.argmax()),
    }  # fmt: skip


def probe(device: torch.device) -> float:
    """Seconds of a product of square matrices that takes any device about a millisecond, the least of five."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    square, seconds = torch.ones(size, size, dtype=dtype, device=device), []
    for _ in range(5):
        began = time.perf_counter()
        (square @ square)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@torch.no_grad()
def _note(mamba: Mamba2, passes: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], projected: Tensor) -> None:
    """Keeps (5 h), fp32: mean, least and greatest dt and the mean decay of each head, and |A|, which a sharded layer has only
    while it runs. dt itself (b t h) is not kept."""
    dt = softplus(projected.split(mamba.projected, dim=-1)[2] + mamba.dt_bias)
    if mamba.limit is not None:
        dt = dt.clamp(*mamba.limit)
    dt = dt.flatten(0, 1)
    rate = mamba.A_log.exp()
    passes.append(torch.stack([dt.mean(0), dt.amin(0), dt.amax(0), torch.exp(-dt * rate).mean(0), rate]))


@torch.no_grad()
def _summary(passes: dict[int, list[Tensor]], window: int) -> dict[str, float]:
    each = torch.stack([torch.stack(layer) for layer in passes.values()])  # (layers passes 5 heads)
    dt, decay = each[:, :, 0].mean(1), each[:, :, 3].mean(1)
    rate = dt * each[:, 0, 4]
    memory = 1 / rate.clamp(min=torch.finfo(rate.dtype).tiny)  # a step that softplus has rounded to 0 is never forgotten
    p5, p95 = torch.quantile(memory.flatten(), torch.tensor([0.05, 0.95], dtype=memory.dtype, device=memory.device))
    figures = {
        "dt/mean": dt.mean(), "dt/min": each[:, :, 1].amin(), "dt/max": each[:, :, 2].amax(), "decay/mean": decay.mean(),
        "memory/p5": p5, "memory/median": memory.quantile(0.5), "memory/p95": p95,
        "memory/beyond_window": (memory > window).to(memory.dtype).mean(),
    }  # fmt: skip
    figures |= {f"dt_mean/layer_{i}": mean for i, mean in zip(passes, dt.mean(1), strict=True)}
    figures |= {f"memory_median/layer_{i}": median for i, median in zip(passes, memory.quantile(0.5, dim=1), strict=True)}
    return dict(zip(figures, torch.stack([*figures.values()]).tolist(), strict=True))
