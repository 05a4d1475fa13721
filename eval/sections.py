"""What the report says, apart from how it looks: sections of tables, pictures and text, each there only where there is data."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

from eval import charts
from eval.charts import TWIN_LABEL
from eval.compare import less_is_better
from eval.results import KEYS, Results
from hybridlm.pages.blocks import Facts, Listing, Section, Shown, Table, Text, column_leaders, leaders, short
from hybridlm.pages.charts import Chart

SAMPLES = 6  # steps whose samples are shown
Rows = list[dict[str, Any]]


def sections(content: dict[str, Any], runs: list[dict[str, Any]], results: Results) -> list[Section]:
    """All that there is something to say about.

    Args:
        content: what report.json has. runs: of each run its `label`, `config_text`, `training`, `validation`, `samples`.
        results: rows of every kind, those of throughput measured here among them; each has its model's `label`.
    """
    made = [
        Section("Side by side", side_by_side(content)),
        Section("Learning", learning(content, runs, results)),
        Section("Accuracy", accuracy(results["accuracy"], [row["label"] for row in content["models"]])),
        Section("Long contexts", long_contexts(results["longcontext"])),
        Section("Speed and memory", speed(content, results["throughput"])),
        Section("What they write" if len(runs) > 1 else "What it writes", samples(runs)),
        Section("Configuration", configuration(runs)),
        Section(
            "Machine",
            [Text("On which this report was made, with what is not from a file."), Facts(content["machine"])],
        ),
    ]  # fmt: skip
    return [section for section in made if section.blocks]


SIDE_BY_SIDE = {
    "label": "model", "pattern": "layers", "parameters": "parameters", "tokens": "tokens seen",
    "val_loss": "validation, nats/token", "bits_per_byte": "bits/byte", "accuracy": "accuracy", "longcontext": "long contexts",
    "prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "written": "written, tokens/s",
    "twin_ratio": "of twin's speed", "peak_memory_mb": "peak memory, MB", "cache_mb": "cache, MB",
}  # fmt: skip
LESS, MORE = (
    ("val_loss", "bits_per_byte", "peak_memory_mb", "cache_mb"),
    ("accuracy", "longcontext", "prefill", "decode", "written"),
)
BEST = dict.fromkeys(LESS, min) | dict.fromkeys((*MORE, "twin_ratio"), max)


def side_by_side(content: dict[str, Any]) -> list[Any]:
    models = content["models"]
    columns = {name: heading for name, heading in SIDE_BY_SIDE.items() if any(row[name] is not None for row in models)}
    blocks: list[Any] = [Table(columns, [shown(row) for row in models], column_leaders(models, BEST))]
    notes = [content[name] for name in ("quality_note", "shape_note") if content[name]]
    if notes:
        blocks.append(Text(" ".join(notes)))
    chosen = "accuracy" if sum(row["accuracy"] is not None for row in models) > 1 else "bits_per_byte"
    drawn = [
        {"label": row["label"], "quality": row[chosen], "speed": row["written"], "twin_speed": row["twin_written"]}
        for row in models
        if row[chosen] is not None and row["written"] is not None
    ]
    if drawn:
        name = "accuracy" if chosen == "accuracy" else "bits per byte"
        chart = charts.quality_against_speed(drawn, name, "tokens written per second, prompt included", name != "accuracy")
        blocks.append([chart])
        if any(row["twin_speed"] is not None for row in drawn):
            blocks.append(
                Text("Hollow: the speed of a model's Transformer twin, which is not trained and has no height of its own.")
            )
    return blocks


def shown(row: dict[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    if row["twin_ratio"] is not None:
        texts["twin_ratio"] = Shown(f"{row['twin_ratio']:.2f} ×", row["twin_ratio"])
    for name in ("val_loss", "bits_per_byte", "accuracy", "longcontext"):
        if row[name] is not None:
            texts[name] = Shown(f"{row[name]:.3f}", row[name])
    for name in ("parameters", "tokens"):
        if row[name] is not None:
            texts[name] = Shown(short(row[name]), row[name])
    return row | texts


def learning(content: dict[str, Any], runs: list[dict[str, Any]], results: Results) -> list[Any]:
    drawn: list[Chart] = []
    if runs:
        drawn.append(charts.loss_curves({run["label"]: (run["training"], run["validation"]) for run in runs}))
    compared = content["text"]
    if compared is not None:
        models = compared["models"] if len(compared["models"]) > 1 else {"this model": next(iter(compared["models"].values()))}
        drawn.append(charts.bits_per_byte(models, {"order-3 bytes": compared["order3"], "xz -9": compared["xz"]}))
    scored = results["perplexity"]
    groups = by_settings(scored)
    series = {row["label"]: row["by_context"] for row in groups[0] if len(row.get("by_context") or []) > 1} if groups else {}
    if series:
        drawn.append(charts.by_context(series))
    blocks: list[Any] = [drawn] if drawn else []
    if compared is not None:
        blocks.append(
            Text(
                f"Bits per byte are on the first {compared['files']} validation document(s) of {compared['of']}, "
                f"{compared['bytes']:,} bytes, the same for all. The order-3 model counts the bytes of all the training text "
                "(Witten–Bell); xz compresses each document as a file of its own. A model, in windows of "
                f"{compared['window']:,} tokens and no state carried over, is not charged for a document's first token."
            )
        )
    if scored:
        fields = {
            "label": "model", "data": "text", "window": "window", "bits_per_byte": "bits/byte", "nats_per_token": "nats/token",
            "stderr": "± stderr", "perplexity": "perplexity", "tokens": "tokens",
        }  # fmt: skip
        rows = [{name: row.get(name) for name in fields} | {"window": window_text(row)} for row in scored]
        blocks.append(Table(fields, rows, column_leaders(rows, {"bits_per_byte": min}) if len(groups) == 1 else set()))
    return blocks


def window_text(row: dict[str, Any]) -> Any:
    if row.get("stride"):
        return Shown(f"{row['window']:,}, {row['stride']:,} apart", row["window"])
    return "document" if row.get("window") is None else row["window"]


def by_settings(rows: Rows) -> list[Rows]:
    """Rows of perplexity that can be compared: on one text in one way. The largest group first."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in KEYS["perplexity"]), []).append(row)
    return sorted(groups.values(), key=len, reverse=True)


def accuracy(rows: Rows, order: Sequence[str]) -> list[Any]:
    """Tasks down, models across."""
    if not rows:
        return []
    models = {f"of {label}": label for label in order if any(row["label"] == label for row in rows)}
    tasks: dict[tuple, dict[str, Any]] = {}
    picks: dict[tuple, Callable] = {}
    for row in rows:
        shots = f"{row['shots']} shots" if row.get("shots") else None
        words = [row["task"], shots, row.get("metric"), row.get("filter") if row.get("filter") != "none" else None]
        fields = {"task": ", ".join(filter(None, words)), "questions": row.get("questions")}
        key = tuple(row.get(name) for name in KEYS["accuracy"])
        line = tasks.setdefault(key, fields)
        picks[key] = min if less_is_better(row) else max
        error = row.get("stderr")
        if row["value"] is not None:
            text = f"{row['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
            line[f"of {row['label']}"] = Shown(text, row["value"])
    lines = list(tasks.values())
    best = set().union(*(leaders(lines, [(i, name) for name in models], pick) for i, pick in enumerate(picks.values())))
    columns = {"task": "task"} | models | {"questions": "questions"}
    note = (
        "± is the standard error over a task's questions. The command eval compare tells which differences are more than chance."
    )
    return [Table(columns, lines, best), Text(note)]


def long_contexts(rows: Rows) -> list[Any]:
    """A heat map and a table for each task and model."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in sorted(rows, key=lambda row: row["task"]):
        groups.setdefault((row["task"], row["label"]), []).append(row)
    if not groups:
        return []
    drawn = [charts.heat_map(task, label, found) for (task, label), found in groups.items()]
    lengths = sorted({row["length"] for row in rows})
    lines = []
    for (task, label), found in groups.items():
        line: dict[str, Any] = {"task": task, "label": label}
        for length in lengths:
            cells = [row for row in found if row["length"] == length]
            if cells:
                mean = sum(row["accuracy"] for row in cells) / len(cells)
                errors = [row["stderr"] for row in cells if row.get("stderr") is not None]
                error = sum(e * e for e in errors) ** 0.5 / len(cells) if len(errors) == len(cells) else None
                line[str(length)] = Shown(f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}"), mean)
        lines.append(line)
    columns = {"task": "task", "label": "model"} | {str(length): f"{length:,} tokens" for length in lengths}
    return [drawn, Table(columns, lines), Text("The table has the mean over depths, and its standard error.")]


THROUGHPUT = {
    "label": "model", "prompt": "prompt", "new": "new tokens", "batch": "batch", "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s", "time_to_first_token_s": "first token, s", "request_seconds": "request, s",
    "peak_memory_mb": "peak memory, MB", "cache_mb": "cache, MB",
}  # fmt: skip
AGAINST_PROMPT = {
    "prefill_tokens_per_second": ("Reading the prompt", "tokens per second"),
    "decode_tokens_per_second": ("Writing, after the prompt", "tokens per second"),
    "peak_memory_bytes": ("Peak memory", "B"),
    "cache_bytes": ("Cache at the end", "B"),
}


def speed(content: dict[str, Any], rows: Rows) -> list[Any]:
    if not rows:
        return []
    (new, sequences), _ = Counter((row["new"], row["sequences"]) for row in rows).most_common(1)[0]
    series: dict[str, Rows] = {}
    for row in rows:
        if (row["new"], row["sequences"]) == (new, sequences):
            series.setdefault(row["label"], []).append(row)
    drawn = [
        charts.against_prompt(series, name, *words)
        for name, words in AGAINST_PROMPT.items()
        if any(row.get(name) is not None for of in series.values() for row in of)
    ]
    table = [
        {name: row.get(name) for name in THROUGHPUT}
        | {
            name.replace("bytes", "mb"): row[name] / 1e6
            for name in ("peak_memory_bytes", "cache_bytes")
            if row.get(name) is not None
        }
        for row in rows
    ]
    columns = {name: heading for name, heading in THROUGHPUT.items() if name != "batch" or any(row["batch"] != 1 for row in rows)}
    kinds = sorted({f"{row['dtype']} on the {row['device'].upper()}" for row in rows if "dtype" in row and "device" in row})
    told = ["one request at a time" if sequences == 1 else f"batch {sequences}", f"{new} tokens written", *kinds, "medians"]
    text = f"Random tokens, {', '.join(told)}. Memory is over what the process had before the model."
    if len(table) > sum(map(len, series.values())):
        text += " The pictures have these shapes alone, the table has all."
    if any(row["label"].endswith(TWIN_LABEL) for row in rows):
        text += " A Transformer twin has the same width, depth and number of parameters, and random weights."
    text += "".join(f" No Transformer twin beside {label}: {fault}" for label, fault in content["twin_faults"].items())
    return [Text(text), drawn, Table(columns, table)]


def samples(runs: Iterable[dict[str, Any]]) -> list[Any]:
    blocks: list[Any] = []
    for run in (runs := list(runs)):
        chosen = pick(run["samples"], SAMPLES if len(runs) == 1 else 2)
        for row in chosen:
            prompt = printable(row["prompt"])
            title = f"Step {row['step']:,}" if len(runs) == 1 else f"{run['label']}, step {row['step']:,}"
            blocks.append(Listing(title, [("b", prompt), ("", printable(row["text"]).removeprefix(prompt))]))
    return blocks or ([Text("No samples yet.")] if runs else [])


def pick(rows: Rows, count: int) -> Rows:
    """Those of `count` steps, evenly apart, the first and the last among them."""
    steps = sorted({row["step"] for row in rows})
    if len(steps) > count:
        steps = [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
    return sorted((row for row in rows if row["step"] in steps), key=lambda row: row["step"])


def printable(text: str) -> str:
    """An untrained model writes control characters, which have no place in HTML."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def configuration(runs: list[dict[str, Any]]) -> list[Any]:
    """Of one run its file; of several a table of what differs, and each folded up with those lines marked."""
    if not runs:
        return []
    if len(runs) == 1:
        return [Listing("", [("", runs[0]["config_text"])])]
    flat = {run["label"]: flatten(yaml.safe_load(run["config_text"])) for run in runs}
    every = dict.fromkeys(name for settings in flat.values() for name in settings)
    differing = [name for name in every if name != "run_dir" and len({str(settings.get(name)) for settings in flat.values()}) > 1]
    lines = [{"setting": name} | {f"of {label}": str(flat[label].get(name, "–")) for label in flat} for name in differing]
    blocks: list[Any] = [Table({"setting": "what differs"} | {f"of {label}": label for label in flat}, lines)] if lines else []
    for label, settings in flat.items():
        parts = [("mark" if name in differing else "", f"{name}: {value}\n") for name, value in settings.items()]
        blocks.append(Listing(label, parts, fold=True))
    return blocks


def flatten(value: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {before: value}
    pairs = [flatten(inner, f"{before}.{name}" if before else str(name)) for name, inner in value.items()]
    return {name: found for part in pairs for name, found in part.items()}
