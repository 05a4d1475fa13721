"""A request as it is timed: a prompt read whole and tokens written one by one, by our models and those of transformers."""

import inspect
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hybridlm.cache import HybridCache

CACHES = ("past_key_values", "cache_params")  # what transformers' models call theirs


def request_dtype(device: torch.device) -> torch.dtype:
    """That of the weights of a model that is timed: as it would be served."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.inference_mode()
def generate(model: Any, seed: int, prompt: int, new: int, batch: int) -> dict[str, Any]:
    """One request, greedy, on random tokens; no end of text ends it.

    The prompt is read whole. In pieces behind the cache, attention would need a mask for each.

    Returns:
        seconds until the `first` token and in `total`; `steps`: of each further token; cache_bytes at the end.
    """
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=rng).to(model.device)
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    # Some of transformers' models, asked without, take a token behind a cache for the first of a text.
    positions = torch.arange(prompt + new, device=model.device)[None] if "position_ids" in takes else None
    kept: dict[str, Any] = {}

    def next_token(tokens: Tensor, before: int) -> Tensor:
        where = {} if positions is None else {"position_ids": positions[:, before : before + tokens.shape[1]]}
        output = model(input_ids=tokens, use_cache=True, **where, **kept, **last)
        kept.update({name: cache for name in CACHES if (cache := getattr(output, name, None)) is not None})
        return output.logits[:, -1:].argmax(-1)

    wait()
    start = time.perf_counter()
    token = next_token(ids, 0)
    wait()
    first = time.perf_counter() - start
    if not kept:
        raise ValueError(f"{type(model).__name__} keeps no cache between tokens, so its generation is not timed.")
    marks = [mark(model.device)]
    for before in range(prompt, prompt + new - 1):
        token = next_token(token, before)
        marks.append(mark(model.device))
    wait()
    total = time.perf_counter() - start
    steps = [seconds_between(*pair) for pair in pairwise(marks)]
    return {"first": first, "total": total, "steps": steps, "cache_bytes": sum(map(cache_bytes, kept.values()))}


def mark(device: torch.device) -> Any:
    """A moment in the work of the device. A GPU is not waited for, as a server would not."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def cache_bytes(kept: Any) -> int:
    """Of the tensors of our cache or of one of transformers."""
    if isinstance(kept, HybridCache):
        return kept.nbytes()
    if isinstance(kept, Tensor):
        return kept.nbytes
    if isinstance(kept, dict):
        return sum(map(cache_bytes, kept.values()))
    layers = getattr(kept, "layers", None)
    return sum(cache_bytes(vars(layer)) for layer in layers) if layers is not None else 0
