"""A sample number to tokens, with no state in between: the position in the data is one integer.

The documents form an endless stream, repeated every epoch. Sample windows tile the stream with no gap and no overlap, so each
token that has one before it in its document is a target exactly once an epoch, and the tail of an epoch that fills no window is
carried over into the next. Within an epoch the windows come in a shuffled order.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hybridlm.data.shards import Shards
from hybridlm.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Sampler:
    """Windows of `seq_len` predictions from one source, in the order that `seed` gives.

    Attributes:
        vocab_size: every token is checked to be below it when it is read, for shards can be damaged after they were written.
    """

    shards: Shards
    seq_len: int
    seed: int
    vocab_size: int

    @property
    def packing(self) -> str:
        """How documents come into windows, in the words by which a checkpoint knows it."""
        return "stream"

    @cached_property
    def ends(self) -> np.ndarray:
        return np.ascontiguousarray(self.shards.documents[:, 0])

    def first_window(self, epoch: int) -> int:
        """The first window that starts in `epoch`."""
        return -(-epoch * len(self.shards) // self.seq_len)

    def window(self, sample: int) -> int:
        """Which window of the stream is the sample of this number."""
        epoch = sample * self.seq_len // len(self.shards)
        first = self.first_window(epoch)
        return first + permute(sample - first, self.first_window(epoch + 1) - first, self.key(epoch))

    def key(self, epoch: int) -> int:
        """What the order of the windows in an epoch is made from."""
        return self.seed * 1_000_003 + epoch

    def inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of a sample's inputs in the shards, and to which piece of the sample each belongs, both (t) int64.

        A piece is what stands together of one document; pieces are numbered from 0.
        """
        stream = self.window(number) * self.seq_len + np.arange(self.seq_len)
        epoch, position = np.divmod(stream, len(self.shards))
        document = np.searchsorted(self.ends, position, side="right") + epoch * len(self.ends)
        return position, document - document[0]

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """`input_ids`, `targets` (-100 where the next token is of another document) and `seq_idx`, each (t) int64.

        Raises:
            ValueError: a token that the model does not have.
        """
        position, piece = self.inputs(number)
        predicts = self.predicts(position)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        targets[predicts] = self.read(position[predicts] + 1)
        return {"input_ids": self.read(position), "targets": targets, "seq_idx": piece}

    def summary(self, stop: int) -> str:
        """Its size, and how often it is seen in `stop` samples."""
        return f"{len(self.shards):,} tokens, {stop * self.seq_len / len(self.shards):.2f} epochs"

    def predicts(self, position: np.ndarray) -> np.ndarray:
        """Whether the token behind each place is of the same document."""
        return position + 1 < self.ends[np.searchsorted(self.ends, position, side="right")]

    def read(self, position: np.ndarray) -> np.ndarray:
        tokens = self.shards.read(position)
        if (wrong := (tokens < 0) | (tokens >= self.vocab_size)).any():
            i = int(wrong.argmax())
            document, offset = self.locate(position[i])
            raise ValueError(
                f"{self.shards.meta['source']}: token id {tokens[i]} at offset {offset} of document {document} is not in the "
                f"model's vocabulary (vocab_size={self.vocab_size}). The prepared data has been damaged; delete it from "
                "data.cache_dir and start again."
            )
        return tokens

    def locate(self, position: int) -> tuple[int, int]:
        """The document of a place in the shards, and the offset there."""
        document = int(np.searchsorted(self.ends, position, side="right"))
        return document, int(position) - (int(self.ends[document - 1]) if document else 0)

    def origin(self, number: int) -> list[dict[str, int]]:
        """The documents of which a sample predicts tokens, in its order: number, and offset of the first token of the piece."""
        position, piece = self.inputs(number)
        predicts = self.predicts(position)
        first = np.unique(piece[predicts], return_index=True)[1]
        return [dict(zip(("document", "offset"), self.locate(p), strict=True)) for p in position[predicts][first]]


def permute(i: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of range(size) puts i, in constant time and memory.

    A Feistel network over the next even power of two, walked until it lands inside (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for turn in range(4):
            left, right = right, left ^ (mix(right + (turn << 48) + key * 0x9E3779B97F4A7C15) & low)
        i = left << half | right
        if i < size:
            return i


def shuffled(count: int, seed: int) -> np.ndarray:
    """(count) int64: the numbers below `count` in an order that `seed` gives, the same on every machine."""
    return np.argsort(mix(np.arange(count, dtype=np.uint64) + np.uint64(mix(seed))), kind="stable")


def mix(x: Any) -> Any:
    """The finaliser of SplitMix64, of an integer or of many (uint64)."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
