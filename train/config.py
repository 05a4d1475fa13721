"""The configuration of a run: nested frozen dataclasses (train/settings.py), filled from a YAML file and the command line
(train/command_line.py), and checked, all faults in one message.
"""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hybridlm import HybridLMConfig
from hybridlm.pattern import SYMBOLS, unknown_symbols
from hybridlm.strict_yaml import dump_yaml, load_yaml
from train.settings import BlendEntry, Data, Distill, RunConfig

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
