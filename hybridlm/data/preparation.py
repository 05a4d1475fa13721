"""Documents to tokens on disk: in parts, by several processes, and to be gone on with where it was cut off.

A folder is written beside its final name, a part of consecutive documents at a time, each part by a rename; when all are there it
is given its tables and renamed itself. So what has its final name is whole, and what was finished before a kill is kept.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm.data.pool import run_parts
from hybridlm.data.rows import BadDocument
from hybridlm.data.shards import FORMAT, Shards, hash_files, token_bytes, tokenize
from hybridlm.data.sources import Documents, Source, split_source

PARTS = 64  # of a source of ordinary size: many for a few processes, few to open
SMALLEST_PART, LARGEST_PART = 2**20, 2**30  # bytes of text
BATCH, PIECE = 2**22, 2**20  # characters tokenised in one call, and of one text in it
EXAMPLES = 5  # of skipped documents, kept in meta.json


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
        prepare_documents(documents, tokenizer, cache_dir, bad_documents, workers, quiet)
        for documents in split_source(source, val_source, val_fraction)
    )
    return training, validation


def prepare_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    bad_documents: str = "stop",
    workers: int | None = None,
    quiet: bool = False,
) -> Shards:
    """The same for documents that are open already."""
    folder = cache_dir / identity(documents, tokenizer_digest(tokenizer))
    return documents_to_shards(documents, tokenizer, folder, bad_documents, workers, quiet)


def identity(documents: Documents, digest: str) -> str:
    """A name for what these documents give with the tokenizer of this digest."""
    return sha256(json.dumps([FORMAT, documents.name, documents.fingerprint, digest]).encode()).hexdigest()[:16]


def prepare_folder(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    val_source: Source | None = None,
    val_fraction: float = 0.1,
    bad_documents: str = "stop",
    workers: int | None = None,
    quiet: bool = False,
) -> tuple[Shards, Shards]:
    """The same in a folder that is itself a source: `train/`, `validation/` and the `tokenizer/`.

    Raises:
        ValueError: as `prepare`; the folder holds other things, or data prepared otherwise.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.removeprefix(".").split("-")[0].removesuffix(".lock") not in ("train", "validation", "tokenizer"):
            raise ValueError(f"{folder} holds {path.name}, which is no prepared data; give a new or empty folder.")
    if Path(source.source).expanduser().resolve() in folder.resolve().parents:
        raise ValueError(f"{folder} lies inside the source {source.source}, which it would change; give a folder elsewhere.")
    documents = split_source(source, val_source, val_fraction)
    if prepared := next((d for d in documents if d.prepared), None):
        raise ValueError(f"{prepared.name} is prepared already; train on it with --data.source {prepared.name}.")
    digest = tokenizer_digest(tokenizer)
    for d, split in zip(documents, ("train", "validation")):
        if (folder / split / "meta.json").exists() and (faults := differences(Shards(folder / split), d, digest)):
            raise ValueError(f"{folder / split} was prepared otherwise: {'; '.join(faults)}. Give another --out, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    training, validation = (
        documents_to_shards(d, tokenizer, folder / split, bad_documents, workers, quiet)
        for d, split in zip(documents, ("train", "validation"))
    )
    return training, validation


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
    with only_one(folder, quiet):
        if not (folder / "meta.json").exists():
            unfinished = folder.with_name(f".{folder.name}-{identity(documents, digest)}")
            for other in folder.parent.glob(f".{folder.name}-*"):
                if other != unfinished:  # of a source that has changed since, or of another tokenizer
                    shutil.rmtree(other)
            if not (unfinished / "meta.json").exists():
                write(documents, tokenizer, digest, unfinished, bad_documents == "skip", workers, quiet)
            shutil.rmtree(unfinished / "parts", ignore_errors=True)
            for leftover in unfinished.glob(".*"):  # of processes that were killed
                leftover.unlink()
            unfinished.rename(folder)
        shards = Shards(folder).check()
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
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    job = partial(write_part, documents, parts, tokenizer, dtype, folder, skip)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tqdm(total=len(documents), desc=f"tokenising {documents.name}", unit=" documents", disable=quiet) as bar:
        bar.update(len(documents) - sum(len(parts[number]) for number in missing))
        bar.initial = bar.n  # what was there before says nothing about the speed
        if workers <= 1 or documents.size <= SMALLEST_PART:
            with threads_of_tokenizers(False):
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
    write_atomically(folder / "meta.json", to_json(meta))


def partition(documents: Documents) -> list[range]:
    """Runs of documents, about equal in bytes; the same for any number of processes."""
    wanted = min(max(documents.size / PARTS, SMALLEST_PART), LARGEST_PART)
    each = max(1, math.ceil(len(documents) * wanted / max(1, documents.size)))
    return [range(start, min(start + each, len(documents))) for start in range(0, len(documents), each)]


def write_part(
    documents: Documents,
    parts: list[range],
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype,
    folder: Path,
    skip: bool,
    number: int,
    advance: Callable[[int], Any],
) -> None:
    """Tokens, then table, then description of one part; with the last it counts as there.

    Args:
        advance: called with how many documents are done since the last call.
    """
    path, side = folder / f"tokens-{number:05d}.bin", folder / "parts" / f"{number:05d}"
    digest, total, largest = sha256(), 0, 0
    rows: list[tuple[int, int]] = []
    skipped, examples = Counter[str](), []
    first_bytes: dict[int, int] = {}
    end = np.array([tokenizer.eos_token_id], dtype=dtype)

    def good() -> Iterator[tuple[str, int]]:
        """Pieces of documents, the last of each with the bytes of the whole, the others with 0."""
        for i in parts[number]:
            try:
                text = documents[i]
            except BadDocument as error:
                if not skip:
                    raise BadDocument(error.reason, f"{error} Mend it, or leave such out with data.bad_documents=skip.") from None
                skipped[error.reason] += 1
                examples.append(str(error))
                continue
            if not text:
                skipped["empty"] += 1
                continue
            *most, last = pieces(text)
            yield from ((piece, 0) for piece in most)
            yield last, len(text.encode())

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        document = []  # the tokens of its pieces so far
        for batch in batches(good()):
            for (_, size), ids in zip(batch, tokenize([piece for piece, _ in batch], tokenizer)):
                document.append(np.fromiter(ids, dtype=dtype, count=len(ids)))
                if not size:
                    continue
                tokens, document = np.concatenate([*document, end]), []
                if len(tokens) == 1:
                    skipped["empty"] += 1
                    continue
                first = int(tokens[0])
                if first not in first_bytes:
                    first_bytes[first] = token_bytes(first, tokenizer)
                total += len(tokens)
                largest = max(largest, int(tokens.max()))
                rows.append((total, size - first_bytes[first]))
                digest.update(tokens.data)
                file.write(tokens.data)
            advance(sum(size > 0 for _, size in batch))
        file.flush()
        os.fsync(file.fileno())
    if total:
        unfinished.replace(path)
    else:
        unfinished.unlink()
    save_table(side.with_suffix(".npy"), np.array(rows, dtype=np.int64).reshape(-1, 2))
    description = {
        "file": path.name, "tokens": total, "sha256": digest.hexdigest(), "largest_id": largest, "skipped": skipped,
        "examples": examples[:EXAMPLES],
    }  # fmt: skip
    write_atomically(side.with_suffix(".json"), to_json(description))


def batches(stretches: Iterator[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Runs of about BATCH characters together."""
    batch, length = [], 0
    for piece, size in stretches:
        batch.append((piece, size))
        length += len(piece)
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def pieces(text: str) -> Iterator[str]:
    """The text in stretches of at most PIECE characters.

    A tokenizer needs some hundred bytes for each character of a call. A cut lies behind a line end where there is one in the
    second half of the stretch: tokens rarely reach over it, so that they are those of the whole text.
    """
    start = 0
    while start < len(text):
        stop = start + PIECE
        if stop < len(text):
            stop = (text.rfind("\n", start + PIECE // 2, stop) + 1) or stop
        yield text[start:stop]
        start = stop


@contextmanager
def threads_of_tokenizers(many: bool) -> Iterator[None]:
    """Whether tokenizers uses threads of its own. A process that has used them cannot be forked without a warning."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = str(many).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def save_table(path: Path, table: np.ndarray) -> None:
    np.save(content := BytesIO(), table, allow_pickle=False)
    write_atomically(path, content.getbuffer())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
