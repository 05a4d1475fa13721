"""Speed and memory of generation: models side by side, each hybrid beside its Transformer twin.

For each shape every model runs in a process of its own, so that its peak memory is its own; the processes take turns, so that
whatever else the machine does hits all alike. What happens inside them is in `eval.generation`.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from eval import generation
from eval.generation import FIT, Batch
from eval.models import is_ours
from eval.output import rows_table
from eval.roofline import Assumptions, estimate
from eval.workers import worker
from hybridlm import HybridLMConfig
from hybridlm.journal import Journal, identity
from hybridlm.machine import machine
from hybridlm.pattern import RECURRENT
from hybridlm.twin import transformer_twin

TWIN = " (Transformer twin)"
LONGEST_NAME = 20  # characters of a model's name that the table has room for
COLUMNS = {
    "model": "model", "prompt": "prompt", "new": "new", "shown_batch": "batch", "prefill": "prefill tok/s",
    "decode": "decode tok/s", "total": "total tok/s", "request": "request s", "peak": "peak MB", "cache": "cache MB",
}  # fmt: skip
ESTIMATE_COLUMNS = {
    "model": "model", "prompt": "prompt", "new": "new", "batch": "batch", "largest_batch": "largest",
    "prefill_seconds": "prefill s", "decode_seconds_per_token": "s/token", "decode_bound": "bound by",
    "request_seconds": "request s", "total_tokens_per_second": "tokens/s",
}  # fmt: skip
DECODED = 16  # tokens read in about the time of one written: for the time that the bar tells alone


class Contender(NamedTuple):
    """A model, or the twin of one; `config` where it is one of ours."""

    folder: str
    config: HybridLMConfig | None
    is_twin: bool = False


class OutOfMemory(MemoryError):
    """Memory did not suffice for some models. `rows` are those of the others."""

    def __init__(self, faults: list[str], rows: list[dict[str, Any]]):
        super().__init__("\n".join([f"{len(faults)} of {len(faults) + len(rows)} rows could not be measured:", *faults]))
        self.rows = rows


def evaluate(
    models: list[str],
    prompts: list[int],
    news: list[int],
    batches: Sequence[Batch],
    *,
    repeats: int = 3,
    twin: bool = True,
    memory: float | None = None,
    assumed: Assumptions | None = None,
    seed: int = 0,
    json_path: str | None = None,
) -> list[dict[str, Any]]:
    """For each combination of prompt, new tokens and batch a row for every model, each followed by its twin's.

    Args:
        batches: sequences at a time, or `FIT`: of each model as many as `memory` bytes have room for.
        twin: whether a hybrid runs beside the Transformer of its size. Other models have none.
        assumed: adds `roofline` to each row: what `eval.roofline.estimate` gives; None for models that are not ours.
        seed: of the prompts, which differ from turn to turn, and of the twins' weights.
        json_path: beside which the rows of each shape are kept, so that the same command goes on where it was stopped.

    Raises:
        ValueError: a folder without a model, or one that cannot read so many tokens.
        OutOfMemory: after all that could be measured was.
    """
    if (FIT in batches) != (memory is not None):
        raise ValueError("--batch fit and --memory belong together: the most sequences for which so many bytes have room.")
    contenders = find_contenders(models, twin)
    shapes = list(product(prompts, news, batches))
    settings = {
        "models": {model: identity(model) for model in models}, "shapes": shapes, "repeats": repeats, "twin": twin,
        "memory": memory, "seed": seed, "machine": machine_name(),
    }  # fmt: skip
    journal = Journal(json_path, {"command": "throughput"} | settings)
    rows, faults = [], []
    runs = len(contenders) * (1 + repeats)
    with tqdm(total=runs * sum(map(weight, shapes)), desc="timing", unit=" tokens", unit_scale=True) as bar:
        for shape in shapes:
            key = "{} in, {} out, batch {}".format(*shape)
            bar.set_description(key)
            if key in journal.results:
                bar.update(runs * weight(shape))
                rows += journal.results[key]
                continue
            found, failed = take_turns(contenders, shape, repeats, memory, seed, partial(bar.update, weight(shape)))
            if not failed:
                journal.keep(key, found)
            rows += found
            faults += failed
    if assumed is not None:
        rows = [row | {"roofline": at_the_roof(contenders[row["model"]].config, row, assumed)} for row in rows]
    if faults:
        raise OutOfMemory(faults, rows)
    return rows


def find_contenders(models: list[str], twin: bool) -> dict[str, Contender]:
    """
    Raises:
        ValueError: a folder without a model.
    """
    found: dict[str, Contender] = {}
    for model in models:
        config = HybridLMConfig.from_pretrained(model) if is_ours(model) else None
        found[model] = Contender(model, config)
        if twin and config is not None and RECURRENT & set(config.hybrid_override_pattern):
            try:
                found[model + TWIN] = Contender(model, transformer_twin(config), is_twin=True)
            except ValueError as error:
                say(f"{model} is timed without a Transformer twin: {error}")
    return found


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def machine_name() -> str:
    here = machine()
    return here["GPU"] if here["GPU"] != "none" else f"{here['CPU']}, {here['threads of torch']} threads"


def weight(shape: tuple[int, int, Batch]) -> int:
    """How long a request takes, in tokens read; how many sequences fit is not known beforehand."""
    prompt, new, batch = shape
    return (prompt + DECODED * new) * (1 if batch == FIT else int(batch))


def take_turns(
    contenders: dict[str, Contender],
    shape: tuple[int, int, Batch],
    repeats: int,
    memory: float | None,
    seed: int,
    tick: Callable[[], Any],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one shape, and a sentence on each contender that memory did not suffice for; `tick` is called for every run."""
    prompt, new, batch = shape
    ready: dict[str, dict[str, Any]] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    faults = []
    with ExitStack() as stack:
        pools = {name: stack.enter_context(worker(generation.__name__)) for name in contenders}
        for turn, name in product(range(1 + repeats), contenders):
            tick()
            if name not in pools:
                continue
            folder, config, is_twin = contenders[name]
            try:
                if turn:
                    done = pools[name].submit(generation.request, seed + turn, prompt, new, ready[name]["batch"])
                    turns[name].append(done.result())
                else:
                    done = pools[name].submit(generation.prepare, folder, config if is_twin else None, *shape, memory, seed)
                    ready[name] = done.result()
                    for note in ready[name]["notes"]:
                        say(f"{name}: {note}")
            except (MemoryError, BrokenProcessPool) as error:
                why = "its process died, as it does where memory runs out" if isinstance(error, BrokenProcessPool) else error
                faults.append(f"{name}, {prompt:,} in, {new:,} out, batch {batch}: {why}")
                pools.pop(name).shutdown()  # the others have its memory
    found = [{"model": name} | summary(turns[name], prompt, new, ready[name]) for name in contenders if name in pools]
    return [row | {"fit_memory_bytes": memory if batch == FIT else None, "machine": machine_name()} for row in found], faults


def summary(turns: list[dict[str, Any]], prompt: int, new: int, ready: dict[str, Any]) -> dict[str, Any]:
    """Medians over the turns; speeds count the tokens of all sequences of a batch. `ready` is what `generation.prepare` gave."""
    batch, asked = ready["batch"], ready["asked_batch"]
    firsts, totals = ([turn[key] for turn in turns] for key in ("first", "total"))
    first, request = statistics.median(firsts), statistics.median(totals)
    steps = [step for turn in turns for step in turn["steps"]]
    p50, p95 = np.percentile(steps, [50, 95]).tolist() if steps else (None, None)
    decode = statistics.median(total - f for f, total in zip(firsts, totals))
    return {
        "prompt": prompt,
        "new": new,
        "batch": batch,
        "asked_batch": asked,
        "tokens_asked": asked * (prompt + new),
        "tokens_used": batch * (prompt + new),
        "prefill_tokens_per_second": batch * prompt / first,
        "decode_tokens_per_second": batch * (new - 1) / decode if new > 1 else None,  # prefill gives the first token
        "total_tokens_per_second": batch * (prompt + new) / request,
        "time_to_first_token_s": first,
        "time_to_first_token_s_each": firsts,
        "request_seconds": request,
        "request_seconds_each": totals,
        "seconds_per_token_p50": p50,
        "seconds_per_token_p95": p95,
        "peak_memory_bytes": ready["peak_memory_bytes"],
        "weight_bytes": ready["weight_bytes"],
        "cache_bytes": turns[0]["cache_bytes"],
        "device": ready["device"],
        "dtype": ready["dtype"],
    }


def at_the_roof(config: HybridLMConfig | None, row: dict[str, Any], assumed: Assumptions) -> dict[str, Any] | None:
    return None if config is None else estimate(config, row["prompt"], row["new"], row["batch"], assumed)


def beside_twin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a table shows them: speeds and memory of a model with their ratio to its twin's, in the next row; MB instead of
    bytes; beside the median of a request its range over the turns."""
    fields = {
        "prefill": ("prefill_tokens_per_second", 1, ".0f"), "decode": ("decode_tokens_per_second", 1, ".0f"),
        "total": ("total_tokens_per_second", 1, ".0f"), "peak": ("peak_memory_bytes", 1e6, ".1f"),
        "cache": ("cache_bytes", 1e6, ".2f"),
    }  # fmt: skip
    shown = []
    for row, after in zip(rows, [*rows[1:], {"model": None}]):
        twin = after if after["model"] == row["model"] + TWIN and shape_of(after) == shape_of(row) else None
        line = row | {"model": short_name(row["model"])}
        for short, (field, unit, style) in fields.items():
            value = row[field]
            line[short] = "-" if value is None else f"{value / unit:{style}}"
            if twin and value and twin[field]:
                line[short] += f" ({value / twin[field]:.2f}x)"
        spread = (max(row["request_seconds_each"]) - min(row["request_seconds_each"])) / row["request_seconds"]
        line["request"] = f"{row['request_seconds']:.3g} ±{spread / 2:.0%}"
        line["shown_batch"] = f"{row['batch']}" + (f" of {row['asked_batch']}" if row["batch"] != row["asked_batch"] else "")
        shown.append(line)
    return shown


def shape_of(row: dict[str, Any]) -> tuple[int, int, Batch]:
    return row["prompt"], row["new"], FIT if row.get("fit_memory_bytes") else row["batch"]


def short_name(name: str) -> str:
    if name.endswith(TWIN):
        return "  its twin"
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def estimates_table(rows: list[dict[str, Any]], assumed: Assumptions) -> str:
    lines = [row["roofline"] | {key: row[key] for key in ("prompt", "new")} | {"model": short_name(row["model"])}
             for row in rows if row["roofline"] is not None]  # fmt: skip
    return f"Estimated, not measured, for {assumed}:\n{rows_table(lines, ESTIMATE_COLUMNS)}"
