"""How long a request takes a shape of which there is no model yet: the sum over its layers, each measured once on this machine
(Puzzle, arXiv 2411.19146)."""

import copy
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import NamedTuple

import torch

from hybridlm.compress.search import LAYERS, Shape
from hybridlm.compress.surgery import PARTS
from hybridlm.configuration import HybridLMConfig
from hybridlm.modeling import HybridLMForCausalLM
from hybridlm.timing import generate, request_dtype


class Layer(NamedTuple):
    """A kind of layer, how many heads, groups or neurons it has, and the width of the residual stream."""

    symbol: str
    size: int
    hidden_size: int


class Seconds(NamedTuple):
    """What a layer adds to a request, and what the request takes without any layer."""

    layer: float
    rest: float


def layers_of(shape: Shape) -> dict[Layer, int]:
    """The layers of a shape and how many of each there are."""
    kinds = {symbol: Layer(symbol, shape[PARTS[symbol]], shape["hidden_size"]) for symbol in LAYERS}
    return {kinds[symbol]: shape[axis] for symbol, axis in LAYERS.items() if shape[axis]}


def needed(shapes: Iterable[Shape]) -> list[Layer]:
    """Every layer that these shapes are made of, once."""
    return list(dict.fromkeys(layer for shape in shapes for layer in layers_of(shape)))


def measure(
    config: HybridLMConfig, layer: Layer, prompt: int, new: int, turns: int, device: torch.device, backend: str = "auto"
) -> Seconds:
    """Of a model with one such layer and of one with two, in turns, each the least of its times: what comes between only adds."""
    per_group = config.num_attention_heads // config.num_key_value_heads
    models = []
    for depth in (1, 2):
        c = copy.deepcopy(config)
        c.hybrid_override_pattern, c.hidden_size = layer.symbol * depth, layer.hidden_size
        setattr(c, PARTS[layer.symbol], layer.size)
        c.num_attention_heads = c.num_key_value_heads * per_group
        with device:
            model = HybridLMForCausalLM(c, backend)
        models.append(model.to(request_dtype(device)).eval())  # type: ignore[arg-type]
        generate(models[-1], 0, min(prompt, 64), min(new, 4), 1)  # warms up
    least = [float("inf")] * 2
    for turn in range(turns):
        least = [min(time, generate(model, turn, prompt, new, 1)["total"]) for time, model in zip(least, models)]
    return Seconds(least[1] - least[0], 2 * least[0] - least[1])


def estimate(shape: Shape, measured: Mapping[Layer, Seconds]) -> float:
    """Seconds of a request of this shape."""
    counts = layers_of(shape)
    return mean(measured[layer].rest for layer in counts) + sum(n * measured[layer].layer for layer, n in counts.items())
