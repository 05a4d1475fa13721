"""What training and inference need of a GPU's memory, from the configuration alone: bytes on one GPU.

An estimate of the tensors, for the eager operators. The allocator's fragments, CUDA's context and NCCL's buffers come on top:
`MARGIN` is left for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hybridlm.configuration import HybridLMConfig
from hybridlm.ops.cross_entropy.eager import block_rows
from hybridlm.ops.selective_scan.eager import BLOCK
from hybridlm.pattern import GATES, SYMBOLS
from hybridlm.twin import cell_parameters, count_parameters, parameters_by_kind

GIB = 2**30
MARGIN = 0.10  # share of a GPU's memory that must stay free for the allocator, CUDA and NCCL
NODE = 8  # GPUs in a machine
MOST_GPUS = 16_384  # past which no remedy is looked for


@dataclass(frozen=True)
class Plan:
    """How a model is trained; the fields are those of a run's configuration.

    Attributes:
        sharding: "none", each GPU has all weights (DDP on several), or "fsdp2".
        recompute: kinds of layer, as pattern symbols, whose activations are computed again in backward.
        micro_batch: sequences in one pass of a GPU.
        global_batch: sequences in a step of all GPUs, where it is known.
        optimizer: "adamw" or "muon".
    """

    gpus: int = 1
    sharding: str = "none"
    precision: str = "bf16"
    recompute: str = ""
    micro_batch: int = 1
    seq_len: int = 8192
    global_batch: int | None = None
    optimizer: str = "adamw"

    @property
    def width(self) -> int:
        """Bytes of a value in the products. fp8 narrows only what enters one, and what is sent: it is kept in bf16."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.seq_len


def weight_bytes(config: HybridLMConfig) -> dict[str, int]:
    """Of all weights. In fp8 the layers take 1 byte a parameter; embedding, head and last norm stay bf16."""
    kinds, total = parameters_by_kind(config), count_parameters(config)
    return {"fp32": 4 * total, "bf16": 2 * total, "fp8": total + kinds["embedding"] + kinds["head"] + kinds["norm"]}


def cache_bytes(config: HybridLMConfig, context: int, value_bytes: float = 2) -> int:
    """What one sequence of `context` tokens leaves: keys and values of each token and attention layer; of each Mamba layer the
    last inputs of the convolution, and a state that is fp32 whatever the rest is, as those of the classical recurrences are. A
    bidirectional model keeps nothing."""
    c = config
    if c.bidirectional is not None:
        return 0
    attention = 2 * c.num_key_value_heads * c.head_dim * context * value_bytes
    state = c.mamba_inner_size * c.ssm_state_size * 4
    mamba, mamba_1 = ((c.conv_kernel - 1) * size * value_bytes + state for size in (c.mamba_conv_size, c.mamba_inner_size))
    h = 4 * c.recurrent_state_size
    each = {"*": attention, "M": mamba, "r": h, "l": 2 * h, "g": h, "m": mamba_1}
    return round(sum(c.hybrid_override_pattern.count(symbol) * size for symbol, size in each.items()))


def inference_bytes(config: HybridLMConfig, context: int, weight_bits: int = 16, cache_bits: int = 16) -> float:
    """Weights, and the cache of one sequence of `context` tokens, at so many bits a value; states are fp32 in any case."""
    return count_parameters(config) * weight_bits / 8 + cache_bytes(config, context, cache_bits / 8)


def longest_context(config: HybridLMConfig, memory: float) -> int | None:
    """Tokens of one sequence whose cache a GPU has room for beside weights in bf16; None where the cache does not grow."""
    room = memory * (1 - MARGIN) - weight_bytes(config)["bf16"] - cache_bytes(config, 0)
    if not (a_token := cache_bytes(config, 1) - cache_bytes(config, 0)):
        return None if room >= 0 else 0
    return max(0, int(room // a_token))


def block_activations(config: HybridLMConfig, symbol: str, w: int, seq_len: int) -> float:
    """Bytes per token that one layer and its norm keep for backward, as autograd has it with the eager operators.

    The residual stream is fp32 in any precision. In bf16 autocast makes a copy of it for every product that reads it, and
    keeps the copy: attention reads its input three times.

    Args:
        w: bytes of a value in the products, 4 or 2.
    """
    c = config
    d, inner, conv, h, n = c.hidden_size, c.mamba_inner_size, c.mamba_conv_size, c.mamba_num_heads, c.ssm_state_size
    q, k, r = min(c.chunk_size, seq_len), c.num_experts_per_tok, c.recurrent_state_size
    latent, narrow = c.moe_latent_size or d, w < 4
    query = c.head_dim * c.num_attention_heads
    of_kind = {
        # Every h in fp32 and as the product has it; gates, c and its tanh. (oneDNN's LSTM, on CPUs, keeps twice as much.)
        **{symbol: states * 4 * r + w * r + (4 - w) * d for symbol, states in {"r": 1, "l": 7, "g": 7}.items()},
        # in_proj and the convolution's result; y before and after its norm, and its scales; the states between chunks; dt with
        # its bias and after softplus.
        "M": w * (inner + conv + h + conv + 2 * inner) + 4 * c.n_groups + 4 * inner * n / q + 8 * h,
        # q, k, v, the product; the sums of its softmax (no weights are kept); the copies.
        "*": w * 2 * (query + c.head_dim * c.num_key_value_heads) + 4 * c.num_attention_heads + narrow * w * (2 * d + query),
        "-": w * c.intermediate_size,  # the squares
        # k times the expert's input, output and squares; the shared one's squares; what is weighted, and routed, in fp32.
        "E": w * (k * (2 * latent + c.moe_intermediate_size) + c.moe_shared_expert_intermediate_size)
        + 4 * k * latent
        + narrow * 4 * d
        + (0 if c.moe_latent_size is None else w * (2 * latent + narrow * d)),
        # in_proj; the convolution's result, y, silu(z), their product; dt at low rank, B, C; the states between blocks; dt with
        # its bias and after softplus.
        "m": w * (6 * inner + c.mamba_rank + 2 * n) + 4 * inner * n / min(BLOCK, seq_len) + 8 * inner,
    }
    both = w * d if c.directions(symbol) == 2 else 0  # the reverse of the norm's result; "concat" keeps what it puts together
    kept = c.directions(symbol) * of_kind[symbol] + both + w * sum(columns for _, columns in c.merge_sizes(symbol))
    return 4 * d + w * d + 4 + kept  # the norm's input, its result, its scale


def block_work(config: HybridLMConfig, symbol: str, w: int, seq_len: int) -> float:
    """Bytes per token that the backward pass of one layer needs beside what forward kept, at its fullest."""
    c = config
    q, k = min(c.chunk_size, seq_len), c.num_experts_per_tok
    query = c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    d, r = c.hidden_size, 4 * c.recurrent_state_size
    of_kind = {
        **{
            "r": 12 * d + r,
            "l": 5 * r,
            "g": 4 * r,
        },  # of Elman's, three times the gradient of its inputs; of the others, gates and h
        # All chunks at once: the decay of each pair of positions in float64 on its way to fp32; x, y and their gradients.
        "M": 12 * c.mamba_num_heads * q + 20 * c.mamba_inner_size + w * c.mamba_conv_size,
        "*": 3 * w * query,
        "-": 3 * w * c.intermediate_size,  # the gradients after and before the square, and its root
        "E": 3 * w * k * c.moe_intermediate_size + 8 * k * (c.moe_latent_size or c.hidden_size),
        # A block at a time: states, their decays, gradients, how far they reach. Of all positions gradients of x, dt, y and z.
        "m": 16 * c.mamba_inner_size * c.ssm_state_size * min(BLOCK, seq_len) / seq_len + (4 + 4 * w) * c.mamba_inner_size,
    }
    return 4 * c.hidden_size + of_kind[symbol]  # the residual stream's gradient


def activation_bytes(config: HybridLMConfig, plan: Plan) -> float:
    """What backward needs of a micro-batch when it begins: of a layer that is recomputed its input alone."""
    each = {symbol: block_activations(config, symbol, plan.width, plan.seq_len) for symbol in set(config.hybrid_override_pattern)}
    each |= dict.fromkeys(plan.recompute, 4 * config.hidden_size)
    last = (4 + plan.width) * config.hidden_size + 16  # of the last norm input, result and scale; of the loss a target and a sum
    return plan.tokens * (sum(each[symbol] for symbol in config.hybrid_override_pattern) + last)


def wide_parameters(config: HybridLMConfig) -> dict[str, int]:
    """Parameters of a layer of each kind that are fp32 in any precision: all but the matrices of products."""
    c = config
    wide = {
        "M": c.mamba_conv_size * (c.conv_kernel + c.use_conv_bias) + 3 * c.mamba_num_heads + c.mamba_inner_size,
        "E": c.n_routed_experts * c.hidden_size,
        # What recurs is computed in fp32: all but the projection behind it.
        **{symbol: cell_parameters(c, symbol) for symbol in GATES},
        "m": c.mamba_inner_size * (c.conv_kernel + c.use_conv_bias + 2 + c.ssm_state_size),
    }
    return {symbol: c.directions(symbol) * wide.get(symbol, 0) + c.hidden_size for symbol in set(c.hybrid_override_pattern)}


def group_bytes(config: HybridLMConfig, w: int) -> dict[str, int]:
    """What the parameters of a layer of each kind take when they are gathered: matrices in `w` bytes, the rest in fp32."""
    kinds, wide = parameters_by_kind(config), wide_parameters(config)
    return {symbol: w * (kinds[symbol] - rest) + 4 * rest for symbol, rest in wide.items()}


def state_bytes(config: HybridLMConfig, plan: Plan) -> dict[str, float]:
    """What is there all the time: fp32 weights, gradients, AdamW's two moments, of Muon's matrices one, over all GPUs or on each
    of them; where they are whole, autocast's copy of the layers' matrices, and the buckets in which DDP sums gradients."""
    total, sharded = count_parameters(config), plan.sharding == "fsdp2"
    share = total / plan.gpus if sharded else total
    narrow = {symbol: parameters_by_kind(config)[symbol] - wide for symbol, wide in wide_parameters(config).items()}
    matrices = sum(narrow[symbol] for symbol in config.hybrid_override_pattern)
    copied = 0 if sharded or plan.width == 4 else 2 * matrices
    moments = 8 - (4 * matrices / total if plan.optimizer == "muon" else 0)
    buckets = 0 if sharded or plan.gpus == 1 else 4 * total
    return {"weights": 4 * share, "gradients": 4 * share, "moments": moments * share, "copy": copied, "buckets": buckets}


def moments(config: HybridLMConfig, plan: Plan) -> dict[str, dict[str, float]]:
    """What comes on top of the state at the fullest moments of a step.

    The gradient of the embedding, as large as the head, comes when all activations are gone, and takes less than the loss.

    Under fsdp2 two blocks are gathered at a time, the one at work and the next, while the gradients of the one before it, whole
    and in fp32, are on their way to the reduction.
    """
    c, w, tokens, sharded = config, plan.width, plan.tokens, plan.sharding == "fsdp2"
    kinds, groups = parameters_by_kind(c), group_bytes(c, w)
    kept = activation_bytes(c, plan)
    work = {symbol: block_work(c, symbol, w, plan.seq_len) for symbol in groups}
    for symbol in set(plan.recompute) & set(work):
        work[symbol] += block_activations(c, symbol, w, plan.seq_len) - 4 * c.hidden_size  # its input is there
    # The loss sums the head's gradient in fp32 and hands it on in the width in which the weight was gathered.
    head = (4 + 2 * w if sharded else 8) * kinds["head"]
    return {
        "loss": {"activations": kept, "head": head, "logits": 8 * min(block_rows(c.vocab_size), tokens) * c.vocab_size},
        "layers": {
            "activations": kept,
            "work": tokens * max(work.values()),
            "gathered": sharded * 2 * max(groups.values()),
            "whole_gradients": sharded * 4 * max(kinds[symbol] for symbol in groups),
        },
    }


def peak_bytes(config: HybridLMConfig, plan: Plan) -> float:
    """Of a training step."""
    return sum(state_bytes(config, plan).values()) + max(sum(parts.values()) for parts in moments(config, plan).values())


def fits(config: HybridLMConfig, plan: Plan, memory: float) -> bool:
    return peak_bytes(config, plan) <= memory * (1 - MARGIN)


def remedies(config: HybridLMConfig, plan: Plan, memory: float) -> list[Plan]:
    """The plans nearest to one that does not fit that do: of one change each, or, where none helps, of several."""
    everything = "".join(symbol for symbol in SYMBOLS if symbol in config.hybrid_override_pattern)
    shared = plan if plan.gpus == 1 else replace(plan, sharding="fsdp2")
    single = [replace(plan, recompute=everything), replace(plan, micro_batch=1), shared, *more_gpus(config, plan, memory)]
    small = replace(plan, recompute=everything, micro_batch=1)
    several = [small, replace(small, sharding=shared.sharding), *more_gpus(config, small, memory)]
    for plans in (single, several):
        if found := [p for p in plans if fits(config, p, memory)]:
            return found if plans is single else found[:1]
    return []


def more_gpus(config: HybridLMConfig, plan: Plan, memory: float) -> Iterator[Plan]:
    """The plan on the least number of GPUs that fits, sharded: whole machines, and a batch that divides among them."""
    whole = replace(plan, gpus=1, sharding="fsdp2")
    state = sum(state_bytes(config, whole).values())
    room = memory * (1 - MARGIN) - (peak_bytes(config, whole) - state)  # all but the state is the same on any number
    for gpus in (2, 4, *range(NODE, MOST_GPUS + 1, NODE)):
        divides = plan.global_batch is None or plan.global_batch % (gpus * plan.micro_batch) == 0
        if gpus > plan.gpus and divides and state / gpus <= room:
            yield replace(whole, gpus=gpus)
            return
