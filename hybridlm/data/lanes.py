"""Windows that go on where those of the batch before ended, for training that carries its states on.

The documents, in an order that `seed` gives, stand end to end and are repeated every epoch: one endless stream. Lanes, as many as
a batch has rows, begin evenly spread over an epoch of it, each reads on for ever, and sample number n is window n // lanes of
lane n % lanes. When every lane has come to where the next one began, an epoch has been read.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybridlm.data.sampler import Sampler, shuffled


@dataclass(frozen=True)
class Lanes(Sampler):
    """As Sampler, but row i of a batch goes on where row i of the one before ended. No sample needs another to be found.

    Exactly once: after any number of batches no target has been seen more than once more often than any other. For the targets
    seen at one place of the stream are as many as lanes that began in the stretch of it that a lane has read so far, and lanes
    that begin at floor(i x epoch / lanes) are spread so evenly that stretches of one length differ by one lane at most.

    Attributes:
        lanes: the rows of a batch.
    """

    lanes: int

    @property
    def packing(self) -> str:
        return f"stream in {self.lanes} lanes"

    @cached_property
    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the documents in the order in which they are read: where each ends in an epoch, and how far from that place it lies
        in the shards. Both (documents) int64."""
        begins = np.concatenate([[0], self.ends[:-1]])
        turn = shuffled(len(begins), self.seed)
        lengths = (self.ends - begins)[turn]
        ends = np.cumsum(lengths)
        return ends, begins[turn] - (ends - lengths)

    def inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        step, lane = divmod(number, self.lanes)
        stream = lane * len(self.shards) // self.lanes + step * self.seq_len + np.arange(self.seq_len)
        epoch, place = np.divmod(stream, len(self.shards))
        ends, shift = self.order
        turn = np.searchsorted(ends, place, side="right")
        document = turn + epoch * len(ends)
        return place + shift[turn], document - document[0]

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """As of Sampler, and `continues` () bool: whether the window before, in its lane, ended in the same document."""
        offset = self.locate(self.inputs(number)[0][0])[1]
        return super().sample(number) | {"continues": np.array(number >= self.lanes and offset > 0)}
