"""Figures that commands wrote with --json: told apart by their fields, so that any number of files can be read together."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.generation import FIT
from eval.throughput import TWIN

# What every row of a kind has; the fields that tell two rows of one model apart.
FIELDS = {
    "perplexity": {"model", "nats_per_token", "bits_per_byte"},
    "throughput": {"model", "prompt", "new", "batch", "request_seconds"},
    "accuracy": {"model", "task", "value"},
    "longcontext": {"model", "task", "length", "depth", "accuracy"},
}
KEYS = {
    "perplexity": ("text_sha256", "window", "stride", "carry"),
    "throughput": ("prompt", "new", "sequences", "fit_memory_bytes"),
    "accuracy": ("task", "metric", "filter", "shots"),
    "longcontext": ("task", "length", "depth"),
}
Results = dict[str, list[dict[str, Any]]]


def read_results(paths: Iterable[str]) -> Results:
    """Rows by kind of result, each with the `file` that it comes from; a row of accuracy is one task of one model.

    Raises:
        ValueError: a file that is absent or holds none of these results, or two that hold the same one.
    """
    results: Results = {kind: [] for kind in FIELDS}
    origin: dict[tuple, tuple[int, str]] = {}
    for i, path in enumerate(paths):
        rows = rows_of(load(path), path)
        kind = kind_of(rows, path)
        for row in with_origin(rows, path):
            key = (kind, identity(row["model"]), *(row.get(field) for field in KEYS[kind]))
            if origin.get(key) == (i, path):
                continue  # asked for twice: as a task and in its group, for instance
            if key in origin:
                raise ValueError(f"{path} has what {origin[key][1]} has: {kind} of {row['model']}. Give one of the two.")
            origin[key] = (i, path)
            results[kind].append(row)
    return results


def with_origin(rows: Iterable[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Rows with the `file` they come from; of throughput also with the `sequences` asked for: a number, or as many as fit."""
    return [
        row | {"file": path} | ({"sequences": FIT if row.get("fit_memory_bytes") else row["batch"]} if "batch" in row else {})
        for row in rows
    ]


def load(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON: {error}. Give a file that a command of `python -m eval` wrote with --json."
        ) from None


def rows_of(content: Any, path: str) -> list[dict[str, Any]]:
    """The content of a file as rows: one object is a list of one, and a model's list of tasks is a row for each."""
    rows = content if isinstance(content, list) else [content]
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("model"), str) for row in rows):
        raise ValueError(f"{path} holds no results: it is not an object with a `model`, nor a list of such. {REMEDY}")
    if all(isinstance(row.get("tasks"), list) for row in rows):
        shared = [{field: value for field, value in row.items() if field != "tasks"} for row in rows]
        return [about | task for about, row in zip(shared, rows) for task in row["tasks"]]
    return rows


def kind_of(rows: list[dict[str, Any]], path: str) -> str:
    """
    Raises:
        ValueError: rows that are of no kind of result known here.
    """
    for kind, fields in FIELDS.items():
        if all(fields <= row.keys() for row in rows):
            return kind
    has = ", ".join(sorted(rows[0])) if rows else "nothing"
    raise ValueError(f"{path} holds no results of a kind known here: its rows have {has}. {REMEDY}")


REMEDY = f"Give what `python -m eval {'|'.join(FIELDS)} --json` wrote."


def identity(name: str) -> str:
    """Equal for all spellings of one model folder; the twin of a model is not the model."""
    folder, twin = name.removesuffix(TWIN), name.endswith(TWIN)
    return (os.path.realpath(folder) if Path(folder).exists() else os.path.normpath(folder)) + TWIN * twin


def labels(names: Iterable[str]) -> dict[str, str]:
    """Short names: the ends of the paths, as long as it takes to tell them apart, without the `model` that ends those of runs."""
    parts = {name: Path(name).parts for name in names}
    parts = {name: part[:-1] if part[-1:] == ("model",) and len(part) > 1 else part for name, part in parts.items()}
    length = 1
    while len({part[-length:] for part in parts.values()}) < len(parts) and length < max(map(len, parts.values())):
        length += 1
    return {name: "/".join(part[-length:]) for name, part in parts.items()}
