"""One part of a source, a run of its documents, to tokens on disk; and files that are there whole or not at all."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridlm.data.rows import BadDocument
from hybridlm.data.shards import token_bytes, tokenize
from hybridlm.data.sources import Documents

BATCH, PIECE = 2**22, 2**20  # characters tokenised in one call, and of one text in it
EXAMPLES = 5  # of skipped documents, kept in meta.json


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
    labels: list[str] = []
    first_bytes: dict[int, int] = {}
    end = np.array([tokenizer.eos_token_id], dtype=dtype)

    def good() -> Iterator[tuple[str, int]]:
        """Pieces of documents, the last of each with the bytes of the whole, the others with -1."""
        for i in parts[number]:
            try:
                text = documents[i]
                label = None if documents.label is None else documents.label(i)
            except BadDocument as error:
                if not skip:
                    raise BadDocument(error.reason, f"{error} Mend it, or leave such out with data.bad_documents=skip.") from None
                skipped[error.reason] += 1
                examples.append(str(error))
                continue
            if not text and label is None:
                skipped["empty"] += 1
                continue
            if label is not None:
                labels.append(label)
            *most, last = pieces(text) if text else [""]
            yield from ((piece, -1) for piece in most)
            yield last, len(text.encode())

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        document = []  # the tokens of its pieces so far
        for batch in batches(good()):
            for (_, size), ids in zip(batch, tokenize([piece for piece, _ in batch], tokenizer)):
                document.append(np.fromiter(ids, dtype=dtype, count=len(ids)))
                if size < 0:
                    continue
                tokens, document = np.concatenate([*document, end]), []
                if len(tokens) == 1 and documents.label is None:
                    skipped["empty"] += 1
                    continue
                first = int(tokens[0])
                if len(tokens) > 1 and first not in first_bytes:
                    first_bytes[first] = token_bytes(first, tokenizer)
                total += len(tokens)
                largest = max(largest, int(tokens.max()))
                rows.append((total, size - first_bytes[first] if len(tokens) > 1 else 0))
                digest.update(tokens.data)
                file.write(tokens.data)
            advance(sum(size >= 0 for _, size in batch))
        file.flush()
        os.fsync(file.fileno())
    if total:
        unfinished.replace(path)
    else:
        unfinished.unlink()
    save_table(side.with_suffix(".npy"), np.array(rows, dtype=np.int64).reshape(-1, 2))
    description = {
        "file": path.name, "tokens": total, "sha256": digest.hexdigest(), "largest_id": largest, "skipped": skipped,
        "examples": examples[:EXAMPLES], "labels": labels,
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
