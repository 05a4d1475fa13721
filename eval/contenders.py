"""The four models of the benchmark: what they are, what they must compute, and how each is called, in a process of its own."""

import copy
import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHForCausalLM

from eval.ceiling import DTYPES
from eval.workers import peak_memory, resident
from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.allocator import keep_freed_memory
from hybridlm.cli.verify import relative
from hybridlm.flops import forward_flops
from hybridlm.mixers.context import Context
from hybridlm.output import quiet
from hybridlm.timing import cache_bytes

CONTENDERS = {
    "hybridlm": "hybridlm",
    "nemotron_h": "stock nemotron_h",
    "twin": "our Transformer twin",
    "llama": "stock Llama",
}
FP32_BOUND = 1e-4
BF16_SLACK = 1.02  # other tokens move the distances by less


@dataclass(frozen=True)
class Shapes:
    """
    Attributes:
        hybrid: HybridLMConfig's fields, of `hybridlm` and, with the same weights, of `nemotron_h`.
        llama: LlamaConfig's fields.
        twin_width: of the FFN of `twin`, which has the hybrid's sizes otherwise and as many attention layers as the Llama.
    """

    hybrid: dict[str, Any]
    llama: dict[str, Any]
    twin_width: int

    @property
    def hybrid_config(self) -> HybridLMConfig:
        return HybridLMConfig.from_strict_dict(self.hybrid)

    @property
    def twin_config(self) -> HybridLMConfig:
        pattern = {"hybrid_override_pattern": "*-" * self.llama["num_hidden_layers"], "rope_theta": 10000.0}
        return HybridLMConfig.from_strict_dict(self.hybrid | pattern | {"intermediate_size": self.twin_width})

    @property
    def llama_config(self) -> LlamaConfig:
        return LlamaConfig(**self.llama, tie_word_embeddings=False)


# Frozen: figures of different versions are to be of the same models. The squared-ReLU FFN of the twin has 2 matrices of 2112,
# Llama's has 3 of 1408: the same parameters.
FULL = Shapes(
    hybrid=yaml.safe_load((Path(__file__).parent.parent / "configs/model/bench-28m.yaml").read_text(encoding="utf-8")),
    llama={
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 131072,
    },
    twin_width=2112,
)  # fmt: skip
# To warm up with: the first pass of any model pages in the libraries, which are no memory of the model.
SMALL = Shapes(
    hybrid={
        "hybrid_override_pattern": "M*-", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
    },
    llama={
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    },
    twin_width=24,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is timed.

    Attributes:
        kind: `train`, forward, loss and backward of `batch` sequences of `length`; `prefill`, a prompt of `length`, its cache
            and the logits of its last position; `decode`, `new` tokens one by one behind it; `request`, both.
        precision: fp32, or bf16: in training autocast over fp32 weights, else weights in bf16.
        whole: tokens of a request; those that are not among the `new` decoded are taken to be as fast as these.
        cap: seconds that one call may take at the ceiling of the machine; a longer one is made smaller or left out.
    """

    name: str
    kind: str
    precision: str
    batch: int
    length: int
    new: int = 0
    whole: int = 0
    cap: float = 60.0


def build(contender: str, shapes: Shapes, folder: Path | str, dtype: torch.dtype) -> Any:
    """`folder` has the weights of the hybrid, as `save` wrote them; those of the Transformers are drawn."""
    if contender == "hybridlm":
        return HybridLMForCausalLM.from_pretrained(folder, dtype=dtype)
    if contender == "nemotron_h":
        return NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    model: Any = HybridLMForCausalLM(shapes.twin_config) if contender == "twin" else LlamaForCausalLM(shapes.llama_config)
    return model.to(dtype)


def save(shapes: Shapes, folder: Path | str) -> None:
    quiet()
    torch.manual_seed(0)
    HybridLMForCausalLM(shapes.hybrid_config).save_pretrained(folder)


def llama_flops(config: LlamaConfig, seq_len: int) -> dict[str, float]:
    """FLOPs per token of a forward pass, counted as `hybridlm.flops.forward_flops` counts."""
    c, d = config, config.hidden_size
    assert c.num_key_value_heads and c.head_dim
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "linear": 2.0 * c.num_hidden_layers * (2 * d * query + 2 * d * key + 3 * d * c.intermediate_size),
        "attention": 2.0 * c.num_hidden_layers * 2 * query * (seq_len + 1) / 2,
        "head": 2.0 * d * c.vocab_size,
    }


def model_flops(contender: str, shapes: Shapes, task: Task) -> float:
    """Of one training step, or of reading the prompt, whose head works on one position."""
    if contender == "llama":
        kinds = llama_flops(shapes.llama_config, task.length)
    else:
        kinds = forward_flops(shapes.twin_config if contender == "twin" else shapes.hybrid_config, task.length)
    forward = sum(kinds.values())
    if task.kind == "train":
        return 3 * forward * task.batch * task.length
    return task.batch * (task.length * (forward - kinds["head"]) + kinds["head"])


# What follows runs in the worker processes. `_model` is the one model of the process, `_behind` what a decode goes on from.
_model: Any = None
_behind: tuple[Tensor, Any] | None = None


def allocator(contender: str) -> None:
    """What a contender's process gets before anything else: ours what `python -m train` gives to its own."""
    if contender in ("hybridlm", "twin"):
        keep_freed_memory()


def prepare(contender: str, task: Task, shapes: Shapes, folders: dict[str, str], threads: int) -> dict[str, Any]:
    """Builds the model after a warm-up and runs the task once: its result, and its peak memory over that before the model."""
    global _model, _behind
    allocator(contender)
    torch.set_num_threads(threads)
    quiet()
    dtype = torch.float32 if task.kind == "train" else DTYPES[task.precision]
    _model = build(contender, SMALL, folders["small"], dtype)
    call(replace(task, batch=1, length=8, new=min(task.new, 2)), 0)
    _model = _behind = None
    gc.collect()
    before = resident()
    _model = build(contender, shapes, folders["full"], dtype)
    for p in _model.parameters():
        p.sum()  # weights from a file are mapped, and in memory only once they are touched
    with peak_memory(0.05 if task.kind == "request" else 0.001) as peak:  # a request is timed meanwhile
        result = call(task, 0)
    weights = sum(p.nbytes for p in _model.parameters()) - _model.get_input_embeddings().weight.nbytes
    return result | {"peak_memory_bytes": peak[0] - before, "weights_bytes": weights}


def call(task: Task, turn: int) -> dict[str, Any]:
    """Runs the task once, on random tokens of its own. The first turn of a decode reads the prompt; all go on from there."""
    global _behind
    ids = torch.randint(_model.config.vocab_size, (task.batch, task.length + 1), generator=torch.Generator().manual_seed(turn))
    if task.kind == "train":
        return {"first": train(_model, ids, task.precision)}
    result: dict[str, Any] = {}
    if _behind is None or task.kind != "decode":
        result["first"], token, behind = read(_model, ids[:, :-1])
        result["cache_bytes"] = cache_bytes(behind)
        if task.kind == "prefill":
            return result
        _behind = (token, behind)
    result["tokens"] = decode(_model, *(copy.deepcopy(_behind) if task.kind == "decode" else _behind), task.new)
    return result


def train(model: Any, ids: Tensor, precision: str) -> float:
    """Seconds of forward, loss and backward: ours as `train/loop.py` runs it, stock with labels, which it shifts itself."""
    model.train()
    inputs, targets = ids[:, :-1], ids[:, 1:]
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        if isinstance(model, HybridLMForCausalLM):
            loss = model(inputs, targets=targets).loss.mean()
        else:
            loss = model(inputs, labels=inputs, use_cache=False).loss
    loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


@torch.inference_mode()
def read(model: Any, ids: Tensor) -> tuple[float, Tensor, Any]:
    """Seconds for a prompt, the token after it, and the cache."""
    model.eval()
    start = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    token = output.logits.argmax(-1)
    return time.perf_counter() - start, token, output.past_key_values


@torch.inference_mode()
def decode(model: Any, token: Tensor, behind: Any, new: int) -> list[float]:
    """Seconds of each of `new` tokens, greedy."""
    seconds = []
    for _ in range(new):
        start = time.perf_counter()
        token = model(token, past_key_values=behind, use_cache=True).logits.argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def attention_seconds(task: Task) -> float:
    """Of the attention layers alone, on random input as long as the prompt."""
    mixers = [layer.mixer for layer in _model.backbone.layers if hasattr(layer.mixer, "q_proj")]
    x = torch.randn(task.batch, task.length, _model.config.hidden_size, dtype=_model.dtype)
    start = time.perf_counter()
    for mixer in mixers:
        mixer(x, Context(), None)
    return time.perf_counter() - start


@torch.inference_mode()
def equality(shapes: Shapes, folder: str, tokens: tuple[int, int], bf16_tokens: int, threads: int) -> dict[str, Any]:
    """Whether `hybridlm` and `nemotron_h` compute the same from the weights in `folder`.

    `fp32` is max|ours - stock's| / max|stock's| of the logits; `bf16_…` the distance of each, with weights in bf16, from float64
    with fp32 weights as the specification of the operators computes it: root mean squares, of the difference over the reference.
    """
    torch.set_num_threads(threads)
    quiet()
    rng = torch.Generator().manual_seed(0)
    ids, few = (torch.randint(shapes.hybrid["vocab_size"], size, generator=rng) for size in (tokens, (1, bf16_tokens)))
    ours, stock = (logits(name, shapes, folder, torch.float32, ids) for name in ("hybridlm", "nemotron_h"))
    fp32 = relative(ours, stock)
    exact = HybridLMForCausalLM.from_pretrained(folder, backend="naive").double()(few, use_cache=False).logits
    near, far = (
        ((logits(name, shapes, folder, torch.bfloat16, few) - exact).square().mean() / exact.square().mean()).sqrt().item()
        for name in ("hybridlm", "nemotron_h")
    )
    return {
        "tokens": list(tokens), "fp32": fp32, "fp32_bound": FP32_BOUND, "same": fp32 <= FP32_BOUND, "bf16_tokens": bf16_tokens,
        "bf16_hybridlm": near, "bf16_nemotron_h": far, "bf16_no_further": near <= BF16_SLACK * far,
    }  # fmt: skip


def logits(contender: str, shapes: Shapes, folder: str, dtype: torch.dtype, ids: Tensor) -> Tensor:
    return build(contender, shapes, folder, dtype).eval()(ids, use_cache=False).logits.float()
