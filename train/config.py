"""The configuration of a run: nested frozen dataclasses, filled from a YAML file and the command line (train/command_line.py).

The docstring under a field is its help; its type and bounds are checked, all faults in one message.
"""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hybridlm import HybridLMConfig
from hybridlm.pattern import SYMBOLS, unknown_symbols
from hybridlm.strict_yaml import dump_yaml, load_yaml

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
settings = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True, config=settings)
class Model:
    config: str | dict[str, Any] | None = None
    """shape of the model: a file of configs/model/, or its content inline"""
    init_from: str | None = None
    """start from the weights of this model folder or hub name; its shape then stands in the place of model.config"""


@dataclass(frozen=True, config=settings)
class Ops:
    backend: Literal["auto", "eager", "fused", "naive"] = "auto"
    """implementation of the operators; auto takes the fastest that runs here"""


@dataclass(frozen=True, config=settings)
class BlendEntry:
    """A source of a blend; what is not said here is as in Data."""

    source: str
    weight: Annotated[list[Rate], BeforeValidator(lambda weight: weight if isinstance(weight, list) else [weight])]
    """share of the samples, of any scale: one number, or one for each phase"""
    revision: str | None = None
    text_column: str = "text"
    template: str | None = None
    license: str | None = None


@dataclass(frozen=True, config=settings)
class Data:
    source: str | None = "stdlib"
    """stdlib, a text, JSONL, CSV, Parquet or Arrow file, a folder of one kind, or a hub dataset (name or name:configuration)"""
    blend: Annotated[list[BlendEntry], Field(min_length=1)] | None = None
    """several sources instead of one: a list of {source, weight, revision, text_column, template, license}"""
    phases: tuple[Share, ...] = ()
    """shares of train.steps at which the next weights of the blend begin: with [0.6, 0.8] each source has three weights"""
    revision: str | None = None
    """commit, branch or tag of a hub dataset; default: the newest"""
    val_source: str | None = None
    """where validation comes from; default: the source's own validation split, else val_fraction of it"""
    val_fraction: Share = 0.1
    """share held out of a source that has no validation split: of its documents, or of the characters of a single one"""
    text_column: str = "text"
    """column that holds the text, where the source has columns"""
    template: str | None = None
    """text made of several columns instead, such as {title}: {body}"""
    label_column: str | None = None
    """trains a classifier of whole documents: the column of their labels (of stdlib: package); default: a language model"""
    license: str | None = None
    """licence of the text, for the record; default: what the dataset says"""
    bad_documents: Literal["stop", "skip"] = "stop"
    """what to do at a document that cannot be read or has no text: stop, or skip and count it"""
    tokenizer: str | None = None
    """`bytes`, or folder or hub name of a fast tokenizer; default: that of model.init_from, else bytes"""
    seq_len: Positive = 512
    """predictions in a training window, tokens"""
    packing: Literal["stream", "best-fit"] = "stream"
    """stream: documents end to end, cut where a window ends; best-fit: cut only where longer than a window, with some padding"""
    carry_state: bool = False
    """row i of each batch goes on in the text where row i of the batch before ended, and starts from the state that was left
    there, detached: gradients reach seq_len positions back, the state any number. For patterns without attention"""
    streaming: bool = False
    """read and tokenise while training, and keep nothing: for a hub dataset too large for the disk. Not shuffled"""
    workers: Annotated[int, Field(ge=0)] = 0
    """processes of each rank that read batches ahead"""
    cache_dir: str = "~/.cache/hybridlm"
    """where tokenised data is kept between runs"""


@dataclass(frozen=True, config=settings)
class Optim:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the layers, and AdamW for embedding, head and vectors; adamw: for all"""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """peak learning rate, of both: Muon's updates are made as large as AdamW's"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """of Muon: decay of the gradient's running mean"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of AdamW: decay of the gradient's running mean"""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """of AdamW: decay of the squared gradient's running mean"""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """of AdamW: added to the root of the running mean square"""
    weight_decay: Rate = 0.1
    """decoupled weight decay; none on norms, biases, A_log, D and dt_bias"""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """largest norm of the whole gradient; a larger one is scaled down to it"""
    z_loss: Rate = 0.0
    """weight of (log of the sum of exp(logits))^2 in the gradients, which keeps logits from drifting; not in the logged loss"""
    moe_bias_rate: Rate = 1e-3
    """step of the bias that balances the load of experts (no loss does); 0: it stays"""


@dataclass(frozen=True, config=settings)
class Schedule:
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """share of train.steps over which the learning rate rises linearly to its peak"""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.2
    """share of train.steps at the end over which it falls; in between it is stable"""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """shape of the fall"""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    """learning rate of the last step as a share of the peak"""
    batch_start: Positive | None = None
    """sequences in the first steps; doubles in even stages up to train.global_batch. Default: no warm-up of the batch"""
    batch_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of train.steps after which the batch is whole"""
    length_start: Positive | None = None
    """positions of the rows that windows are cut into in the first steps; doubles up to data.seq_len. Default: they stay whole"""
    length_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of train.steps after which windows are whole"""


@dataclass(frozen=True, config=settings)
class Train:
    steps: Positive = 1000
    """optimiser steps of the whole run"""
    global_batch: Positive = 16
    """sequences in a step, over all ranks together"""
    micro_batch: Positive | None = None
    """sequences in one forward pass of a rank; default: all of its share of the batch"""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """arithmetic of matrix products; weights and optimiser stay fp32. bf16 pays on GPUs and CPUs with bf16 units, fp8 on GPUs"""
    fp8_unfit: Literal["stop", "bf16"] = "stop"
    """with fp8, what to do at a linear layer whose sizes do not divide by 16: stop and name it, or leave it in bf16"""
    fp8_emulate: bool = False
    """with fp8, compute the same numbers without FP8 units, slowly: on CPUs and older GPUs"""
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: parameters, gradients and optimiser state are split over the ranks; none: each rank has all of them"""
    recompute: str = ""
    """kinds of layer, as pattern symbols, whose activations are computed again in backward instead of kept, such as M*-"""
    checkpoint_every: Positive = 500
    """steps between checkpoints; the last step always has one"""
    keep_checkpoints: Positive = 2
    """how many of the newest checkpoints stay"""
    keep_every: Positive | None = None
    """checkpoints of steps that this divides stay for good; default: none"""
    checkpoint_async: bool = True
    """write checkpoints behind the training, from a copy of the weights; false: training waits, and there is no copy"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite changes no weight, is written to incidents.jsonl, and stops the run or is skipped"""
    spike_sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """skip steps whose loss is this many standard deviations above the mean of the last spike_window; default: none"""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """steps that a loss is compared with"""
    timeout: Annotated[float, Field(gt=0, le=1e7)] = 600.0
    """seconds after which a rank that gives no sign of life ends the run"""
    val_every: Positive = 250
    """steps between validations; there is one before the first step and one after the last"""
    val_sequences: Positive | None = None
    """windows of seq_len in a validation, spread evenly over the held-out text; default: all of them"""


@dataclass(frozen=True, config=settings)
class Distill:
    teacher: str | None = None
    """learn from this model, a folder or hub name: forward KL on its logits instead of the next-token loss"""
    logits: str | None = None
    """learn from the largest logits of a teacher in this folder, which `distill --write_logits` made; no teacher is in memory"""
    top_k: Positive = 64
    """entries of a token that are kept when logits are written"""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """what the logits of both are divided by; the loss is times its square"""
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the loss that is the next-token loss on the text"""
    hidden_weight: Rate = 0.0
    """weight of the mean squared difference between the hidden states of teacher and student, each divided by its own size"""


@dataclass(frozen=True, config=settings)
class Log:
    every: Positive = 10
    """steps between lines in metrics.jsonl"""
    wandb: bool = False
    """also log to Weights & Biases; offline where no key is configured"""
    wandb_project: str = "hybridlm"
    """project in Weights & Biases"""
    sample_prompt: Annotated[str, Field(max_length=10_000)] = "import "
    """text that the model continues after each validation"""
    sample_tokens: Annotated[int, Field(ge=0, le=10_000)] = 200
    """length of that sample, tokens; 0 for none"""


@dataclass(frozen=True, config=settings)
class RunConfig:
    run_dir: str
    """folder of this run: configuration, metrics, checkpoints, model"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of the initial weights, the order of the data and the masks of dropout"""
    model: Model = field(default_factory=Model)
    ops: Ops = field(default_factory=Ops)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)
    log: Log = field(default_factory=Log)


Config = TypeVar("Config", bound=RunConfig)  # a run's, or that of a job that makes runs
# What a blend says of each source apart.
SOURCE_SETTINGS = ("revision", "text_column", "template", "license")


def schema(kind: type[Config]) -> TypeAdapter[Config]:
    return TypeAdapter(kind)


def parse(values: dict[str, Any], kind: type[Config] = RunConfig) -> Config:  # type: ignore[assignment]
    """A checked configuration from nested values, with the shape file read in.

    Raises:
        ValueError: one message with every fault.
    """
    faults = []
    sections = {f.name for f in fields(kind) if is_dataclass(f.type)}
    values = {key: {} if value is None and key in sections else value for key, value in values.items()}
    try:
        config = _checked(values, kind)
    except ValidationError as error:
        raise ValueError(fault_list([_explain(e, kind) for e in error.errors()])) from None
    model, schedule = config.model, config.schedule
    if model.config is None and model.init_from is None:
        faults.append("model: set model.config (a new model) or model.init_from (weights to start from).")
    if schedule.warmup + schedule.decay > 1:
        faults.append(
            f"schedule: warmup ({schedule.warmup}) and decay ({schedule.decay}) are shares of the run; together at most 1."
        )
    faults += _warmup_faults(config)
    faults += _data_faults(config.data, values.get("data", {}))
    faults += _distill_faults(config) if kind is RunConfig else []  # of a job with a teacher of its own
    if config.optim.z_loss and (config.data.label_column is not None or config.distill != Distill()):
        faults.append("optim.z_loss: it is for the next-token loss of a language model; leave it away with a teacher or labels.")
    if config.data.blend:
        values = values | {"data": {**values["data"], "source": None}}
    if unknown := unknown_symbols(config.train.recompute):
        known = ", ".join(f"{symbol!r} {kind}" for symbol, kind in SYMBOLS.items())
        faults.append(f"train.recompute: unknown symbol(s) {unknown!r}; known are {known}.")
    if model.init_from is not None:
        values = values | {"model": {"init_from": model.init_from}}
    elif isinstance(model.config, str):
        try:
            values = values | {"model": {**values["model"], "config": load_yaml(model.config)}}
        except ValueError as error:
            faults.append(f"model.config: {error}")
    try:
        if isinstance(values.get("model", {}).get("config"), dict):
            HybridLMConfig.from_strict_dict(values["model"]["config"])
    except ValueError as error:
        faults.append(f"model.config: {error}")
    if faults:
        raise ValueError(fault_list(faults))
    return _checked(values | {"run_dir": os.path.expanduser(config.run_dir)}, kind)


def _warmup_faults(config: RunConfig) -> list[str]:
    schedule, train, data, faults = config.schedule, config.train, config.data, []
    carries = {"data.carry_state": data.carry_state}
    windows = carries | {"data.label_column": data.label_column is not None, "distill.logits": config.distill.logits is not None}
    batch = ("batch", train.global_batch, "train.global_batch", carries)
    for what, whole, name, refused in (batch, ("length", data.seq_len, "data.seq_len", windows)):
        start, share = getattr(schedule, f"{what}_start"), getattr(schedule, f"{what}_warmup")
        if (start is None) != (share == 0):
            faults.append(f"schedule: set both {what}_start and {what}_warmup, or neither; got {start} and {share}.")
        if start is None:
            continue
        doublings = (whole // start).bit_length() - 1
        if whole % start or start << doublings != whole:
            faults.append(f"schedule.{what}_start: it must become {name} ({whole}) by doubling; got {start}.")
        elif share and share * train.steps < doublings:
            faults.append(f"schedule.{what}_warmup: {share} of {train.steps} steps are fewer than the {doublings} doublings.")
        for other in (other for other, is_set in refused.items() if is_set):
            faults.append(f"schedule.{what}_start: rows change with it, which {other} does not allow; leave one away.")
    if schedule.batch_start is not None and train.micro_batch is not None and schedule.batch_start % train.micro_batch:
        faults.append(
            f"schedule.batch_start ({schedule.batch_start}) must be a multiple of train.micro_batch ({train.micro_batch})."
        )
    return faults


def _data_faults(data: Data, given: dict[str, Any]) -> list[str]:
    faults = []
    if data.blend and given.get("source") is not None:
        faults.append("data: set data.source (one source) or data.blend (several), not both.")
    if not data.blend and data.source is None:
        faults.append("data: set data.source (one source) or data.blend (several).")
    of_validation = ("text_column", "template") if data.val_source else ()
    of_one = [k for k in SOURCE_SETTINGS if k not in of_validation and getattr(data, k) != getattr(Data, k)]
    if data.blend and of_one:
        faults.append(f"data.{', data.'.join(of_one)}: with data.blend this is said of each of its sources, in the list.")
    if data.phases and not data.blend:
        faults.append("data.phases: they change the weights of a data.blend, and there is none.")
    if any(a >= b for a, b in zip(data.phases, data.phases[1:])):
        faults.append(f"data.phases: each must be later than the one before; got {list(data.phases)}.")
    phases = len(data.phases) + 1
    wrong = [entry for entry in data.blend or [] if len(entry.weight) not in (1, phases)]
    for entry in wrong:
        faults.append(f"data.blend: {entry.source} needs one weight, or {phases}, one for each phase; got {entry.weight}.")
    for i, weights in enumerate([] if wrong else blend_weights(data)):
        if not sum(weights):
            faults.append(f"data.blend: all weights of phase {i + 1} are 0; give at least one source some.")
    if data.carry_state and len(data.blend or [0]) > 1:
        faults.append(f"data.carry_state: it reads on in one source; got a data.blend of {len(data.blend or [])}.")
    if data.carry_state and data.packing != "stream":
        faults.append(f"data.carry_state: {data.packing} packing takes windows out of their order; set data.packing: stream.")
    if data.carry_state and data.streaming:
        faults.append("data.carry_state: rows read at places far apart, and data.streaming at one; set data.streaming: false.")
    if data.label_column is not None:
        unfit = {
            "blend": data.blend,
            "streaming": data.streaming,
            "carry_state": data.carry_state,
            "packing": data.packing != "stream",
        }
        faults += [
            f"data.{name}: documents with labels (data.label_column) are read whole, from one source; leave it away."
            for name, given_too in unfit.items()
            if given_too
        ]
    if data.streaming and data.blend:
        faults.append("data.streaming: it reads one source; set data.source instead of data.blend.")
    if data.streaming and data.packing != "stream":
        faults.append(f"data.streaming: {data.packing} packing must know all documents beforehand; set data.packing: stream.")
    if data.streaming and data.workers:
        faults.append(f"data.streaming: the stream is read in one process; set data.workers: 0, not {data.workers}.")
    return faults


def _distill_faults(config: RunConfig) -> list[str]:
    distill, data = config.distill, config.data
    if distill.teacher is None and distill.logits is None:
        idle = [f"distill.{f.name}" for f in fields(Distill) if getattr(distill, f.name) != getattr(Distill, f.name)]
        return [f"{', '.join(idle)}: nothing to learn from; set distill.teacher (a model) or distill.logits."] if idle else []
    faults = []
    if distill.teacher is not None and distill.logits is not None:
        faults.append("distill: set distill.teacher (a model in memory) or distill.logits (what it said, on disk), not both.")
    if distill.teacher is None and distill.hidden_weight:
        faults.append("distill.hidden_weight: hidden states need the teacher itself (distill.teacher); on disk are logits.")
    if distill.logits is not None and data.streaming:
        faults.append("distill.logits: they are found by sample number; of a stream (data.streaming) nothing can be found again.")
    unfit = {"label_column": "a classifier has no logits to distil", "carry_state": "a teacher's states are not carried on"}
    faults += [f"data.{name}: {why}; leave it away." for name, why in unfit.items() if getattr(data, name)]
    return faults


def blend_weights(data: Data) -> list[list[float]]:
    """For each phase the weight of each source of the blend."""
    phases = len(data.phases) + 1
    return [list(weights) for weights in zip(*(entry.weight * (phases // len(entry.weight)) for entry in data.blend or []))]


def _checked(values: dict[str, Any], kind: type[Config]) -> Config:
    # By way of JSON: pydantic's strict mode takes a mapping for a dataclass only there.
    return schema(kind).validate_json(json.dumps(values))


def dump(config: RunConfig) -> str:
    """The YAML of the resolved configuration; `parse` reads it back unchanged."""
    return dump_yaml(schema(type(config)).dump_python(config))


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A line for each leaf in which two configurations differ."""
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old!r} -> {new!r}"


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every setting."""
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if isinstance(info.annotation, type) and is_dataclass(info.annotation):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def fault_list(faults: list[str]) -> str:
    return "\n".join([f"the configuration has {len(faults)} fault(s):", *(f"  {fault}" for fault in faults)])


def unknown_name(name: str, what: str, kind: type = RunConfig) -> str:
    known = [known for known, _ in leaves(kind)] + [f.name for f in fields(kind)]
    known += [f"data.blend.{f.name}" for f in fields(BlendEntry)]
    last = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.rsplit(".", 1)[-1] == last]
    return f"unknown {what}{name}{f'; did you mean {near[0]}?' if near else ''}"


def _explain(error: Any, kind: type) -> str:
    name = ".".join(str(part) for part in error["loc"] if part not in ("str", "dict[str,any]"))
    if error["type"] == "unexpected_keyword_argument":
        return unknown_name(name, "key ", kind)
    if error["type"] in ("missing", "missing_argument"):
        return f"{name} is missing; set it in the file or with --{name}."
    came = repr(error["input"])
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}; got {came if len(came) <= 200 else came[:200] + '…'}."
