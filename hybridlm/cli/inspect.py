"""What a model is made of and what it costs, from its configuration alone."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hybridlm.checkpoint import check_folder
from hybridlm.cluster import communication
from hybridlm.configuration import CLASSIFIER, HybridLMConfig
from hybridlm.flops import forward_flops, layer_flops, training_flops
from hybridlm.memory import (
    GIB,
    MARGIN,
    Plan,
    activation_bytes,
    cache_bytes,
    fits,
    longest_context,
    moments,
    peak_bytes,
    remedies,
    state_bytes,
    weight_bytes,
)
from hybridlm.output import BYTES, COUNT, FLOP, scaled, table
from hybridlm.pattern import SYMBOLS, unknown_symbols
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import active_parameters, count_parameters, parameters_by_kind, transformer_twin

CONTEXTS = {"4k": 2**12, "16k": 2**14, "64k": 2**16, "256k": 2**18, "1M": 2**20}
Rows = list[tuple[str, ...]]
# What a run's config that does not say trains with: the defaults of `train`, which the library does not import.
RUN_DEFAULTS: dict[str, Any] = {
    "precision": "fp32",
    "sharding": "none",
    "recompute": "",
    "micro_batch": None,
    "global_batch": 16,
    "steps": 1000,
    "seq_len": 512,
}
OPTIMIZERS = {"adamw": "AdamW's two moments, 8", "muon": "Muon's mean of the layers' matrices, 4, AdamW's moments of the rest, 8"}
PARTS = {  # of the fullest moments, as a person reads them
    "activations": "activations",
    "head": "weight and gradient of the head",
    "logits": "a block of logits",
    "work": "backward of a layer",
    "gathered": "two layers gathered",
    "whole_gradients": "gradients of one before reduction",
}


def read_config(source: str) -> HybridLMConfig:
    """From a shape file, the config of a run, a config.json, a model folder or the name of one on the hub.

    Raises:
        ValueError: none of them there, or not a valid one.
    """
    path = Path(source).expanduser()
    is_shape = path.suffix in (".yaml", ".yml")
    if path.suffix == ".json" and not path.is_file():
        raise ValueError(f"there is no file {source}.")
    if not is_shape and not path.is_file():
        check_folder(source)
    try:
        if not is_shape:
            return HybridLMConfig.from_pretrained(path if path.exists() else source)
        values = load_yaml(path)
        if is_run(values):
            run = values["model"]
            if (shape := run.get("config") or run.get("init_from")) is None:
                raise ValueError(f"{source} has neither model.config nor model.init_from.")
            if not isinstance(shape, dict) and Path(shape).resolve() == path.resolve():
                raise ValueError(f"{source} names itself as the place of its model.")
            return HybridLMConfig.from_strict_dict(shape) if isinstance(shape, dict) else read_config(str(shape))
        return HybridLMConfig.from_strict_dict(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None


def is_run(values: dict[str, Any]) -> bool:
    return isinstance(values.get("model"), dict)


def read_plan(source: str, gpus: int, given: dict[str, Any]) -> tuple[Plan, int | None]:
    """How `source` is trained on so many GPUs, and for how many steps: as `given` says (None: it does not), else as the config of
    a run does, else as most would a bare shape: in bf16, sharded where there are several GPUs.

    Raises:
        ValueError: a batch that does not divide, or a kind of layer that there is not.
    """
    path = Path(source).expanduser()
    values = load_yaml(path) if path.suffix in (".yaml", ".yml") else {}
    bare = {"sharding": "fsdp2" if gpus > 1 else "none", "micro_batch": 1}
    if run := is_run(values):
        said = {**(values.get("train") or {}), **(values.get("data") or {})}
        bare = {key: said.get(key, default) for key, default in RUN_DEFAULTS.items()}
        bare["optimizer"] = (values.get("optim") or {}).get("name", "muon")
    chosen = bare | {key: value for key, value in given.items() if value is not None}
    if gpus == 1:
        chosen["sharding"] = "none"  # as `train` has it: there is nobody to share with
    steps: int | None = chosen.pop("steps", None)
    if unknown := unknown_symbols(chosen.get("recompute", "")):
        raise ValueError(f"recompute: {unknown!r} is no kind of layer; give some of {', '.join(SYMBOLS)}.")
    if run:
        batch: int = chosen["global_batch"]
        if batch % gpus:
            raise ValueError(f"train.global_batch ({batch}) must be a multiple of the number of GPUs ({gpus}).")
        chosen["micro_batch"] = chosen["micro_batch"] or batch // gpus
        if batch // gpus % chosen["micro_batch"]:
            share = f"{batch} / {gpus} = {batch // gpus}"
            raise ValueError(f"the micro-batch ({chosen['micro_batch']}) must divide a GPU's share of the batch ({share}).")
    return Plan(gpus=gpus, **chosen), steps


def figures(config: HybridLMConfig, plan: Plan, *, memory: float | None = None, steps: int | None = None) -> dict[str, Any]:
    """All that the page shows, in parameters, FLOPs, bytes and seconds.

    Args:
        memory: bytes of a GPU, where the question is whether the plan fits.
        steps: of the run, where it is known.
    """
    kinds, total, seq_len = parameters_by_kind(config), count_parameters(config), plan.seq_len
    flops = {symbol: layer_flops(config, symbol, seq_len) for symbol in kinds if symbol in SYMBOLS}
    flops["head"] = forward_flops(config, seq_len)["head"]
    rows = [
        {"kind": kind, "layers": (count := config.hybrid_override_pattern.count(kind) if kind in SYMBOLS else 1),
         "parameters_each": each, "parameters": count * each, "share": count * each / total,
         "flops_per_token": count * flops.get(kind, 0.0)}
        for kind, each in kinds.items()
    ]  # fmt: skip
    cache = [{"context": context, "bytes": cache_bytes(config, context)} for context in CONTEXTS.values()]
    try:
        twin = transformer_twin(config)
        cache = [row | {"twin_bytes": cache_bytes(twin, row["context"])} for row in cache]
        twin_is = (
            f"The Transformer twin: {twin.num_hidden_layers:,} layers, attention and FFN in turn, FFN width "
            f"{twin.intermediate_size:,}, {count_parameters(twin):,} parameters."
        )
    except ValueError as error:
        twin_is = f"No Transformer twin to compare with: {error}"
    return {
        "pattern": config.hybrid_override_pattern,
        "classifier": classifier(config),
        "layers": rows,
        "parameters": total,
        "active_parameters": active_parameters(config),
        "seq_len": seq_len,
        "forward_flops_per_token": sum(forward_flops(config, seq_len).values()),
        "training_flops_per_token": training_flops(config, seq_len),
        "weight_bytes": weight_bytes(config),
        "cache": cache,
        "twin": twin_is,
        "training": training_figures(config, plan, memory),
        "communication": communication(config, plan, steps) if plan.gpus > 1 else None,
        "inference": None if memory is None else {"memory_bytes": memory, "longest_context": longest_context(config, memory)},
    }


def classifier(config: HybridLMConfig) -> str | None:
    """What is counted of a classifier, which has another head."""
    is_one = config.architectures == [CLASSIFIER]
    if not is_one and config.bidirectional is None:
        return None
    rows, width = f"{config.num_labels:,}" if is_one else "labels", config.hidden_size
    return (
        f"A classifier: its head is {rows} x {width:,}. Counted is that of a language model, {config.vocab_size:,} x {width:,}."
    )


def training_figures(config: HybridLMConfig, plan: Plan, memory: float | None) -> dict[str, Any]:
    kinds = "".join(dict.fromkeys(config.hybrid_override_pattern))
    found: dict[str, Any] = asdict(plan) | {
        "state_bytes": state_bytes(config, plan),
        "moments": moments(config, plan),
        "peak_bytes": peak_bytes(config, plan),
        "activation_bytes": {
            "all_kept": activation_bytes(config, replace(plan, recompute="")),
            "as_planned": activation_bytes(config, plan),
            "all_recomputed": activation_bytes(config, replace(plan, recompute=kinds)),
        },
    }
    if memory is not None:
        found |= {"memory_bytes": memory, "margin": MARGIN, "fits": fits(config, plan, memory)}
        plans = [] if found["fits"] else remedies(config, plan, memory)
        found["remedies"] = [{"change": changes(plan, other), "peak_bytes": peak_bytes(config, other)} for other in plans]
    return found


def changes(plan: Plan, other: Plan) -> str:
    """The flags that lead from one plan to another."""
    flags = {"recompute": "'{}'", "micro_batch": "{}", "sharding": "{}", "gpus": "{}"}
    changed = [name for name in flags if getattr(plan, name) != getattr(other, name)]
    return " ".join(f"--{name.replace('_', '-')} {flags[name].format(getattr(other, name))}" for name in changed)


def page(f: dict[str, Any]) -> str:
    """The figures as a person reads them, each with what it is made of."""
    cache = "Cache of one sequence: keys and values, and the last inputs of convolutions, in bf16; recurrent states in fp32."
    if not f["cache"][-1]["bytes"]:
        cache = "It has no cache: nothing is kept from one token to the next."
    parts = [
        f"pattern  {f['pattern']}" + (f"\n{f['classifier']}" if f["classifier"] else ""),
        table(layer_rows(f), "<<"),
        table(sum_rows(f), "<><"),
        f"{cache}\n{f['twin']}",
        table(cache_rows(f)),
        training_heading(f["training"]),
        table(training_rows(f["training"]), "<><"),
    ]
    if f["inference"]:
        parts += [verdict(f["training"]), inference(f["inference"])]
    if f["communication"]:
        parts += [
            "Communication of each GPU. Not measured: the rates are those of H100 machines on paper. At best a byte enters a\n"
            "machine once and goes on inside by NVLink; at worst every GPU fetches all that it needs over its own network card.",
            table(communication_rows(f["communication"], f["training"]), "<><"),
        ]
    return "\n\n".join(parts)


def layer_rows(f: dict[str, Any]) -> Rows:
    rows: Rows = [("layers", "", "number", "parameters each", "in all", "share", f"FLOPs/token at {f['seq_len']:,}")]
    for row in f["layers"]:
        symbol, name = (row["kind"], SYMBOLS[row["kind"]]) if row["kind"] in SYMBOLS else ("", row["kind"])
        counts = (f"{row[field]:,}" for field in ("layers", "parameters_each", "parameters"))
        flops = scaled(row["flops_per_token"], FLOP) if row["flops_per_token"] else "-"
        rows.append((symbol, name, *counts, f"{row['share']:.1%}", flops))
    return rows


def sum_rows(f: dict[str, Any]) -> Rows:
    total, active = f["parameters"], f["active_parameters"]
    experts = "all: there are no experts" if total == active else "all but the experts that a token does not go to"
    return [
        ("parameters", f"{total:,}", f"{scaled(total, COUNT)}; embedding and head are two matrices"),
        ("active", f"{active:,}", f"{scaled(active, COUNT)}; {experts}"),
        ("forward", scaled(f["forward_flops_per_token"], FLOP), "per token: matrix products, 2 FLOPs a multiply-add"),
        ("training", scaled(f["training_flops_per_token"], FLOP), "per token: 3 x forward, nothing recomputed"),
        ("weights, fp32", scaled(f["weight_bytes"]["fp32"], BYTES), "4 bytes each"),
        ("weights, bf16", scaled(f["weight_bytes"]["bf16"], BYTES), "2 bytes each"),
        (
            "weights, fp8",
            scaled(f["weight_bytes"]["fp8"], BYTES),
            "1 byte each in the layers; embedding, head and last norm in bf16",
        ),
    ]


def cache_rows(f: dict[str, Any]) -> Rows:
    rows: Rows = [("context", "cache", "twin's", "ratio")]
    for name, row in zip(CONTEXTS, f["cache"]):
        own, twin = row["bytes"], row.get("twin_bytes")
        beside = (scaled(twin, BYTES), f"{twin / own:,.1f}x" if own else "-") if twin else ("-", "-")
        rows.append((name, scaled(own, BYTES), *beside))
    return rows


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def training_heading(training: dict[str, Any]) -> str:
    gpus, whole = training["gpus"], "each with the whole model (DDP)"
    shared = f", {'sharded (fsdp2)' if training['sharding'] == 'fsdp2' else whole}" if gpus > 1 else ""
    again = f"; activations of {training['recompute']} computed again" if training["recompute"] else ""
    return (
        f"Training in {training['precision']} on {gpus:,} GPU{'s' if gpus > 1 else ''}{shared}{again}: on each, for a "
        f"micro-batch of {training['micro_batch']:,} x {training['seq_len']:,} tokens.\n"
        "An estimate, in GiB of 2^30 bytes, with the eager operators. fp8 narrows only what enters a product."
    )


def training_rows(training: dict[str, Any]) -> Rows:
    gpus, state, moments = training["gpus"], training["state_bytes"], training["moments"]
    over = f"parameters / {gpus:,}" if training["sharding"] == "fsdp2" and gpus > 1 else "parameters"
    kept = training["activation_bytes"]
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    rows: list[tuple[str, float, str]] = [
        ("weights", state["weights"], f"fp32: 4 bytes x {over}"),
        ("gradients", state["gradients"], f"fp32: 4 bytes x {over}"),
        ("optimiser", state["moments"], f"in fp32, {OPTIMIZERS[training['optimizer']]}: bytes x {over}"),
        ("autocast", state["copy"], "its bf16 copy of the layers' matrices"),
        ("DDP", state["buckets"], "its buckets for gradients: 4 bytes x parameters"),
        (
            "activations",
            kept["as_planned"],
            f"kept for backward (of all layers {gib(kept['all_kept'])}, of none {gib(kept['all_recomputed'])})",
        ),
    ]
    for name, parts in moments.items():
        text = " + ".join(f"{PARTS[part]} {gib(size)}" for part, size in parts.items() if size)
        rows.append((f"at the {name}", sum(parts.values()), text))
    rows.append(("peak", training["peak_bytes"], f"what is there all the time, and what comes at the {fullest}"))
    return [(name, gib(size), text) for name, size, text in rows if size]


def verdict(training: dict[str, Any]) -> str:
    need, memory = training["peak_bytes"], training["memory_bytes"]
    of = f"{need / GIB:,.1f} of {memory / GIB:,.1f} GiB"
    if training["fits"]:
        return f"fits: {of}, {1 - need / memory:.0%} left for the allocator, CUDA and NCCL ({MARGIN:.0%} must be)"
    said = f"does not fit: {of}, and {MARGIN:.0%} must be left for the allocator, CUDA and NCCL; "
    if not training["remedies"]:
        return said + "neither recomputing, nor a micro-batch of 1, nor more GPUs make it fit"
    ways = ", ".join(f"{way['change']} ({way['peak_bytes'] / GIB:,.1f} GiB)" for way in training["remedies"])
    return said + f"what would make it fit: {ways}"


def inference(found: dict[str, Any]) -> str:
    context, memory = found["longest_context"], f"{found['memory_bytes'] / GIB:,.1f} GiB"
    if context == 0:
        return f"inference: its weights in bf16 do not fit in {memory}"
    tokens = "a context of any length" if context is None else f"the cache of {context:,} tokens"
    return f"inference: {memory} hold the weights in bf16 and {tokens} ({MARGIN:.0%} left)"


def communication_rows(found: dict[str, Any], training: dict[str, Any]) -> Rows:
    sent, assumed = found["bytes"], found["assumed"]
    rates = dict.fromkeys(f"{assumed[f'bytes_per_second_{case}'] / 1e9:,.0f}" for case in ("best", "worst"))
    every = "a micro-batch" if training["sharding"] == "fsdp2" else "a step"
    rows: Rows = []
    if sent["gathered"]:
        rows.append(("gathered", scaled(sent["gathered"], BYTES), f"{every}: weights, for forward and again for backward"))
    rows += [
        ("reduced", scaled(sent["reduced"], BYTES), f"{every}: gradients, in fp32"),
        ("sending", between(found, "seconds", "s"), f"{every}, at {' and at '.join(rates)} GB/s into a GPU"),
        (
            "computing",
            f"{found['compute_seconds']:,.3g} s",
            f"a micro-batch, at {assumed['flops_per_second'] / 1e12:,.0f} TFLOP/s of a GPU",
        ),
        ("hidden from", between(found, "tokens_to_hide", "tokens"), f"of a GPU in {every}: with fewer it waits"),
    ]
    if "most_gpus" in found:
        text = f"a sequence each; here {found['sequences_per_gpu']:,.3g}. To use more would take tensor or context parallelism"
        rows.append(("at most", f"{found['most_gpus']:,} GPUs", text))
    if "days_best" in found:
        rows.append(("the run", between(found, "days", "days"), f"{scaled(found['tokens'], COUNT)} tokens"))
    return rows


def between(found: dict[str, Any], name: str, unit: str) -> str:
    """The best and the worst case, one figure where they are the same."""
    values = (found[f"{name}_{case}"] for case in ("best", "worst"))
    return f"{' to '.join(dict.fromkeys(f'{v:,.0f}' if v >= 100 else f'{v:.3g}' for v in values))} {unit}"
