"""A page on a training run: what it learned, what that is worth beside simple baselines, and how fast the model is."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from eval import perplexity, throughput
from eval.baselines import order3_bits_per_byte, xz_bits_per_byte
from eval.machine import machine
from eval.page import page
from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.sources import Source, split_source
from hybridlm.output import quiet, write_json
from hybridlm.twin import transformer_twin

COMPARED_BYTES = 2**18  # of validation text, for the model and its baselines: seconds of work on a laptop
NEW_TOKENS = 32


def report(run: Path, prompts: list[int]) -> str:
    """Writes report/index.html and report/report.json into the run's directory. Gives the headline.

    Raises:
        ValueError: no run there, one without a checkpoint, or its data cannot be read any more.
    """
    quiet()
    config_text, config, metrics = read_run(run)
    training = [row for row in metrics if row.get("loss") is not None]  # null where a step went wrong
    validation = [row for row in metrics if "val_loss" in row]
    folder = run / "model"
    content: dict[str, Any] = {
        "run": str(run),
        "checkpoint": folder.resolve().parent.name,
        "step": metrics[-1]["step"],
        "steps": config["train"]["steps"],
        "finished": metrics[-1]["step"] >= config["train"]["steps"],
        "tokens": metrics[-1]["tokens"],
        "val_loss": validation[-1]["val_loss"] if validation else None,
        "val_bits_per_byte": validation[-1]["val_bits_per_byte"] if validation else None,
        "training_tokens_per_second": statistics.median(row["tokens_per_second"] for row in training) if training else None,
    }
    content |= compare(folder, config["data"])
    content["twin_fault"] = twin_fault = no_twin(folder)
    content["throughput"] = throughput.evaluate([str(folder)], prompts, [NEW_TOKENS], [1], twin=twin_fault is None)
    content["machine"] = machine()
    out = run / "report"
    out.mkdir(exist_ok=True)
    write_json(content, out / "report.json")
    samples = lines(run / "samples.jsonl")
    (out / "index.html").write_text(page(content, training, validation, samples, config_text), encoding="utf-8")
    return headline(content, out / "index.html")


def read_run(run: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The run's config.yaml, as text and as values, and its metrics."""
    remedy = "Give the directory that `python -m train` wrote (run_dir)."
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run directory: it has no config.yaml. {remedy}")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or not {"data", "train"} <= config.keys():
        raise ValueError(f"{run}/config.yaml is not the configuration of a run: it lacks the sections data and train. {remedy}")
    if not (run / "model" / "config.json").is_file():
        raise ValueError(f"{run} has no checkpoint yet: there is no {run}/model. Report on it after its first checkpoint.")
    metrics = lines(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(
            f"{run} has no metrics yet: metrics.jsonl is missing or empty. Report on it after its first logged step."
        )
    return text, config, metrics


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file. A run that is going on may be in the middle of its last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def compare(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """The model, the byte model and xz on the same validation text; of a blend, on that of its first source.

    Raises:
        ValueError: the data was streamed, so there is no training text to count.
    """
    if data.get("streaming"):
        raise ValueError("a run with data.streaming keeps no text for the report's baselines; see `python -m eval perplexity`.")
    entry = data["blend"][0] if data.get("blend") else data
    settings = {key: entry[key] for key in ("revision", "text_column", "template") if entry.get(key) is not None}
    source = Source(entry["source"], **settings)
    val_source = None if data["val_source"] is None else replace(source, source=data["val_source"], revision=None)
    training, validation = split_source(source, val_source, data["val_fraction"])
    texts = first_documents(validation, COMPARED_BYTES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HybridLMForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    score = perplexity.measure(model, load_tokenizer(folder), texts, data["seq_len"], name=str(folder))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": {
            "model": score["bits_per_byte"],
            "order3": order3_bits_per_byte(training, texts),
            "xz": xz_bits_per_byte(texts),
            "files": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "window": data["seq_len"],
        },
    }


def first_documents(documents: Iterable[str], limit: int) -> list[str]:
    """The first whole documents, up to `limit` bytes together; where the very first has more, its beginning."""
    texts: list[str] = []
    left = limit
    for text in documents:
        left -= len(text.encode())
        if left < 0:
            return texts or [text.encode()[:limit].decode(errors="ignore")]
        texts.append(text)
    return texts


def no_twin(folder: Path) -> str | None:
    """Why the model has no Transformer twin; None where it has one."""
    try:
        transformer_twin(HybridLMConfig.from_pretrained(folder))
    except ValueError as error:
        return str(error)
    return None


def headline(content: dict[str, Any], path: Path) -> str:
    compared = content["bits_per_byte"]
    loss = "none yet"
    if content["val_loss"] is not None:
        loss = f"{content['val_loss']:.3f} nats/token, {content['val_bits_per_byte']:.3f} bits/byte"
    state = "" if content["finished"] else f" · unfinished: step {content['step']:,} of {content['steps']:,}"
    lines = [
        f"{content['run']}: {content['parameters']:,} parameters · {content['tokens']:,} tokens · validation loss {loss}{state}",
        f"bits per byte: model {compared['model']:.3f} · order-3 byte model {compared['order3']:.3f} · "
        f"xz -9 per file {compared['xz']:.3f} (on the same {compared['files']} validation files)",
    ]
    for row in content["throughput"]:
        decode = row["decode_tokens_per_second"]
        lines.append(
            f"prompt {row['prompt']:,}: {row['prefill_tokens_per_second']:,.0f} tokens/s in, {decode:,.0f} out, "
            f"{row['peak_memory_bytes'] / 1e6:,.1f} MB · {'twin' if row['model'].endswith(throughput.TWIN) else 'model'}"
        )
    return "\n".join([*lines, f"report: {path}"])
