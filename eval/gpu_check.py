"""The speed of the fused operators on a GPU: a hybrid beside its Transformer twin and beside stock transformers with the hybrid's
own weights, in training and in generation; and the hybrid trained in FP8 beside itself in bf16.

The contenders take turns, so that whatever else the machine does hits all alike; figures are medians.
"""

import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import NemotronHForCausalLM

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.flops import peak_flops, training_flops
from hybridlm.fp8 import convert, refusal, summary
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.output import quiet
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import transformer_twin

T = TypeVar("T")

SHAPE = Path(__file__).parent.parent / "configs" / "model" / "bench-1b.yaml"
PACKAGES = ("torch", "transformers", "triton", "mamba-ssm", "causal-conv1d", "torchao")
HYBRID, TWIN, STOCK = "hybridlm, hybrid", "hybridlm, Transformer twin", "transformers, the same hybrid"
WARM_UP = 2  # turns that are not timed: the kernels tune themselves
COLUMNS = {
    "model": "model", "parameters": "parameters", "training_tokens_per_second": "training tok/s", "mfu": "MFU", "loss": "loss",
    "prefill_tokens_per_second": "prefill tok/s", "decode_tokens_per_second": "decode tok/s",
}  # fmt: skip
FP8_COLUMNS = {
    "precision": "precision", "training_tokens_per_second": "training tok/s", "mfu": "MFU", "first_loss": "first loss",
    "last_loss": "last loss",
}  # fmt: skip


def check() -> dict[str, Any]:
    """`measure` at its real size, and under `fp8` what `measure_fp8` gives.

    Raises:
        ValueError: no CUDA device, or no kernels: the error names what is missing.
    """
    config = HybridLMConfig.from_strict_dict(load_yaml(SHAPE))
    content = measure(config, "cuda", "fused", batch=4, seq_len=4096, prompt=4096, new=128, repeats=10)
    return content | {"fp8": measure_fp8(config, "cuda", "fused", batch=4, seq_len=4096, steps=20)}


def measure(
    config: HybridLMConfig, device: str, backend: str, *, batch: int, seq_len: int, prompt: int, new: int, repeats: int
) -> dict[str, Any]:
    """What ran and on what, and `rows`: a row of figures for each contender.

    Training is forward and backward of `batch` sequences of `seq_len` random tokens, with fp32 weights under bf16 autocast;
    generation one sequence of `prompt` tokens and `new` more, in bf16. Speeds are in tokens per second. `mfu` is None where the
    device's peak is unknown; `loss` is of the same tokens for all.
    """
    quiet()
    models = build(config, device, backend)
    ops = models[HYBRID].ops.backends
    with tqdm(total=2 * len(models) * (WARM_UP + repeats), desc="timing", unit=" runs") as bar:
        steps = in_turns(models, lambda model, turn: train_step(model, batch, seq_len, turn), repeats, bar)
        for model in models.values():
            model.to(torch.bfloat16).eval()
        requests = in_turns(models, lambda model, turn: request(model, prompt, new, turn), repeats, bar)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = peak_flops(name, "bf16")
    rows = []
    for contender, model in models.items():
        shape = transformer_twin(config) if contender == TWIN else config
        speed = batch * seq_len / statistics.median(seconds for seconds, _ in steps[contender])
        decode = statistics.median(total - first for first, total in requests[contender])
        rows.append({
            "model": contender,
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_tokens_per_second": speed,
            "mfu": speed * training_flops(shape, seq_len) / peak if peak else None,
            "loss": steps[contender][-1][1],
            "prefill_tokens_per_second": prompt / statistics.median(first for first, _ in requests[contender]),
            "decode_tokens_per_second": (new - 1) / decode,
        })  # fmt: skip
    return {
        "device": name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "operators": ops,
        "batch": batch, "seq_len": seq_len, "prompt": prompt, "new": new, "repeats": repeats,
        "rows": rows,
    }  # fmt: skip


def measure_fp8(
    config: HybridLMConfig, device: str, backend: str, *, batch: int, seq_len: int, steps: int, emulate: bool = False
) -> dict[str, Any]:
    """The model trained in bf16 and, from the same weights, in FP8, in turns, always on the same sequences of random tokens.

    Returns:
        `layers`, what became of the linear layers, and `rows`, one for each precision: speed in tokens per second, the update
        of the weights included; `mfu` of the peak of that precision; `losses` of the steps after the warm-up, nats per token.
        Where FP8 cannot run, `refused` alone: why.
    """
    if fault := refusal(device, emulate):
        return {"refused": f"fp8 {fault}"}
    models = {}
    for precision in ("bf16", "fp8"):
        torch.manual_seed(0)
        with torch.device(device):
            models[precision] = HybridLMForCausalLM(config, backend=backend).train()
    convert(models["fp8"], device, emulate=emulate)
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True) for model in models.values()}
    with tqdm(total=2 * (WARM_UP + steps), desc="timing fp8", unit=" steps") as bar:
        found = in_turns(models, lambda model, turn: train_step(model, batch, seq_len, 0, optimizers[model]), steps, bar)
    rows = []
    for precision, results in found.items():
        speed = batch * seq_len / statistics.median(seconds for seconds, _ in results)
        peak = peak_flops(torch.cuda.get_device_name() if device == "cuda" else "cpu", precision)
        losses = [loss for _, loss in results]
        rows.append({
            "precision": precision,
            "training_tokens_per_second": speed,
            "mfu": speed * training_flops(config, seq_len) / peak if peak else None,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "losses": losses,
        })  # fmt: skip
    return {"layers": summary(models["fp8"]), "rows": rows}


def build(config: HybridLMConfig, device: str, backend: str) -> dict[str, Any]:
    """The contenders, in training mode, fp32."""
    torch.manual_seed(0)
    ours = {HYBRID: config, TWIN: transformer_twin(config)}
    models: dict[str, Any] = {}
    for name, shape in ours.items():
        with torch.device(device):
            models[name] = HybridLMForCausalLM(shape, backend=backend)
    with tempfile.TemporaryDirectory() as folder:
        models[HYBRID].save_pretrained(folder)
        models[STOCK] = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models[STOCK].to(device)
    return {name: model.train() for name, model in models.items()}


def in_turns(models: dict[str, nn.Module], run: Callable[[Any, int], T], repeats: int, bar: tqdm) -> dict[str, list[T]]:
    """`run(model, turn)` of one model after the other, turn after turn; the results of the timed turns."""
    results: dict[str, list[T]] = {name: [] for name in models}
    for turn in range(WARM_UP + repeats):
        for name, model in models.items():
            result = run(model, turn)
            if turn >= WARM_UP:
                results[name].append(result)
            bar.update()
    return results


def random_tokens(model: Any, batch: int, length: int, turn: int) -> Tensor:
    """The same for every model."""
    generator = torch.Generator().manual_seed(turn)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def clock(device: torch.device) -> float:
    """Seconds, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_step(
    model: Any, batch: int, seq_len: int, turn: int, optimizer: torch.optim.Optimizer | None = None
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the update where there is an optimizer; the loss in nats per token."""
    ids = random_tokens(model, batch, seq_len, turn)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    start = clock(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        if isinstance(model, HybridLMForCausalLM):  # as `python -m train` calls it
            loss = model(ids, targets=targets).loss.sum() / (batch * (seq_len - 1))
        else:
            loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    seconds = clock(model.device) - start
    model.zero_grad()
    return seconds, loss.item()


@torch.inference_mode()
def request(model: Any, prompt: int, new: int, turn: int) -> tuple[float, float]:
    """Seconds until the first token and until the last, greedy."""
    token, cache = random_tokens(model, 1, prompt, turn), None
    start = clock(model.device)
    for i in range(new):
        outputs = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = outputs.logits.argmax(-1), outputs.past_key_values
        if i == 0:
            first = clock(model.device) - start
    return first, clock(model.device) - start


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
