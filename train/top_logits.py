"""The largest logits of a teacher on disk, by sample number: a run learns from them with no teacher in memory.

The folder has logits-00000.safetensors, … of a fixed number of samples each: `ids` (samples t k) uint16, or int32 for more than
65,536 tokens, and `log_probs` (samples t k) float16, the k largest log-probabilities of each position at the temperature of
the loss. `plan.json`, written first, says of what they are; `meta.json`, written last, has the sha256 of every file too. A file
appears under its name by one rename, after it has reached the disk.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from hybridlm.data.blend import Blend
from train import files
from train.config import differences
from train.optim import samples_by
from train.settings import RunConfig

PLAN, META = "plan.json", "meta.json"
FILE_BYTES = 2**27
MOST_IN_UINT16 = 2**16
AGAIN = "`python -m train distill … --write_logits` as it was first given writes what is missing or damaged, and nothing else."

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Logits:
    """A finished folder.

    Attributes:
        meta: `samples` in all, `samples_per_file`, `seq_len`, `top_k`, `temperature`, `vocab_size`, `data` (what gives sample
            numbers their meaning), the teacher's name, fingerprint and precision, and `files`: the sha256 of each.
    """

    folder: Path
    meta: dict[str, Any]

    def batch(self, start: int, stop: int) -> Arrays:
        """Of samples start … stop - 1: `teacher_ids` (b t k) int32, `teacher_log_probs` (b t k) float16.

        Raises:
            ValueError: there are not so many, or a file cannot be read any more.
        """
        if stop > self.meta["samples"]:
            raise ValueError(f"{self.folder} has logits of {self.meta['samples']} samples, and number {stop - 1} is asked for.")
        size = self.meta["samples_per_file"]
        parts = [
            self._rows(number, max(start - number * size, 0), min(stop - number * size, size))
            for number in range(start // size, -(-stop // size))
        ]
        ids, log_probs = (np.concatenate([part[name] for part in parts]) for name in ("ids", "log_probs"))
        return {"teacher_ids": ids.astype(np.int32), "teacher_log_probs": log_probs}

    def _rows(self, number: int, first: int, end: int) -> Arrays:
        path = self.folder / file_name(number)
        try:
            with safe_open(path, framework="np") as file:
                return {name: file.get_slice(name)[first:end] for name in ("ids", "log_probs")}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}. {AGAIN}") from None


@dataclass(frozen=True)
class Taught(Blend):
    """Samples that bring what a teacher said of them."""

    kept: Logits

    def batch(self, start: int, stop: int) -> Arrays:
        return super().batch(start, stop) | self.kept.batch(start, stop)


def taught(stream: Blend, config: RunConfig, vocab_size: int) -> Taught:
    """
    Raises:
        ValueError: `distill.logits` are not of the samples, the vocabulary or the temperature of this run, or too few.
    """
    assert config.distill.logits is not None
    kept = open_logits(config.distill.logits)
    meta, needed = kept.meta, samples_by(config, config.train.steps)
    faults = [f"  {line}" for line in stream.changed(meta["data"], min(needed, meta["samples"]))]
    if meta["temperature"] != config.distill.temperature:
        faults.append(f"  distill.temperature: {meta['temperature']} -> {config.distill.temperature}")
    if meta["vocab_size"] != vocab_size:
        faults.append(f"  vocab_size: {meta['vocab_size']} -> {vocab_size}")
    if needed > meta["samples"]:
        faults.append(f"  samples (of all train.steps): {meta['samples']} -> {needed}")
    if faults:
        raise ValueError(
            "\n".join([f"distill.logits {kept.folder} were written for another run (written -> wanted):", *faults])
            + "\nRestore what it was, or write others: python -m train distill … --write_logits DIR."
        )
    return Taught(stream.samplers, stream.weights, stream.borders, kept)


def open_logits(folder: str) -> Logits:
    """
    Raises:
        ValueError: it has none, or they are not finished.
    """
    path = Path(folder).expanduser()
    if not (path / META).is_file():
        what = f"are not finished. {AGAIN}" if (path / PLAN).is_file() else (
            f"has no {META}, so it holds no logits; make them: python -m train distill --config FILE --write_logits {folder}"
        )  # fmt: skip
        raise ValueError(f"distill.logits {folder} {what}")
    try:
        return Logits(path, json.loads((path / META).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"distill.logits {folder}: {META} cannot be read ({error}); delete it. {AGAIN}") from None


def verify(kept: Logits) -> None:
    """Reads every file, with a progress bar.

    Raises:
        ValueError: one is missing or has been altered.
    """
    faults = []
    for name, digest in tqdm(kept.meta["files"].items(), desc="checking the logits", unit="file", leave=False):
        path = kept.folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif files.sha256_of(path) != digest:
            faults.append(f"{name} has been altered")
    if faults:
        raise ValueError(f"distill.logits {kept.folder}: {'; '.join(faults)}. {AGAIN}")


def write(folder: Path, plan: dict[str, Any], entries: Callable[[int, int], Arrays]) -> None:
    """Writes what is not there yet, with a progress bar; cut off, the same call goes on.

    Args:
        plan: `Logits.meta` but for `files`, and `rows`, the samples of one pass of the teacher.
        entries: `ids` and `log_probs` of samples start … stop - 1.

    Raises:
        ValueError: the folder is something else, or of another plan.
    """
    begin(folder, plan)
    known = json.loads((folder / META).read_text())["files"] if (folder / META).exists() else {}
    size, digests = plan["samples_per_file"], {}
    with tqdm(total=plan["samples"], desc="writing logits", unit="sample", dynamic_ncols=True) as bar:
        for number in range(-(-plan["samples"] // size)):
            name, start = file_name(number), number * size
            stop = min(start + size, plan["samples"])
            path = folder / name
            digest = files.sha256_of(path) if path.is_file() else None
            if digest is None or known.get(name, digest) != digest:
                parts = []
                for first in range(start, stop, plan["rows"]):
                    parts.append(entries(first, min(first + plan["rows"], stop)))
                    bar.update(min(plan["rows"], stop - first))
                whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
                unfinished = folder / f".{name}.unfinished"
                digest = files.write(unfinished, [save(whole)])
                files.rename(unfinished, path)
            else:
                bar.initial += stop - start  # else the time left would be judged by what took none
                bar.n += stop - start
            digests[name] = digest
    files.replace_text(folder / META, json.dumps(plan | {"files": digests}, indent=2) + "\n")


def begin(folder: Path, plan: dict[str, Any]) -> None:
    file = folder / PLAN
    if file.exists():
        if lines := list(differences(json.loads(file.read_text()), plan)):
            raise ValueError(
                f"--write_logits {folder} has logits of other settings (there -> now):\n"
                + "".join(f"  {line}\n" for line in lines)
                + "Give another folder, or the settings that it was begun with."
            )
        return
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {f".{PLAN}.unfinished"}):
        raise ValueError(f"--write_logits {folder} exists and holds no logits; give another folder.")
    files.make_folder(folder)
    files.replace_text(file, json.dumps(plan, indent=2) + "\n")


def samples_per_file(seq_len: int, top_k: int, vocab_size: int) -> int:
    return max(1, FILE_BYTES // (seq_len * top_k * (np.dtype(id_type(vocab_size)).itemsize + 2)))


def id_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= MOST_IN_UINT16 else np.int32


def file_name(number: int) -> str:
    return f"logits-{number:05d}.safetensors"
