"""Whole documents with a label, several in a window, each read once an epoch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybridlm.data.packing import best_fit
from hybridlm.data.sampler import Sampler, permute, shuffled
from hybridlm.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Labelled(Sampler):
    """Windows of `seq_len` tokens, in which documents stand whole, packed best-fit; the target at the end token of each is the
    number of its label. A document that is longer keeps its first tokens, and its end token behind them.

    Every epoch has each document once; its windows come in a shuffled order. Padding repeats an end token, has a `seq_idx` of its
    own, and no targets.

    Attributes:
        names: the labels, numbered by their place.

    Raises:
        ValueError: a document with another label.
    """

    names: list[str]

    @property
    def packing(self) -> str:
        return "documents"

    def __post_init__(self):
        _ = self.order, self.labels  # made now, by the process that prepares data, and not by each that reads it

    @cached_property
    def labels(self) -> np.ndarray:
        """(documents) int64: the number of each one's label."""
        own = self.shards.meta["labels"]
        if unknown := [name for name in own if name not in self.names]:
            raise ValueError(
                f"{self.shards.meta['source']} has the label(s) {', '.join(map(repr, unknown))}, which no training document has; "
                f"known are {', '.join(map(repr, self.names))}."
            )
        return np.array([self.names.index(name) for name in own])[self.shards.labels]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(documents) int64: the tokens that are read of each."""
        return np.minimum(np.diff(self.ends, prepend=0), self.seq_len)

    @cached_property
    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """(windows + 1) where each window begins in the second: (documents) those of one window behind the other."""
        # In no order of their lengths: else a window would hold long documents or short ones, and a step learn from few or many.
        windows = best_fit(self.lengths, self.seq_len, shuffled(len(self.lengths), self.seed))
        return np.concatenate([[0], np.bincount(windows).cumsum()]), np.argsort(windows, kind="stable")

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return len(self.order[0]) - 1

    @property
    def cut(self) -> int:
        """Documents of which only the beginning is read."""
        return int((np.diff(self.ends, prepend=0) > self.seq_len).sum())

    def window(self, sample: int) -> int:
        epoch, i = divmod(sample, self.windows)
        return permute(i, self.windows, self.key(epoch))

    def chosen(self, number: int) -> np.ndarray:
        """The documents of a sample."""
        window = self.window(number)
        return self.order[1][self.order[0][window] : self.order[0][window + 1]]

    def inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        documents = self.chosen(number)
        lengths = self.lengths[documents]
        used, last = int(lengths.sum()), lengths.cumsum() - 1
        begins = np.where(documents > 0, self.ends[documents - 1], 0)
        position = np.full(self.seq_len, self.ends[0] - 1)
        piece = np.full(self.seq_len, len(documents))
        piece[:used] = np.repeat(np.arange(len(documents)), lengths)
        position[:used] = np.repeat(begins - last + lengths - 1, lengths) + np.arange(used)
        position[last] = self.ends[documents] - 1
        return position, piece

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """As `Sampler.sample`, with labels for targets."""
        position, piece = self.inputs(number)
        documents = self.chosen(number)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        targets[self.lengths[documents].cumsum() - 1] = self.labels[documents]
        return {"input_ids": self.read(position), "targets": targets, "seq_idx": piece}

    def summary(self, stop: int) -> str:
        cut = f" ({self.cut:,} of them longer than a window: their beginning)" if self.cut else ""
        count, labels = len(self.ends), len(self.names)
        return f"{count:,} documents{cut} of {labels} labels, {len(self.shards):,} tokens, {stop / self.windows:.2f} epochs"

    def origin(self, number: int) -> list[dict[str, int]]:
        return [{"document": int(document), "offset": 0} for document in self.chosen(number)]
