"""What runs in the worker processes of `eval.throughput`: one model each, put there by `prepare`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from eval.models import broken_part, is_ours, is_out_of_memory, logits_in_pieces, open_stock
from eval.workers import peak_memory, resident
from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.output import quiet
from hybridlm.timing import generate, request_dtype

FIT: Literal["fit"] = "fit"
Batch = int | Literal["fit"]
TRIED = 64  # tokens that show whether a model gives numbers at all
FINE = 1.1  # no larger batch is looked for where less than this times as much is expected
GROWTH = 8  # times as many sequences as ran are tried at most
_model: Any = None


def prepare(
    folder: str, twin: HybridLMConfig | None, prompt: int, new: int, batch: Batch, memory: float | None, seed: int = 0
) -> dict[str, Any]:
    """Loads the model, or builds its `twin` with random weights, and runs a request, which warms it up.

    The timed requests are not watched: the watching thread takes time of its own.

    Args:
        batch: sequences of the request; `FIT`: the most that keep the process within `memory` bytes over what it had before the
            model; see `fit`.
        seed: of the twin's weights and of the tokens.

    Returns:
        batch; asked_batch: the largest that was tried; notes: why they differ; peak_memory_bytes, weight_bytes, device, dtype.

    Raises:
        ValueError: no model there, or it cannot read so many tokens. MemoryError: memory does not suffice.
        FloatingPointError: logits that are no numbers: such a model takes its time like another.
    """
    global _model
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = request_dtype(device)
    warm_up(device)
    before = held(device)
    with memory_errors():
        torch.manual_seed(seed)
        _model = load(folder, twin, dtype, device)
        weights = sum(p.nbytes for p in _model.parameters())
        try:
            used, asked, notes = batch, batch, list[str]()
            if batch == FIT:
                assert memory is not None
                few = min(new, 2)  # the step after the prompt is where the cache makes room for more
                used, asked, notes = fit(memory, lambda b: run_watched(seed, prompt + new - few, few, b, before))
            peak, _ = run_watched(seed, prompt, new, int(used), before)
        except IndexError:
            raise ValueError(f"{folder} cannot read {prompt:,} tokens and write {new:,}: its positions end before.") from None
        ids = torch.arange(min(prompt, TRIED)).remainder(_model.config.get_text_config().vocab_size)[None].to(device)
        if not all(logits.isfinite().all() for _, logits in logits_in_pieces(_model, ids)):
            raise FloatingPointError(f"{folder} gives logits that are no finite numbers: {broken_part(_model, ids)}.")
    return {
        "batch": used, "asked_batch": asked, "notes": notes, "peak_memory_bytes": peak, "weight_bytes": weights,
        "device": device.type, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def warm_up(device: torch.device) -> None:
    """The first pass of any model pages in the libraries, which are no memory of the model."""
    small = HybridLMConfig(
        hybrid_override_pattern="M*-", vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, mamba_num_heads=1, mamba_head_dim=8, n_groups=1, ssm_state_size=8,
    )  # fmt: skip
    with device:
        model = HybridLMForCausalLM(small).eval()
    generate(model, 0, 4, 2, 1)


def load(folder: str, twin: HybridLMConfig | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if twin is not None:
        with device:
            return HybridLMForCausalLM(twin).to(dtype).eval()  # type: ignore[arg-type]
    model: Any = HybridLMForCausalLM.from_pretrained(folder, dtype=dtype) if is_ours(folder) else open_stock(folder, dtype)
    return model.to(device).eval()


def held(device: torch.device) -> int:
    """Bytes that the process holds on the device now."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else resident()


def run_watched(seed: int, prompt: int, new: int, batch: int, before: int) -> tuple[int, int]:
    """The most bytes held during a request, over `before`, and those of its cache."""
    if _model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        found = generate(_model, seed, prompt, new, batch)
        return torch.cuda.max_memory_allocated() - before, found["cache_bytes"]
    with peak_memory() as peak:
        found = generate(_model, seed, prompt, new, batch)
    return peak[0] - before, found["cache_bytes"]


def fit(memory: float, run: Callable[[int], tuple[int, int]]) -> tuple[int, int, list[str]]:
    """The largest batch that runs within `memory` bytes, to a fifth; the largest that was tried; and what went wrong meanwhile.

    From the bytes of one sequence and of a batch follows what each more takes, at least its cache, and so the batch to try next,
    from two on, but never more than GROWTH times what has run: of a few sequences little may show. Of a batch that runs and one
    that takes too much the middle bounds the next: from below after what takes too much, else from above. After one that
    cannot run at all half of it, until one can.

    Args:
        run: gives of a batch the most bytes held and those of the cache.

    Raises:
        MemoryError: not even one sequence does.
    """
    one, cache = run(1)
    if one > memory:
        raise MemoryError(f"one sequence takes {one / 2**30:.2f} GiB, more than the {memory / 2**30:.2f} GiB of --memory")
    best, too_many, batch, asked, starved, notes = 1, math.inf, 2, 1, False, list[str]()
    while is_worth_a_try(batch, best):
        asked = max(asked, batch)
        try:
            peak, _ = run(batch)
            following = 1 + (memory - one) / max(1, cache, (peak - one) / (batch - 1))
            trouble = f"takes {peak / 2**30:.2f} GiB" if peak > memory else None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            following, trouble, starved = batch / 2, "ran out of memory", True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if trouble is None:
            best = batch
            if starved:
                break
            following = min(following, GROWTH * best, math.sqrt(best * too_many))
        else:
            too_many = batch
            if not starved:
                following = max(following, math.sqrt(best * too_many))
        batch = int(min(following, too_many - 1))
        if trouble:
            notes.append(f"a batch of {too_many} {trouble}; going on with {batch if is_worth_a_try(batch, best) else best}")
    return best, asked, notes


def is_worth_a_try(batch: int, best: int) -> bool:
    return batch > best * (1 if best == 1 else FINE)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Whatever a lack of memory raises is a MemoryError, which finds its way between processes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error).partition("\n")[0]) from None
        raise


def request(seed: int, prompt: int, new: int, batch: int) -> dict[str, Any]:
    with memory_errors():
        return generate(_model, seed, prompt, new, batch)
