"""What the parts of a model do: how little each would be missed.

The text is read batch by batch, so that any amount of it takes the memory of one batch.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybridlm.compress.surgery import PARTS, check_kinds
from hybridlm.masking import build_context
from hybridlm.mixers.parts import IntoResidual
from hybridlm.modeling import HybridLMForCausalLM

Batch = dict[str, Tensor]  # `input_ids` (b t), and of packed documents `seq_idx` (b t)


@dataclass(frozen=True)
class Importance:
    """All float64.

    Attributes:
        layers: (layers) mean squared change of what enters the head when a layer is left out.
        parts: for each layer the L2 norm of the activations of its Mamba heads, key-value groups or neurons, see `watched`.
        channels: (d) the same of the channels of the residual stream.
    """

    layers: Tensor
    parts: list[Tensor]
    channels: Tensor

    def save(self, file: Path) -> None:
        parts = {f"parts.{i}": part for i, part in enumerate(self.parts)}
        save_file({"layers": self.layers, "channels": self.channels, **parts}, file)

    @classmethod
    def load(cls, file: Path) -> "Importance":
        tensors = load_file(file)
        parts = [tensors[f"parts.{i}"] for i in range(len(tensors) - 2)]
        return cls(tensors["layers"], parts, tensors["channels"])


def measure(model: HybridLMForCausalLM, for_layers: Iterable[Batch], for_parts: Iterable[Batch]) -> Importance:
    """The importance of everything that `surgery.prune` can cut, by the text of two runs of batches.

    Raises:
        ValueError: layers that cannot be pruned.
    """
    check_kinds(model.config)
    with torch.no_grad():
        changes = [(layer_changes(model, batch), batch["input_ids"].numel()) for batch in for_layers]
        with watched(model) as sums:
            for batch in for_parts:
                model.backbone(**batch, use_cache=False)
    layers = torch.stack([change for change, _ in changes]).sum(0) / sum(count for _, count in changes)
    parts, channels = ([sum_.sqrt().cpu() for sum_ in some] for some in (sums[:-1], sums[-1:]))
    return Importance(layers.cpu(), parts, channels[0])


def layer_changes(model: HybridLMForCausalLM, batch: Batch) -> Tensor:
    """(layers): the squared change of what enters the head without a layer, mean over channels, summed over positions."""
    x = model.backbone.embed(batch["input_ids"])
    context = build_context(model.config, x, None, batch.get("seq_idx"), None, None)  # type: ignore[arg-type]
    layers, norm = list(model.backbone.layers), model.backbone.norm_f
    entered = [x]
    for block in layers:
        entered.append(block(entered[-1], context)[0])
    whole, changes = norm(entered[-1]), []
    for i, x in enumerate(entered[:-1]):
        for block in layers[i + 1 :]:
            x = block(x, context)[0]
        changes.append((norm(x) - whole).double().square().mean(-1).sum())
    return torch.stack(changes)


@contextmanager
def watched(model: HybridLMForCausalLM) -> Iterator[list[Tensor]]:
    """Sums, for each layer and last for the residual stream, that grow with every batch the model reads inside: of the size of
    each activation the mean over the rows of a batch, squared, over all positions and batches (Minitron, arXiv 2407.14679).

    The activation of a Mamba head, a key-value group or a neuron is what it adds to the residual stream, its size the L2 norm of
    that; the activation of a channel of the residual stream what the norms before the layers and the head give of it.
    """
    c = model.config
    sizes = [getattr(c, PARTS[symbol]) for symbol in c.hybrid_override_pattern]
    sums = [torch.zeros(size, dtype=torch.float64, device=model.device) for size in [*sizes, c.hidden_size]]

    def add(to: Tensor, size: Tensor) -> None:
        to += size.mean(0).square().sum(0, dtype=torch.float64)

    hooks = []
    for norm in [*(block.norm for block in model.backbone.layers), model.backbone.norm_f]:
        hooks.append(cast(nn.Module, norm).register_forward_hook(lambda _, args, y: add(sums[-1], y.float().abs())))
    for block, to in zip(model.backbone.layers, sums):
        (into,) = (module for module in block.modules() if isinstance(module, IntoResidual))
        columns = into.weight.float().unflatten(1, (len(to), -1))  # (d parts s)
        gram = torch.einsum("dps,dpq->psq", columns, columns)
        hooks.append(into.register_forward_pre_hook(lambda _, args, to=to, gram=gram: add(to, added(args[0], gram))))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def added(x: Tensor, gram: Tensor) -> Tensor:
    """(b t parts): the L2 norm of what each part of x (b t parts*s) becomes behind a projection, by the products of its columns,
    `gram` (parts s s)."""
    parts = x.float().unflatten(-1, gram.shape[:2])
    return (torch.einsum("btps,psq->btpq", parts, gram) * parts).sum(-1).clamp(min=0).sqrt()
