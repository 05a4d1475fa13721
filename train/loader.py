"""The batches of a rank, read in its own process or ahead of it in others."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hybridlm.data.blend import Blend
from hybridlm.data.streaming import Streamed

# What gives samples by number, and says what its numbers mean; both have the same methods.
Stream = Blend | Streamed


@dataclass(frozen=True)
class Stage:
    """Steps of one batch.

    Attributes:
        rows: sample numbers within the global batch, one range a micro-batch of this rank (train.optim.micro_batches).
        count: how many steps.
    """

    rows: list[range]
    global_batch: int
    count: int


@dataclass(frozen=True)
class _Steps:
    """The micro-batches of step 0, 1, …, for torch's loader."""

    stream: Stream
    first: int
    stages: list[Stage]

    def __len__(self) -> int:
        return sum(stage.count for stage in self.stages)

    def __getitem__(self, step: int) -> list[dict[str, np.ndarray]]:
        base = self.first
        for stage in self.stages:
            if step < stage.count:
                base += step * stage.global_batch
                return [self.stream.batch(base + rows.start, base + rows.stop) for rows in stage.rows]
            base += stage.count * stage.global_batch
            step -= stage.count
        raise IndexError


def batches(stream: Stream, first: int, stages: list[Stage], workers: int) -> Iterator[list[dict[str, Tensor]]]:
    """For each step the micro-batches of this rank, each tensor (b t) int64; the same for any number of workers.

    Args:
        first: the number of the first sample of the first step.
        workers: processes that read ahead; with 0, a step is read when it is asked for.

    Raises:
        RuntimeError: a worker has died.
    """
    loader: DataLoader = DataLoader(
        _Steps(stream, first, stages),  # type: ignore[arg-type]
        batch_size=None,
        # Arrays are sent as bytes. A tensor would be fetched from its worker when it is here, and need an open file each.
        collate_fn=_as_it_is,
        num_workers=workers,
        # Else it would draw from the generator of the run.
        generator=torch.Generator(),
        # A forked worker shares the memory maps; to another they would be sent, token for token.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_heed_no_signal,
    )
    for step in loader:
        yield [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in step]


def _as_it_is(step: list) -> list:
    return step


def _heed_no_signal(worker: int) -> None:
    """Ctrl-C and SIGTERM are for the process that trains: it still wants batches, and ends its workers. Some schedulers send
    them to the group of processes, some to each.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
