"""The Transformer twin: what a hybrid is compared with."""

from hybridlm.configuration import HybridLMConfig
from hybridlm.pattern import GATES


def parameters_by_kind(config: HybridLMConfig) -> dict[str, int]:
    """Parameters of one layer of each kind in the pattern, its norm among them; of `embedding`, `head` and last `norm`.

    From the configuration alone; embedding and head are two matrices.
    """
    c, d = config, config.hidden_size
    inner, conv, heads = c.mamba_inner_size, c.mamba_conv_size, c.mamba_num_heads
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    projected = inner + conv + heads
    mamba = (
        d * projected + conv * (c.conv_kernel + c.use_conv_bias) + 3 * heads + inner + inner * d + c.use_bias * (projected + d)
    )
    rank, n = c.mamba_rank, c.ssm_state_size
    # in_proj; the convolution, x_proj, dt_proj, dt_bias, D and A_log; out_proj.
    mamba_1 = (
        2 * d * inner
        + inner * (c.conv_kernel + c.use_conv_bias + rank + 2 * n + rank + 2 + n)
        + inner * d
        + c.use_bias * (2 * inner + d)
    )
    of_kind = {
        "M": mamba,
        "*": 2 * d * (query + key) + c.attention_bias * (query + 2 * key + d),
        "-": _mlp(d, c.intermediate_size, c.mlp_bias),
        "E": c.n_routed_experts * (_expert(c) + d) + _shared(c),
        **{symbol: cell_parameters(c, symbol) + d * c.recurrent_state_size + c.use_bias * d for symbol in GATES},
        "m": mamba_1,
    }
    layers = {
        symbol: c.directions(symbol) * of_kind[symbol] + sum(rows * columns for rows, columns in c.merge_sizes(symbol)) + d
        for symbol in dict.fromkeys(c.hybrid_override_pattern)
    }
    return {"embedding": c.vocab_size * d, **layers, "norm": d, "head": c.vocab_size * d}


def _mlp(size: int, width: int, bias: bool) -> int:
    return 2 * size * width + bias * (width + size)


def cell_parameters(c: HybridLMConfig, symbol: str) -> int:
    """Of the cell of `r`, `l` or `g`, with torch's two biases for each gate."""
    n = c.recurrent_state_size
    return GATES[symbol] * n * (c.hidden_size + n + 2)


def _expert(c: HybridLMConfig) -> int:
    return _mlp(c.moe_latent_size or c.hidden_size, c.moe_intermediate_size, bias=False)


def _shared(c: HybridLMConfig) -> int:
    """What every token passes in an `E` layer besides the router: the shared expert, the way into and out of the latent space."""
    d, latent = c.hidden_size, c.moe_latent_size
    projections = 0 if latent is None else 2 * d * latent + c.mlp_bias * (d + latent)
    return _mlp(d, c.moe_shared_expert_intermediate_size, c.mlp_bias) + projections


def count_parameters(config: HybridLMConfig) -> int:
    """Of the language model; a classifier has num_labels x hidden_size in the place of the head, and of what a bidirectional
    configuration says there is nothing but classifiers."""
    kinds = parameters_by_kind(config)
    return kinds["embedding"] + kinds["norm"] + kinds["head"] + sum(kinds[symbol] for symbol in config.hybrid_override_pattern)


def active_parameters(config: HybridLMConfig) -> int:
    """Parameters that work on one token: all but the experts that it does not go to."""
    idle = config.n_routed_experts - config.num_experts_per_tok
    return count_parameters(config) - config.hybrid_override_pattern.count("E") * idle * _expert(config)


def transformer_twin(config: HybridLMConfig) -> HybridLMConfig:
    """The Transformer of equal width, depth and, within the rounding of its FFN to a multiple of 8, size, with RoPE.

    Its layers are attention and FFN in turn, half the hybrid's depth of each; the width of the FFN makes the size.

    Raises:
        ValueError: the hybrid has too few parameters for a Transformer of its depth.
    """
    pairs = max(1, round(config.num_hidden_layers / 2))
    values = {k: v for k, v in config.to_dict().items() if k in HybridLMConfig.__annotations__}

    def twin(width: int) -> HybridLMConfig:
        return HybridLMConfig(
            **values
            | {"hybrid_override_pattern": "*-" * pairs, "intermediate_size": width, "rope_theta": config.rope_theta or 10000.0}
        )

    without = count_parameters(twin(8)) - pairs * 2 * config.hidden_size * 8
    width = round((count_parameters(config) - without) / (pairs * 2 * config.hidden_size) / 8) * 8
    if width < 8:
        raise ValueError(
            f"a Transformer of {pairs} attention layers is larger than this hybrid of {count_parameters(config):,} parameters; "
            "take fewer attention heads (num_attention_heads)."
        )
    return twin(width)
