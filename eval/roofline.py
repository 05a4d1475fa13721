"""What a GPU could do with a model, from its configuration and the vendors' data sheets: an estimate, nothing is run.

A pass takes as long as the slower of its arithmetic and its traffic with memory; `Assumptions` says the rest.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm import HybridLMConfig
from hybridlm.arguments import check_names
from hybridlm.flops import PEAK_FLOPS, forward_flops
from hybridlm.memory import GIB, MARGIN, cache_bytes, weight_bytes
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import active_parameters, count_parameters, parameters_by_kind


class Memory(NamedTuple):
    """Of one GPU: bytes, and bytes a second."""

    size: float
    bandwidth: float


# What Nemotron-H is compared with, as patterns of ours: a gated FFN has three matrices; here, with two, it is half as wide again.
# d_model, FFN width, attention layers, query and key-value heads of 128, vocabulary: from their config.json.
TRANSFORMERS = {
    "Qwen-2.5-7B": (3584, 18944, 28, 28, 4, 152064),
    "Qwen-2.5-72B": (8192, 29568, 80, 64, 8, 152064),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
}
# arXiv 2504.03624: how many times as fast the first is as the second, 65,536 tokens read and 1,024 written on H100s.
PAPER = {
    ("Nemotron-H-8B", "Qwen-2.5-7B"): 1.8,
    ("Nemotron-H-56B", "Qwen-2.5-72B"): 2.4,
    ("Nemotron-H-56B", "Llama-3.1-70B"): 2.4,
    ("Nemotron-H-47B", "Qwen-2.5-72B"): 2.9,
    ("Nemotron-H-47B", "Llama-3.1-70B"): 2.9,
    ("Nemotron-H-47B", "Nemotron-H-56B"): 1.2,
}
PAPER_PROMPT, PAPER_NEW = 65_536, 1_024
PAPER_COLUMNS = {
    "model": "model", "beside": "beside", "gpus": "GPUs", "batches": "batches", "half": "at 50%", "full": "at 100%",
    "paper": "paper",
}  # fmt: skip

# Data sheets of H100 (SXM and PCIe), H200, B200, A100 80GB (SXM) and L40S. H100, H200 and A100 have about as many GiB as their
# sheets have GB.
GPUS = {
    "H100": Memory(80 * GIB, 3.35e12),
    "H100 PCIe": Memory(80 * GIB, 2.0e12),
    "H200": Memory(141 * GIB, 4.8e12),
    "B200": Memory(192e9, 8.0e12),
    "A100": Memory(80 * GIB, 2.039e12),
    "L40S": Memory(48e9, 864e9),
}
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Assumptions:
    """What an estimate takes for granted.

    Attributes:
        gpus: that share the weights, the cache and the work of each pass evenly; what they send each other takes no time.
        precision: of the weights and of the products (fp32, bf16, fp8).
        cache_precision: of keys, values and the convolution's inputs. The state of Mamba-2 is fp32.
        arithmetic: share of the peak FLOP/s that a pass reaches. bandwidth: share of the peak bytes/s.
        free: share of the memory that is left for all but weights and cache.

    Raises:
        ValueError: no such GPU or precision, or the GPU has no units for it; a share that is none.
    """

    gpu: str = "H100"
    gpus: int = 1
    precision: str = "bf16"
    cache_precision: str = "bf16"
    arithmetic: float = 0.5
    bandwidth: float = 1.0
    free: float = MARGIN

    def __post_init__(self) -> None:
        check_names("GPU", [self.gpu], GPUS)
        check_names("precision", [self.precision, self.cache_precision], VALUE_BYTES)
        check_names(f"precision of {self.gpu}", [self.precision], PEAK_FLOPS[self.gpu])
        if self.gpus < 1 or not (0 < self.arithmetic <= 1 and 0 < self.bandwidth <= 1 and 0 <= self.free < 1):
            raise ValueError(
                "gpus must be at least 1, arithmetic and bandwidth above 0 and at most 1, free from 0 to below 1; got "
                f"{self.gpus}, {self.arithmetic}, {self.bandwidth}, {self.free}."
            )

    def __str__(self) -> str:
        memory, peak = GPUS[self.gpu], PEAK_FLOPS[self.gpu][self.precision]
        return (
            f"{self.gpus} x {self.gpu}: {self.arithmetic:.0%} of {peak / 1e12:,.0f} TFLOP/s, {self.bandwidth:.0%} of "
            f"{memory.bandwidth / 1e12:.4g} TB/s, {self.free:.0%} of {memory.size / GIB:.0f} GiB left free; weights "
            f"{self.precision}, cache {self.cache_precision}"
        )

    def seconds(self, flops: float, nbytes: float) -> float:
        """Of a pass that computes and moves so much."""
        rate, bandwidth = self.arithmetic * PEAK_FLOPS[self.gpu][self.precision], self.bandwidth * GPUS[self.gpu].bandwidth
        return max(flops / rate, nbytes / bandwidth) / self.gpus


def estimate(config: HybridLMConfig, prompt: int, new: int, batch: int | None, assumed: Assumptions) -> dict[str, Any]:
    """What reading `prompt` tokens and writing `new` takes, for `batch` sequences at a time: by default the most that fit.

    Returns:
        batch, fits, largest_batch (0 where the weights alone do not fit); weight_bytes and, for a sequence at its end,
        cache_bytes, over all GPUs; prefill_seconds of the batch; decode_seconds_per_token, at half of the new tokens, and what
        they are `decode_bound` by; request_seconds; tokens_per_second_per_gpu: new ones; total_tokens_per_second: read and
        written, of all GPUs; assumed. Without room for a sequence times and speeds are None.
    """
    weights = weight_bytes(config)[assumed.precision]
    cache = cache_bytes(config, prompt + new, VALUE_BYTES[assumed.cache_precision])
    most = largest_batch(config, prompt + new, assumed)
    found: dict[str, Any] = {"batch": most if batch is None else batch, "largest_batch": most, "weight_bytes": weights,
                             "cache_bytes": cache, "assumed": asdict(assumed)}  # fmt: skip
    found["fits"] = 0 < found["batch"] <= most
    times = ("prefill_seconds", "decode_seconds_per_token", "decode_bound", "request_seconds", "tokens_per_second_per_gpu",
             "total_tokens_per_second")  # fmt: skip
    if not found["fits"]:
        return found | dict.fromkeys(times)
    batch = found["batch"]
    prefill = assumed.seconds(prefill_flops(config, prompt) * batch, read_bytes(config, prompt * batch, assumed))
    flops, nbytes = step_flops(config, prompt + new / 2) * batch, step_bytes(config, prompt + new // 2, batch, assumed)
    step = assumed.seconds(flops, nbytes)
    bound = "arithmetic" if step > assumed.seconds(0, nbytes) else "bandwidth"
    request = prefill + (new - 1) * step  # the prompt gives the first token
    speeds = (batch * new / request / assumed.gpus, batch * (prompt + new) / request)
    return found | dict(zip(times, (prefill, step, bound, request, *speeds), strict=True))


def largest_batch(config: HybridLMConfig, context: int, assumed: Assumptions) -> int:
    """Sequences of `context` tokens whose cache has room beside the weights; 0 where there is none for one.

    Raises:
        ValueError: a model that keeps nothing between tokens, so that any number has room.
    """
    cache = cache_bytes(config, context, VALUE_BYTES[assumed.cache_precision])
    if not cache:
        raise ValueError(f"{config.hybrid_override_pattern} keeps nothing between tokens: there is no largest batch.")
    room = GPUS[assumed.gpu].size * assumed.gpus * (1 - assumed.free) - weight_bytes(config)[assumed.precision]
    return max(0, int(room // cache))


def prefill_flops(config: HybridLMConfig, prompt: int) -> float:
    """Of one prompt; the head works on its last position alone."""
    kinds = forward_flops(config, prompt)
    return prompt * (sum(kinds.values()) - kinds["head"]) + kinds["head"]


def step_flops(config: HybridLMConfig, context: float) -> float:
    """Of one token behind a `context`: attention to all of it, one update and one read-out of each Mamba state."""
    kinds = forward_flops(config, 1)
    attention = kinds["attention"] * context
    ssd = 2.0 * config.hybrid_override_pattern.count("M") * 2 * config.mamba_inner_size * config.ssm_state_size
    return kinds["linear"] + kinds["conv"] + kinds["head"] + attention + ssd + kinds["scan"]


def step_bytes(config: HybridLMConfig, context: int, batch: int, assumed: Assumptions) -> float:
    """Memory traffic of one token of each sequence: the weights, each cache; and recurrent states written back."""
    width = VALUE_BYTES[assumed.cache_precision]
    return read_bytes(config, batch, assumed) + batch * (cache_bytes(config, context, width) + cache_bytes(config, 0, width))


def read_bytes(config: HybridLMConfig, tokens: int, assumed: Assumptions) -> float:
    """Weights that a pass over `tokens` tokens reads: all but the embedding, of which it takes rows, and the experts that none of
    the tokens goes to, were each token to choose among all with the same chance."""
    total = count_parameters(config)
    read = float(total - parameters_by_kind(config)["embedding"])
    if "E" in config.hybrid_override_pattern:
        n, k = config.n_routed_experts, config.num_experts_per_tok
        if n > k:
            read -= (total - active_parameters(config)) * n / (n - k) * (1 - k / n) ** tokens
    return read * weight_bytes(config)[assumed.precision] / total


def published(name: str) -> HybridLMConfig:
    """The shape of a model that `PAPER` names."""
    if name not in TRANSFORMERS:
        file = Path(__file__).parent.parent / f"configs/model/{name.lower()}.yaml"
        return HybridLMConfig.from_strict_dict(load_yaml(file))
    d, width, pairs, query, key, vocabulary = TRANSFORMERS[name]
    return HybridLMConfig(
        hybrid_override_pattern="*-" * pairs, hidden_size=d, intermediate_size=width * 3 // 2, num_attention_heads=query,
        num_key_value_heads=key, head_dim=128, vocab_size=vocabulary, rope_theta=1e6,
    )  # fmt: skip


def beside_the_paper() -> list[dict[str, Any]]:
    """A row for each comparison of `PAPER`, of the large models on 4 and on 8 GPUs: how many times as many tokens a GPU writes
    when arithmetic reaches `half` of its peak, and when the `full` one; and the `batches` of the two."""
    rows = []
    for (model, other), paper in PAPER.items():
        for gpus in (1,) if model == "Nemotron-H-8B" else (4, 8):  # of 80 GiB; two have no room for a 70B and a prompt
            row: dict[str, Any] = {"model": model, "beside": other, "gpus": gpus, "paper": paper}
            for field, arithmetic in (("half", 0.5), ("full", 1.0)):
                assumed = Assumptions(gpus=gpus, arithmetic=arithmetic)
                ours, theirs = (estimate(published(name), PAPER_PROMPT, PAPER_NEW, None, assumed) for name in (model, other))
                row[field] = ours["tokens_per_second_per_gpu"] / theirs["tokens_per_second_per_gpu"]
                row["batches"] = f"{ours['batch']} and {theirs['batch']}"
            rows.append(row)
    return rows
