"""What a model is made of and what it costs, from its configuration alone."""

import copy
from pathlib import Path
from typing import Any

from hybridlm.checkpoint import check_folder
from hybridlm.configuration import HybridLMConfig
from hybridlm.flops import forward_flops, training_flops
from hybridlm.output import BYTES, COUNT, FLOP, scaled, table
from hybridlm.pattern import SYMBOLS
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import active_parameters, count_parameters, parameters_by_kind, transformer_twin

CONTEXTS = {"4k": 2**12, "16k": 2**14, "64k": 2**16, "256k": 2**18, "1M": 2**20}
Rows = list[tuple[str, ...]]
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}  # of a value in training: fp8 narrows only what enters a product


def read_config(source: str) -> HybridLMConfig:
    """From a shape file, the config of a run, a config.json, a model folder or the name of one on the hub.

    Raises:
        ValueError: none of them there, or not a valid one.
    """
    path = Path(source).expanduser()
    is_shape = path.suffix in (".yaml", ".yml")
    if path.suffix == ".json" and not path.is_file():
        raise ValueError(f"there is no file {source}.")
    if not is_shape and not path.is_file():
        check_folder(source)
    try:
        if not is_shape:
            return HybridLMConfig.from_pretrained(path if path.exists() else source)
        values = load_yaml(path)
        if isinstance(run := values.get("model"), dict):
            if (shape := run.get("config") or run.get("init_from")) is None:
                raise ValueError(f"{source} has neither model.config nor model.init_from.")
            if not isinstance(shape, dict) and Path(shape).resolve() == path.resolve():
                raise ValueError(f"{source} names itself as the place of its model.")
            return HybridLMConfig.from_strict_dict(shape) if isinstance(shape, dict) else read_config(str(shape))
        return HybridLMConfig.from_strict_dict(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None


def layer_flops(config: HybridLMConfig, symbol: str, seq_len: int) -> float:
    """FLOPs per token of a forward pass through one layer of a kind."""
    alone = copy.copy(config)
    alone.hybrid_override_pattern = symbol
    flops = forward_flops(alone, seq_len)
    return sum(flops.values()) - flops["head"]


def weight_bytes(config: HybridLMConfig) -> dict[str, int]:
    """Of all weights. In fp8 the layers take 1 byte a parameter; embedding, head and last norm stay bf16."""
    kinds, total = parameters_by_kind(config), count_parameters(config)
    return {"fp32": 4 * total, "bf16": 2 * total, "fp8": total + kinds["embedding"] + kinds["head"] + kinds["norm"]}


def cache_bytes(config: HybridLMConfig, context: int, value_bytes: int = 2) -> int:
    """What one sequence of `context` tokens leaves: keys and values of each token and attention layer; of each Mamba-2 layer the
    last inputs of the convolution, and a state that is fp32 whatever the rest is."""
    c = config
    attention = 2 * c.num_key_value_heads * c.head_dim * context * value_bytes
    mamba = (c.conv_kernel - 1) * c.mamba_conv_size * value_bytes + c.mamba_inner_size * c.ssm_state_size * 4
    return c.hybrid_override_pattern.count("*") * attention + c.hybrid_override_pattern.count("M") * mamba


def norm_activations(config: HybridLMConfig, w: int) -> int:
    """Bytes per token that a norm keeps for backward: its input and its result, and the scale of the token in fp32."""
    return 2 * config.hidden_size * w + 4


def block_activations(config: HybridLMConfig, symbol: str, w: int, seq_len: int) -> float:
    """Bytes per token that one layer and its norm keep for backward, as autograd has it with the eager operators.

    Args:
        w: bytes of a value in the products, 4 or 2.
    """
    c = config
    inner, conv, h, n = c.mamba_inner_size, c.mamba_conv_size, c.mamba_num_heads, c.ssm_state_size
    q, k = min(c.chunk_size, seq_len), c.num_experts_per_tok
    latent = c.moe_latent_size or c.hidden_size
    of_kind = {
        # in_proj and the convolution's result; y before and after its norm, and its scales; the states between chunks; dt with
        # its bias and after softplus.
        "M": w * (inner + conv + h + conv + 2 * inner) + 4 * c.n_groups + 4 * inner * n / q + 8 * h,
        # q, k, v, the product; the sums of its softmax (no weights are kept).
        "*": w * 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) + 4 * c.num_attention_heads,
        "-": w * c.intermediate_size,  # the squares
        # k times the expert's input, output and squares; the shared one's squares; what is weighted, and routed, in fp32.
        "E": w * (k * (2 * latent + c.moe_intermediate_size) + c.moe_shared_expert_intermediate_size)
        + 4 * k * latent
        + (4 * c.hidden_size if w < 4 else 0)
        + (0 if c.moe_latent_size is None else w * 2 * latent),
    }
    return norm_activations(c, w) + of_kind[symbol]


def activation_bytes(config: HybridLMConfig, w: int, tokens: int, seq_len: int) -> dict[str, float]:
    """What backward needs of the tokens of a micro-batch: all that the blocks keep, or the input of each and one block's own."""
    blocks = [block_activations(config, symbol, w, seq_len) for symbol in config.hybrid_override_pattern]
    head = norm_activations(config, w)
    return {
        "all_kept": tokens * (sum(blocks) + head),
        "recomputed": tokens * (len(blocks) * config.hidden_size * w + max(blocks) + head),
    }


def state_bytes(config: HybridLMConfig, gpus: int, w: int) -> dict[str, float]:
    """Training state on each of N GPUs, fully sharded: 4 bytes of weight, 4 of gradient and 8 of AdamW's moments a parameter,
    over N; and the copy that is computed with. On several GPUs that is embedding, head and the largest layer, gathered, with
    their gradients before these are spread; on one, autocast's copy of all weights."""
    kinds, share = parameters_by_kind(config), count_parameters(config) / gpus
    gathered = kinds["embedding"] + kinds["head"] + kinds["norm"] + max(kinds[s] for s in config.hybrid_override_pattern)
    copy_ = 2 * w * gathered if gpus > 1 else share * w * (w < 4)
    return {"weights": 4 * share, "gradients": 4 * share, "moments": 8 * share, "compute_copy": copy_}


def figures(config: HybridLMConfig, *, gpus: int, precision: str, seq_len: int, micro_batch: int) -> dict[str, Any]:
    """All that the page shows, in parameters, FLOPs and bytes."""
    kinds, total, w = parameters_by_kind(config), count_parameters(config), COMPUTE_BYTES[precision]
    flops = {symbol: layer_flops(config, symbol, seq_len) for symbol in kinds if symbol in SYMBOLS}
    flops["head"] = forward_flops(config, seq_len)["head"]
    rows = [
        {"kind": kind, "layers": (count := config.hybrid_override_pattern.count(kind) if kind in SYMBOLS else 1),
         "parameters_each": each, "parameters": count * each, "share": count * each / total,
         "flops_per_token": count * flops.get(kind, 0.0)}
        for kind, each in kinds.items()
    ]  # fmt: skip
    cache = [{"context": context, "bytes": cache_bytes(config, context)} for context in CONTEXTS.values()]
    try:
        twin = transformer_twin(config)
        cache = [row | {"twin_bytes": cache_bytes(twin, row["context"])} for row in cache]
        twin_is = (
            f"The Transformer twin: {twin.num_hidden_layers:,} layers, attention and FFN in turn, FFN width "
            f"{twin.intermediate_size:,}, {count_parameters(twin):,} parameters."
        )
    except ValueError as error:
        twin_is = f"No Transformer twin to compare with: {error}"
    return {
        "pattern": config.hybrid_override_pattern,
        "layers": rows,
        "parameters": total,
        "active_parameters": active_parameters(config),
        "seq_len": seq_len,
        "forward_flops_per_token": sum(forward_flops(config, seq_len).values()),
        "training_flops_per_token": training_flops(config, seq_len),
        "weight_bytes": weight_bytes(config),
        "cache": cache,
        "twin": twin_is,
        "training": {"gpus": gpus, "precision": precision, "micro_batch": micro_batch}
        | {"state_bytes": state_bytes(config, gpus, w)}
        | {"activation_bytes": activation_bytes(config, w, micro_batch * seq_len, seq_len)},
    }


def page(f: dict[str, Any]) -> str:
    """The figures as a person reads them, each with what it is made of."""
    training = f["training"]
    gpus, precision = training["gpus"], training["precision"]
    return "\n\n".join([
        f"pattern  {f['pattern']}",
        table(layer_rows(f), "<<"),
        table(sum_rows(f), "<><"),
        "Cache of one sequence: keys and values, and the last inputs of the convolution, in bf16; the Mamba-2 state in fp32.\n"
        + f["twin"],
        table(cache_rows(f)),
        f"Training in {precision} on {gpus:,} GPU{'s, fully sharded' if gpus > 1 else ''}: bytes on each, for a micro-batch of "
        f"{training['micro_batch']:,} x {f['seq_len']:,} tokens.\n"
        "An estimate. The activations are those of the eager operators. Logits come in blocks and do not count. fp8 narrows\n"
        "only what enters a product. The allocator needs more.",
        table(training_rows(training), "<><"),
    ])  # fmt: skip


def layer_rows(f: dict[str, Any]) -> Rows:
    rows: Rows = [("layers", "", "number", "parameters each", "in all", "share", f"FLOPs/token at {f['seq_len']:,}")]
    for row in f["layers"]:
        symbol, name = (row["kind"], SYMBOLS[row["kind"]]) if row["kind"] in SYMBOLS else ("", row["kind"])
        counts = (f"{row[field]:,}" for field in ("layers", "parameters_each", "parameters"))
        flops = scaled(row["flops_per_token"], FLOP) if row["flops_per_token"] else "-"
        rows.append((symbol, name, *counts, f"{row['share']:.1%}", flops))
    return rows


def sum_rows(f: dict[str, Any]) -> Rows:
    total, active = f["parameters"], f["active_parameters"]
    experts = "all: there are no experts" if total == active else "all but the experts that a token does not go to"
    return [
        ("parameters", f"{total:,}", f"{scaled(total, COUNT)}; embedding and head are two matrices"),
        ("active", f"{active:,}", f"{scaled(active, COUNT)}; {experts}"),
        ("forward", scaled(f["forward_flops_per_token"], FLOP), "per token: matrix products, 2 FLOPs a multiply-add"),
        ("training", scaled(f["training_flops_per_token"], FLOP), "per token: 3 x forward, nothing recomputed"),
        ("weights, fp32", scaled(f["weight_bytes"]["fp32"], BYTES), "4 bytes each"),
        ("weights, bf16", scaled(f["weight_bytes"]["bf16"], BYTES), "2 bytes each"),
        (
            "weights, fp8",
            scaled(f["weight_bytes"]["fp8"], BYTES),
            "1 byte each in the layers; embedding, head and last norm in bf16",
        ),
    ]


def cache_rows(f: dict[str, Any]) -> Rows:
    rows: Rows = [("context", "cache", "twin's", "ratio")]
    for name, row in zip(CONTEXTS, f["cache"]):
        own, twin = row["bytes"], row.get("twin_bytes")
        beside = (scaled(twin, BYTES), f"{twin / own:,.1f}x" if own else "-") if twin else ("-", "-")
        rows.append((name, scaled(own, BYTES), *beside))
    return rows


def training_rows(training: dict[str, Any]) -> Rows:
    gpus, state, kept = training["gpus"], training["state_bytes"], training["activation_bytes"]
    over = "parameters" if gpus == 1 else f"parameters / {gpus:,}"
    copied = (
        "embedding, head and the largest layer, gathered, with their gradients" if gpus > 1 else "autocast's copy of all weights"
    )
    rows: list[tuple[str, float, str]] = [
        ("weights", state["weights"], f"fp32: 4 bytes x {over}"),
        ("gradients", state["gradients"], f"fp32: 4 bytes x {over}"),
        ("AdamW", state["moments"], f"two moments in fp32: 8 bytes x {over}"),
        ("compute copy", state["compute_copy"], copied if state["compute_copy"] else "none: the weights themselves"),
        ("activations", kept["all_kept"], "every layer's, kept for backward"),
        ("  or", kept["recomputed"], "each layer's input, and one layer's own: gradient checkpointing"),
        ("in all", sum(state.values()) + kept["all_kept"], "with every layer's activations"),
        ("  or", sum(state.values()) + kept["recomputed"], "with gradient checkpointing"),
    ]
    return [(name, scaled(size, BYTES), text) for name, size, text in rows]
