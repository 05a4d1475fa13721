"""The loss of a model on documents: what validation in training and `eval perplexity` both report."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridlm.cache import HybridCache
from hybridlm.ops.cross_entropy import IGNORE


class Window(NamedTuple):
    """A stretch of a document that is read by itself.

    Attributes:
        ids: its tokens, one more than its predictions.
        document: the number of the document.
        start: tokens of the document before the window.
        skip: predictions at its beginning that an earlier window made already.
    """

    ids: np.ndarray
    document: int
    start: int
    skip: int


def windows(documents: Iterable[np.ndarray], size: int | None, stride: int | None = None) -> Iterator[Window]:
    """Windows of up to `size` predictions, `stride` apart, in which each token but a document's first is predicted once.

    Args:
        documents: token ids, one array a document; those without a second token have no window.
        size: None for whole documents.
        stride: at most `size`, which it is by default; with less, every prediction but a document's first ones has at least
            `size - stride` predictions before it in its window (a sliding window).
    """
    for document, ids in enumerate(documents):
        last, made = len(ids) - 1, 0
        length = size or max(last, 1)
        for start in range(0, last, stride or length):
            end = min(start + length, last)
            yield Window(ids[start : end + 1], document, start, made - start)
            made = end
            if made == last:
                break


def batch_arrays(batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (b t), int64. Short windows are filled up on the right, where nothing before them can see it."""
    length = max(len(window.ids) for window in batch) - 1
    ids = np.zeros((len(batch), length), dtype=np.int64)
    targets = np.full((len(batch), length), IGNORE, dtype=np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids) - 1] = window.ids[:-1]
        targets[row, : len(window.ids) - 1] = window.ids[1:]
    return torch.from_numpy(ids), torch.from_numpy(targets)


@torch.no_grad()
def nll(model: PreTrainedModel, ids: Tensor, targets: Tensor, cache: HybridCache | None = None) -> Tensor:
    """Nats (b t) of each target, 0 where it is `IGNORE`; a model of ours, in evaluation mode. `cache` is moved on."""
    return model(ids, targets=targets, past_key_values=cache, use_cache=cache is not None).loss
