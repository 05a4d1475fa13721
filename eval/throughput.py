"""Speed and memory of generation, beside the Transformer twin.

Each model and shape runs in a process of its own, so that its peak memory is its own; the two processes of a model and its twin
take turns, so that whatever else the machine does hits both alike.
"""

import statistics
import time
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from eval.workers import peak_memory, resident, worker
from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.output import quiet
from hybridlm.twin import transformer_twin

TWIN = " (Transformer twin)"
COLUMNS = {
    "model": "model", "prompt": "prompt", "new": "new", "batch": "batch", "prefill": "prefill tok/s", "decode": "decode tok/s",
    "first": "first token s", "request_seconds": "request s", "peak": "peak memory MB", "cache": "cache MB",
}  # fmt: skip


def evaluate(
    folders: list[str], prompts: list[int], news: list[int], batches: list[int], *, repeats: int = 3, twin: bool = True
) -> list[dict[str, Any]]:
    """A row for each model and each combination of prompt, new tokens and batch; after it the row of its twin.

    Raises:
        ValueError: a folder without a model, or a model too small to have a twin.
    """
    shapes = list(product(prompts, news, batches))
    rows = []
    runs = len(folders) * len(shapes) * (1 + twin) * (1 + repeats)
    with tqdm(total=runs, desc="timing", unit=" requests") as bar:
        for folder, (prompt, new, batch) in product(folders, shapes):
            contenders = {folder: False} | ({folder + TWIN: True} if twin else {})
            with ExitStack() as stack:
                pools = {name: stack.enter_context(worker(__name__)) for name in contenders}
                peaks: dict[str, int] = {}
                turns: dict[str, list[dict]] = {name: [] for name in contenders}
                for name, is_twin in contenders.items():
                    peaks[name] = pools[name].submit(prepare, folder, is_twin, prompt, new, batch).result()
                    bar.update()
                for turn, name in product(range(1, repeats + 1), contenders):
                    turns[name].append(pools[name].submit(request, turn, prompt, new, batch).result())
                    bar.update()
            rows += [{"model": name} | summary(turns[name], prompt, new, batch, peaks[name]) for name in contenders]
    return rows


def summary(turns: list[dict], prompt: int, new: int, batch: int, peak: int) -> dict[str, Any]:
    """Medians over the turns; speeds count the tokens of all sequences of the batch."""
    first = statistics.median(turn["first"] for turn in turns)
    decode = statistics.median(turn["total"] - turn["first"] for turn in turns)
    return {
        "prompt": prompt,
        "new": new,
        "batch": batch,
        "prefill_tokens_per_second": batch * prompt / first,
        "decode_tokens_per_second": batch * (new - 1) / decode if new > 1 else None,  # prefill gives the first token
        "time_to_first_token_s": first,
        "request_seconds": statistics.median(turn["total"] for turn in turns),
        "peak_memory_bytes": peak,
        "cache_bytes": turns[0]["cache_bytes"],
        "device": turns[0]["device"],
        "dtype": turns[0]["dtype"],
    }


# What follows runs in the worker processes. `_model` is the one model of the process, put there by `prepare`.
_model: HybridLMForCausalLM | None = None


def prepare(folder: str, twin: bool, prompt: int, new: int, batch: int) -> int:
    """Loads the model, or builds its twin with random weights, and runs one request to warm up. Gives that one's peak memory.

    The timed requests are not watched: the watching thread takes time of its own.
    """
    global _model
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # The first pass of any model pages in the libraries, which are no memory of the model.
    small = HybridLMConfig(
        hybrid_override_pattern="M*-", vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, mamba_num_heads=1, mamba_head_dim=8, n_groups=1, ssm_state_size=8,
    )  # fmt: skip
    with device:
        warm_up = HybridLMForCausalLM(small).eval()
    generate(warm_up, 0, 4, 2, 1)
    before = memory(device)
    if twin:
        try:
            config = transformer_twin(HybridLMConfig.from_pretrained(folder))
        except ValueError as error:
            raise ValueError(f"{folder} has no Transformer twin: {error} Or leave the twin out (--no-twin).") from None
        with device:
            _model = HybridLMForCausalLM(config).to(dtype).eval()  # type: ignore[arg-type]
    else:
        _model = HybridLMForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        generate(_model, 0, prompt, new, batch)
        return torch.cuda.max_memory_allocated() - before
    with peak_memory() as peak:
        generate(_model, 0, prompt, new, batch)
    return peak[0] - before


def memory(device: torch.device) -> int:
    """Bytes that the process holds on the device now."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else resident()


def request(turn: int, prompt: int, new: int, batch: int) -> dict[str, Any]:
    assert _model is not None
    return generate(_model, turn, prompt, new, batch)


@torch.inference_mode()
def generate(model: HybridLMForCausalLM, turn: int, prompt: int, new: int, batch: int) -> dict[str, Any]:
    """One request, greedy, on random tokens that differ from turn to turn. Seconds until the `first` token and in `total`."""
    rng = torch.Generator().manual_seed(turn)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=rng).to(model.device)
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    cache = HybridCache(model.config.num_hidden_layers)

    def next_token(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    wait()
    start = time.perf_counter()
    token = next_token(ids)
    wait()
    first = time.perf_counter() - start
    for _ in range(new - 1):
        token = next_token(token)
    wait()
    total = time.perf_counter() - start
    kind = {"device": str(model.device.type), "dtype": str(model.dtype).removeprefix("torch.")}
    return {"first": first, "total": total, "cache_bytes": cache.nbytes(), **kind}


def beside_twin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a table shows them: speeds and memory of a model with their ratio to its twin's, MB instead of bytes."""
    twins = {(row["model"], row["prompt"], row["new"], row["batch"]): row for row in rows if row["model"].endswith(TWIN)}
    fields = {
        "prefill": ("prefill_tokens_per_second", 1, ".0f"), "decode": ("decode_tokens_per_second", 1, ".0f"),
        "first": ("time_to_first_token_s", 1, ".3g"), "peak": ("peak_memory_bytes", 1e6, ".1f"),
        "cache": ("cache_bytes", 1e6, ".2f"),
    }  # fmt: skip
    shown = []
    for row in rows:
        twin = twins.get((row["model"] + TWIN, row["prompt"], row["new"], row["batch"]))
        line = dict(row)
        for short, (field, unit, style) in fields.items():
            value = row[field]
            line[short] = "-" if value is None else f"{value / unit:{style}}"
            if twin and value and twin[field]:
                line[short] += f" ({value / twin[field]:.2f}x)"
        shown.append(line)
    return shown
