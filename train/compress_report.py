"""The report on a compression: what was won and lost, what was tried, what mattered. Made of the files of its folder alone."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hybridlm.output import BYTES, scaled
from hybridlm.pages.blocks import Facts, Listing, Section, Shown, Table, Text, short
from hybridlm.pages.charts import Chart, Rows
from hybridlm.pages.page import write_page
from hybridlm.pattern import SYMBOLS
from train import compress_charts as charts

BEST = 20  # candidates in the table
LATE = 0.5  # share of the tokens after which the second picture of the losses begins
LONG = 30  # layers; of more, the table has their numbers
WHAT = {
    "parent": "the model that was compressed, as it came",
    "parent trained on": "the parent after as many more tokens as the others were given: what these tokens alone are worth",
    "pruned": "the winner of the search, as it was cut out of the parent; not trained",
    "pruned + distilled": "the same, then taught by the parent's predictions",
    "pruned + cross-entropy": "the same, then trained on the text alone, without the parent",
    "from scratch": "the winner's shape with random weights, trained on as many tokens",
    "uniform depth + distilled": "layers left out at even distances, down to the student's parameters, then distilled alike",
    "uniform width + distilled": "every width cut by one share, down to the student's parameters, then distilled alike",
}
PARTS = {"M": "heads of Mamba-2", "*": "key-value groups", "-": "neurons of FFN", "E": "parts of experts"}


@dataclass
class Content:
    """What the folder has; empty where it has not."""

    search: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    trainings: dict[str, Rows] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        found = self.summary.get("models") or {name: self.summary.get(name) for name in ("parent", "student")}
        return {name: entry for name, entry in found.items() if entry}

    @property
    def parent(self) -> dict[str, Any]:
        return self.summary.get("parent") or self.search.get("parent") or {}

    @property
    def candidates(self) -> Rows:
        return self.search.get("candidates") or []

    @property
    def student(self) -> dict[str, Any]:
        return self.summary.get("student") or next(iter(self.candidates), {})


def write_report(folder: Path) -> None:
    """Writes index.html, report.md and figures/ into `folder/report`, of what there is; the page says what is missing.

    Args:
        folder: with search.json, summary.json, importance.safetensors and runs/*/metrics.jsonl, or some of them.

    Raises:
        ValueError: it has neither search.json nor summary.json, or one that is no JSON.
    """
    content = read(folder)
    made = [
        Section("Side by side", side_by_side(content)),
        Section("Learning", learning(content)),
        Section("The search", search(content)),
        Section("What matters", importance(content)),
        Section("How it was measured", measured(content)),
    ]
    title, subtitle = headline(content), " → ".join(filter(None, map(shape, (content.parent, content.student))))
    sections = [section for section in made if section.blocks]
    write_page(folder / "report", title, subtitle, missing(content), cards(content), sections)


def read(folder: Path) -> Content:
    content = Content(
        search=read_json(folder / "search.json"),
        summary=read_json(folder / "summary.json"),
        importance=load_file(file) if (file := folder / "importance.safetensors").is_file() else {},
    )
    if not (content.search or content.summary):
        raise ValueError(
            f"{folder} has nothing to report on: neither search.json nor summary.json is there. Give the folder that "
            "`python -m train compress` wrote."
        )
    for file in sorted(folder.glob("runs/*/metrics.jsonl")):
        lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n"))
        validations = [row for row in lines if row.get("val_loss") is not None and row.get("tokens") is not None]
        if validations:
            content.trainings[file.parent.name] = validations
    return content


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); let `python -m train compress` write it again.") from None


def missing(content: Content) -> list[str]:
    parts = {
        "the search (search.json)": content.search,
        "the models beside each other (summary.json)": content.summary,
        "trainings (runs/*/metrics.jsonl)": content.trainings,
        "the importance of layers and parts (importance.safetensors)": content.importance,
    }
    lacking = [name for name, found in parts.items() if not found]
    if content.summary:
        lacking += [f"the model “{name}”" for name in WHAT if name not in content.models]
    return [f"Not there: {', '.join(lacking)}."] if lacking else []


@dataclass
class Gains:
    """The student over the parent, None where not both are known; `quality` over the parent trained on, or else the parent."""

    parameters: float | None
    speed: float | None
    quality: float | None
    against: str


def gains(content: Content) -> Gains:
    over = content.models.get("parent trained on")
    return Gains(
        ratio(content.student, content.parent, "parameters"),
        ratio(content.student, content.parent, "tokens_per_second"),
        ratio(content.student, over or content.parent, "bits_per_byte" if content.summary else "loss"),
        "parent trained on as many tokens" if over else "parent",
    )


def ratio(a: dict[str, Any], b: dict[str, Any], name: str) -> float | None:
    return a[name] / b[name] if a.get(name) and b.get(name) else None


def headline(content: Content) -> str:
    won = gains(content)
    told = []
    if won.parameters is not None:
        told.append(f"{abs(1 - won.parameters):.0%} {'fewer' if won.parameters < 1 else 'more'} parameters")
    if won.speed is not None:
        told.append(f"{won.speed:.2f} times the tokens per second")
    if won.quality is not None:
        what = "bits per byte" if content.summary else "loss before distillation"
        told.append(f"{abs(won.quality - 1):.1%} {'more' if won.quality > 1 else 'less'} {what} than the {won.against}")
    return ", ".join(told)[:1].upper() + ", ".join(told)[1:] if told else "A compression"


def cards(content: Content) -> dict[str, str]:
    won, tokens, of = gains(content), content.summary.get("distillation_tokens"), content.summary.get("parent_tokens")
    share = f", {tokens / of:.2%} of those of the parent's training" if of and tokens is not None else ""
    found = {
        "parameters": None if won.parameters is None else signed(won.parameters),
        f"tokens/s, {request(content)}": None if won.speed is None else f"{won.speed:.2f} ×",
        f"{'bits per byte' if content.summary else 'loss, not distilled'}, beside the {won.against}": (
            None if won.quality is None else signed(won.quality)
        ),
        f"tokens of distillation{share}": None if tokens is None else short(tokens),
    }
    return {name: value for name, value in found.items() if value is not None}


def signed(value: float) -> str:
    return f"{100 * (value - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def request(content: Content) -> str:
    told = content.summary or content.search
    return f"prompt {told['prompt']:,} in, {told['new']:,} out" if {"prompt", "new"} <= told.keys() else "as it was timed"


def layers(pattern: str) -> str:
    """The pattern; of a long one how many layers of each kind there are."""
    if len(pattern) <= LONG:
        return pattern
    return f"{len(pattern)}: " + ", ".join(f"{pattern.count(symbol)} {symbol}" for symbol in dict.fromkeys(pattern))


def shape(model: dict[str, Any]) -> str:
    told = [layers(model["pattern"])] if model.get("pattern") else []
    return ", ".join([*told, f"{model['parameters']:,} parameters"] if model.get("parameters") else told)


def patterns(models: Iterable[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Those that the tables have no room for, folded up."""
    long = {name: model["pattern"] for name, model in models if len(model.get("pattern") or "") > LONG}
    return [Listing("Layers, one by one", [("", f"{name}\n{pattern}\n\n") for name, pattern in long.items()], fold=True)] * bool(
        long
    )


# How a cell is written; others as they are.
FORMS: dict[str, Callable[[Any], str]] = {
    "pattern": layers, "parameters": short, "tokens": short, "memory_bytes": lambda value: scaled(value, BYTES),
    "tokens_per_second": lambda value: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}",
    **dict.fromkeys(("nats_per_token", "bits_per_byte", "accuracy", "agreement", "loss", "distilled_loss"), "{:.3f}".format),
    **dict.fromkeys(("request_seconds", "damage"), "{:.3g}".format),
}  # fmt: skip


def written(row: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    def cell(name: str) -> Any:
        value = row.get(name)
        if value is None or name not in FORMS:
            return value
        return Shown(FORMS[name](value), FORMS[name](value) if name == "pattern" else value)

    return {name: cell(name) for name in fields}


MODELS = {
    "name": "model", "pattern": "layers", "parameters": "parameters", "bits_per_byte": "validation, bits/byte",
    "accuracy": "next token right", "agreement": "agrees with the parent", "tokens_per_second": "tokens/s",
    "request_seconds": "seconds a request", "memory_bytes": "memory", "tokens": "tokens after pruning",
}  # fmt: skip


def side_by_side(content: Content) -> list[Any]:
    if not content.summary:
        return []
    rows = [written(entry | {"name": name}, MODELS) for name, entry in content.models.items()]
    context = content.summary.get("context") or content.search.get("budget", {}).get("context")
    kept = f"weights and the cache of {context:,} tokens" if context else "weights and cache"
    note = (
        "Accuracy and agreement: the share of validation tokens whose likeliest prediction is the text's, and the parent's. "
        f"Tokens/s: read and written, over a request's seconds ({request(content)}, batch {content.summary.get('batch', 1)}). "
        f"Memory: {kept}, computed."
    )
    told = {name: WHAT[name] for name in content.models if name in WHAT}
    return [Table(MODELS, rows), Facts(told), Text(note), *patterns(content.models.items())]


def learning(content: Content) -> list[Any]:
    runs = content.trainings
    if not runs:
        return []
    in_bits = all(row.get("val_bits_per_byte") is not None for row in chain(*runs.values()))
    curve, unit, figure = (
        ("val_bits_per_byte", "bits per byte", "bits_per_byte") if in_bits else ("val_loss", "nats per token", "nats_per_token")
    )
    levels = {"parent": content.models["parent"][figure]} if content.models.get("parent", {}).get(figure) is not None else {}
    drawn = [charts.validation_curves(runs, curve, unit, levels, since) for since in (0.0, LATE)]
    fields = {"name": "training", "first": f"at first, {unit}", "last": f"at last, {unit}", "tokens": "tokens"}
    rows = []
    for name, of in runs.items():
        ends = [Shown(f"{row[curve]:.3f}", row[curve]) for row in (of[0], of[-1])]
        rows.append({"name": name, "first": ends[0], "last": ends[1]} | written(of[-1], ["tokens"]))
    return [drawn, Table(fields, rows)]


STAGES = {
    "grid": ("grid", "combinations of layers and widths that were looked at"),
    "within_budget": ("within budget", "of these, what keeps to the budget"),
    "scored": ("scored", "cut out of the parent, and their loss measured without training"),
    "timed": ("timed", "the best of these, their requests timed"),
    "kept": ("kept", "the best of these, distilled for a short time"),
}
CANDIDATES = {
    "name": "candidate", "pattern": "layers", "hidden_size": "width", "parameters": "parameters", "memory_bytes": "memory",
    "damage": "predicted damage", "loss": "nats/token", "accuracy": "next token right", "agreement": "agrees with the parent",
    "request_seconds": "seconds a request", "tokens_per_second": "tokens/s", "distilled_loss": "nats/token, shortly distilled",
}  # fmt: skip


def search(content: Content) -> list[Any]:
    if not content.search:
        return []
    counts = {name: count for name, count in content.search.get("funnel", {}).items() if name in STAGES}
    stages = [{"stage": STAGES[name][0], "count": count, "what": STAGES[name][1]} for name, count in counts.items()]
    blocks: list[Any] = []
    if counts:
        blocks.append(Table({"stage": "stage", "count": "candidates", "what": "which"}, stages))
        blocks.append([charts.funnel({STAGES[name][0]: count for name, count in counts.items()})])
    drawn: list[Chart] = []
    named = {"winner": winner(content), "parent": content.search.get("parent")} | uniform(content)
    for x, title, unit in (
        ("parameters", "Loss against size", "parameters"),
        ("tokens_per_second", "Loss against speed", f"tokens/s, {request(content)}"),
    ):
        rows = [row for row in content.candidates if row.get(x) is not None and row.get("loss") is not None]
        marked = {name: row for name, row in named.items() if row and row.get(x) is not None and row.get("loss") is not None}
        if rows:
            drawn.append(charts.trade_off(f"loss-{x.replace('_', '-')}", title, rows, marked, x, unit, x != "parameters"))
    best = content.candidates[:BEST]
    columns = {name: heading for name, heading in CANDIDATES.items() if any(row.get(name) is not None for row in best)}
    won = {(i, "name") for i, row in enumerate(best) if row is named["winner"]}
    note = f"The best {len(best)} of {len(content.candidates)} candidates, the best first. Losses are before any distillation."
    absent = [name for name in ("uniform depth", "uniform width") if named.get(name) is None]
    if absent:
        note += f" Not in the pictures: {' and '.join(absent)}, which the search did not score."
    table = Table(columns, [written(row, columns) for row in best], won)
    blocks += [drawn] if drawn else []
    return blocks + ([Text(note), table] if best else []) + patterns((row["name"], row) for row in best)


def winner(content: Content) -> dict[str, Any] | None:
    """The candidate that became the student; before there is one, the best."""
    same = (row for row in content.candidates if alike(row, content.summary.get("student") or {}))
    return next(same, next(iter(content.candidates), None))


def uniform(content: Content) -> dict[str, dict[str, Any]]:
    """The candidates that have the shape of a uniform baseline, or its name."""
    found = {}
    for name in ("uniform depth", "uniform width"):
        entry = content.models.get(f"{name} + distilled", {})
        called = [row for row in content.candidates if row.get("name", "").startswith(name)]
        fit = called or [row for row in content.candidates if alike(row, entry)]
        if fit:
            found[name] = fit[0]
    return found


def alike(row: dict[str, Any], entry: dict[str, Any]) -> bool:
    return bool(entry) and all(row.get(name) == entry.get(name) for name in ("pattern", "parameters"))


def importance(content: Content) -> list[Any]:
    """Pictures of what the file has; where the parent's pattern is unknown or of another length, of the channels alone."""
    tensors, pattern = content.importance, content.parent.get("pattern") or ""
    whole: list[Chart] = []
    blocks: list[Any] = [whole]
    told = []
    if pattern and len(tensors.get("layers", ())) == len(pattern):
        whole.append(charts.layer_importance(tensors["layers"], pattern))
        if none := [str(i) for i, value in enumerate(tensors["layers"]) if value <= 0]:
            told.append(f"Without a bar, since they are not above 0: layers {', '.join(none)}.")
    if len(tensors.get("channels", ())):
        whole.append(charts.sorted_curves("channels", "channels", [tensors["channels"]], -1))
    for symbol in dict.fromkeys(pattern):
        of, numbers = PARTS.get(symbol, f"parts of {SYMBOLS.get(symbol, symbol)}"), charts.of_kind(pattern, symbol)
        parts = {i: values for i in numbers if len(values := tensors.get(f"parts.{i}", np.empty(0)))}
        name, colour = of.replace(" ", "-").lower(), charts.kind_colour(symbol)
        if parts:
            spread = charts.spread_within_layers(name, of, parts, len(pattern), colour)
            blocks.append([spread, charts.sorted_curves(name, of, parts.values(), colour)])
    if len(blocks) > 1:
        told.append(
            "Parts are the neurons of an FFN, the heads of a Mamba-2 layer and the groups of keys and values of attention; "
            f"channels are those of the whole model's width. What has less than {charts.FLOOR:g} of the largest is drawn at "
            "that height. By layer: a thin line from the least to the most, a thick one over the middle 80%, a dot for the "
            "median. A sorted curve that falls at once says that few parts carry the layer; a flat one, that all do."
        )
    return [*filter(None, blocks), *[Text(" ".join(told))] * bool(told)]


def measured(content: Content) -> list[Any]:
    summary, budget = content.summary, content.search.get("budget") or {}
    told = summary or content.search
    settings = {
        "request": f"{request(content)}, batch {summary.get('batch', 1)}",
        "context for memory": f"{told['context']:,} tokens" if told.get("context") else None,
        "tokens of distillation": count(summary.get("distillation_tokens")),
        "tokens of the parent's training": count(summary.get("parent_tokens")) or ("not known" if summary else None),
    }
    limits = {
        "budget: parameters": count(budget.get("parameters")),
        "budget: memory": None if budget.get("memory_bytes") is None else scaled(budget["memory_bytes"], BYTES),
        "budget: request": None if budget.get("request_seconds") is None else f"{budget['request_seconds']:.3g} s",
    }
    if budget and not any(limits.values()):
        limits["budget"] = "none"
    widths = {f"bits of a {name[:-5]}": str(budget[name]) for name in ("weight_bits", "cache_bits") if budget.get(name)}
    if budget.get("context"):
        widths["budget's context"] = f"{budget['context']:,} tokens"
    facts = {name: value for name, value in (settings | limits | widths).items() if value is not None}
    blocks: list[Any] = [Facts(facts)]
    if seconds := summary.get("seconds"):
        rows = [{"phase": phase, "seconds": Shown(f"{value:,.1f}", value)} for phase, value in seconds.items()]
        blocks.append(Table({"phase": "phase", "seconds": "seconds"}, rows))
    return blocks + ([Facts(summary["machine"])] if summary.get("machine") else [])


def count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
