"""The command line of `python -m train`: each setting of the configuration is a flag."""

import argparse
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from hybridlm.strict_yaml import load_yaml, parse_yaml
from train.config import Config, fault_list, leaves, parse, unknown_name
from train.settings import BlendEntry, RunConfig


def argument_parser() -> argparse.ArgumentParser:
    parser = settings_parser(RunConfig)
    parser.prog, parser.description = "python -m train", "Train a model. Settings come from the file, then from the command line."
    parser.epilog = "other jobs: python -m train {prepare,tokenizer,distill,compress,merge,sweep,status} --help"
    parser.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        default="auto",
        help="auto: go on from the run's newest valid checkpoint, or start (default)\n"
        "never: the run directory must be empty\nPATH: go on from this checkpoint folder",
    )
    parser.add_argument("--allow-config-change", action="store_true", help="go on with other settings than the run began with")
    return parser


def settings_parser(kind: type[Config]) -> argparse.ArgumentParser:
    """Of a job whose settings are those of `kind`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file with the settings of a run")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings and stop")
    group = parser.add_argument_group("settings (type, default)")
    for name, info in leaves(kind):
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)}"
        group.add_argument(
            f"--{name}", metavar="V", help=f"{info.description.replace('%', '%%')}\n({_type_name(info)}, {default})"
        )
    return parser


def parse_command_line(
    argv: list[str],
    parser: argparse.ArgumentParser | None = None,
    kind: type[Config] = RunConfig,  # type: ignore[assignment]
) -> tuple[Config, argparse.Namespace]:
    """Reads `--config FILE` and overrides, and what else the `parser` of a job knows, whose settings are those of `kind`.

    Raises:
        ValueError: an unknown flag (with the nearest), or what `parse` finds.
    """
    arguments, unknown = (parser or argument_parser()).parse_known_args(argv)
    faults = [unknown_name(word.split("=")[0].removeprefix("--"), "flag --", kind) for word in unknown if word.startswith("--")]
    if unknown and not faults:
        faults = [f"unexpected argument {unknown[0]!r}."]
    if faults:
        raise ValueError(fault_list(faults))
    values = load_yaml(arguments.config)
    for name, info in leaves(kind):
        if (text := getattr(arguments, name)) is not None:
            *sections, last = name.split(".")
            target = values
            for section in sections:
                target[section] = {} if target.get(section) is None else target[section]
                target = target[section]
                if not isinstance(target, dict):
                    raise ValueError(
                        fault_list([f"{section} in {arguments.config} must hold `key: value` lines; got {target!r}."])
                    )
            target[last] = _value(name, text, info)
    return parse(values, kind), arguments


def _value(name: str, text: str, info: Any) -> Any:
    """What a flag's words mean: where text is wanted they are it, but for `null` and, for a shape, a mapping in braces."""
    kinds = {info.annotation, *get_args(info.annotation)}
    if str in kinds and not (NoneType in kinds and text == "null") and not (dict[str, Any] in kinds and text.startswith("{")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(fault_list([f"--{name}: {text!r} cannot be read: {error}"])) from None


def _type_name(info: Any) -> str:
    """`int | None` for what reads `Annotated[int, Field(gt=0)] | None` in the class."""

    def name(annotation: Any) -> str:
        if get_origin(annotation) is Annotated:
            return name(get_args(annotation)[0])
        if get_origin(annotation) is Literal:
            return "|".join(get_args(annotation))
        if get_origin(annotation) in (list, tuple):
            return f"list of {name(get_args(annotation)[0])}"
        if get_origin(annotation) is dict:
            return "mapping"
        if get_origin(annotation) in (Union, UnionType):
            return " | ".join(name(a) for a in get_args(annotation))
        return {type(None): "null", BlendEntry: "mapping"}.get(annotation) or annotation.__name__

    return name(info.annotation)
