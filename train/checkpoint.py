"""The checkpoints of a run: whole or not there, checked when read, safetensors and JSON only.

checkpoints/step-<n>/ holds `model/` (a `from_pretrained` folder), `optimizer.safetensors`, `state.json` and, written last,
`manifest.json` with the sha256 of every other file. A folder appears under its name by one rename, after everything in it has
reached the disk.
"""

import hashlib
import json
import logging
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def save(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict,
    card: str,
) -> Path:
    """Writes checkpoints/step-<step> and points RUN/model at its model.

    Args:
        state: JSON: what else a resume needs.
        card: the model card, in Markdown.
    """
    final = run_dir / "checkpoints" / f"step-{step}"
    if final.exists():
        return final  # the one that this run went on from: `rewind` has left no other
    unfinished = run_dir / "checkpoints" / f".step-{step}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished / "model")
    tokenizer.save_pretrained(unfinished / "model")
    (unfinished / "model" / "README.md").write_text(card)
    save_file(_optimizer_tensors(model, optimizer) | {"rng": torch.get_rng_state()}, unfinished / "optimizer.safetensors")
    (unfinished / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    files = sorted(p for p in unfinished.rglob("*") if p.is_file())
    digests = {p.relative_to(unfinished).as_posix(): _sha256(p) for p in files}
    (unfinished / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")
    for path in (*files, unfinished / MANIFEST, unfinished / "model", unfinished):
        _sync(path)
    unfinished.rename(final)
    _sync(final.parent)
    _link(run_dir, final)
    return final


def load(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts weights, optimiser state and RNG back, and returns `state`. Nothing is changed before everything has been checked.

    Raises:
        ValueError: a file is missing or altered, or tensors do not fit the model: all listed.
    """
    if faults := validate(folder):
        raise ValueError(f"{folder} is not a valid checkpoint: {'; '.join(faults)}.")
    weights = load_file(folder / "model" / "model.safetensors") if (folder / "model" / "model.safetensors").exists() else {}
    for shard in sorted((folder / "model").glob("model-*.safetensors")):
        weights |= load_file(shard)
    tensors = load_file(folder / "optimizer.safetensors")
    rng = tensors.pop("rng")
    own = model.state_dict()
    names: dict[str, torch.Tensor] = {
        f"{name}.{slot}": p for name, p in model.named_parameters() for slot in ("exp_avg", "exp_avg_sq")
    }
    names |= {f"{name}.step": torch.zeros(()) for name, _ in model.named_parameters()}
    faults = [*_mismatch("weights", own, weights), *_mismatch("optimiser", names, tensors)]
    if faults:
        raise ValueError(f"{folder} does not fit this model: {'; '.join(faults)}.")
    model.load_state_dict(weights)
    for name, p in model.named_parameters():
        optimizer.state[p] = {slot: tensors[f"{name}.{slot}"].to(p.device) for slot in ("step", "exp_avg", "exp_avg_sq")}
    torch.set_rng_state(rng)
    return json.loads((folder / "state.json").read_text())


def newest(run_dir: Path) -> Path | None:
    """The newest valid checkpoint, None where there is none at all; says loudly which newer ones it passed over.

    Raises:
        ValueError: there are checkpoints, and not one is valid. To begin again then would be to lose a run without a word.
    """
    broken = []
    for _, folder in sorted(_all(run_dir), reverse=True):
        if not (faults := validate(folder)):
            return folder
        broken.append(f"{folder}: {'; '.join(faults)}")
        logger.warning("PASSING OVER %s", broken[-1])
    if broken:
        raise ValueError("\n  ".join(["no checkpoint of this run is whole; restore one, or choose another --run_dir:", *broken]))
    return None


def rewind(run_dir: Path, start_from: Path | None) -> None:
    """Leaves only `start_from` and what came before it, and points RUN/model at it.

    Later checkpoints, of a future that is about to be another, and broken ones go to checkpoints/set-aside-<i>/.
    """
    ours = start_from is not None and start_from.resolve().parent == (run_dir / "checkpoints").resolve()
    first = int(start_from.resolve().name.removeprefix("step-")) + 1 if start_from and ours else 0
    later = [folder for number, folder in _all(run_dir) if number >= first]
    if later:
        aside = next(p for i in count(1) if not (p := run_dir / "checkpoints" / f"set-aside-{i}").exists())
        aside.mkdir()
        for folder in later:
            logger.warning("setting %s aside in %s: the run goes on from %s", folder, aside, start_from or "its start")
            folder.rename(aside / folder.name)
    for unfinished in (run_dir / "checkpoints").glob(".step-*.unfinished"):
        shutil.rmtree(unfinished)
    if start_from and ours:
        _link(run_dir, run_dir / "checkpoints" / start_from.resolve().name)
    else:
        (run_dir / "model").unlink(missing_ok=True)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints."""
    for _, folder in sorted(_all(run_dir), reverse=True)[keep:]:
        shutil.rmtree(folder)


def validate(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder; nothing if it is whole."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    faults = []
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif _sha256(path) != digest:
            faults.append(f"{name} has been altered")
    return faults


def _all(run_dir: Path) -> list[tuple[int, Path]]:
    found = (run_dir / "checkpoints").glob("step-*")
    return [(int(p.name.removeprefix("step-")), p) for p in found if p.name.removeprefix("step-").isdigit()]


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}.{slot}": value for name, p in model.named_parameters() for slot, value in optimizer.state[p].items()}


def _mismatch(what: str, want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    faults = [f"{what} missing {sorted(want.keys() - got.keys())}"] if want.keys() - got.keys() else []
    if got.keys() - want.keys():
        faults.append(f"{what} unknown {sorted(got.keys() - want.keys())}")
    for name in want.keys() & got.keys():
        wanted, came = ((tuple(t.shape), t.dtype) for t in (want[name], got[name]))
        if wanted != came:
            faults.append(f"{what} {name}: wanted {wanted}, got {came}")
    return faults


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(run_dir: Path, checkpoint: Path) -> None:
    """Points RUN/model at the checkpoint's model: a relative link, swapped in one rename."""
    fresh = run_dir / ".model.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path("checkpoints") / checkpoint.name / "model")
    fresh.replace(run_dir / "model")
    _sync(run_dir)
