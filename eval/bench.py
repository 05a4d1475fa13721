"""The yardstick: training, prefill and decode of one hybrid beside stock transformers with the same weights, and Transformers.

All in one run on the CPU, each contender in a process of its own, taken in turn; beside each figure what the machine can do.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from eval import ceiling, contenders
from eval.contenders import CONTENDERS, FULL, SMALL, Shapes, Task, model_flops
from eval.output import rows_table
from eval.workers import worker
from hybridlm.machine import machine
from hybridlm.output import write_json

# On a CPU without bf16 units bf16 takes a hundred times as long as fp32; its rows then take shapes of a few seconds.
TASKS = (
    Task("train-fp32", "train", "fp32", 4, 1024),
    Task("train-bf16", "train", "bf16", 4, 1024, cap=6),
    Task("prefill-4096", "prefill", "fp32", 1, 4096),
    Task("prefill-16384", "prefill", "fp32", 1, 16384),
    Task("decode-fp32", "decode", "fp32", 1, 1024, new=64),
    Task("decode-bf16", "decode", "bf16", 1, 1024, new=64, cap=3),
)
LONG_TASKS = (Task("request-65536", "request", "fp32", 1, 65536, new=64, whole=1024, cap=900),)
SHORTEST = 32
REACHED = 0.5  # what a call reaches of the ceiling, roughly: for the estimate of the run's time alone
BUSY = 0.5  # processes a core that want to run, before anything was started here
EQUALITY_TOKENS = ((2, 1024), Task("equality", "decode", "bf16", 1, 256, cap=3))
COLUMNS = {
    "row": "row", "shape": "shape", "contender": "contender", "seconds": "seconds", "tokens_per_second": "tokens/s",
    "speed_to_nemotron_h": "x nemotron_h", "speed_to_llama": "x Llama", "ceiling": "of ceiling", "peak": "peak MB",
    "memory_to_nemotron_h": "x nemotron_h", "memory_to_llama": "x Llama",
}  # fmt: skip


def command(json_path: str | None, only: list[str] | None, repeats: int, long: bool) -> None:
    """Runs, prints the tables, and writes the figures to `json_path`, by default a new file in runs/bench.

    Raises:
        ValueError: no such row.
        ArithmeticError: the same weights do not give the same logits.
        KeyboardInterrupt: after what has been measured was written.
    """
    if unknown := set(only or ()) - {task.name for task in TASKS + LONG_TASKS}:
        known = ", ".join(task.name for task in TASKS + LONG_TASKS)
        raise ValueError(f"--only takes the names of rows, {known}; got {', '.join(sorted(unknown))}.")
    path = json_path or f"runs/bench/bench-{datetime.now():%Y%m%d-%H%M%S}.json"
    if json_path is None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in TASKS + LONG_TASKS if (task.name in only if only else long or task not in LONG_TASKS)]
    content: dict[str, Any] = {}
    try:
        run(content, tasks, repeats)
    finally:
        if content.get("equality"):
            write_json(content, path)
            if path != "-":
                print(f"{text(content)}\n\nfigures: {path}")
    if not content["equality"]["same"]:
        raise ArithmeticError(
            f"stock transformers and hybridlm differ by {content['equality']['fp32']:.1e} on the same weights, more than "
            f"{content['equality']['fp32_bound']:.0e}: the figures are not of the same model. See `python -m hybridlm verify`."
        )


def run(
    content: dict[str, Any],
    tasks: list[Task],
    repeats: int,
    *,
    shapes: Shapes = FULL,
    ceiling_sizes: dict[str, Any] | None = None,
    equality_tokens: tuple[tuple[int, int], Task] = EQUALITY_TOKENS,
) -> None:
    """Fills `content` with machine, ceiling, equality, rows and notes, as they come."""
    threads = torch.get_num_threads()
    start = time.perf_counter()
    content |= {
        "machine": machine(), "load_before": psutil.getloadavg()[0], "repeats": repeats, "shapes": asdict(shapes),
        "finished": False, "seconds": 0.0, "ceiling": {}, "equality": {}, "rows": [], "notes": [],
    }  # fmt: skip
    say("measuring what the machine can do, about half a minute")
    with worker(contenders.__name__) as pool:
        ends = content["ceiling"] = pool.submit(ceiling.ceiling, threads, **ceiling_sizes or {}).result()
    at_ceiling = {name: partial(seconds_at_ceiling, name, shapes, ends=ends) for name in CONTENDERS}
    planned, content["notes"] = plan(tasks, at_ceiling)
    few = fit(equality_tokens[1], at_ceiling["hybridlm"])

    def estimate(task: Task, name: str) -> float:
        """Of one of the turns; a decode reads its prompt in the first of them only."""
        return at_ceiling[name](task) / REACHED / (1 + repeats if task.kind == "decode" else 1)

    turns = {task: 1 if task.kind == "request" else 1 + repeats for task in planned}
    total = sum(turns[task] * estimate(task, name) for task in planned for name in CONTENDERS)
    say(f"about {1 + total / 60:.0f} minutes for {', '.join(f'{task.name} {shape(task)}' for task in planned)}")
    with tempfile.TemporaryDirectory() as folder:
        folders = {"full": f"{folder}/full", "small": f"{folder}/small"}
        say("comparing the logits of hybridlm and stock nemotron_h")
        with worker(contenders.__name__) as pool:
            for name, of in (("full", shapes), ("small", SMALL)):
                pool.submit(contenders.save, of, folders[name]).result()
            content["equality"] = pool.submit(
                contenders.equality, shapes, folders["full"], equality_tokens[0], few.length if few else SHORTEST, threads
            ).result()
        with tqdm(total=total, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}", smoothing=0) as bar:

            def tick(task: Task, name: str) -> None:
                bar.update(min(estimate(task, name), total - bar.n))  # no rounding past the end

            for task in planned:
                bar.set_description(task.name)
                with ExitStack() as stack:
                    pools = {name: stack.enter_context(worker(contenders.__name__)) for name in CONTENDERS}
                    setup = (shapes, folders, threads)
                    results, notes = take_turns(pools, task, setup, turns[task], partial(tick, task))
                content["notes"] += notes
                content["rows"] += rows_of(task, results, shapes, ends)
                content["seconds"] = time.perf_counter() - start
    content["finished"] = True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shape(task: Task) -> str:
    return f"{task.batch} x {task.length:,}" + (f" + {task.whole or task.new:,}" if task.new else "")


def seconds_at_ceiling(contender: str, shapes: Shapes, task: Task, ends: dict[str, Any]) -> float:
    """Of one call, could it do nothing but matrix products. Of the decode's tokens, which take little, none."""
    return model_flops(contender, shapes, task) / ends["flops_per_second"][task.precision]


def fit(task: Task, seconds: Callable[[Task], float]) -> Task | None:
    """The task, or the largest smaller one within its cap: fewer sequences, then shorter ones.

    None where there is none; a prefill and a request are about their length, which stays.
    """
    while seconds(task) > task.cap:
        if task.batch > 1:
            task = replace(task, batch=task.batch // 2)
        elif task.kind in ("train", "decode") and task.length > SHORTEST:
            task = replace(task, length=task.length // 2)
        else:
            return None
    return task


def plan(tasks: list[Task], seconds: Mapping[str, Callable[[Task], float]]) -> tuple[list[Task], list[str]]:
    """The tasks that fit their caps for every contender, and what was changed to make them."""
    planned, notes = [], []
    for task in tasks:
        smaller = fit(task, lambda task: max(of(task) for of in seconds.values()))
        too_long = f"one call would take more than {task.cap:g} s on this machine."
        if smaller is None:
            notes.append(f"{task.name} is left out: {too_long}")
            continue
        if smaller != task:
            notes.append(f"{task.name} is {shape(smaller)} instead of {shape(task)}: {too_long}")
        planned.append(smaller)
    return planned, notes


def take_turns(
    pools: dict[str, Any], task: Task, setup: tuple[Shapes, dict[str, str], int], turns: int, tick: Callable[[str], Any]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The results of each contender, turn by turn, the first with its memory; and a note on each that has none."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in pools}
    notes: list[str] = []
    for turn, name in product(range(turns), pools):
        if name not in results:
            continue
        try:
            work = (contenders.call, task, turn) if turn else (contenders.prepare, name, task, *setup)
            result = pools[name].submit(*work).result()
            if name == "hybridlm" and task.kind in ("prefill", "request"):
                result["attention"] = pools[name].submit(contenders.attention_seconds, task).result()
            results[name].append(result)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, BrokenProcessPool)) and "allocate" not in str(error):
                raise
            notes.append(f"{task.name} is without {CONTENDERS[name]}: it needs more memory than there is ({error}).")
            del results[name]
        tick(name)
    return results, notes


def rows_of(task: Task, turns: dict[str, list[dict[str, Any]]], shapes: Shapes, ends: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians over the timed turns, as rows; a request, whose first turn is the timed one, gives three of each contender."""
    rows: list[dict[str, Any]] = []
    kinds = ("prefill", "decode", "request") if task.kind == "request" else (task.kind,)
    for kind in kinds:
        name = task.name if kind == task.kind else f"{kind}-{task.length}"
        group = []
        for contender, every in turns.items():
            timed = every[1:] or every
            each = [seconds_of(kind, task, turn) for turn in timed]
            seconds = statistics.median(each)
            row: dict[str, Any] = {
                "row": name, "kind": kind, "precision": task.precision, "batch": task.batch, "length": task.length,
                "new": 0 if kind == "prefill" else task.whole if kind == "request" else task.new, "contender": contender,
                "seconds": seconds, "seconds_each": each, "tokens_per_second": None, "share_of_ceiling": None,
                "peak_memory_bytes": every[0]["peak_memory_bytes"], "cache_bytes": every[0].get("cache_bytes"),
                "extrapolated_tokens": max(0, task.whole - 1 - task.new) if kind == "request" else 0,
            }  # fmt: skip
            if kind == "decode":
                row["tokens_per_second"] = task.batch / seconds
                nbytes = every[0]["weights_bytes"] + every[0]["cache_bytes"]
                row["share_of_ceiling"] = nbytes / seconds / end(ends["read_bytes_per_second"], task.precision)
            elif kind != "request":
                row["tokens_per_second"] = task.batch * task.length / seconds
                flops = model_flops(contender, shapes, task)
                row["share_of_ceiling"] = flops / seconds / end(ends["flops_per_second"], task.precision)
            if kind == "prefill" and "attention" in timed[0]:
                row["attention_seconds"] = statistics.median(turn["attention"] for turn in timed)
            group.append(row)
        rows += with_ratios(group)
    return rows


def end(rates: dict[str, float], precision: str) -> float:
    """What a row is held against: in bf16 the larger of both rates, for a CPU without bf16 units does its work in fp32 units."""
    return rates["fp32"] if precision == "fp32" else max(rates.values())


def seconds_of(kind: str, task: Task, turn: dict[str, Any]) -> float:
    """Of a training step or a prompt; of the median token; of a request, with the tokens that were not decoded as fast as the
    others on average. The prompt gives the first token.
    """
    if kind == "decode":
        return statistics.median(turn["tokens"])
    if kind == "request":
        return turn["first"] + (task.whole - 1) * statistics.fmean(turn["tokens"])
    return turn["first"]


def with_ratios(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed (more is better) and memory (less is better) of each, over those of the two stock models."""
    of = {row["contender"]: row for row in group}
    for row, other in ((row, other) for row in group for other in ("nemotron_h", "llama")):
        there = other in of
        row[f"speed_to_{other}"] = of[other]["seconds"] / row["seconds"] if there else None
        row[f"memory_to_{other}"] = row["peak_memory_bytes"] / of[other]["peak_memory_bytes"] if there else None
    return group


def text(content: dict[str, Any]) -> str:
    """The figures for people."""
    ends, same = content["ceiling"], content["equality"]
    shown = [
        row
        | {
            "contender": CONTENDERS[row["contender"]],
            "shape": f"{row['batch']} x {row['length']:,}"
            + (f" + {row['new']:,}" if row["new"] else "")
            + (f", {row['extrapolated_tokens']:,} extrapolated" if row["extrapolated_tokens"] else ""),
            "ceiling": None if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}",
            "peak": f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        }
        | {key: None if row[key] is None else f"{row[key]:.2f}" for key in row if key.startswith(("speed_to", "memory_to"))}
        for row in content["rows"]
    ]
    per_token = [
        {
            "length": row["length"],
            "all": 1e6 * row["seconds"] / row["length"],
            "attention": 1e6 * row["attention_seconds"] / row["length"],
            "rest": 1e6 * (row["seconds"] - row["attention_seconds"]) / row["length"],
        }
        for row in content["rows"]
        if "attention_seconds" in row
    ]
    flops, read = ends["flops_per_second"], ends["read_bytes_per_second"]
    verdict = "the same logits" if same["same"] else "NOT the same logits"
    parts = [
        f"{content['machine']['CPU']}, {content['machine']['threads of torch']} threads, torch {content['machine']['torch']}, "
        f"transformers {content['machine']['transformers']}, {content['machine']['date']}, {content['seconds'] / 60:.1f} minutes",
        f"ceiling: matrix product {flops['fp32'] / 1e9:,.3g} GFLOP/s in fp32, {flops['bf16'] / 1e9:,.3g} in bf16; matrix-vector "
        f"product reads {read['fp32'] / 1e9:.3g} GB/s in fp32, {read['bf16'] / 1e9:.3g} in bf16; copy "
        f"{ends['copy_bytes_per_second'] / 1e9:.3g} GB/s, read and written",
        f"hybridlm and stock nemotron_h: {verdict}, {same['fp32']:.1e} apart in fp32 (bound {same['fp32_bound']:.0e}); "
        f"in bf16 hybridlm is {same['bf16_hybridlm']:.3g} from float64, stock {same['bf16_nemotron_h']:.3g}"
        + ("" if same["bf16_no_further"] else ": hybridlm is FURTHER"),
        rows_table(shown, COLUMNS, "<<<"),
    ]
    if per_token:
        headings = {"length": "hybridlm, prompt", "all": "µs a token", "attention": "attention layers", "rest": "all but them"}
        parts.append(rows_table(per_token, headings))
    parts += content["notes"]
    if any(row["extrapolated_tokens"] for row in content["rows"]):
        parts.append("Extrapolated: tokens of a request that were not decoded, and count as the mean of those that were.")
    if content["load_before"] > BUSY * content["machine"]["cores"]:
        parts.append(
            f"The machine was busy with something else (load {content['load_before']:.1f}): take no figure from this run."
        )
    if not content["finished"]:
        parts.append("Interrupted: the rows above are those that were measured.")
    return "\n\n".join(parts)
