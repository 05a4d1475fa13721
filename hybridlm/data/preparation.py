"""Documents to tokens on disk: in parts, by several processes, and to be gone on with where it was cut off.

A folder is written beside its final name, a part of consecutive documents at a time, each part by a rename; when all are there it
is given its tables and renamed itself. So what has its final name is whole, and what was finished before a kill is kept.
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm.data.parts import EXAMPLES, save_table, to_json, write_atomically, write_part
from hybridlm.data.pool import run_parts
from hybridlm.data.shards import FORMAT, LABELS, Shards, hash_files
from hybridlm.data.sources import Documents, Source, split_source
from hybridlm.machine import cores

PARTS = 64  # of a source of ordinary size: many for a few processes, few to open
SMALLEST_PART, LARGEST_PART = 2**20, 2**30  # bytes of text


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    val_source: Source | None = None,
    val_fraction: float = 0.1,
    bad_documents: str = "stop",
    workers: int | None = None,
    quiet: bool = False,
) -> tuple[Shards, Shards]:
    """Training and validation shards, from `cache_dir` where they have been written before.

    Args:
        bad_documents: `stop` at the first that cannot be read, or `skip` and count them.
        workers: processes that tokenise; default: one for each core that this process may use. 1 makes none for small data.

    Raises:
        ValueError: a tokenizer that cannot be used; a source that is bad, has no text, or was changed meanwhile.
        ChildProcessError: a process of the pool died.
    """
    training, validation = (
        documents_to_shards(d, tokenizer, cache_folder(d, tokenizer, cache_dir), bad_documents, workers, quiet)
        for d in split_source(source, val_source, val_fraction)
    )
    return training, validation


def cache_folder(documents: Documents, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Path:
    """Where these documents are kept as tokens."""
    check_outside(documents, cache_dir, "data.cache_dir")
    return cache_dir / identity(documents, tokenizer_digest(tokenizer))


def identity(documents: Documents, digest: str) -> str:
    """A name for what these documents give with the tokenizer of this digest."""
    return sha256(json.dumps([FORMAT, documents.name, documents.fingerprint, digest]).encode()).hexdigest()[:16]


def prepare_folder(
    documents: tuple[Documents, Documents],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    bad_documents: str = "stop",
    workers: int | None = None,
    quiet: bool = False,
) -> tuple[Shards, Shards]:
    """The same in a folder that is itself a source: `train/`, `validation/` and the `tokenizer/`.

    Args:
        documents: to train on and to validate with, as `split_source` gives them.

    Raises:
        ValueError: as `prepare`; the folder holds other things, or data prepared otherwise.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.removeprefix(".").split("-")[0].removesuffix(".lock") not in ("train", "validation", "tokenizer"):
            raise ValueError(f"{folder} holds {path.name}, which is no prepared data; give a new or empty folder.")
        if path.name in ("train", "validation") and not (path / "meta.json").exists():
            raise ValueError(f"{path} is no prepared data; give a new or empty folder.")
    for d in documents:
        check_outside(d, folder, "--out")
    if prepared := next((d for d in documents if d.prepared), None):
        raise ValueError(f"{prepared.name} is prepared already; train on it with --data.source {prepared.name}.")
    training, validation = (
        documents_to_shards(d, tokenizer, folder / split, bad_documents, workers, quiet)
        for d, split in zip(documents, ("train", "validation"))
    )
    tokenizer.save_pretrained(folder / "tokenizer")  # last: without it the folder is no source
    return training, validation


def check_outside(documents: Documents, folder: Path, setting: str) -> None:
    """
    Raises:
        ValueError: what is written to `folder` would become part of the source.
    """
    if Path(documents.name).expanduser().resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"{setting} {folder} lies inside the source {documents.name}, which it would change; give a folder elsewhere."
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of what decides the tokens.

    Raises:
        ValueError: a tokenizer without an end token or a fast backend.
    """
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.tokenizer must be a fast tokenizer with an end token (eos_token); got {type(tokenizer).__name__}."
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return sha256(json.dumps([content, tokenizer.eos_token_id]).encode()).hexdigest()


def differences(shards: Shards, documents: Documents, digest: str) -> list[str]:
    """In what finished shards are not those of `documents`, in words."""
    wanted = {"source": documents.name, "fingerprint": documents.fingerprint, "tokenizer": digest}
    words = {"fingerprint": "fingerprint (the source has changed since, or what is taken of it)"}
    return [
        f"{words.get(name, name)}: {shards.meta[name]} -> {value}"  # type: ignore[literal-required]
        for name, value in wanted.items()
        if shards.meta[name] != value  # type: ignore[literal-required]
    ]


def documents_to_shards(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    bad_documents: str = "stop",
    workers: int | None = None,
    quiet: bool = False,
) -> Shards:
    """The shards of `documents` in `folder`, written where they are not there yet; `Raises` as `prepare`."""
    digest = tokenizer_digest(tokenizer)
    if documents.prepared is not None:
        shards = Shards(documents.prepared).check()
        if shards.meta["tokenizer"] != digest:
            raise ValueError(
                f"{documents.name} was prepared with another tokenizer; its own is {documents.prepared.parent / 'tokenizer'} "
                "(data.tokenizer)."
            )
        return shards
    # What is there already may be where nothing can be written.
    with nullcontext() if (folder / "meta.json").exists() else only_one(folder, quiet):
        if not (folder / "meta.json").exists():
            unfinished = folder.with_name(f".{folder.name}-{identity(documents, digest)}")
            for other in folder.parent.glob(f".{folder.name}-*"):
                if other != unfinished:  # of a source that has changed since, or of another tokenizer
                    shutil.rmtree(other)
            if not (unfinished / "meta.json").exists():
                try:
                    write(documents, tokenizer, digest, unfinished, bad_documents == "skip", workers, quiet)
                except OSError as error:
                    if error.errno is None:  # a process that died, which says so itself
                        raise
                    kept = f"{error.strerror}; what is finished of {unfinished} is kept, and the same command goes on"
                    raise OSError(error.errno, kept, error.filename) from None
            shutil.rmtree(unfinished / "parts", ignore_errors=True)
            for leftover in unfinished.glob(".*"):  # of processes that were killed
                leftover.unlink()
            unfinished.rename(folder)
        shards = Shards(folder).check()
        if faults := differences(shards, documents, digest):
            raise ValueError(f"{folder} was prepared otherwise: {'; '.join(faults)}. Give another --out, or remove it.")
        if shards.meta["license"] != documents.license:
            write_atomically(folder / "meta.json", to_json(shards.meta | {"license": documents.license}))
            shards = Shards(folder).check()
    bad = {reason: count for reason, count in shards.meta["skipped"].items() if reason != "empty"}
    if bad and bad_documents == "stop":
        raise ValueError(
            f"{documents.name} was prepared without {sum(bad.values())} bad documents ({shards.meta['skipped_examples'][0]} …); "
            "mend them, or accept that with data.bad_documents=skip."
        )
    return shards


@contextmanager
def only_one(folder: Path, quiet: bool) -> Iterator[None]:
    """Inside, no other process prepares this folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not quiet:
            print(f"another process is preparing {folder}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    digest: str,
    folder: Path,
    skip: bool,
    workers: int | None,
    quiet: bool,
) -> None:
    """All parts that are not there yet, then `documents.npy`, and `meta.json` last."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    parts = partition(documents)
    missing = [number for number in range(len(parts)) if not (folder / "parts" / f"{number:05d}.json").exists()]
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4")
    job = partial(write_part, documents, parts, tokenizer, dtype, folder, skip)
    if workers is None:
        workers = cores()
    with tqdm(total=len(documents), desc=f"tokenising {documents.name}", unit=" documents", disable=quiet) as bar:
        bar.update(len(documents) - sum(len(parts[number]) for number in missing))
        bar.initial = bar.n  # what was there before says nothing about the speed
        if workers <= 1 or documents.size <= SMALLEST_PART:
            with single_threaded_tokenizers():
                for number in missing:
                    job(number, bar.update)
        else:
            names = {n: f"documents {parts[n].start} to {parts[n].stop - 1} of {documents.name}" for n in missing}
            run_parts(job, names, min(workers, len(missing)), bar.update)
    if documents.changed():
        shutil.rmtree(folder)
        raise ValueError(f"data source {documents.name!r} was changed while it was read; leave it as it is and start again.")
    finish(documents, digest, dtype, tokenizer.eos_token_id, folder, len(parts))


def finish(documents: Documents, digest: str, dtype: np.dtype, end: int, folder: Path, count: int) -> None:
    parts = [json.loads((folder / "parts" / f"{number:05d}.json").read_text()) for number in range(count)]
    tables = [np.load(folder / "parts" / f"{number:05d}.npy", allow_pickle=False) for number in range(count)]
    offset, skipped = 0, Counter[str]()
    for part, table in zip(parts, tables):
        table[:, 0] += offset
        offset += part["tokens"]
        skipped.update(part["skipped"])
    examples = [example for part in parts for example in part["examples"]][:EXAMPLES]
    table = np.concatenate(tables)
    if not len(table):
        why = "; ".join([*(f"{reason}: {n}" for reason, n in skipped.items()), *examples[:1]])
        raise ValueError(f"data source {documents.name!r} has {len(documents)} document(s) and no text in them ({why}).")
    kept = [{key: part[key] for key in ("file", "tokens", "sha256")} for part in parts if part["tokens"]]
    save_table(folder / "documents.npy", table)
    meta = {
        "format": FORMAT, "source": documents.name, "fingerprint": documents.fingerprint, "license": documents.license,
        "tokenizer": digest, "dtype": dtype.str, "parts": kept, "tokens": offset, "documents": len(table),
        "documents_sha256": hash_files([folder / "documents.npy"]), "bytes": int(table[:, 1].sum()),
        "largest_id": max(end, *(part["largest_id"] for part in parts)), "skipped": dict(sorted(skipped.items())),
        "skipped_examples": examples, "sha256": hash_files([folder / part["file"] for part in kept]),
    }  # fmt: skip
    if documents.label is not None:
        names, of_document = numbered([label for part in parts for label in part["labels"]])
        save_table(folder / LABELS, of_document)
        meta |= {"labels": names, "labels_sha256": hash_files([folder / LABELS])}
        meta["sha256"] = sha256(json.dumps([meta["sha256"], names, meta["labels_sha256"]]).encode()).hexdigest()
    write_atomically(folder / "meta.json", to_json(meta))


def numbered(labels: list[str]) -> tuple[list[str], np.ndarray]:
    """The different labels, sorted, whole numbers by their size and before others, and (documents) int64: which each is."""
    is_number = re.compile("-?[0-9]{1,18}").fullmatch
    names = sorted(set(labels), key=lambda label: (0, int(label), label) if is_number(label) else (1, 0, label))
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], dtype=np.int64)


def partition(documents: Documents) -> list[range]:
    """Runs of documents, about equal in bytes; the same for any number of processes."""
    wanted = min(max(documents.size / PARTS, SMALLEST_PART), LARGEST_PART)
    each = max(1, math.ceil(len(documents) * wanted / max(1, documents.size)))
    return [range(start, min(start + each, len(documents))) for start in range(0, len(documents), each)]


@contextmanager
def single_threaded_tokenizers() -> Iterator[None]:
    """Without threads of the tokenizers library's own: a process that has used them cannot be forked without a warning."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
