"""The Transformer twin: what a hybrid is compared with."""

from hybridlm.configuration import HybridLMConfig


def count_parameters(config: HybridLMConfig) -> int:
    """Parameters of the model, from the configuration alone; embedding and head are two matrices."""
    c, d = config, config.hidden_size
    inner, conv, heads = c.mamba_inner_size, c.mamba_conv_size, c.mamba_num_heads
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    projected = inner + conv + heads
    of_kind = {
        "M": d * projected
        + conv * (c.conv_kernel + c.use_conv_bias)
        + 3 * heads
        + inner
        + inner * d
        + c.use_bias * (projected + d),
        "*": 2 * d * (query + key) + c.attention_bias * (query + 2 * key + d),
        "-": 2 * d * c.intermediate_size + c.mlp_bias * (c.intermediate_size + d),
    }
    layers = sum(of_kind[symbol] + d for symbol in c.hybrid_override_pattern)  # + the norm before each
    return 2 * c.vocab_size * d + layers + d


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
