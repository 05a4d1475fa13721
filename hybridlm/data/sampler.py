"""A sample number to tokens, with no state in between: the position in the data is one integer.

The documents form an endless stream, repeated every epoch. Sample windows tile the stream with no gap and no overlap, so each
token that has one before it in its document is a target exactly once an epoch, and the tail of an epoch that fills no window is
carried over into the next. Within an epoch the windows come in a shuffled order.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybridlm.data.shards import Shards
from hybridlm.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Sampler:
    """Windows of `seq_len` predictions from `shards`, in the order that `seed` gives."""

    shards: Shards
    seq_len: int
    seed: int

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
        return first + permute(sample - first, self.first_window(epoch + 1) - first, key=self.seed * 1_000_003 + epoch)

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """`input_ids`, `targets` (-100 where the next token is of another document) and `seq_idx`, each (t) int64."""
        total = len(self.shards)
        stream = self.window(number) * self.seq_len + np.arange(self.seq_len + 1)
        epoch, position = np.divmod(stream, total)
        tokens = self.shards.read(position)
        document = np.searchsorted(self.ends, position, side="right") + epoch * len(self.ends)
        targets = np.where(document[1:] == document[:-1], tokens[1:], IGNORE)
        return {"input_ids": tokens[:-1], "targets": targets, "seq_idx": document[:-1] - document[0]}

    def batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Samples start … stop - 1, stacked: each (b t)."""
        samples = [self.sample(number) for number in range(start, stop)]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


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
            left, right = right, left ^ (_mix(right + (turn << 48) + key * 0x9E3779B97F4A7C15) & low)
        i = left << half | right
        if i < size:
            return i


def _mix(x: int) -> int:
    """The finaliser of SplitMix64."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
