"""python -m train merge --run RUN | --models DIR DIR …: the plain mean of the weights of several checkpoints, as a model folder.

The mean over the end of a stable learning rate stands in for a decay of it (WSM, arXiv 2507.17634; LAWA, arXiv 2209.14981), and
that of models trained apart from one start is often better than each (model soups, arXiv 2203.05482).
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hybridlm import HybridLMConfig
from train import files
from train.card import merged_card
from train.checkpoint import MANIFEST, folders, validate
from train.tensor_files import Part, Stored, flat, header, in_order, mismatch, read, shard_index, split
from train.weights import stored_weights

logger = logging.getLogger(__name__)

BESIDE = (".json", ".jinja", ".txt", ".model")  # tokenizer and generation settings; no code, no other weights


@dataclass(frozen=True)
class Model:
    """A model folder, of which nothing but names and shapes is in memory.

    Attributes:
        name: how the card calls it. config: what config.json says. tensors: its weights, in their files.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    tensors: dict[str, Stored]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train merge", allow_abbrev=False,
        description="Write the mean of the weights of several checkpoints, in fp32, as a folder that from_pretrained opens.",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="RUN", type=Path, help="a run directory: its checkpoints, those that are whole")
    which.add_argument("--models", metavar="DIR", type=Path, nargs="+", help="model folders of one shape")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--last", metavar="N", type=int, help="the N newest of the run (default: all)")
    some.add_argument("--from_step", metavar="S", type=int, help="those of the run from step S on (default: all)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write; must not be there")
    arguments = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("merge works in one process; start it without a launcher.")
    if arguments.models and (arguments.last is not None or arguments.from_step is not None):
        raise ValueError("--last and --from_step choose among the checkpoints of --run; with --models name the folders alone.")
    if arguments.out.exists() or arguments.out.is_symlink():
        raise ValueError(f"{arguments.out} is there already, and nothing is written over; choose another --out.")
    chosen = arguments.models or of_run(arguments.run, arguments.last, arguments.from_step)
    models = open_models(chosen)
    try:
        write_mean(models, arguments.out)
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.out} is {'whole' if arguments.out.exists() else 'not there'}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: the mean of {len(models)} models: {', '.join(model.name for model in models)}")
    print(f"next: python -m eval perplexity --model {arguments.out} {models[-1].folder} --data SOURCE")
    return 0


def of_run(run: Path, last: int | None, from_step: int | None) -> list[Path]:
    """The model folders of a run's checkpoints, the oldest first; says loudly which it passed over.

    Raises:
        ValueError: no run, or fewer than two that can be merged.
    """
    if last is not None and last < 2:
        raise ValueError(f"--last must be at least 2; got {last}.")
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} is no run directory: it has no checkpoints. Model folders are merged with --models.")
    whole: list[Path] = []
    for step, folder in reversed(folders(run)):
        if len(whole) == last or (from_step is not None and step < from_step):
            break
        if faults := validate(folder):
            logger.warning("PASSING OVER %s: %s", folder, "; ".join(faults))
        else:
            whole.insert(0, folder)
    wanted = last or 2
    if len(whole) < wanted:
        span = "" if from_step is None else f" from step {from_step} on"
        raise ValueError(
            f"{run} has {len(whole)} whole checkpoints{span} ({', '.join(p.name for p in whole) or 'none'}), and {wanted} are "
            "wanted. train.keep_every: N keeps those of every N-th step, train.keep_checkpoints: K the K newest."
        )
    return [folder / "model" for folder in whole]


def open_models(chosen: Sequence[Path]) -> list[Model]:
    """
    Raises:
        ValueError: fewer than two, one twice, one that is none or is damaged, or models that differ: all differences listed.
    """
    if len(chosen) < 2:
        raise ValueError(f"a mean needs at least 2 models; got {len(chosen)}.")
    if len({path.resolve() for path in chosen}) < len(chosen):
        raise ValueError(f"a folder is named twice, and would count twice: {', '.join(map(str, chosen))}.")
    models = [_open(path) for path in chosen]
    faults = [fault for other in models for fault in _differences(models[0], other)]
    if faults:
        raise ValueError("\n  ".join([f"these models cannot be merged, the first being {models[0].folder}:", *faults]))
    return models


def _open(path: Path) -> Model:
    tensors, folder = stored_weights(path), path.resolve()
    step = folder.parent if folder.name == "model" and folder.parent.name.startswith("step-") else None
    if step and (step / MANIFEST).exists() and (faults := validate(step)):
        raise ValueError(f"{path} is of a checkpoint that is not valid: {'; '.join(faults)}.")
    name = f"{step.parent.parent.name}/{step.name}" if step else str(path)
    return Model(path, name, json.loads((path / "config.json").read_text(encoding="utf-8")), tensors)


def _differences(first: Model, other: Model) -> list[str]:
    """What keeps two models from being merged, and of the first with itself: what is no floating point number."""
    ours, theirs = (_shape(model) for model in (first, other))
    faults = [f"config.json {key}: {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
    if _bytes(first.folder / "tokenizer.json") != _bytes(other.folder / "tokenizer.json"):
        faults.append("tokenizer.json: not the same")
    faults += mismatch("weights", {name: one.local for name, one in _parts(first).items()}, other.tensors, cast=True)
    return [f"{other.folder}: {fault}" for fault in faults]


def _shape(model: Model) -> dict[str, Any]:
    """All of the configuration, with the defaults for what an older version did not write."""
    config = HybridLMConfig.from_pretrained(model.folder)
    kind = {"architectures": config.architectures, "labels": config.label_names}
    return kind | {name: getattr(config, name) for name in HybridLMConfig.__annotations__}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _parts(model: Model) -> dict[str, Part]:
    """The tensors that are written: their names and shapes, without what is in them."""
    return {name: Part(torch.empty(one.shape, device="meta"), one.shape, False) for name, one in model.tensors.items()}


def write_mean(models: Sequence[Model], out: Path) -> None:
    """Writes the folder under another name and gives it its own last; all but the weights and the card is the last model's.
    One tensor of one model is in memory at a time, and the sum.

    Raises:
        ValueError: a weight that is not finite, by its name. OSError: of the disk. Nothing is left of the folder.
    """
    last, unfinished = models[-1], out.with_name(f".{out.name}.unfinished")
    if unfinished.exists():
        files.remove(unfinished)
    parts = _parts(last)
    shards = split(parts, "model")
    config = last.config | {key: "float32" for key in ("dtype", "torch_dtype") if key in last.config}
    beside = {p.name: p.read_bytes() for p in sorted(last.folder.iterdir()) if p.suffix in BESIDE and p.is_file()}
    beside |= {"config.json": (json.dumps(config, indent=2) + "\n").encode(), "README.md": _card(models, out, parts).encode()}
    beside.pop(SAFE_WEIGHTS_INDEX_NAME, None)
    if shards.is_sharded:
        beside[SAFE_WEIGHTS_INDEX_NAME] = shard_index(shards)
    total = sum(one.nbytes for one in parts.values()) * len(models)
    try:
        files.make_folder(unfinished)
        with tqdm(total=total, desc="merging", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            for file, names in shards.filename_to_tensors.items():
                files.write(unfinished / file, _blocks(models, {name: parts[name] for name in names}, bar))
        for file, data in beside.items():
            files.write(unfinished / file, [data])
        files.sync(unfinished)
        files.rename(unfinished, out)
    except BaseException:
        if unfinished.exists():
            files.remove(unfinished)
        raise


def _card(models: Sequence[Model], out: Path, parts: Mapping[str, Part]) -> str:
    total = sum(one.size for name, one in parts.items() if not name.endswith("e_score_correction_bias"))  # no parameter
    shape = HybridLMConfig.from_pretrained(models[-1].folder)
    return merged_card(shape, (shape.architectures or [""])[0], out.name, total, [model.name for model in models])


def _blocks(models: Sequence[Model], parts: Mapping[str, Part], bar: tqdm) -> Iterator[bytes | memoryview]:
    yield header(parts)
    for name, one in in_order(parts):
        total, buffer = torch.zeros(one.shape, dtype=torch.float64), torch.empty(one.shape, dtype=torch.float64)
        for model in models:
            read({name: model.tensors[name]}, {name: buffer}, None)
            _check_finite(buffer, name, model)
            total += buffer
            bar.update(one.nbytes)
        yield flat(total.div_(len(models)).float()).numpy().data


def _check_finite(values: Tensor, name: str, model: Model) -> None:
    if not values.float().isfinite().all():
        raise ValueError(f"{name} of {model.folder} is not finite in fp32; leave this model out.")
