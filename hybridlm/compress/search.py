"""Which parts to cut: a grid of shapes, those within a budget, and in each the parts that matter most (MiniPuzzle: Nemotron-H,
arXiv 2504.03624, section 4); beside them uniform cuts to the same size, which look at no layer's worth."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from operator import itemgetter

import torch
from torch import Tensor

from hybridlm.compress.importance import Importance
from hybridlm.compress.surgery import PARTS, Kept
from hybridlm.configuration import HybridLMConfig
from hybridlm.memory import inference_bytes
from hybridlm.output import BYTES, scaled
from hybridlm.twin import count_parameters

LAYERS = {"M": "mamba_layers", "*": "attention_layers", "-": "ffn_layers"}
AXES = (*LAYERS.values(), *PARTS.values(), "hidden_size")
SETTINGS = ", ".join(f"compress.{axis}" for axis in AXES)
Shape = dict[str, int]  # a value for each of AXES


@dataclass(frozen=True)
class Budget:
    """What a candidate may take at most; None for no limit.

    Attributes:
        parameters: of the model.
        memory: bytes of weights and of the cache of one sequence of `context` tokens, with so many bits a value.
        seconds: of a request, as somebody estimates them for a shape.
    """

    parameters: float | None = None
    memory: float | None = None
    seconds: float | None = None
    context: int = 8192
    weight_bits: int = 16
    cache_bits: int = 16

    def bytes_of(self, config: HybridLMConfig) -> float:
        return inference_bytes(config, self.context, self.weight_bits, self.cache_bits)

    def admits(self, config: HybridLMConfig) -> bool:
        return (self.parameters is None or count_parameters(config) <= self.parameters) and (
            self.memory is None or self.bytes_of(config) <= self.memory
        )


@dataclass(frozen=True)
class Candidate:
    """A shape of the grid, and how much of the parent's work is thought to be lost in it (`damage`)."""

    shape: Shape
    damage: float

    @property
    def name(self) -> str:
        return named(self.shape)


def named(shape: Shape) -> str:
    """3M-1A-3F-h4-g2-n288-d128: layers, Mamba heads, key-value groups, neurons, channels."""
    return "-".join(letter.format(shape[axis]) for axis, letter in zip(AXES, ("{}M", "{}A", "{}F", "h{}", "g{}", "n{}", "d{}")))


def shape_of(config: HybridLMConfig) -> Shape:
    counts = {axis: config.hybrid_override_pattern.count(symbol) for symbol, axis in LAYERS.items()}
    return counts | {axis: getattr(config, axis) for axis in AXES[len(LAYERS) :]}


def default_axis(config: HybridLMConfig, axis: str) -> list[int]:
    """Of layers all down to two thirds; of widths all, seven eighths, three quarters, five eighths and a half, rounded down
    to whole groups of heads and 16 neurons; all channels of the residual stream, which every part of a model needs."""
    full = shape_of(config)[axis]
    if axis in LAYERS.values():
        return list(range(full, math.ceil(full * 2 / 3) - 1, -1))
    if axis == "hidden_size":
        return [full]
    step = {"intermediate_size": 16, "mamba_num_heads": config.n_groups}.get(axis, 1)  # FP8 takes multiples of 16
    sizes = [full, *(int(full * eighths / 8) // step * step for eighths in (7, 6, 5, 4))]
    return list(dict.fromkeys(size for size in sizes if size))


def check_axes(config: HybridLMConfig, axes: Mapping[str, list[int]]) -> None:
    """
    Raises:
        ValueError: more than the parent has, nothing, or Mamba heads that do not divide among its groups: all in one message.
    """
    full, faults = shape_of(config), []
    for axis, values in axes.items():
        least = 0 if axis in LAYERS.values() else 1
        wrong = [value for value in values if not least <= value <= full[axis]]
        if wrong or not values:
            faults.append(f"{axis}: give one or more of {least} to {full[axis]}, which the parent has; got {values}.")
        if axis == "mamba_num_heads" and any(value % config.n_groups for value in values):
            faults.append(f"{axis}: each of the {config.n_groups} groups keeps as many; got {values}.")
    if faults:
        raise ValueError("\n".join(["the grid does not fit the parent:", *(f"  {fault}" for fault in faults)]))


def grid(config: HybridLMConfig, axes: Mapping[str, list[int]]) -> Iterator[Shape]:
    """Every combination; what no layer is left of has the parent's width."""
    full, seen = shape_of(config), set()
    for values in product(*(axes[axis] for axis in AXES)):
        shape = dict(zip(AXES, values))
        shape |= {PARTS[symbol]: full[PARTS[symbol]] for symbol, axis in LAYERS.items() if not shape[axis]}
        if any(shape[axis] for axis in LAYERS.values()) and (key := tuple(shape.values())) not in seen:
            seen.add(key)
            yield shape


def most_important(config: HybridLMConfig, importance: Importance, shape: Shape) -> Kept:
    """What stays of a model in this shape: of each kind the layers that would be missed most, in each of them the parts."""
    layers, full = best_layers(config, importance, shape), shape_of(config)
    sizes = {i: shape[PARTS[config.hybrid_override_pattern[i]]] for i in layers}
    parts = {i: best_parts(config, importance, i, size) for i, size in sizes.items() if size < len(importance.parts[i])}
    width = shape["hidden_size"]
    channels = None if width == full["hidden_size"] else best_parts(config, importance, None, width)
    return Kept(layers, parts, channels)


def best_layers(config: HybridLMConfig, importance: Importance, shape: Shape) -> list[int]:
    pattern, worth = config.hybrid_override_pattern, importance.layers.tolist()
    layers: list[int] = []
    for symbol, axis in LAYERS.items():
        of_kind = [i for i, s in enumerate(pattern) if s == symbol]
        layers += sorted(of_kind, key=worth.__getitem__, reverse=True)[: shape[axis]]
    return sorted(layers)


def by_group(config: HybridLMConfig, importance: Importance, layer: int | None) -> Tensor:
    """(groups, parts of each): the importance of the parts of a layer, or of the channels of the residual stream."""
    if layer is None:
        return importance.channels[None]
    return importance.parts[layer].view(config.n_groups if config.hybrid_override_pattern[layer] == "M" else 1, -1)


def best_parts(config: HybridLMConfig, importance: Importance, layer: int | None, count: int) -> list[int]:
    """The numbers of the `count` best, rising, as many of each group."""
    scores = by_group(config, importance, layer)
    chosen = scores.topk(count // len(scores)).indices + torch.arange(len(scores))[:, None] * scores.shape[1]
    return sorted(chosen.flatten().tolist())


def damage(config: HybridLMConfig, importance: Importance, shape: Shape, lost: Callable[[int | None, int], float]) -> float:
    """The importance of the layers that go, and of those that stay as large a share as goes of their squared activations; of all
    layers where channels of the residual stream go."""
    pattern, worth = config.hybrid_override_pattern, importance.layers.tolist()
    layers = best_layers(config, importance, shape)
    gone = sum(worth[i] for i in set(range(len(pattern))).difference(layers))
    thinner = sum(worth[i] * lost(i, shape[PARTS[pattern[i]]]) for i in layers)
    return gone + thinner + sum(worth) * lost(None, shape["hidden_size"])


def lost_share(config: HybridLMConfig, importance: Importance, layer: int | None, count: int) -> float:
    """Of the squared activations, the part that goes where `count` parts of a layer stay, or channels of the residual stream."""
    scores = by_group(config, importance, layer)
    least = scores.topk(scores.shape[1] - count // len(scores), largest=False).values
    return (least.square().sum() / scores.square().sum()).item()


def candidates(
    config: HybridLMConfig,
    importance: Importance,
    axes: Mapping[str, list[int]],
    budget: Budget,
    most: int,
    seconds: Callable[[Shape], float] = lambda shape: 0.0,
) -> tuple[list[Candidate], dict[str, int]]:
    """The `most` candidates within the budget that are thought to lose least, and how many there are of what; else as
    `within_budget`."""
    within, of_grid = within_budget(config, axes, budget, seconds)
    lost = cache(partial(lost_share, config, importance))
    found = sorted((Candidate(shape, damage(config, importance, shape, lost)) for shape in within), key=lambda one: one.damage)
    return found[:most], {"grid": of_grid, "within_budget": len(within), "scored": min(most, len(found))}


def within_budget(
    config: HybridLMConfig,
    axes: Mapping[str, list[int]],
    budget: Budget,
    seconds: Callable[[Shape], float] = lambda shape: 0.0,
) -> tuple[list[Shape], int]:
    """The shapes of the grid that keep to the budget, and how many it has besides the parent's own.

    Args:
        seconds: what a request is thought to take a shape.

    Raises:
        ValueError: a grid that does not fit the parent, or has no other shape; none within the budget: the message has the
            smallest.
    """
    check_axes(config, axes)
    shapes = [shape for shape in grid(config, axes) if shape != shape_of(config)]
    if not shapes:
        raise ValueError(f"the grid has no shape but the parent's own; let it go further down ({SETTINGS}).")
    limit = math.inf if budget.seconds is None else budget.seconds
    within = [shape for shape in shapes if budget.admits(counted(config, shape)) and seconds(shape) <= limit]
    if not within:
        raise ValueError(unreachable(config, shapes, budget, seconds))
    return within, len(shapes)


def counted(config: HybridLMConfig, shape: Shape) -> HybridLMConfig:
    """A configuration that takes what a model of this shape takes; the order of its layers is another."""
    small = copy.copy(config)
    small.hybrid_override_pattern = "".join(symbol * shape[axis] for symbol, axis in LAYERS.items())
    small.num_attention_heads = config.num_attention_heads // config.num_key_value_heads * shape["num_key_value_heads"]
    for axis in (*PARTS.values(), "hidden_size"):
        setattr(small, axis, shape[axis])
    return small


def unreachable(config: HybridLMConfig, shapes: list[Shape], budget: Budget, seconds: Callable[[Shape], float]) -> str:
    """What the budget asks for and the least that the grid has."""
    smalls = [counted(config, shape) for shape in shapes]
    lines = []
    if budget.parameters is not None:
        least = min(map(count_parameters, smalls))
        lines.append(f"at most {budget.parameters:,.0f} parameters; the smallest shape of the grid has {least:,}")
    if budget.memory is not None:
        least_bytes = min(map(budget.bytes_of, smalls))
        lines.append(
            f"at most {scaled(budget.memory, BYTES)} of weights and cache at {budget.context:,} tokens; the smallest shape "
            f"of the grid takes {scaled(least_bytes, BYTES)}"
        )
    if budget.seconds is not None:
        quickest = min(map(seconds, shapes))
        lines.append(f"at most {budget.seconds:.3g} s for a request; the quickest shape of the grid takes about {quickest:.3g} s")
    return "\n".join(
        [
            f"no shape of the grid ({len(shapes):,}) is within the budget:",
            *(f"  {line}" for line in lines),
            f"Raise the budget, or let the grid go further down ({SETTINGS}).",
        ]
    )


def uniform_depth(config: HybridLMConfig, importance: Importance, parameters: int) -> Kept:
    """Layers go at even distances, whatever they do, as many as leave the model no smaller than `parameters`, and then the least
    important neurons of all FFN layers; one layer more where neurons do not suffice.

    Raises:
        ValueError: no such model.
    """
    pattern, full, found = config.hybrid_override_pattern, shape_of(config), None
    for gone in range(len(pattern) - 1, -1, -1):
        dropped = {int((i + 0.5) * len(pattern) / gone) for i in range(gone)}
        layers = [i for i in range(len(pattern)) if i not in dropped]
        left = [pattern[i] for i in layers]
        shape = full | {axis: left.count(symbol) for symbol, axis in LAYERS.items()}
        if shape["ffn_layers"] and (neurons := most_neurons(config, shape, parameters)) >= 1:
            found = layers, min(neurons, full["intermediate_size"])
        if count_parameters(counted(config, shape)) >= parameters:
            break
    if found is None:
        raise ValueError(f"no layers at even distances, an FFN among them, have {parameters:,} parameters or fewer.")
    layers, neurons = found
    return Kept(layers, {i: best_parts(config, importance, i, neurons) for i in layers if pattern[i] == "-"})


def uniform_width(config: HybridLMConfig, importance: Importance, parameters: int) -> Kept:
    """All layers stay, and of every width, channels of the residual stream too, the most important share, the same of each up to
    whole heads and groups: the share at which neurons, which make up the difference to `parameters`, are nearest to it.

    Raises:
        ValueError: no such model.
    """
    full = shape_of(config)
    if not full["ffn_layers"]:
        raise ValueError("the parent has no FFN layer, whose neurons make up the difference between a uniform cut and its size.")
    fitting = []
    for channels in range(full["hidden_size"], 0, -1):
        share = channels / full["hidden_size"]
        shape = full | {axis: max(1, round(full[axis] * share)) for axis in (*PARTS.values(), "hidden_size")}
        shape["mamba_num_heads"] = max(1, round(full["mamba_num_heads"] / config.n_groups * share)) * config.n_groups
        if (count := most_neurons(config, shape, parameters)) >= 1:
            fitting.append((abs(count / full["intermediate_size"] - share), shape | {"intermediate_size": count}))
    if not fitting:
        raise ValueError(f"no model of one width has {parameters:,} parameters or fewer.")
    return most_important(config, importance, min(fitting, key=itemgetter(0))[1])


def most_neurons(config: HybridLMConfig, shape: Shape, parameters: int) -> int:
    """With so many, maybe more than the parent has or less than one, a model of this shape has `parameters`, or just less."""
    fewest, one_more = (count_parameters(counted(config, shape | {"intermediate_size": count})) for count in (1, 2))
    return 1 + (parameters - fewest) // (one_more - fewest)
