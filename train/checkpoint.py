"""The checkpoints of a run: whole or not there, checked when read, safetensors and JSON only.

checkpoints/step-<n>/ holds `model/` (a `from_pretrained` folder), `optimizer.safetensors` (with the random state), `state.json`
and, written last, `manifest.json` with the sha256 of every other file. A folder appears under its name by one rename, after
everything in it has reached the disk, and disappears by one rename before anything in it is deleted.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from train import files

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a resume needs besides tensors; `identity` says what the position in the data means, `cursor` is of streamed data.
STATE = {
    "step": int, "samples": int, "tokens": int, "identity": dict, "cursor": dict, "spikes": dict, "validation": list,
    "weights_sha256": str,
}  # fmt: skip
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint, in memory.

    Attributes:
        weights: the model's, by name. optimizer: its state by `parameter.slot`, and the random state.
        state: JSON, the keys of STATE but for the digest. sidecars: the other files of the model folder.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    sidecars: dict[str, bytes]


def snapshot(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any], sidecars: dict[str, bytes], copy: bool
) -> Snapshot:
    """The state of this moment. With `copy` it stays so while training goes on; without, it is to be written at once."""

    def keep(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=copy) for name, tensor in tensors.items()}

    rng = {"rng": torch.get_rng_state()}
    if next(model.parameters()).device.type == "cuda":
        rng["rng_cuda"] = torch.cuda.get_rng_state()
    return Snapshot(keep(model.state_dict()), keep(_optimizer_tensors(model, optimizer)) | rng, state, sidecars)


def sidecars(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a model folder besides the weights: configuration, generation settings, tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={})  # no weights: these go through `files`
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def write(run_dir: Path, shot: Snapshot) -> Path:
    """Writes checkpoints/step-<step> and points RUN/model at its model.

    Raises:
        OSError: the disk would not have it. Older checkpoints are as they were; what was written is removed where possible.
    """
    step = shot.state["step"]
    final = run_dir / "checkpoints" / f"step-{step}"
    unfinished = run_dir / "checkpoints" / f".step-{step}.unfinished"
    if unfinished.exists():
        files.remove(unfinished)
    try:
        files.make_folder(unfinished / "model")
        content: dict[str, Any] = {f"model/{name}": [data] for name, data in shot.sidecars.items()}
        shards = split_torch_state_dict_into_shards(shot.weights, max_shard_size="5GB")
        for name, keys in shards.filename_to_tensors.items():
            content[f"model/{name}"] = _safetensors({key: shot.weights[key] for key in keys})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            content[f"model/{SAFE_WEIGHTS_INDEX_NAME}"] = [json.dumps(index, indent=2).encode()]
        content["optimizer.safetensors"] = _safetensors(shot.optimizer)
        state = shot.state | {"weights_sha256": digest(shot.weights)}
        content["state.json"] = [(json.dumps(state, indent=2, allow_nan=False) + "\n").encode()]
        digests = {name: files.write(unfinished / name, blocks) for name, blocks in sorted(content.items())}
        files.write_text(unfinished / MANIFEST, _manifest(digests))
        files.sync(unfinished / "model")
        files.sync(unfinished)
        files.rename(unfinished, final)
        files.link(Path("checkpoints") / final.name / "model", run_dir / "model")
    except OSError as error:
        kept = [f"step-{number}" for number, _ in folders(run_dir) if number != step]
        try:
            if unfinished.exists():
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


def load(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts weights, optimiser state and random state back, and returns the rest. Nothing is changed before all is checked.

    Raises:
        ValueError: a file is missing or altered, or tensors do not fit the model: all listed.
    """
    if faults := validate(folder):
        raise ValueError(f"{folder} is not a valid checkpoint: {'; '.join(faults)}.")
    state = json.loads((folder / "state.json").read_text())
    try:
        weights = {k: v for path in sorted((folder / "model").glob("*.safetensors")) for k, v in load_file(path).items()}
        tensors = load_file(folder / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is not a valid checkpoint: {error}.") from None
    rng: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if "rng_cuda" in tensors and torch.cuda.is_available():
        rng["rng_cuda"] = torch.cuda.get_rng_state()
    kept_rng = {name: tensors.pop(name) for name in ("rng", "rng_cuda") if name in tensors}
    want = _optimizer_tensors(model, optimizer)
    faults = [*_mismatch("weights", model.state_dict(), weights), *_mismatch("optimiser", want, tensors)]
    faults += _mismatch("random state", rng, {name: kept_rng[name] for name in kept_rng if name in rng})
    if faults:
        raise ValueError(f"{folder} does not fit this model: {'; '.join(faults)}.")
    model.load_state_dict(weights)
    for name, p in model.named_parameters():
        optimizer.state[p] = {slot: tensors[f"{name}.{slot}"].to(p.device, copy=True) for slot in _zeros(p)}
    torch.set_rng_state(kept_rng["rng"])
    if "rng_cuda" in rng:
        torch.cuda.set_rng_state(kept_rng["rng_cuda"])
    if digest(model.state_dict()) != state["weights_sha256"]:
        raise ValueError(
            f"the weights in memory are not those that were saved in {folder}: the machine's memory may be at fault."
        )
    return state


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


def validate(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder, each file by its name; nothing if it is whole."""
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
    for name in sorted({"model/config.json", "optimizer.safetensors", "state.json"} - digests.keys()):
        faults.append(f"{name} is missing in {MANIFEST}")
    for name, want in digests.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.resolve() != folder.resolve() / name:
            faults.append(f"{name} leads outside the checkpoint")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif _sha256(path) != want:
            faults.append(f"{name} has been altered")
    return faults or _state_faults(folder)


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


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, `parameter.slot`; before the first update, while it has none, the zeros that it begins with."""
    states = {name: optimizer.state[p] or _zeros(p) for name, p in model.named_parameters()}
    return {f"{name}.{slot}": value for name, state in states.items() for slot, value in state.items()}


def _zeros(p: Tensor) -> dict[str, Tensor]:
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _mismatch(what: str, want: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    faults = [f"{what} missing {sorted(want.keys() - got.keys())}"] if want.keys() - got.keys() else []
    if got.keys() - want.keys():
        faults.append(f"{what} unknown {sorted(got.keys() - want.keys())}")
    for name in want.keys() & got.keys():
        wanted, came = ((tuple(t.shape), t.dtype) for t in (want[name], got[name]))
        if wanted != came:
            faults.append(f"{what} {name}: wanted {wanted}, got {came}")
    return faults


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in blocks. The library's own writer copies all tensors into one and keeps Python, and so the training
    beside it, waiting meanwhile.
    """
    # The widest first, so that each stays aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names and values, in the order of the names."""
    total = sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        total.update(_bytes(tensors[name]))
    return total.hexdigest()


def _manifest(digests: dict[str, str]) -> str:
    """Its text; it holds its own digest, so that a flaw in it is not taken for one in the files."""
    own = sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": dict(sorted(digests.items())), "sha256": own}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    total = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()
