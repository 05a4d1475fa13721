"""The checkpoints of a run: whole or not there, checked when read, safetensors and JSON only.

checkpoints/step-<n>/ holds `model/` (a `from_pretrained` folder), `optimizer.safetensors` (with the random state, and the states
that rows carry on; several files where it is large), `state.json` and, written last, `manifest.json` with the sha256 of every
other file. A folder appears under its name by one rename, after everything in it has reached the disk; it disappears by one
before anything in it is deleted.

It is the same, byte for byte, whether one rank has the whole model or many share it (`group`: all ranks, over gloo; None: this
process has everything), and any number of ranks can read it. `tensor_files` has what goes on between them.
"""

import errno
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from train import files, tensor_files
from train.carried import PREFIX, Carried
from train.ranks import together
from train.tensor_files import Part, fingerprint, mismatch, part, place, split, stored

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a resume needs besides tensors; `identity` says what the position in the data means, `cursor` is of streamed data.
STATE = {
    "step": int, "samples": int, "tokens": int, "identity": dict, "cursor": dict, "spikes": dict, "validation": list,
    "fingerprint": str,
}  # fmt: skip
SLOTS = (".exp_avg", ".exp_avg_sq", ".momentum_buffer")  # of AdamW and of Muon
THREADS = 8  # that hash files at a time
LARGE = 10**9  # bytes that take long enough to hash for a progress bar


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint that this rank has, in memory.

    Attributes:
        weights: the model's, by name. optimizer: its state by `parameter.slot`, the random state, and what is carried on.
        state: JSON, the keys of STATE but for the fingerprint. sidecars: the other files of the model folder. Those of rank 0 are
            written.
    """

    weights: dict[str, Part]
    optimizer: dict[str, Part]
    state: dict[str, Any]
    sidecars: dict[str, bytes]


def snapshot(
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    state: dict[str, Any],
    sidecars: dict[str, bytes],
    copy: bool,
    carried: Carried | None = None,
) -> Snapshot:
    """The state of this moment, as far as this rank has it. With `copy` it stays so while training goes on; without, it is to be
    written at once."""

    def keep(parts: dict[str, Part]) -> dict[str, Part]:
        return {name: Part(one.local.to("cpu", copy=copy), one.shape, one.shared) for name, one in parts.items()}

    rng = {"rng": torch.get_rng_state()}
    if next(model.parameters()).device.type == "cuda":
        rng["rng_cuda"] = torch.cuda.get_rng_state()
    # First: with it FSDP2 puts shards back in the place of parameters that it has gathered.
    weights = keep(_parts(model.state_dict()))
    moments = _optimizer_tensors(_states(model, optimizers))
    return Snapshot(weights, keep(_parts(moments | rng) | (carried.parts() if carried else {})), state, sidecars)


def sidecars(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a model folder besides the weights: configuration, generation settings, tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={})  # no weights: these go through `files`
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def write(run_dir: Path, shot: Snapshot, group: ProcessGroup | None = None) -> Path:
    """Writes checkpoints/step-<step> and points RUN/model at its model. All ranks of the group must call it.

    Raises:
        OSError: on all ranks, where the disk would not have it on one. Older checkpoints are as they were; what was written is
            removed where possible.
    """
    step, main = shot.state["step"], place(group)[0] == 0
    final = run_dir / "checkpoints" / f"step-{step}"
    unfinished = run_dir / "checkpoints" / f".step-{step}.unfinished"
    weights, optimizer = split(shot.weights, "model"), split(shot.optimizer, "optimizer")
    content = {f"model/{name}": {key: shot.weights[key] for key in keys} for name, keys in weights.filename_to_tensors.items()}
    content |= {name: {key: shot.optimizer[key] for key in keys} for name, keys in optimizer.filename_to_tensors.items()}
    small = {f"model/{name}": data for name, data in shot.sidecars.items()}
    if weights.is_sharded:
        small[f"model/{SAFE_WEIGHTS_INDEX_NAME}"] = tensor_files.shard_index(weights)
    try:
        together(group, lambda: _begin(unfinished) if main else None)
        together(group, lambda: _look_for(unfinished))
        digests = tensor_files.write(unfinished, content, group)
        state = shot.state | {"fingerprint": _fingerprint(shot.weights, shot.optimizer, group)}
        small["state.json"] = (json.dumps(state, indent=2, allow_nan=False) + "\n").encode()
        together(group, lambda: _finish(unfinished, final, small, digests) if main else None)
    except OSError as error:
        kept = [f"step-{number}" for number, _ in folders(run_dir) if number != step]
        try:
            if main and unfinished.exists():
                files.remove(unfinished)
        except OSError:
            logger.warning("%s is no checkpoint and could not be removed; the next start does", unfinished)
        raise OSError(
            error.errno,
            f"the checkpoint of step {step} could not be written ({error.strerror or error}). "
            f"The older ones ({', '.join(kept) or 'none yet'}) are as they were; make room or mend the disk, "
            f"and the same command goes on from the newest",
            str(error.filename or final),
        ) from error
    return final


def _begin(unfinished: Path) -> None:
    if unfinished.exists():
        files.remove(unfinished)
    files.make_folder(unfinished / "model")


def _look_for(unfinished: Path) -> None:
    if not (unfinished / "model").is_dir():
        message = "rank 0 made it, and it is not there: run_dir must be on a disk that all ranks share"
        raise FileNotFoundError(errno.ENOENT, message, str(unfinished))


def _finish(unfinished: Path, final: Path, small: dict[str, bytes], digests: dict[str, str]) -> None:
    """Writes what is missing beside the tensors, whose files have these `digests`; gives the checkpoint its name and the link."""
    digests = digests | {name: files.write(unfinished / name, [data]) for name, data in sorted(small.items())}
    files.write_text(unfinished / MANIFEST, _manifest(digests))
    files.sync(unfinished / "model")
    files.sync(unfinished)
    files.rename(unfinished, final)
    files.link(Path("checkpoints") / final.name / "model", final.parent.parent / "model")


def load(
    folder: Path,
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    group: ProcessGroup | None = None,
    carried: Carried | None = None,
) -> dict[str, Any]:
    """Puts weights, optimiser state, random state and `carried` back, and returns the rest. Nothing is changed before all is
    checked but the bytes of the tensors: `newest` and `validate` have hashed them, and they are compared with what was saved once
    they are in memory. A rank reads only what it has of the model, and what its parameters held is never looked at. All ranks of
    the group must call it.

    Raises:
        ValueError: a file is missing or altered, or tensors do not fit the model: all listed.
    """
    state = together(group, lambda: _fill(folder, model, optimizers, group, carried))[place(group)[0]]
    weights, moments = _parts(model.state_dict()), _parts(_optimizer_tensors(_states(model, optimizers)))
    if _fingerprint(weights, moments | (carried.parts() if carried else {}), group) != state["fingerprint"]:
        raise ValueError(
            f"what is in memory is not what was saved in {folder}: the memory or the disk of a machine may be at fault."
        )
    return state


def _fill(
    folder: Path, model: PreTrainedModel, optimizers: list[Optimizer], group: ProcessGroup | None, carried: Carried | None
) -> dict[str, Any]:
    if faults := validate(folder, tensors=False):
        raise ValueError(f"{folder} is not a valid checkpoint: {'; '.join(faults)}.")
    try:
        weights, rest = stored((folder / "model").glob("*.safetensors")), stored(folder.glob("optimizer*.safetensors"))
    except ValueError as error:
        raise ValueError(f"{folder} is not a valid checkpoint: {error}.") from None
    rng = {"rng": torch.get_rng_state()}
    if "rng_cuda" in rest and torch.cuda.is_available():
        rng["rng_cuda"] = torch.cuda.get_rng_state()
    else:
        rest.pop("rng_cuda", None)
    want = model.state_dict()  # first, as in `snapshot`
    states = _states(model, optimizers)
    moments = _optimizer_tensors(states)
    rows = {name: one for name, one in rest.items() if carried and name.startswith(PREFIX)}
    others = {name: one for name, one in rest.items() if name not in rows}
    unfit = carried.unfit(rows) if carried else []
    slots = [{name.rsplit(".", 1)[-1] for name in tensors if name.endswith(SLOTS)} for tensors in (moments, others)]
    if slots[0] != slots[1]:
        raise ValueError(
            f"{folder} has the optimiser state of another optim.name: {sorted(slots[1])}, wanted {sorted(slots[0])}. "
            "Restore that, or start a new run from its model (--model.init_from)."
        )
    if faults := [*mismatch("weights", want, weights), *mismatch("optimiser", moments | rng, others), *unfit]:
        raise ValueError(f"{folder} does not fit this model: {'; '.join(faults)}.")
    into = carried.make_room(rows, model.device) if carried else {}
    tensor_files.read(weights | rest, want | moments | rng | into, group)
    of = _owners(optimizers)
    for name, p in model.named_parameters():
        of[p].state[p] = states[name]
    torch.set_rng_state(rng["rng"])
    if "rng_cuda" in rng:
        torch.cuda.set_rng_state(rng["rng_cuda"])
    return json.loads((folder / "state.json").read_text())


def folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run, whole or not, the oldest first."""
    found = [(p.name.removeprefix("step-"), p) for p in (run_dir / "checkpoints").glob("step-*")]
    return sorted((int(number), p) for number, p in found if number.isascii() and number.isdecimal())


def is_of(run_dir: Path, folder: Path) -> bool:
    """Whether a folder is one of the run's own checkpoints, and not one of another place or set aside."""
    return folder.resolve() in [own.resolve() for _, own in folders(run_dir)]


def newest(run_dir: Path) -> Path | None:
    """The newest valid checkpoint, None where there is none at all; says loudly which newer ones it passed over.

    Raises:
        ValueError: there are checkpoints, and not one is valid. To begin again then would be to lose a run without a word.
    """
    broken = []
    for _, folder in reversed(folders(run_dir)):
        if not (faults := validate(folder)):
            return folder
        broken.append(f"{folder}: {'; '.join(faults)}")
        logger.warning("PASSING OVER %s", broken[-1])
    if broken:
        raise ValueError("\n  ".join(["no checkpoint of this run is whole; restore one, or choose another --run_dir:", *broken]))
    if aside := sorted(map(str, (run_dir / "checkpoints").glob("set-aside-*/step-*"))):
        raise ValueError("\n  ".join(["all checkpoints of this run were set aside; go on from one with --resume PATH:", *aside]))
    return None


def rewind(run_dir: Path, start_from: Path | None) -> None:
    """Leaves only `start_from` and what came before it, and points RUN/model at it.

    Later checkpoints, of a future that is about to be another, and broken ones go to checkpoints/set-aside-<i>/.
    """
    ours = start_from is not None and is_of(run_dir, start_from)
    # First, so that it never points at what has been set aside.
    if start_from and ours:
        files.link(Path("checkpoints") / start_from.resolve().name / "model", run_dir / "model")
    elif (run_dir / "model").is_symlink():
        files.remove(run_dir / "model")
    first = int(start_from.resolve().name.removeprefix("step-")) + 1 if start_from and ours else 0
    later = [folder for number, folder in folders(run_dir) if number >= first]
    if later:
        aside = next(p for i in count(1) if not (p := run_dir / "checkpoints" / f"set-aside-{i}").exists())
        files.make_folder(aside)
        for folder in later:
            logger.warning("setting %s aside in %s: the run goes on from %s", folder, aside, start_from or "its start")
            files.rename(folder, aside / folder.name)
    for pattern in (".step-*.unfinished", ".step-*.deleted"):
        for folder in (run_dir / "checkpoints").glob(pattern):
            files.remove(folder)


def prune(run_dir: Path, keep: int, every: int | None = None) -> None:
    """Deletes all but the `keep` newest checkpoints and those of every `every`-th step, the oldest first."""
    older = folders(run_dir)[:-keep]
    for step, folder in older:
        if every is None or step % every:
            deleted = folder.with_name(f".{folder.name}.deleted")
            files.rename(folder, deleted)
            files.remove(deleted)


def validate(folder: Path, tensors: bool = True) -> list[str]:
    """What is wrong with a checkpoint folder, each file by its name; nothing if it is whole. Shows a bar where it takes long.

    Args:
        tensors: whether to read the files of tensors too, which may be all there is to read; otherwise they need only be there.
    """
    try:
        text = (folder / MANIFEST).read_text()
        digests = json.loads(text)["files"]
        altered = text != _manifest(digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if altered:
        return [f"{MANIFEST} has been altered"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("[!.]*") if p.is_symlink() or not p.is_dir()} - {MANIFEST}
    faults = [f"{name} is not in {MANIFEST}: it does not belong here" for name in sorted(there - digests.keys())]
    whole = "optimizer.safetensors"
    several = any(re.fullmatch(r"optimizer-\d+-of-\d+\.safetensors", name) for name in digests)
    for name in sorted({"model/config.json", "state.json", *([] if several else [whole])} - digests.keys()):
        faults.append(f"{name} is missing in {MANIFEST}")
    to_hash = []
    for name in digests:
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.resolve() != folder.resolve() / name:
            faults.append(f"{name} leads outside the checkpoint")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif tensors or path.suffix != ".safetensors":
            to_hash.append(name)
    found = _hash([folder / name for name in to_hash])
    faults += [f"{name} has been altered" for name, own in zip(to_hash, found) if own != digests[name]]
    return faults or _state_faults(folder)


def identity(folder: Path) -> str | None:
    """Which checkpoint it is that this rank sees there, by its manifest; None if it sees none."""
    manifest = folder / MANIFEST
    return f"{folder.name}, manifest {sha256(manifest.read_bytes()).hexdigest()[:12]}" if manifest.is_file() else None


def _state_faults(folder: Path) -> list[str]:
    try:
        state = json.loads((folder / "state.json").read_text())
        faults = [f"state.json has no {key} ({kind.__name__})" for key, kind in STATE.items() if type(state.get(key)) is not kind]
    except (ValueError, AttributeError, RecursionError) as error:
        return [f"state.json cannot be read ({error})"]
    name = folder.resolve().name
    if not faults and name.startswith("step-") and name != f"step-{state['step']}":
        faults = [f"state.json is of step {state['step']}: the folder has another's name"]
    return faults


def _states(model: PreTrainedModel, optimizers: list[Optimizer]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state by parameter; before the first update, while it has none, the zeros that it begins with."""
    of = _owners(optimizers)
    return {name: of[p].state[p] or _zeros(p, of[p]) for name, p in model.named_parameters()}


def _owners(optimizers: list[Optimizer]) -> dict[Tensor, Optimizer]:
    return {p: one for one in optimizers for group in one.param_groups for p in group["params"]}


def _zeros(p: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(p)}
    return {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _optimizer_tensors(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`parameter.slot`"""
    return {f"{name}.{slot}": value for name, state in states.items() for slot, value in state.items()}


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    return {name: part(tensor) for name, tensor in tensors.items()}


def _fingerprint(weights: Mapping[str, Part], optimizer: Mapping[str, Part], group: ProcessGroup | None) -> str:
    """Of all tensors but the random state, which is not in memory after a load where there is no such device."""
    return fingerprint({**weights, **{name: one for name, one in optimizer.items() if name not in ("rng", "rng_cuda")}}, group)


def _manifest(digests: dict[str, str]) -> str:
    """Its text; it holds its own digest, so that a flaw in it is not taken for one in the files."""
    own = sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": dict(sorted(digests.items())), "sha256": own}, indent=2) + "\n"


def _hash(paths: list[Path]) -> list[str]:
    """The sha256 of each file, several at a time; empty where it is no longer there."""
    size, lock = sum(path.stat().st_size for path in paths), Lock()
    bar = tqdm(total=size, desc="checking the checkpoint", unit="B", unit_scale=True, disable=size < LARGE, dynamic_ncols=True)

    def advance(count: int) -> None:
        with lock:
            bar.update(count)

    def one(path: Path) -> str:
        with suppress(FileNotFoundError):  # a run that goes on may have pruned it
            return files.sha256_of(path, advance)
        return ""

    with bar, ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, paths))
