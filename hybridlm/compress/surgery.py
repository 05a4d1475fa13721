"""Cutting parts out of a trained model. What is left is an ordinary model of the smaller shape.

Parts that are zero change no logit when they go. For that two things make up for norms that take their mean over fewer
channels: their weights grow by the square root of what the width shrinks by, and epsilon counts for as much as before, which is
for the residual stream a matter of its scale, since every layer reads it through a norm.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.configuration import HybridLMConfig
from hybridlm.modeling import HybridLMForCausalLM
from hybridlm.pattern import SYMBOLS

# For each kind of layer that can be cut the size that its parts number: Mamba heads, key-value groups, neurons.
PARTS = {"M": "mamba_num_heads", "*": "num_key_value_heads", "-": "intermediate_size"}
PRUNING = "pruning.json"  # beside the weights of a pruned model
Index = list[int]


@dataclass(frozen=True)
class Kept:
    """What stays of a model, by its numbers there, each list rising.

    Attributes:
        layers: of the pattern.
        parts: for a layer (its number in the parent) the Mamba heads, key-value groups with their query heads, or neurons; all
            where a layer is not named. Layers of a kind keep the same number, and Mamba heads are the same number in each group.
        channels: of the residual stream; None for all.
    """

    layers: Index
    parts: Mapping[int, Index] = field(default_factory=dict)
    channels: Index | None = None

    def save(self, folder: Path, parent: str) -> None:
        """Writes `pruning.json`, by which a pruned model can be held against its parent."""
        (folder / PRUNING).write_text(json.dumps(asdict(self) | {"parent": parent}) + "\n", encoding="utf-8")


def check_kinds(config: HybridLMConfig) -> None:
    """
    Raises:
        ValueError: layers of kinds that cannot be cut, or a model that predicts no next token.
    """
    others = [symbol for symbol in dict.fromkeys(config.hybrid_override_pattern) if symbol not in PARTS]
    if others:
        named = ", ".join(f"{symbol!r} {SYMBOLS[symbol]}" for symbol in others)
        known = ", ".join(f"{symbol!r} {SYMBOLS[symbol]}" for symbol in PARTS)
        raise ValueError(
            f"the pattern {config.hybrid_override_pattern!r} has layers that cannot be pruned: {named}. Compression takes models "
            f"of {known} alone."
        )
    if config.bidirectional is not None:
        raise ValueError("a bidirectional model is a classifier; compression takes language models alone.")


def smaller_config(config: HybridLMConfig, kept: Kept) -> HybridLMConfig:
    """The shape of what is left.

    Raises:
        ValueError: parts that are not there, or of layers that do not stay; none left of something, or not the same number in
            layers of a kind.
    """
    check_kinds(config)
    pattern = config.hybrid_override_pattern
    _check_index("layers", kept.layers, len(pattern))
    if strangers := sorted(set(kept.parts).difference(kept.layers)):
        raise ValueError(f"parts to keep are given for layers that do not stay: {strangers}; layers {kept.layers} stay.")
    channels = range(config.hidden_size) if kept.channels is None else kept.channels
    _check_index("channels", channels, config.hidden_size)
    values = {name: getattr(config, name) for name in HybridLMConfig.__annotations__}
    values |= {"hybrid_override_pattern": "".join(pattern[i] for i in kept.layers), "hidden_size": len(channels)}
    for symbol, size in PARTS.items():
        layers = [i for i in kept.layers if pattern[i] == symbol]
        sizes = {i: len(_part(config, kept, i)) for i in layers}
        for i in layers:
            _check_index(f"{size} of layer {i}", _part(config, kept, i), getattr(config, size))
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all layers of kind {symbol!r} must keep the same {size}; got {sizes}.")
        if layers:
            values[size] = sizes[layers[0]]
        if symbol == "M":
            _check_groups(config, {i: _part(config, kept, i) for i in layers})
    per_group = config.num_attention_heads // config.num_key_value_heads
    values["num_attention_heads"] = values["num_key_value_heads"] * per_group
    values["layer_norm_epsilon"] *= config.mamba_num_heads / values["mamba_num_heads"]
    return HybridLMConfig(**values)


def prune(model: HybridLMForCausalLM, kept: Kept, backend: str = "auto") -> HybridLMForCausalLM:
    """A model of `kept` alone, in the dtype and on the device of `model`, with which it shares no weight.

    Args:
        backend: of its operators, as in `from_pretrained`.

    Raises:
        ValueError: as `smaller_config`.
    """
    old: Any = model.config
    config, source = smaller_config(old, kept), model.state_dict()
    channels = torch.tensor(range(old.hidden_size) if kept.channels is None else kept.channels)
    # Norms that take their mean over so many times fewer channels than before, where what went was zero, give so much less.
    stream, inner = old.hidden_size / config.hidden_size, old.mamba_num_heads / config.mamba_num_heads
    scale = math.sqrt(inner / stream)  # of the residual stream: epsilon has grown by `inner`, and is to count `stream` times
    tensors = {
        "backbone.embeddings.weight": source["backbone.embeddings.weight"][:, channels] * scale,
        "backbone.norm_f.weight": source["backbone.norm_f.weight"][channels] * math.sqrt(stream),
        "lm_head.weight": source["lm_head.weight"][:, channels],
    }
    factors = dict.fromkeys(("out_proj", "o_proj", "down_proj"), scale) | {"norm": math.sqrt(inner)}
    for new, i in enumerate(kept.layers):
        before, after = f"backbone.layers.{i}.", f"backbone.layers.{new}."
        tensors[f"{after}norm.weight"] = source[f"{before}norm.weight"][channels] * math.sqrt(stream)
        for name, (rows, columns) in _cuts(old, old.hybrid_override_pattern[i], _part(old, kept, i), channels).items():
            if (whole := source.get(f"{before}mixer.{name}")) is not None:  # biases are there or not
                cut = whole[rows] if columns is None else whole[rows][:, columns]
                tensors[f"{after}mixer.{name}"] = cut * factors.get(name.split(".")[0], 1)
    with torch.device("meta"):
        small = HybridLMForCausalLM(config, backend)
    small.load_state_dict({name: tensor.to(model.device) for name, tensor in tensors.items()}, assign=True)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def _cuts(config: HybridLMConfig, symbol: str, part: Index, channels: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """For each tensor of a mixer the rows that stay, and of matrices the columns."""
    c, every = config, torch.tensor(part)
    modules: dict[str, tuple[Tensor, Tensor | None]] = {"up_proj": (every, channels), "down_proj": (channels, every)}
    if symbol == "*":
        keys, queries_of_one = _spread(every, c.head_dim), c.num_attention_heads // c.num_key_value_heads * c.head_dim
        queries = _spread(every, queries_of_one)
        modules = dict.fromkeys(("k_proj", "v_proj"), (keys, channels))
        modules |= {"q_proj": (queries, channels), "o_proj": (channels, queries)}
    if symbol == "M":
        inner, states = c.mamba_inner_size, c.n_groups * c.ssm_state_size
        own = _spread(every, c.mamba_head_dim)
        convolved = torch.cat([own, torch.arange(inner, inner + 2 * states)])  # x, B, C: these are the groups'
        projected = torch.cat([own, inner + convolved, 2 * inner + 2 * states + every])  # z, x, B, C, dt
        modules = {"in_proj": (projected, channels), "conv1d": (convolved, None), "norm": (own, None)}
        modules |= {"out_proj": (channels, own)}
    tensors = {f"{name}.weight": cut for name, cut in modules.items()} | {
        f"{name}.bias": (cut[0], None) for name, cut in modules.items()
    }
    return tensors | (dict.fromkeys(("A_log", "D", "dt_bias"), (every, None)) if symbol == "M" else {})


def _spread(parts: Tensor, size: int) -> Tensor:
    """The rows of parts that have `size` rows each."""
    return (parts[:, None] * size + torch.arange(size)).flatten()


def _part(config: HybridLMConfig, kept: Kept, layer: int) -> Index:
    return kept.parts.get(layer, list(range(getattr(config, PARTS[config.hybrid_override_pattern[layer]]))))


def _check_index(what: str, index: Iterable[int], size: int) -> None:
    index = list(index)
    if not index or index != sorted(set(index)) or index[0] < 0 or index[-1] >= size:
        raise ValueError(f"{what} to keep must be rising numbers from 0 to {size - 1}, at least one; got {index}.")


def _check_groups(config: HybridLMConfig, heads: dict[int, Index]) -> None:
    """The heads of a group share B and C, and their groups are equal."""
    size = config.mamba_num_heads // config.n_groups
    for layer, index in heads.items():
        counts = [sum(head // size == group for head in index) for group in range(config.n_groups)]
        if len(set(counts)) > 1:
            raise ValueError(f"layer {layer} must keep as many Mamba heads in each of its groups; got {counts} of {size} each.")
