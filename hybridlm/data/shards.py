"""Tokens on disk: written once, then read through memory maps.

A folder holds `tokens-00000.bin`, … (little-endian uint16 or uint32, one document after the other, each closed by the end
token), `documents.npy` (one row a document: where it ends, and how many bytes of text its tokens after the first stand for) and
`meta.json`.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm.data.sources import Documents

FORMAT = 1
SHARD_TOKENS = 2**28
BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Shards:
    folder: Path

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def tokens(self) -> list[np.memmap]:
        dtype = np.dtype(self.meta["dtype"])
        return [np.memmap(path, dtype=dtype, mode="r") for path in sorted(self.folder.glob("tokens-*.bin"))]

    @cached_property
    def documents(self) -> np.ndarray:
        """(documents, 2) int64: the position behind each document's last token, and its bytes after the first token."""
        return np.load(self.folder / "documents.npy", allow_pickle=False)

    def __len__(self) -> int:
        return self.meta["tokens"]

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Tokens (int64) at any positions below len(self)."""
        shard, offset = np.divmod(positions, SHARD_TOKENS)
        out = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(shard):
            here = shard == number
            out[here] = self.tokens[number][offset[here]]
        return out


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, with no special token added and none read out of the text itself."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def bytes_after_first(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the tokens that have one before them, and so are predicted."""
    pieces = tokenizer.convert_ids_to_tokens(ids[:1])
    byte_level = tokenizer.backend_tokenizer.decoder.__class__.__name__ == "ByteLevel"
    first = len(pieces[0]) if byte_level else len(str(tokenizer.decode(ids[:1])).encode())
    return len(text.encode()) - first


def prepare(documents: Documents, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, quiet: bool = False) -> Shards:
    """The shards of `documents`, from `cache_dir` where they have been written before.

    Raises:
        ValueError: a tokenizer without an end token or a fast backend, or documents without any text.
    """
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.tokenizer must be a fast tokenizer with an end token (eos_token); got {type(tokenizer).__name__}."
        )
    identity = [FORMAT, documents.name, documents.fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]
    key = sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache_dir / key
    if not (folder / "meta.json").exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=cache_dir))
        try:
            _write(documents, tokenizer, unfinished, quiet)
            if not folder.exists():  # another process may have been as quick
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Shards(folder)


def _write(documents: Documents, tokenizer: PreTrainedTokenizerBase, folder: Path, quiet: bool) -> None:
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    end, total, largest, rows = tokenizer.eos_token_id, 0, 0, []
    bar = tqdm(total=len(documents), desc=f"tokenising {documents.name}", unit=" documents", disable=quiet)
    buffer = np.empty(0, dtype=dtype)
    shard, digest = 0, sha256()
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        texts = [documents[i] for i in range(start, min(start + BATCH_DOCUMENTS, len(documents)))]
        pieces = [buffer]
        for text, ids in zip(texts, tokenize(texts, tokenizer), strict=True):
            bar.update()
            if not ids:
                continue
            largest = max(largest, max(ids))
            total += len(ids) + 1
            rows.append((total, bytes_after_first(text, ids, tokenizer)))
            pieces.append(np.array([*ids, end], dtype=dtype))
        for piece in pieces[1:]:
            digest.update(piece.tobytes())
        buffer = np.concatenate(pieces)
        while len(buffer) >= SHARD_TOKENS:
            buffer[:SHARD_TOKENS].tofile(folder / f"tokens-{shard:05d}.bin")
            buffer, shard = buffer[SHARD_TOKENS:], shard + 1
    if len(buffer):
        buffer.tofile(folder / f"tokens-{shard:05d}.bin")
    bar.close()
    if not rows:
        raise ValueError(f"data source {documents.name!r} has {len(documents)} document(s) and no text in them.")
    np.save(folder / "documents.npy", np.array(rows, dtype=np.int64))
    meta = {
        "format": FORMAT, "source": documents.name, "fingerprint": documents.fingerprint, "dtype": dtype.str, "tokens": total,
        "documents": len(rows), "largest_id": max(largest, end), "bytes": int(sum(row[1] for row in rows)),
        "sha256": digest.hexdigest(),
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
