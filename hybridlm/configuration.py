"""The configuration: the pattern string is the architecture, every other field a size."""

import difflib
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from hybridlm.configuration_faults import MOE_SIZES, faults_of
from hybridlm.pattern import NEMOTRON_H_SYMBOLS, RECURRENT, evenly_dispersed

# Other spellings of our fields in published configs.
SYNONYMS = {
    "attention_head_dim": "head_dim", "rms_norm_eps": "layer_norm_epsilon", "norm_eps": "layer_norm_epsilon",
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_chunk_size": "chunk_size", "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias", "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor", "mamba_dt_limit": "time_step_limit", "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
}  # fmt: skip
MOE_FIELDS = frozenset([*MOE_SIZES, "moe_latent_size", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor"])
NO_LIMIT = [0.0, math.inf]
CLASSIFIER = "HybridLMForSequenceClassification"
LAYER_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}


class HybridLMConfig(PreTrainedConfig):
    """A hybrid Mamba-2/Transformer language model in the style of Nemotron-H (arXiv 2504.03624).

    The names are those of transformers' `NemotronHConfig`; what is ours stands at the end. The defaults are the 8B model.

    Args:
        hybrid_override_pattern: one symbol a layer: `M` Mamba-2, `*` self-attention, `-` FFN, `E` mixture of experts; and of
            the line that led here `r` Elman RNN, `l` LSTM, `g` GRU, `m` Mamba-1. Its length is the depth.
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the FFN.
        num_attention_heads, num_key_value_heads, head_dim: of self-attention; query heads share key-value heads in groups.
        mamba_num_heads, mamba_head_dim: of Mamba-2; their product is its inner width (`expand` is not used).
        n_groups: groups of Mamba heads that share B and C. ssm_state_size: rows of the state of each head channel.
        conv_kernel: window of the convolution, in positions. chunk_size: positions of one SSD chunk; no result depends on it.
        time_step_min, time_step_max, time_step_floor: range of dt at initialisation.
        A_init_min, A_init_max: range of -A at initialisation, of Mamba-2.
        time_step_limit: dt is clamped to it in every pass.
        time_step_rank: of Mamba-1, the width from which dt is projected; None: a sixteenth of hidden_size, rounded up. Its inner
            width, its convolution and the rows of its state are Mamba-2's.
        n_routed_experts, moe_intermediate_size: of an `E` layer: its experts and the width of each.
        num_experts_per_tok: experts that a token goes to. n_group, topk_group: they are chosen among those of the best
            topk_group of n_group groups of experts.
        moe_shared_expert_intermediate_size: width of the expert that every token goes to.
        moe_latent_size: width at which the experts work; None: hidden_size.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum. routed_scaling_factor: what they
            are then multiplied by.
        initializer_range: standard deviation of the weights at initialisation; with `rescale_prenorm_residual`, that of
            the projections into the residual stream is divided by the square root of the depth.
        recurrent_size: width of the state of `r`, `l` and `g`; None: hidden_size. rnn_activation: of `r`, tanh or relu.
        lstm_forget_bias: of `l` at initialisation: with 1, a state begins with keeping 73% of itself at each token.
        attention_dropout, hidden_dropout: shares that are dropped in training mode alone: of the weights of attention, and of
            what each layer adds to the residual stream. Stock transformers holds both, and drops the first alone.
        rope_theta: base of the rotary position embedding; None, as in Nemotron-H, for no position embedding.
        bidirectional: "sum" or "concat" for a model in which every token sees its whole document, for classification alone: each
            recurrent layer has a second mixer that reads from the end, and what the two give is added, or put side by side and
            projected back; attention has no causal mask. None: a causal model.

    Raises:
        ValueError: one message with every fault.
    """

    model_type = "hybridlm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 131072
    hidden_size: int = 4096
    hybrid_override_pattern: str = evenly_dispersed(52, 4)
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 8192
    attention_bias: bool = False
    attention_dropout: float = 0.0
    intermediate_size: int = 21504
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    ssm_state_size: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    mamba_hidden_act: str = "silu"
    n_groups: int = 8
    conv_kernel: int = 4
    expand: int = 2
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)
    use_conv_bias: bool = True
    chunk_size: int = 128
    mamba_ssm_cache_dtype: str = "float32"
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    num_experts_per_tok: int = 2
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    use_bias: bool = False
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    hidden_dropout: float = 0.0
    rescale_prenorm_residual: bool = True
    rope_theta: float | None = None
    recurrent_size: int | None = None
    rnn_activation: str = "tanh"
    lstm_forget_bias: float = 1.0
    time_step_rank: int | None = None
    bidirectional: str | None = None
    A_init_min: float = 1.0
    A_init_max: float = 16.0

    def __post_init__(self, **kwargs):
        kwargs.pop("num_hidden_layers", None)  # the pattern's length
        super().__post_init__(**kwargs)
        if faults := faults_of(self):
            raise ValueError("\n".join([f"HybridLMConfig has {len(faults)} fault(s):", *faults]))

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner_size(self) -> int:
        """Width of x and z in Mamba-2 and Mamba-1."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_rank(self) -> int:
        """Width from which Mamba-1's dt is projected."""
        return -(-self.hidden_size // 16) if self.time_step_rank is None else self.time_step_rank

    @property
    def mamba_conv_size(self) -> int:
        """Channels that pass the convolution of Mamba-2: x, B and C. Of Mamba-1 it is x alone."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def label_names(self) -> list[str]:
        """The labels of a classifier, by their numbers."""
        return list(self.id2label.values())  # type: ignore[union-attr]

    @property
    def has_dropout(self) -> bool:
        """Whether a pass in training mode draws random numbers."""
        return self.attention_dropout > 0 or self.hidden_dropout > 0

    @property
    def recurrent_state_size(self) -> int:
        """Width of the state of the classical recurrences."""
        return self.recurrent_size or self.hidden_size

    @property
    def is_nemotron_h(self) -> bool:
        """Whether stock transformers' `nemotron_h` can hold this model.

        It knows no RoPE and no bias in attention, ignores `time_step_limit`, reads in one direction and classifies nothing.
        """
        attention = self.rope_theta is None and not self.attention_bias
        return (
            set(self.hybrid_override_pattern) <= NEMOTRON_H_SYMBOLS
            and (attention or "*" not in self.hybrid_override_pattern)
            and list(self.time_step_limit) == NO_LIMIT
            and self.bidirectional is None
            and self.architectures != [CLASSIFIER]
        )

    def directions(self, symbol: str) -> int:
        """Mixers in a layer of this kind."""
        return 2 if self.bidirectional is not None and symbol in RECURRENT else 1

    def merge_sizes(self, symbol: str) -> list[tuple[int, int]]:
        """(rows, columns) of the projection by which "concat" makes one of two directions; none in other layers."""
        concat = self.bidirectional == "concat" and symbol in RECURRENT
        return [(self.hidden_size, 2 * self.hidden_size)] * concat

    @classmethod
    def from_strict_dict(cls, values: dict[str, Any]) -> "HybridLMConfig":
        """A config from a person's own words (a shape file): unknown keys are errors that name the nearest known one."""
        known = {f.name for f in fields(HybridLMConfig) if f.name in HybridLMConfig.__annotations__}
        unknown = [key for key in values if key not in known]
        if unknown:
            nearest = {key: difflib.get_close_matches(key, sorted(known), n=1) for key in unknown}
            hints = [f"{key}{f' (did you mean {near[0]}?)' if near else ''}" for key, near in nearest.items()]
            raise ValueError(f"unknown model config key(s): {', '.join(hints)}.")
        return cls(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers' own; also reads a `nemotron_h` config, ours or published. Fields in `kwargs` take the place of its."""
        if "num_hidden_layers" in kwargs:
            raise ValueError("num_hidden_layers is the length of hybrid_override_pattern; change the pattern.")
        changed = {key: value for key, value in kwargs.items() if key in HybridLMConfig.__annotations__}
        return super().from_dict(from_disk(config_dict) | changed, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):  # under from_pretrained and from_json_file
        return from_disk(super()._dict_from_json_file(json_file))

    def to_json_file(self, json_file_path, use_diff: bool = True) -> None:
        Path(json_file_path).write_text(json.dumps(to_disk(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_disk(config: HybridLMConfig) -> dict[str, Any]:
    """The content of config.json: a `nemotron_h` model wherever one can hold this, and a form every reader of it takes."""
    values = config.to_diff_dict()
    values["num_hidden_layers"] = config.num_hidden_layers
    if list(config.time_step_limit) == NO_LIMIT:
        del values["time_step_limit"]  # the default everywhere, and JSON has no infinity
    if "E" not in config.hybrid_override_pattern:
        values = {key: value for key, value in values.items() if key not in MOE_FIELDS}
    if "m" not in config.hybrid_override_pattern:
        values.pop("time_step_rank", None)
    if config.is_nemotron_h:
        del values["rope_theta"]
        values["model_type"] = "nemotron_h"
        values["architectures"] = ["NemotronHForCausalLM"]
        # Stock transformers clamps dt at time_step_min in every pass; training never did. 0.0 breaks its from_config.
        values["time_step_min"] = 1e-30
        values["time_step_init_min"] = config.time_step_min
    return values


def from_disk(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_disk`, and the spellings of other writers of `nemotron_h`."""
    if not isinstance(values, dict):
        raise ValueError(f"config.json must hold an object; got {type(values).__name__}.")
    if values.get("quantization_config") is not None:
        raise ValueError("config.json has a quantization_config; this library opens weights of floating point numbers alone.")
    # Code of others, and what a caller chooses: neither is a config file's to say.
    values = {key: value for key, value in values.items() if "_implementation" not in key and key != "auto_map"}
    for key in ("dtype", "torch_dtype"):
        name = str(values.get(key) or "float32").removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"config.json has {key} {values[key]!r}, which is no dtype.")
    if values.get("model_type", "hybridlm") not in ("nemotron_h", "hybridlm"):
        raise ValueError(f"config.json has model_type {values['model_type']!r}; this library opens nemotron_h and hybridlm.")
    for other, name in SYNONYMS.items():
        if other in values:
            values = {name: values[other], **{key: value for key, value in values.items() if key != other}}
    if values.get("model_type") == "nemotron_h":
        values.pop("rope_theta", None)  # the stock model has no position embedding, whatever its config says
    kinds = values.pop("layers_block_type", None)
    if kinds is not None and "hybrid_override_pattern" not in values:
        values["hybrid_override_pattern"] = "".join(LAYER_KINDS.get(kind, "?") for kind in kinds)
    if "time_step_limit" in values:
        values["time_step_limit"] = _limit(values["time_step_limit"])
    if values.get("num_key_value_heads", 1) is None:
        values["num_key_value_heads"] = values.get("num_attention_heads", HybridLMConfig.num_attention_heads)
    if "time_step_init_min" in values:
        values["time_step_min"] = values.pop("time_step_init_min")
    if values.get("architectures") == ["NemotronHForCausalLM"]:
        del values["architectures"]  # the class that opens it there, not here
    values["model_type"] = "hybridlm"
    return values


def _limit(limit: Any) -> Any:
    """`time_step_limit` in any spelling: null, Infinity, "inf", {"__float__": "Infinity"}, a number too large to limit."""
    if limit is None:
        return NO_LIMIT
    if not isinstance(limit, (list, tuple)) or len(limit) != 2:
        return limit  # a fault, which the config will name
    try:
        low, high = (x["__float__"] if isinstance(x, dict) else x for x in limit)
        low, high = 0.0 if low is None else float(low), math.inf if high is None else float(high)
    except (TypeError, ValueError, KeyError):
        return limit
    return [low, math.inf if high >= 1e30 else high]
