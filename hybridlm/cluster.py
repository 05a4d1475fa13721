"""What data-parallel training sends between GPUs, and whether that hides behind the arithmetic. From the configuration alone.

The rates are assumptions, those of H100 machines on paper: nothing here was measured on a cluster.
"""

from math import lcm
from typing import Any

from hybridlm.configuration import HybridLMConfig
from hybridlm.flops import layer_flops, training_flops
from hybridlm.fp8 import EDGE, MULTIPLE
from hybridlm.memory import NODE, Plan, group_bytes
from hybridlm.pattern import GATES
from hybridlm.twin import count_parameters, parameters_by_kind

SUSTAINED = 400e12  # FLOP/s of a GPU: 40% of an H100's bf16 peak. fp8 is not counted as faster.
NVLINK = 450e9  # bytes/s into a GPU from others of its machine
NIC = 50e9  # bytes/s into a GPU from other machines: 400 Gbit/s each


def step_flops(config: HybridLMConfig, plan: Plan) -> float:
    """FLOPs per token of a training step with the layers that are recomputed; the head's logits, which always are, left out."""
    return training_flops(config, plan.seq_len) + sum(
        config.hybrid_override_pattern.count(symbol) * layer_flops(config, symbol, plan.seq_len) for symbol in set(plan.recompute)
    )


def sent_bytes(config: HybridLMConfig, plan: Plan) -> dict[str, float]:
    """What a GPU receives for one micro-batch: under fsdp2 every group of weights, gathered before its forward and again before
    its backward pass, and fp32 gradients, reduced and scattered. Without sharding the gradients alone, once a step."""
    others = (plan.gpus - 1) / plan.gpus
    total, kinds = count_parameters(config), parameters_by_kind(config)
    if plan.sharding == "none":
        return {"gathered": 0.0, "reduced": 2 * 4 * total * others}  # scattered and gathered again
    pattern, groups = config.hybrid_override_pattern, group_bytes(config, plan.width)
    gathered = sum(groups[symbol] for symbol in pattern)
    if plan.precision == "fp8":  # what multiplies in FP8 is gathered in it, where every GPU has as many rows
        of_kind = matrices(config)
        middle = (shape for symbol in pattern[EDGE:-EDGE] for shape in of_kind[symbol])
        whole = lcm(plan.gpus, MULTIPLE)
        gathered -= sum(rows * columns for rows, columns in middle if not (rows % whole or columns % MULTIPLE))
    gathered += 4 * (kinds["embedding"] + kinds["norm"]) + plan.width * kinds["head"]
    return {"gathered": 2 * gathered * others, "reduced": 4 * total * others}


def matrices(config: HybridLMConfig) -> dict[str, list[tuple[int, int]]]:
    """(rows, columns) of the linear layers of each kind of layer."""
    c, d = config, config.hidden_size
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner, rank = c.mamba_inner_size, c.mamba_rank
    latent, shared = c.moe_latent_size, c.moe_shared_expert_intermediate_size
    size = d if latent is None else latent
    experts = [(c.moe_intermediate_size, size), (size, c.moe_intermediate_size)] * c.n_routed_experts
    of_kind = {
        "M": [(inner + c.mamba_conv_size + c.mamba_num_heads, d), (d, inner)],
        "*": [(query, d), (key, d), (key, d), (d, query)],
        "-": [(c.intermediate_size, d), (d, c.intermediate_size)],
        **{symbol: [(d, c.recurrent_state_size)] for symbol in GATES},  # the cell's are no linear layers
        "m": [(2 * inner, d), (rank + 2 * c.ssm_state_size, inner), (inner, rank), (d, inner)],
        "E": [*experts, (shared, d), (d, shared), *([] if latent is None else [(latent, d), (d, latent)])],
    }
    return {symbol: c.directions(symbol) * sizes + c.merge_sizes(symbol) for symbol, sizes in of_kind.items()}


def communication(config: HybridLMConfig, plan: Plan, steps: int | None) -> dict[str, Any]:
    """Bytes and seconds of one micro-batch of a GPU, communication beside arithmetic; of a whole run where its batch is known.

    Two rates bound the first. At best each byte enters a machine once, over all its network cards, and goes on inside by
    NVLink, as NCCL's rings have it; at worst every GPU fetches all it needs over its own card.
    """
    sent, flops = sent_bytes(config, plan), step_flops(config, plan)
    best, worst = (NVLINK, NVLINK) if plan.gpus <= NODE else (min(NVLINK, NODE * NIC), NIC)
    seconds = [sum(sent.values()) / rate for rate in (best, worst)]
    compute = flops * plan.tokens / SUSTAINED
    found: dict[str, Any] = {
        "bytes": sent,
        "seconds_best": seconds[0],
        "seconds_worst": seconds[1],
        "compute_seconds": compute,
        # below which GPUs wait for each other
        "tokens_to_hide_best": seconds[0] * SUSTAINED / flops,
        "tokens_to_hide_worst": seconds[1] * SUSTAINED / flops,
        "assumed": {"flops_per_second": SUSTAINED, "bytes_per_second_best": best, "bytes_per_second_worst": worst},
    }
    if plan.global_batch is not None:
        found["sequences_per_gpu"] = plan.global_batch / plan.gpus
        found["most_gpus"] = plan.global_batch
        if steps is not None:
            # Without sharding gradients go once a step, whatever the number of micro-batches.
            passes = plan.global_batch / plan.gpus / plan.micro_batch
            sendings = passes if plan.sharding == "fsdp2" else 1
            found["tokens"] = steps * plan.global_batch * plan.seq_len
            found["days_best"], found["days_worst"] = (
                steps * max(passes * compute, sendings * second) / 86400 for second in seconds
            )
    return found
