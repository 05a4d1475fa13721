"""Best-fit packing: windows that cut no document which fits into one.

A document is cut into pieces of at most `seq_len` predictions. Full pieces are windows of their own; what is left of a document
is packed with others, each piece where it leaves the least room (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling"). What stays empty is padding. Which pieces share a window is worked out once and kept as an index beside the shards, so
that a sample is still found by its number alone.
"""

import errno
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hybridlm.data.sampler import Sampler, permute

logger = logging.getLogger(__name__)


def pieces(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece begins in the shards, and how many predictions it holds; full pieces come first. Both (pieces) int64.

    A piece of n predictions at s has the inputs s … s + n - 1 and the targets s + 1 … s + n.

    Args:
        ends: (documents) the position behind each document's last token.
    """
    begins = np.concatenate([[0], ends[:-1]])
    full, rest = np.divmod(ends - begins - 1, seq_len)
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)  # which full piece of its document
    starts = [np.repeat(begins, full) + within * seq_len, (begins + full * seq_len)[rest > 0]]
    return np.concatenate(starts), np.concatenate([np.full(full.sum(), seq_len), rest[rest > 0]])


def best_fit(lengths: np.ndarray, size: int, order: np.ndarray | None = None) -> np.ndarray:
    """The window of each piece (pieces) int64. Each is placed where it leaves the least room.

    Args:
        lengths: (pieces) from 1 to `size`, the room of a window.
        order: in which they are placed; by default the longest first, which leaves the least room in all.
    """
    windows = np.empty(len(lengths), dtype=np.int64)
    count = 0
    with_room: list[list[int]] = [[] for _ in range(size)]
    rooms = 0  # bit r is set where a window has room for exactly r, so the least that fits is found without a search
    for piece in (np.argsort(-lengths, kind="stable") if order is None else order).tolist():
        length = int(lengths[piece])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, window = size, count
            count += 1
        windows[piece] = window
        with_room[room - length].append(window)
        rooms |= 1 << room - length
    return windows


def make_index(ends: np.ndarray, seq_len: int) -> np.ndarray:
    """(3, pieces) int64, in the order of the windows: the window of each piece, where it begins, its predictions."""
    starts, lengths = pieces(ends, seq_len)
    full = int((lengths == seq_len).sum())
    windows = np.concatenate([np.arange(full), full + best_fit(lengths[full:], seq_len)])
    order = np.argsort(windows, kind="stable")
    return np.stack([windows[order], starts[order], lengths[order]])


def open_index(ends: np.ndarray, seq_len: int, file: Path) -> np.ndarray:
    """The index, memory-mapped from `file`, which is written first where it is not there, and can be.

    Raises:
        ValueError: the file is not an index of these documents.
    """
    if not file.exists():
        unfinished = file.with_name(f".{file.name}-{os.getpid()}")
        try:
            with unfinished.open("wb") as out:
                np.save(out, make_index(ends, seq_len))
                out.flush()
                os.fsync(out.fileno())
            unfinished.replace(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            logger.warning("%s cannot be written (%s): the packing is worked out anew at each start", file, error.strerror)
            return make_index(ends, seq_len)
        finally:
            unfinished.unlink(missing_ok=True)
    try:
        index = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it, and it is made again.") from None
    starts, lengths = pieces(ends, seq_len)
    if (
        index.dtype != np.int64
        or index.shape != (3, len(starts))
        # Every piece is there once …
        or not np.array_equal(np.sort(index[1]), np.sort(starts))
        or not np.array_equal(lengths[np.argsort(starts)], index[2][np.argsort(index[1])])
        # … and the windows are in order, with none left out and none too full.
        or index[0, 0] != 0
        or not np.isin(np.diff(index[0]), (0, 1)).all()
        or np.bincount(index[0], index[2]).max() > seq_len
    ):
        raise ValueError(f"{file} is not the index of these documents for seq_len={seq_len}; delete it, and it is made again.")
    return index


@dataclass(frozen=True)
class BestFit(Sampler):
    """As Sampler, but packed best-fit. An epoch is a whole number of windows, so every epoch has each target exactly once.

    Padding repeats an end token, has a `seq_idx` of its own, and no targets.
    """

    @property
    def packing(self) -> str:
        return "best-fit"

    def __post_init__(self):
        _ = self.index  # made now, by the process that prepares data, and not by each that reads it

    @cached_property
    def index(self) -> np.ndarray:
        return open_index(self.ends, self.seq_len, self.shards.folder / f"best-fit-{self.seq_len}.npy")

    @cached_property
    def windows(self) -> int:
        """Windows in an epoch."""
        return int(self.index[0, -1]) + 1

    def window(self, sample: int) -> int:
        epoch, i = divmod(sample, self.windows)
        return permute(i, self.windows, self.key(epoch))

    def inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        window = self.window(number)
        first, last = np.searchsorted(self.index[0], [window, window + 1])
        lengths = self.index[2, first:last]
        used = int(lengths.sum())
        position = np.full(self.seq_len, self.ends[0] - 1)  # an end token: no position after it is in its document
        piece = np.full(self.seq_len, len(lengths))
        piece[:used] = np.repeat(np.arange(len(lengths)), lengths)
        position[:used] = np.repeat(self.index[1, first:last] - np.cumsum(lengths) + lengths, lengths) + np.arange(used)
        return position, piece
