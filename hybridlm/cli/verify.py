"""Whether stock transformers gives our logits for a folder."""

import gc
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.checkpoint import load_tokenizer
from hybridlm.modeling import HybridLMForCausalLM
from hybridlm.output import quiet, table

KERNELS = ("mamba_ssm", "causal_conv1d")


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, the GPU packages cannot be imported.

    transformers takes their kernels for good when a model's file is imported, and then calls them on a CPU too, where they fail.
    """
    before = {name: sys.modules[name] for name in KERNELS if name in sys.modules}
    sys.modules.update(dict.fromkeys(KERNELS))  # type: ignore[arg-type]  # None there means: not to be found
    try:
        yield
    finally:
        for name in KERNELS:
            del sys.modules[name]
        sys.modules.update(before)


with without_kernels():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM

FEWEST_TOKENS = 32
STEPS = 16  # tokens decoded one by one, and generated
PIECES = (7, 1, 61, 13)  # sizes of a prompt's pieces, in turn: odd, shorter and longer than a convolution's window
TEXT = (
    "def mean(values):\n    return sum(values) / len(values)\n\nThe quick brown fox — naïve, as ever — jumps over the lazy dog.\n"
)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def one_pass(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def in_pieces(model: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    """Each piece read on from the cache of those before it."""
    logits, cache = [], None
    for piece in ids.split(sizes, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        cache = output.past_key_values
    return torch.cat(logits, dim=1)


def odd_sizes(tokens: int) -> list[int]:
    sizes: list[int] = []
    while (left := tokens - sum(sizes)) > 0:
        sizes.append(min(left, PIECES[len(sizes) % len(PIECES)]))
    return sizes


def continuation(model: Any, ids: Tensor) -> list[int]:
    cached = "*" in model.config.hybrid_override_pattern  # stock's cache counts positions in an attention layer
    length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=cached, **length)
    return new[0, ids.shape[1] :].tolist()


@torch.no_grad()
def compare(folder: str, tokens: int = 512, tolerance: float = 1e-4) -> dict[str, Any]:
    """Our logits beside stock's, in fp32 on the CPU; one model is in memory at a time.

    Returns:
        `cases`, each with its difference max|ours - stock's| / max|stock's| from stock's one pass with dt unbounded (null where
        it is no number); whether all are within the tolerance (`same`); what the bound on dt changes in stock's own logits.

    Raises:
        ValueError: no model there, or one that stock transformers does not open.
    """
    path = Path(folder).expanduser()
    check_folder(folder, path, tokens)
    quiet()
    say(f"opening {folder} with hybridlm")
    model = HybridLMForCausalLM.from_pretrained(path, dtype=torch.float32)
    inputs = {"random": torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))}
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        inputs["text"] = torch.tensor([load_tokenizer(folder)(TEXT)["input_ids"]])
    ours: dict[tuple[str, str], Tensor] = {}
    for name, ids in inputs.items():
        n = ids.shape[1]
        say(f"{name}, {n:,} tokens: one pass, in pieces, and the last {STEPS} one by one")
        ours[name, "one pass"] = one_pass(model, ids)
        ours[name, "prefill in pieces"] = in_pieces(model, ids, odd_sizes(n))
        ours[name, "cached decode"] = in_pieces(model, ids, [n - STEPS, *[1] * STEPS])
    prompt = inputs.get("text", inputs["random"])
    our_tokens = continuation(model, prompt)
    del model
    gc.collect()

    say("opening it with transformers")
    stock = open_stock(path)
    mixers = [layer.mixer for layer in stock.model.layers if hasattr(layer.mixer, "time_step_limit")]
    limits = [mixer.time_step_limit for mixer in mixers]
    bounded = {}
    for name, ids in inputs.items():
        say(f"{name}, {ids.shape[1]:,} tokens: one pass, as stock opens it")
        bounded[name] = one_pass(stock, ids)
    for mixer in mixers:
        mixer.time_step_limit = (0.0, math.inf)
    cases: list[dict[str, Any]] = []
    clamp = []
    for name, ids in inputs.items():
        say(f"{name}, {ids.shape[1]:,} tokens: one pass, dt unbounded")
        theirs = one_pass(stock, ids)
        clamp.append(relative(bounded[name], theirs))
        for (of, way), logits in ours.items():
            if of == name:
                cases.append({"input": name, "way": way, "tokens": ids.shape[1], "difference": finite(relative(logits, theirs))})
    say(f"greedy continuation of {STEPS} tokens")
    equal = sum(a == b for a, b in zip(our_tokens, continuation(stock, prompt)))
    return {
        "model": folder,
        "tolerance": tolerance,
        "cases": cases,
        "same": all(case["difference"] is not None and case["difference"] <= tolerance for case in cases),
        "clamp": {"bound": max((low for low, _ in limits), default=None), "difference": finite(max(clamp))},
        "greedy": {"tokens": STEPS, "equal": equal},
    }


def check_folder(folder: str, path: Path, tokens: int) -> None:
    if tokens < FEWEST_TOKENS:
        raise ValueError(f"--tokens must be at least {FEWEST_TOKENS}, so that pieces and single steps have room; got {tokens}.")
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json. A run keeps its newest model in RUN/model.")
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {type(error).__name__}: {error}") from None
    if kind != "nemotron_h":
        raise ValueError(
            f"{folder} is of model_type {kind!r}, which stock transformers does not open: there is nothing to compare with. Only "
            "patterns of M, *, - and E without RoPE, bias in attention and time_step_limit are saved as nemotron_h."
        )


def open_stock(path: Path) -> Any:
    try:
        return NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    except Exception as error:  # whatever it stumbles over, it does not open the folder
        raise ValueError(f"stock transformers cannot open {path}: {type(error).__name__}: {error}") from None


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def page(f: dict[str, Any]) -> str:
    def figure(x: float | None) -> str:
        return "no number" if x is None else f"{x:.1e}"

    rows = [("input", "tokens", "ours", "difference")]
    rows += [(case["input"], f"{case['tokens']:,}", case["way"], figure(case["difference"])) for case in f["cases"]]
    known = [case["difference"] for case in f["cases"]]
    worst = None if None in known else max(known)
    verdict = "the same logits" if f["same"] else "NOT the same logits"
    bound, moved = f["clamp"]["bound"], f["clamp"]["difference"]
    if bound is None or moved == 0:
        clamp = "no effect"
    else:
        clamp = f"as stock opens the folder, it holds dt at {bound:g} or above, which moves its own logits by {figure(moved)}"
    return "\n".join([
        table(rows, "<><>"),
        "",
        f"{verdict}: difference at most {figure(worst)}, tolerance {f['tolerance']:.1e}; max|ours - stock's| / max|stock's|",
        f"clamp: {clamp}",
        f"greedy: {f['greedy']['equal']} of {f['greedy']['tokens']} tokens equal",
    ])  # fmt: skip
