"""A report on any number of runs, models and results: what was learned, what it is worth beside baselines, how fast it is."""

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from eval import perplexity, throughput
from eval.baselines import order3_bits_per_byte, xz_bits_per_byte
from eval.charts import TWIN_LABEL
from eval.models import is_ours, open_model
from eval.overview import cards, headline, notices, side_by_side, subtitle, title
from eval.results import Results, identity, labels, read_results, with_origin
from eval.sections import SIDE_BY_SIDE, sections
from eval.throughput import TWIN
from hybridlm import HybridLMConfig
from hybridlm.data.sources import Source, split_source
from hybridlm.machine import machine
from hybridlm.output import quiet, write_json
from hybridlm.pages.page import write_page
from hybridlm.pattern import RECURRENT
from hybridlm.twin import count_parameters, transformer_twin

COMPARED_BYTES = 2**18  # of validation text, for the models and their baselines: seconds of work on a laptop
NEW_TOKENS = 32
DEFAULT_OUT = Path("runs/report")
Rows = list[dict[str, Any]]


def report(runs: list[Path], models: list[str], result_files: list[str], prompts: list[int], out: str | None = None) -> str:
    """Writes index.html, report.md, report.csv, report.json and figures/ into `out`. Gives the headline.

    Args:
        out: by default the folder `report` of the one run, else DEFAULT_OUT.

    Raises:
        ValueError: nothing to report on; no run there, one without a checkpoint, or its data cannot be read any more; a file that
            holds no results.
    """
    quiet()
    if not (runs or models or result_files):
        raise ValueError("there is nothing to report on. Give --run, --model or --results.")
    told = [read_run(run) for run in runs]
    results = read_results(result_files)
    content = measure(told, models, results, prompts)
    folder = Path(out) if out else runs[0] / "report" if len(runs) == 1 else DEFAULT_OUT
    return write(content, told, results, folder)


def read_run(run: Path) -> dict[str, Any]:
    """The facts of a run for report.json, under `facts`; its model folder, config, curves and samples."""
    remedy = "Give the directory that `python -m train` wrote (run_dir)."
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run directory: it has no config.yaml. {remedy}")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or not {"data", "train"} <= config.keys():
        raise ValueError(f"{run}/config.yaml is not the configuration of a run: it lacks the sections data and train. {remedy}")
    if isinstance(config["data"], dict) and config["data"].get("label_column") is not None:
        raise ValueError(
            f"{run} trains a classifier (data.label_column), and a report is on language models. `python -m train status {run}` "
            f"has its figures, {run}/metrics.jsonl those of each step."
        )
    folder = run / "model"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{run} has no checkpoint yet: there is no {folder}. Report on it after its first checkpoint.")
    metrics = lines(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(
            f"{run} has no metrics yet: metrics.jsonl is missing or empty. Report on it after its first logged step."
        )
    training = [row for row in metrics if row.get("loss") is not None]  # null where a step went wrong
    validation = [row for row in metrics if "val_loss" in row]
    facts = {
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
    curves = {"training": training, "validation": validation, "samples": lines(run / "samples.jsonl")}
    return {"facts": facts, "model": str(folder), "data": config["data"], "config_text": text} | curves


def lines(path: Path) -> Rows:
    """The objects of a JSONL file; none where there is no file. A run that is going on may be in the middle of its last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def measure(runs: Rows, models: list[str], results: Results, prompts: list[int]) -> dict[str, Any]:
    """What report.json has. Models of runs and those given beside them are scored and timed, unless results have their speed.

    `results` get the rows that were timed here, and all rows the `label` of their model.
    """
    names = {identity(name): name for name in [*(run["model"] for run in runs), *models]}
    ours = list(names.values())
    for rows in results.values():
        for row in rows:
            folder = row["model"].removesuffix(TWIN)
            names.setdefault(identity(folder), folder)
    label = dict(zip(names, labels(names.values()).values()))
    timed = {identity(row["model"]) for row in results["throughput"]}
    twin_faults = {name: no_twin(name) for name in ours if identity(name) not in timed}
    rows, timing_fault = speeds(list(twin_faults), prompts)
    results["throughput"] += with_origin(rows, "measured here")
    for rows in results.values():
        for row in rows:
            folder = row["model"].removesuffix(TWIN)
            row["label"] = label[identity(folder)] + TWIN_LABEL * (folder != row["model"])
    for run in runs:
        run["label"] = label[identity(run["model"])]
    text = text_scores(runs, {label[identity(name)]: name for name in ours})
    told = {run["label"]: run["facts"] for run in runs}
    models_told = [{"label": label[key], "model": name} | describe(name) for key, name in names.items()]
    table, notes = side_by_side(models_told, told, text, results)
    content: dict[str, Any] = {
        "runs": [run["facts"] for run in runs],
        "models": table,
        "text": text,
        "timing_fault": timing_fault,
        "twin_faults": {label[identity(name)]: fault for name, fault in twin_faults.items() if fault},
        "throughput": [
            {k: v for k, v in row.items() if k not in ("file", "label", "sequences")} for row in results["throughput"]
        ],
        "machine": machine(),
    }
    if len(runs) == 1:  # what the report of one run has always had
        mine = runs[0]["label"]
        of_text = text and {"model": text["models"][mine]} | {k: text[k] for k in ("order3", "xz", "files", "bytes", "window")}
        (parameters,) = (row["parameters"] for row in table if row["label"] == mine)
        content |= runs[0]["facts"] | {
            "parameters": parameters,
            "bits_per_byte": of_text,
            "twin_fault": content["twin_faults"].get(mine),
        }
    return content | notes


def speeds(folders: list[str], prompts: list[int]) -> tuple[Rows, str | None]:
    """Throughput of models in turns, each hybrid beside its twin; what memory did not suffice for, in words."""
    try:
        return (throughput.evaluate(folders, prompts, [NEW_TOKENS], [1]) if folders else []), None
    except throughput.OutOfMemory as error:
        return error.rows, str(error)


def text_scores(runs: Rows, models: dict[str, str]) -> dict[str, Any] | None:
    """Bits per byte of all models and baselines: on the beginning of the validation text of the first run that keeps its text."""
    run = next((run for run in runs if not run["data"].get("streaming")), None)
    if run is None:
        return None
    data = run["data"]
    entry = data["blend"][0] if data.get("blend") else data  # of a blend, on that of its first source
    settings = {key: entry[key] for key in ("revision", "text_column", "template") if entry.get(key) is not None}
    source = Source(entry["source"], **settings)
    val_source = None if data["val_source"] is None else replace(source, source=data["val_source"], revision=None)
    training, validation = split_source(source, val_source, data["val_fraction"])
    texts = first_documents(validation, COMPARED_BYTES)
    scores = {}
    for label, folder in models.items():
        model, tokenizer = open_model(folder)
        scores[label] = perplexity.measure(model, tokenizer, texts, data["seq_len"], name=folder)["bits_per_byte"]
        del model  # before the next one is opened
    return {
        "of": run["label"],
        "models": scores,
        "order3": order3_bits_per_byte(training, texts),
        "xz": xz_bits_per_byte(texts),
        "files": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "window": data["seq_len"],
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


def no_twin(folder: str) -> str | None:
    """Why the model has no Transformer twin; None where it has one."""
    config = HybridLMConfig.from_pretrained(folder) if is_ours(folder) else None
    if config is None or not RECURRENT & set(config.hybrid_override_pattern):
        return "it is a Transformer itself."
    try:
        transformer_twin(config)
    except ValueError as error:
        return str(error)
    return None


def describe(name: str) -> dict[str, Any]:
    """Layers and parameters of a model that is on this machine; of another what is not known."""
    if not (Path(name).expanduser() / "config.json").is_file():
        return {"pattern": None, "parameters": None}
    if is_ours(name):
        config = HybridLMConfig.from_pretrained(name)
        return {"pattern": config.hybrid_override_pattern, "parameters": count_parameters(config)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    return {"pattern": model.config.model_type, "parameters": model.num_parameters()}


def write(content: dict[str, Any], runs: Rows, results: Results, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    write_json(content, out / "report.json")
    made = sections(content, runs, results)
    write_page(out, title(content), subtitle(content), notices(content), cards(content), made)
    with (out / "report.csv").open("w", encoding="utf-8", newline="") as file:
        columns = ["model", *SIDE_BY_SIDE]
        csv.writer(file).writerows([columns, *([row[name] for name in columns] for row in content["models"])])
    return "\n".join([*headline(content, results), f"report: {out / 'index.html'}"])
