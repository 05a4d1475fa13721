"""The report's figures in few words: the table of all models, the cards on top, the headline in the terminal."""

import math
import statistics
from collections import Counter
from typing import Any

from eval.charts import TWIN_LABEL
from eval.compare import less_is_better
from eval.generation import FIT
from eval.results import KEYS, Results, identity
from eval.sections import by_settings
from hybridlm.output import cell
from hybridlm.pages.blocks import short

Rows = list[dict[str, Any]]


def side_by_side(
    models: Rows, runs: dict[str, dict[str, Any]], text: dict[str, Any] | None, results: Results
) -> tuple[Rows, dict[str, str]]:
    """A row for each model, of what can be compared: tasks that all have, one text, one shape of request. Which, in words.

    Args:
        models: of each its `label`, `model`, `pattern`, `parameters`. runs: facts of runs by the label of their model.
        results: rows of every kind, with labels.
    """
    scored = by_settings(results["perplexity"])
    tasks = common_tasks(results["accuracy"])
    shape, shapes = common_shape(results["throughput"])
    bits = {row["label"]: row["bits_per_byte"] for row in scored[0]} if scored else dict(text["models"]) if text else {}
    table = []
    for model in models:
        mine, run = model["label"], runs.get(model["label"], {})
        timed = {row["label"]: row for row in shapes}.get(mine, {})
        twin = {row["label"]: row for row in shapes}.get(mine + TWIN_LABEL)
        accuracies = [row["value"] for row in results["accuracy"] if row["label"] == mine and task_key(row) in tasks]
        recalled = [row["accuracy"] for row in results["longcontext"] if row["label"] == mine]
        written, beside = written_per_second(timed), written_per_second(twin or {})
        table.append(
            model
            | {"tokens": run.get("tokens"), "val_loss": run.get("val_loss"), "bits_per_byte": bits.get(mine)}
            | {"accuracy": statistics.mean(accuracies) if accuracies else None}
            | {"longcontext": statistics.mean(recalled) if recalled else None}
            | {"prefill": timed.get("prefill_tokens_per_second"), "decode": timed.get("decode_tokens_per_second")}
            | {"written": written, "twin_written": beside, "twin_ratio": written / beside if written and beside else None}
            | {f"{name}_mb": megabytes(timed.get(f"{name}_bytes")) for name in ("peak_memory", "cache")}
        )
    notes = []
    if scored:
        window = scored[0][0].get("window") or "document"
        notes.append(f"Bits/byte: on {scored[0][0].get('data', 'the text of the results')}, window {window}.")
    elif bits:
        notes.append("Bits/byte: on the validation text below.")
    if tasks:
        notes.append(f"Accuracy: mean over {', '.join(sorted(str(task[0]) for task in tasks))}, which all asked models have.")
    spoken = ""
    if shape:
        spoken = (
            f"Speed and memory: {shape[0]:,} tokens in, {shape[1]:,} out, batch {shape[2]}; written: tokens written over all the "
            "seconds of a request."
        )
    return table, {"quality_note": " ".join(notes), "shape_note": spoken}


def task_key(row: dict[str, Any]) -> tuple:
    return tuple(row.get(name) for name in KEYS["accuracy"])


def common_tasks(rows: Rows) -> set[tuple]:
    """Of every task that all models have, its first metric of which more is better; of a group of tasks the group."""
    models = {row["label"] for row in rows}
    groups = {row["task"] for row in rows if row.get("asked") == row["task"]}
    has = Counter(task_key(row) for row in rows if row["value"] is not None and not less_is_better(row))
    first: dict[str, tuple] = {}
    for row in rows:
        if has[task_key(row)] == len(models) and (row["task"] in groups or row.get("asked") not in groups):
            first.setdefault(row["task"], task_key(row))
    return set(first.values())


def common_shape(rows: Rows) -> tuple[tuple[int, int, Any] | None, Rows]:
    """The shape (prompt, new, batch) that most models were timed at, the longest of these, and its rows."""
    shapes = Counter((row["prompt"], row["new"], row["sequences"]) for row in rows)
    if not shapes:
        return None, []
    shape = max(shapes, key=lambda one: (shapes[one], one[:2], math.inf if one[2] == FIT else one[2]))
    return shape, [row for row in rows if (row["prompt"], row["new"], row["sequences"]) == shape]


def written_per_second(row: dict[str, Any]) -> float | None:
    """Tokens of all sequences over the seconds of the request, its prompt included: the throughput of the Nemotron-H paper."""
    return row["batch"] * row["new"] / row["request_seconds"] if row else None


def megabytes(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def title(content: dict[str, Any]) -> str:
    models = [row["label"] for row in content["models"]]
    if len(content["runs"]) == 1 == len(models):
        return content["runs"][0]["run"]
    return ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")


def subtitle(content: dict[str, Any]) -> str:
    told = [f"{run['run']}: step {run['step']:,} of {run['steps']:,}, checkpoint {run['checkpoint']}" for run in content["runs"]]
    return " · ".join([*told, content["machine"]["date"]])


def notices(content: dict[str, Any]) -> list[str]:
    going = [run["run"] for run in content["runs"] if not run["finished"]]
    found = [f"Not finished: {', '.join(going)}. These are the figures so far."] if going else []
    if content["runs"] and content["text"] is None:
        found.append("No text baselines: a run with data.streaming keeps no text. See `python -m eval perplexity`.")
    if content["timing_fault"]:
        found.append(f"Not timed: {content['timing_fault']}")
    return found


def cards(content: dict[str, Any]) -> dict[str, str]:
    """Of one run its figures; of several models which is best at what."""
    models = content["models"]
    if len(models) == 1 and content["runs"]:
        (run,), (model,) = content["runs"], models
        speed, known = run["training_tokens_per_second"], run["val_loss"] is not None
        return {
            "parameters": "–" if model["parameters"] is None else short(model["parameters"]),
            "tokens seen": short(run["tokens"]),
            "validation loss, nats/token": f"{run['val_loss']:.3f}" if known else "–",
            "validation loss, bits/byte": f"{run['val_bits_per_byte']:.3f}" if known else "–",
            "training tokens/s, median": "–" if speed is None else short(speed),
        }
    found = {"models": str(len(models))}
    for name, words, pick in BEST_CARDS:
        having = [row for row in models if row[name] is not None]
        if len({row[name] for row in having}) > (len(models) > 1):  # of several that are equal none is best
            best = pick(having, key=lambda row, name=name: row[name])
            found[f"{words}: {best['label']}"] = f"{best[name]:.3f}" if abs(best[name]) < 100 else short(best[name])
    return found


BEST_CARDS: tuple[tuple[str, str, Any], ...] = (
    ("accuracy", "highest accuracy", max), ("bits_per_byte", "least bits/byte", min),
    ("longcontext", "best in long contexts", max), ("written", "most tokens written/s", max),
    ("twin_ratio", "furthest ahead of its twin, ×", max),
)  # fmt: skip


def headline(content: dict[str, Any], results: Results) -> list[str]:
    return [*map(run_line, content["runs"], run_parameters(content)), *text_lines(content), *speed_lines(results["throughput"])]


def run_parameters(content: dict[str, Any]) -> list[int]:
    of = {identity(row["model"]): row["parameters"] for row in content["models"]}
    return [of[identity(f"{run['run']}/model")] for run in content["runs"]]


def run_line(run: dict[str, Any], parameters: int) -> str:
    loss = "none yet"
    if run["val_loss"] is not None:
        loss = f"{run['val_loss']:.3f} nats/token, {run['val_bits_per_byte']:.3f} bits/byte"
    state = "" if run["finished"] else f" · unfinished: step {run['step']:,} of {run['steps']:,}"
    return f"{run['run']}: {parameters:,} parameters · {run['tokens']:,} tokens · validation loss {loss}{state}"


def text_lines(content: dict[str, Any]) -> list[str]:
    text = content["text"]
    if text is None:
        return []
    scores = text["models"] if len(text["models"]) > 1 else {"model": next(iter(text["models"].values()))}
    models = " · ".join(f"{name} {value:.3f}" for name, value in scores.items())
    return [
        f"bits per byte: {models} · order-3 byte model {text['order3']:.3f} · "
        f"xz -9 per file {text['xz']:.3f} (on the same {text['files']} validation files)"
    ]


def speed_lines(rows: Rows) -> list[str]:
    single = len({row["label"].removesuffix(TWIN_LABEL) for row in rows}) == 1
    found = []
    for row in rows:
        name = ("twin" if row["label"].endswith(TWIN_LABEL) else "model") if single else row["label"]
        decode = cell(row.get("decode_tokens_per_second"))
        found.append(
            f"prompt {row['prompt']:,}: {cell(row.get('prefill_tokens_per_second'))} tokens/s in, {decode} out, "
            f"{cell(megabytes(row.get('peak_memory_bytes')))} MB · {name}"
        )
    return found
