"""The settings of `python -m train sweep`: those of a run like any other, and the table of runs that differ from it."""

import difflib
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, fields, is_dataclass, replace
from hashlib import sha256
from itertools import product
from typing import Annotated, Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from hybridlm import HybridLMConfig
from hybridlm.strict_yaml import load_yaml, parse_yaml
from hybridlm.twin import count_parameters
from train.config import fault_list, leaves, parse, schema, unknown_name
from train.settings import RunConfig, settings

Seed = Annotated[int, Field(ge=0, lt=2**32)]
SHAPE = "model.config."  # begins the name of a field of the shape
EQUAL = 1.01  # rows of equal size: the largest over the smallest
LONGEST = 80  # characters of a folder's name before its hash
NOT_HERE = {
    "seed": "the seeds of every row are sweep.seeds",
    "run_dir": "each run has a folder of its own below the sweep's",
}


@dataclass(frozen=True, config=settings)
class Sweep:
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = field(default_factory=dict)
    """values of settings, such as {optim.lr: [1e-3, 3e-3]}: every combination is a row. model.config.FIELD is of the shape"""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """rows by name, such as {wide: {model.config.hidden_size: 96}}; with a grid, each of them at each point of it"""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """each row is trained with each of them"""
    target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """also tell after how many seconds of training the validation loss is this (between two validations, on the line); nats"""
    equal_parameters: bool = False
    """rows must have the same number of parameters, within 1%"""


@dataclass(frozen=True, config=settings)
class SweepConfig(RunConfig):
    run_dir: str
    """folder of this sweep: results, table, plot, runs"""
    seed: Seed = 0
    """not to be set: the runs have those of sweep.seeds"""
    sweep: Sweep = field(default_factory=Sweep)


@plain_dataclass(frozen=True)
class Row:
    """
    Attributes:
        name: that of its folder, told by what the row changes alone: it stays when other rows come.
        settings: what the table says of it: the variant's name, and what varies in the grid.
        parameters: None where model.init_from or a classifier's labels decide.
        runs: one for each seed.
    """

    name: str
    settings: dict[str, Any]
    parameters: int | None
    runs: list[RunConfig]


def with_grid(config: SweepConfig, words: list[str]) -> SweepConfig:
    """The configuration with `KEY=V1,V2` in the place of what its grid says of KEY; `seed=` replaces the seeds.

    Raises:
        ValueError: one message with every fault.
    """
    values, faults = schema(SweepConfig).dump_python(config), []
    for word in words:
        name, equals, text = word.partition("=")
        try:
            found = parse_yaml(f"[{text}]")
        except yaml.YAMLError:
            faults.append(f"--grid {word}: the values cannot be read; put text that begins with a sign of YAML's in quotes.")
            continue
        if not equals or not found:
            faults.append(f"--grid {word}: it must be KEY=VALUE,VALUE…, such as optim.lr=1e-3,3e-3.")
        elif name == "seed":
            values["sweep"]["seeds"] = found
        else:
            values["sweep"]["grid"][name] = found
    if faults:
        raise ValueError(fault_list(faults))
    return parse(values, SweepConfig)


def table_of_runs(config: SweepConfig) -> list[Row]:
    """The rows, in the order of the file: all points of the grid for the first variant, then for the next.

    Raises:
        ValueError: one message with every fault of every row.
    """
    sweep = config.sweep
    faults = list(_sweep_faults(sweep))
    if config.seed:
        faults.append(f"seed ({config.seed}): a sweep has several; set sweep.seeds, or --grid seed={config.seed}.")
    if faults:
        raise ValueError(fault_list(faults))
    columns = [name for name, values in sweep.grid.items() if len(values) > 1] or ([] if sweep.variants else list(sweep.grid))
    base, whole = _given(config), schema(SweepConfig).dump_python(config)
    rows: list[Row] = []
    wrong: dict[str, list[str]] = {}
    points = [dict(zip(sweep.grid, values)) for values in product(*sweep.grid.values())]
    for (variant, changes), point in product((sweep.variants or {"": {}}).items(), points):
        told = {key: value for key, value in point.items() if value != _value(whole, key)}
        name = slug("_".join(slug(part) for part in (variant, *_texts(told)) if part)) or "base"
        try:
            run: RunConfig = parse(_changed(base, changes | point))
        except ValueError as error:
            wrong.setdefault(str(error).partition("\n")[2] or str(error), []).append(name)
            continue
        runs = [replace(run, seed=seed, run_dir=f"{config.run_dir}/runs/{name}/seed-{seed}") for seed in sweep.seeds]
        shown = {"variant": variant} if variant else {}
        rows.append(Row(name, shown | {key: point[key] for key in columns}, _parameters(run), runs))
    faults = [f"{', '.join(names)}: {fault.strip()}" for fault, names in wrong.items()]
    if faults := faults or list(_table_faults(rows, sweep.equal_parameters)):
        raise ValueError(fault_list(faults))
    return rows


def _sweep_faults(sweep: Sweep) -> Iterator[str]:
    if not sweep.grid and not sweep.variants:
        yield (
            "sweep: there is nothing to compare; give values of a setting, such as --grid optim.lr=1e-3,3e-3, or sweep.grid or "
            "sweep.variants in the file."
        )
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield f"sweep.seeds: each may stand there once; got {list(sweep.seeds)}."
    if "" in sweep.variants:
        yield "sweep.variants: a row has no name; give it one."
    known = {name for name, _ in leaves(RunConfig)} | {SHAPE + f for f in HybridLMConfig.__annotations__}
    named = dict.fromkeys([*sweep.grid, *(name for changes in sweep.variants.values() for name in changes)])
    for name in named:
        if name in NOT_HERE:
            yield f"{name} cannot vary: {NOT_HERE[name]}."
        elif name not in known and name.startswith(SHAPE):
            near = difflib.get_close_matches(name, sorted(known), n=1)
            yield f"unknown setting {name}{f'; did you mean {near[0]}?' if near else ''}"
        elif inside := next((setting for setting, _ in leaves(RunConfig) if setting.startswith(f"{name}.")), None):
            yield f"{name} is a section; name a setting of it, such as {inside}."
        elif name not in known:
            yield unknown_name(name, "setting ")
    for variant, changes in sweep.variants.items():
        if twice := sorted(changes.keys() & sweep.grid.keys()):
            yield f"sweep.variants.{variant}: {', '.join(twice)} stands in sweep.grid too; say it in one of them."


def _table_faults(rows: list[Row], equal: bool) -> Iterator[str]:
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for row in rows:
        text = json.dumps(schema(RunConfig).dump_python(replace(row.runs[0], run_dir="")), sort_keys=True)
        if (first := seen.setdefault(text, row.name)) != row.name:
            yield f"{first} and {row.name} are the same run; leave one of them out."
        elif folders.setdefault(row.name.lower(), text) != text:  # there are disks that know no capitals
            yield f"two rows would have the folder {row.name}; give one of the variants another name."
        elif first == row.name and [other.name for other in rows].count(row.name) > 1:
            yield f"{row.name} stands in the table twice; leave one of them out."
    sizes = {row.name: row.parameters for row in rows if row.parameters is not None}
    if equal and (unknown := [row.name for row in rows if row.parameters is None]):
        yield f"sweep.equal_parameters: the size of these is not known before training: {', '.join(unknown)}."
    elif equal and max(sizes.values()) > EQUAL * min(sizes.values()):
        yield (
            "sweep.equal_parameters: the rows differ in size by more than 1%: "
            + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            + ". Change sizes of their shapes (model.config.intermediate_size is the finest), or set it to false."
        )


def _given(config: SweepConfig) -> dict[str, Any]:
    """What the sweep says of its runs; what has its default counts as not said."""
    values: dict[str, Any] = {"run_dir": config.run_dir}
    whole = schema(SweepConfig).dump_python(config)
    for section in fields(RunConfig):
        if isinstance(section.type, type) and is_dataclass(section.type):
            default = section.type()
            said = whole[section.name].items()
            values[section.name] = {key: value for key, value in said if value != getattr(default, key)}
    return values


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        ValueError: a shape that is no file, or a field of a shape where there is none.
    """
    values = deepcopy(base)
    for name, value in sorted(changes.items(), key=lambda change: change[0].count(".")):  # a shape before its fields
        *sections, last = name.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = deepcopy(value)
        if name == "model.config" and isinstance(value, str):
            target[last] = load_yaml(value)
    model = values.get("model", {})
    if model.get("init_from") is not None and (shape := [name for name in changes if f"{name}.".startswith(SHAPE)]):
        raise ValueError(f"{', '.join(shape)}: the shape is that of model.init_from; set it to null, or leave the shape alone.")
    return values


def _value(values: dict[str, Any], name: str) -> Any:
    """That of a dotted name; of a field of the shape that is not said, its default."""
    *sections, last = name.split(".")
    for section in sections:
        values = values[section] or {}
    return values.get(last, getattr(HybridLMConfig, last, None) if name.startswith(SHAPE) else None)


def _texts(changes: dict[str, Any]) -> list[str]:
    """`name-value` of each, in an order that does not depend on the file's."""
    short = short_names(list(changes))
    return [f"{short[name]}-{as_text(changes[name])}" for name in sorted(changes)]


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def short_names(names: list[str]) -> dict[str, str]:
    """The last part of each dotted name, or all of it where that is not enough to tell them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: part if last.count(part) == 1 else name for name, part in zip(names, last)}


def slug(text: str) -> str:
    """A name for a folder: the text where it can be one, else what of it can, and a hash of it."""
    safe = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", text).strip("-.")[:LONGEST]
    return safe if safe == text else f"{safe}-{sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def _parameters(run: RunConfig) -> int | None:
    if not isinstance(run.model.config, dict) or run.model.init_from is not None or run.data.label_column is not None:
        return None
    return count_parameters(HybridLMConfig.from_strict_dict(run.model.config))
