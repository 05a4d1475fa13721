"""Tokens: of a text, and on disk, where they are read through memory maps.

A folder holds `tokens-00000.bin`, … (little-endian uint16 or uint32, one document after the other, each closed by the end
token), `documents.npy` (one row a document: where it ends, and how many bytes of text its tokens after the first stand for) and
`meta.json`, which names the files; with labels `labels.npy`, a number for each document. `hybridlm.data.preparation` writes it.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from transformers import PreTrainedTokenizerBase
from typing_extensions import NotRequired, TypedDict

FORMAT: Literal[2] = 2
LABELS = "labels.npy"
HASH_BYTES = 2**22

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@with_config(ConfigDict(extra="forbid", strict=True))
class Part(TypedDict):
    file: Annotated[str, Field(pattern="^tokens-[0-9]+\\.bin$")]
    tokens: Annotated[int, Field(gt=0)]
    sha256: Digest


@with_config(ConfigDict(extra="forbid", strict=True))
class Meta(TypedDict):
    """What meta.json says. `sha256` is of all tokens in order, however they lie in parts, and of the labels where there are any;
    `bytes` are those predicted; `labels` are the names of the numbers in `labels.npy`."""

    format: Literal[2]
    source: str
    fingerprint: str
    license: str | None
    tokenizer: Digest
    dtype: Literal["<u2", "<u4"]
    parts: list[Part]
    tokens: Count
    documents: Count
    documents_sha256: Digest
    largest_id: Count
    bytes: Count
    skipped: dict[str, Count]
    skipped_examples: list[str]
    sha256: Digest
    labels: NotRequired[Annotated[list[str], Field(min_length=1)]]
    labels_sha256: NotRequired[Digest]


META = TypeAdapter(Meta)


@dataclass(frozen=True)
class Shards:
    """A folder of tokens. What is read of it is checked when it is first read.

    Raises:
        ValueError: (the properties) a file that is missing, altered or none of ours, named.
    """

    folder: Path

    @cached_property
    def meta(self) -> Meta:
        path = self._inside("meta.json")
        try:
            meta = META.validate_json(path.read_bytes())
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip() for fault in error.errors()[:3])
            raise ValueError(f"{path} does not describe prepared data: {'; '.join(faults)}. {REMEDY}") from None
        if sum(part["tokens"] for part in meta["parts"]) != meta["tokens"]:
            raise ValueError(f"{path} is altered: its parts do not have its {meta['tokens']} tokens together. {REMEDY}")
        return meta

    @cached_property
    def tokens(self) -> list[np.memmap]:
        dtype = np.dtype(self.meta["dtype"])
        for part in self.meta["parts"]:
            path, want = self._inside(part["file"]), part["tokens"] * dtype.itemsize
            if path.stat().st_size != want:
                raise ValueError(f"{path} has {path.stat().st_size} bytes; meta.json says {want}. {REMEDY}")
        return [np.memmap(self.folder / part["file"], dtype=dtype, mode="r") for part in self.meta["parts"]]

    @cached_property
    def ends(self) -> np.ndarray:
        """(parts) int64: the position behind each part's last token."""
        return np.cumsum([part["tokens"] for part in self.meta["parts"]], dtype=np.int64)

    @cached_property
    def documents(self) -> np.ndarray:
        """(documents, 2) int64: the position behind each document's last token, and its bytes after the first token."""
        path = self._inside("documents.npy")
        try:
            table = np.lib.format.open_memmap(path, mode="r")  # the reader that never unpickles
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no table of documents: {error}. {REMEDY}") from None
        shape = (self.meta["documents"], 2)
        if table.shape != shape or table.dtype != np.int64:
            raise ValueError(f"{path} has {table.dtype} {table.shape}; meta.json says int64 {shape}. {REMEDY}")
        least = 1 if "labels" in self.meta else 2  # a document has a token and its end; one with a label may be empty
        if not len(table) or table[0, 0] < least or (np.diff(table[:, 0]) < least).any() or table[-1, 0] != len(self):
            raise ValueError(f"{path} is altered: its documents do not follow one another up to token {len(self)}. {REMEDY}")
        if hash_files([path]) != self.meta["documents_sha256"]:
            raise ValueError(f"{path} is altered: its sha256 is not the one in meta.json. {REMEDY}")
        return table

    @cached_property
    def labels(self) -> np.ndarray:
        """(documents) int64: which of `meta["labels"]` each is of."""
        path = self._inside(LABELS)
        try:
            table = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is no table of labels: {error}. {REMEDY}") from None
        count = len(self.meta["labels"])
        if table.shape != (self.meta["documents"],) or table.dtype != np.int64 or (table < 0).any() or (table >= count).any():
            raise ValueError(f"{path} has not one of {count} labels for each of {self.meta['documents']} documents. {REMEDY}")
        if hash_files([path]) != self.meta["labels_sha256"]:
            raise ValueError(f"{path} is altered: its sha256 is not the one in meta.json. {REMEDY}")
        return table

    def __len__(self) -> int:
        return self.meta["tokens"]

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Tokens (int64) at any positions below len(self)."""
        number = np.searchsorted(self.ends, positions, side="right")
        out = np.empty(len(positions), dtype=np.int64)
        for part in np.unique(number):
            here = number == part
            out[here] = self.tokens[part][positions[here] - (self.ends[part] - len(self.tokens[part]))]
        return out

    def check(self) -> "Shards":
        """Itself, its sizes and tables checked; `verify` also reads the tokens."""
        assert self.tokens and len(self.documents) and ("labels" not in self.meta or len(self.labels))
        return self

    def verify(self) -> None:
        """Reads every file.

        Raises:
            ValueError: one that is not what was written.
        """
        self.check()
        digests = {part["file"]: part["sha256"] for part in self.meta["parts"]}
        for name, digest in (digests | {"documents.npy": self.meta["documents_sha256"]}).items():
            if (found := hash_files([self.folder / name])) != digest:
                raise ValueError(f"{self.folder / name} is altered: its sha256 is {found}; meta.json says {digest}. {REMEDY}")

    def _inside(self, name: str) -> Path:
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path} is a link that leads outside its folder, which is not followed. {REMEDY}")
        if not path.is_file():
            raise ValueError(f"{path} is missing. {REMEDY}")
        return path


REMEDY = "Remove the folder and prepare the data again."


def hash_files(paths: list[Path]) -> str:
    """The sha256 of the files' contents, one after the other."""
    digest = sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, all of it, with no special token added and none read out of the text itself.

    Raises:
        ValueError: the tokenizer fails on one of them.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()  # which a tokenizer's file may ask for
    backend.no_padding()
    try:
        tokens = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the panic of its Rust is no Exception
        raise ValueError(f"the tokenizer fails on a text: {type(error).__name__}: {error}") from None
    # The model of some (Unigram, WordLevel) has the specials among its own pieces.
    specials = {s: tokenizer.convert_tokens_to_ids(s) for s in tokenizer.all_special_tokens if s != tokenizer.unk_token}
    for text, ids in zip(texts, tokens):
        if read := next((s for s, i in specials.items() if s in text and i in ids), None):
            raise ValueError(f"the tokenizer reads {read!r} in a text as its special token; take it out, or another tokenizer.")
    return tokens


def bytes_after_first(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the tokens that have one before them, and so are predicted."""
    return len(text.encode()) - token_bytes(ids[0], tokenizer)


def token_bytes(token: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes that a token stands for."""
    text = tokenizer.convert_ids_to_tokens([token])[0]
    if tokenizer.backend_tokenizer.decoder.__class__.__name__ == "ByteLevel":
        return len(text)
    if re.fullmatch("<0x[0-9A-F]{2}>", text):  # one byte of a character, which alone is decoded to a mark for what is no text
        return 1
    return len(str(tokenizer.decode([token])).encode())
