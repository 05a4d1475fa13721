"""What a `HybridLMConfig` must fulfil."""

import math
from types import NoneType
from typing import Any

from hybridlm.pattern import SYMBOLS, unknown_symbols

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "chunk_size"),
    "max_position_embeddings",
)
MOE_SIZES = (
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("n_group", "topk_group"),
)


def faults_of(c: Any) -> list[str]:
    """Every broken invariant, each with what came and what to do."""
    faults = []
    for name in (*SIZES, *MOE_SIZES) if "E" in str(c.hybrid_override_pattern) else SIZES:
        value = getattr(c, name)
        if value is None or not _is_size_or_none(value):
            faults.append(f"{name} must be a whole number of at least 1 and below 2**31; got {value!r}.")
    for name in (
        *("initializer_range", "layer_norm_epsilon", "time_step_min", "time_step_max", "time_step_floor"),
        *("A_init_min", "A_init_max"),
    ):
        value = getattr(c, name)
        if not _is_positive(value):
            faults.append(f"{name} must be a finite number above 0; got {value!r}.")
    if not isinstance(c.hybrid_override_pattern, str) or not c.hybrid_override_pattern:
        faults.append(f"hybrid_override_pattern must be a string with a symbol a layer; got {c.hybrid_override_pattern!r}.")
    elif unknown := unknown_symbols(c.hybrid_override_pattern):
        known = ", ".join(f"{symbol!r} {kind}" for symbol, kind in SYMBOLS.items())
        faults.append(
            f"hybrid_override_pattern {c.hybrid_override_pattern!r} has unknown symbol(s) {unknown!r}; known are {known}."
        )
    if faults:
        return faults  # what follows does arithmetic on these
    if c.mamba_num_heads % c.n_groups:
        faults.append(
            f"mamba_num_heads must be a multiple of n_groups; got {c.mamba_num_heads} heads and {c.n_groups} groups. "
            "Choose n_groups among the divisors of mamba_num_heads."
        )
    if c.num_attention_heads % c.num_key_value_heads:
        faults.append(
            "num_attention_heads must be a multiple of num_key_value_heads; "
            f"got {c.num_attention_heads} and {c.num_key_value_heads}."
        )
    if c.rope_theta is not None and (not _is_positive(c.rope_theta) or c.head_dim % 2):
        faults.append(f"rope_theta must be a finite number above 0 and head_dim even; got {c.rope_theta!r} and {c.head_dim}.")
    if not _is_size_or_none(c.time_step_rank):
        faults.append(f"time_step_rank must be null or a whole number of at least 1 and below 2**31; got {c.time_step_rank!r}.")
    if c.bidirectional not in (None, "sum", "concat"):
        faults.append(f"bidirectional must be 'sum', 'concat' or null; got {c.bidirectional!r}.")
    if not c.time_step_min <= c.time_step_max:
        faults.append(f"time_step_min must not exceed time_step_max; got {c.time_step_min} and {c.time_step_max}.")
    if not c.A_init_min <= c.A_init_max:
        faults.append(f"A_init_min must not exceed A_init_max; got {c.A_init_min} and {c.A_init_max}.")
    limit = c.time_step_limit
    if not isinstance(limit, (list, tuple)) or len(limit) != 2 or not all(isinstance(x, (int, float)) for x in limit):
        faults.append(f"time_step_limit must be two numbers; got {limit!r}.")
    elif not 0 <= limit[0] < limit[1]:
        faults.append(f"time_step_limit must be two rising numbers of at least 0; got {limit!r}.")
    if "E" in c.hybrid_override_pattern:
        faults += _moe_faults(c)
    if not _is_size_or_none(c.recurrent_size):
        faults.append(f"recurrent_size must be null or a whole number of at least 1 and below 2**31; got {c.recurrent_size!r}.")
    if c.rnn_activation not in ("tanh", "relu"):
        faults.append(f"rnn_activation must be tanh or relu; got {c.rnn_activation!r}.")
    bias = c.lstm_forget_bias
    if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not math.isfinite(bias):
        faults.append(f"lstm_forget_bias must be a finite number; got {bias!r}.")
    eos = c.eos_token_id
    if not isinstance(eos, (int, NoneType)) and not (isinstance(eos, list) and all(isinstance(x, int) for x in eos)):
        faults.append(f"eos_token_id must be a token id, a list of them or null; got {eos!r}.")
    for name in ("bos_token_id", "pad_token_id"):
        if not isinstance(getattr(c, name), (int, NoneType)):
            faults.append(f"{name} must be a token id or null; got {getattr(c, name)!r}.")
    flags = ["use_cache", "use_bias", "use_conv_bias", "mlp_bias", "attention_bias", "rescale_prenorm_residual"]
    for name in [*flags, "norm_topk_prob"] if "E" in c.hybrid_override_pattern else flags:
        if not isinstance(getattr(c, name), bool):
            faults.append(f"{name} must be true or false; got {getattr(c, name)!r}.")
    for name in ("attention_dropout", "hidden_dropout"):
        share = getattr(c, name)
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
            faults.append(f"{name} must be a share of at least 0 and below 1; got {share!r}.")
    only = {
        "tie_word_embeddings": False, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "mamba_ssm_cache_dtype": "float32",
        "residual_in_fp32": False,
    }  # fmt: skip
    faults += [
        f"{k} must be {v!r}, the only kind there is; got {getattr(c, k)!r}." for k, v in only.items() if getattr(c, k) != v
    ]
    return faults


def _moe_faults(c: Any) -> list[str]:
    faults = []
    of_group, rest = divmod(c.n_routed_experts, c.n_group)
    if rest or of_group < 2:  # a group is judged by its best two
        faults.append(
            "n_routed_experts must make n_group equal groups of at least 2; "
            f"got {c.n_routed_experts} experts and {c.n_group} groups."
        )
    if c.topk_group > c.n_group:
        faults.append(f"topk_group must not exceed n_group; got {c.topk_group} of {c.n_group}.")
    elif c.num_experts_per_tok > c.topk_group * of_group:
        faults.append(
            f"num_experts_per_tok must not exceed the {c.topk_group * of_group} experts of {c.topk_group} group(s); "
            f"got {c.num_experts_per_tok}."
        )
    if not _is_size_or_none(c.moe_latent_size):
        faults.append(f"moe_latent_size must be null or a whole number of at least 1 and below 2**31; got {c.moe_latent_size!r}.")
    if not _is_positive(c.routed_scaling_factor):
        faults.append(f"routed_scaling_factor must be a finite number above 0; got {c.routed_scaling_factor!r}.")
    if not isinstance(c.n_shared_experts, int) or c.n_shared_experts < 1:
        faults.append(f"n_shared_experts must be at least 1: no layer is without; got {c.n_shared_experts!r}.")
    return faults


def _is_size_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
