"""Model FLOPs of a hybrid: what one forward pass must compute, by kind of work.

A multiply-add is 2 FLOPs. Only matrix products count, and the multiply-adds of Mamba-1's scan, which has none; norms, gates and
activations do not. Nothing recomputed counts, and SSD is taken at a fixed chunk of 128 whatever the machine runs, so that
utilisation is comparable between machines.
"""

import copy

from hybridlm.configuration import HybridLMConfig
from hybridlm.pattern import GATES, SYMBOLS

CHUNK = 128


def forward_flops(config: HybridLMConfig, seq_len: int, chunk: int = CHUNK) -> dict[str, float]:
    """FLOPs per token of a forward pass over `seq_len` positions, by kind: linear, attention, ssd, scan, conv, head.

    Attention counts the keys that the causal mask lets through, (seq_len + 1) / 2 on average; all, in a bidirectional model. Of
    such a model both directions count, and the head is still that of a language model. A chunk of SSD is a full matrix product,
    as every implementation runs it. The scan has three multiply-adds for each element of the state: decay, input and read-out;
    the exponential is none. Of the experts, those that a token goes to count.
    """
    c = config
    inner, conv, n = c.mamba_inner_size, c.mamba_conv_size, c.ssm_state_size
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layers = {symbol: c.hybrid_override_pattern.count(symbol) * c.directions(symbol) for symbol in SYMBOLS}
    merged = sum(rows * columns for symbol in c.hybrid_override_pattern for rows, columns in c.merge_sizes(symbol))
    keys = (seq_len + 1) / 2 if c.bidirectional is None else seq_len
    mamba, attention = layers["M"], layers["*"]
    d, latent, h = c.hidden_size, c.moe_latent_size, c.recurrent_state_size
    weights = {
        "M": d * (inner + conv + c.mamba_num_heads) + inner * d,
        "*": 2 * d * query + 2 * d * key,
        "-": 2 * d * c.intermediate_size,
        "E": d * c.n_routed_experts
        + 2 * d * c.moe_shared_expert_intermediate_size
        + c.num_experts_per_tok * 2 * (latent or d) * c.moe_intermediate_size
        + (0 if latent is None else 2 * d * latent),
        **{symbol: gates * h * (d + h) + h * d for symbol, gates in GATES.items()},
        "m": 3 * d * inner + inner * (2 * c.mamba_rank + 2 * n),
    }
    # C B^T per group, the masked product with x per head, the state's update and its read-out.
    ssd = c.n_groups * chunk * n + inner * chunk + 2 * inner * n
    return {
        "linear": 2.0 * (sum(layers[symbol] * weights[symbol] for symbol in layers) + merged),
        "attention": 2.0 * attention * 2 * query * keys,
        "ssd": 2.0 * mamba * ssd,
        "scan": 2.0 * layers["m"] * 3 * inner * n,
        "conv": 2.0 * (mamba * conv + layers["m"] * inner) * c.conv_kernel,
        "head": 2.0 * d * c.vocab_size,
    }


def layer_flops(config: HybridLMConfig, symbol: str, seq_len: int) -> float:
    """FLOPs per token of a forward pass through one layer of a kind."""
    alone = copy.copy(config)
    alone.hybrid_override_pattern = symbol
    flops = forward_flops(alone, seq_len)
    return sum(flops.values()) - flops["head"]


def training_flops(config: HybridLMConfig, seq_len: int, head: bool = True) -> float:
    """FLOPs per token of forward and backward: backward is two products for each of forward's. Without the head, which a
    classifier has for a whole document, that of its backbone."""
    flops = forward_flops(config, seq_len)
    return 3 * (sum(flops.values()) - (0 if head else flops["head"]))


# Dense peak of one device in FLOP/s, without sparsity, from the vendors' data sheets.
PEAK_FLOPS = {
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12, "fp32": 80e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp8": 733e12, "fp32": 91.6e12},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """The peak of the device that torch calls `device_name`, or None where it is unknown (every CPU)."""
    for name, peaks in PEAK_FLOPS.items():
        if name in device_name:
            return peaks.get(precision)
    return None
