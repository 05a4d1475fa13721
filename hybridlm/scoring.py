"""The loss of a model on documents: what validation in training and `eval perplexity` both report."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from hybridlm.cache import HybridCache
from hybridlm.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Score:
    """Sums over windows.

    Attributes:
        nats, tokens: of each window (float64, int64).
        bytes: of text that all predicted tokens stand for.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.bytes)

    @property
    def stderr(self) -> float | None:
        """Standard error of `nats_per_token`, windows taken as independent draws; None for a single window."""
        n = len(self.nats)
        if n < 2:
            return None
        residual = self.nats - self.nats_per_token * self.tokens
        return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / self.tokens.sum())


def windows(documents: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Windows of size + 1 tokens, `size` apart, the last one shorter: each token but a document's first is predicted once."""
    for ids in documents:
        for start in range(0, len(ids) - 1, size):
            yield ids[start : start + size + 1]


@torch.no_grad()
def score(
    model: PreTrainedModel,
    documents: Iterable[np.ndarray],
    size: int,
    *,
    bytes: int,
    batch_size: int = 8,
    carry: bool = False,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Score:
    """Nats of every predicted token, over windows of `size` predictions. No special token is added.

    Args:
        documents: token ids, one array a document.
        bytes: UTF-8 bytes that the predicted tokens stand for.
        batch_size: windows in one pass; the result does not depend on it beyond rounding.
        carry: whether a window starts from the state in which the one before it in the document ended.
        advance: told after each pass how many tokens it scored.

    Raises:
        ValueError: no document has two tokens.
    """
    training = model.training
    model.eval()
    if carry:
        batches = _carried(model, documents, size)
    else:
        batches = (_pass(model, batch) for batch in _batches(windows(documents, size), batch_size))
    nats, tokens = [], []
    for batch_nats, batch_tokens in batches:
        nats.append(batch_nats)
        tokens.append(batch_tokens)
        advance(int(batch_tokens.sum()))
    model.train(training)
    if not tokens:
        raise ValueError("there is nothing to score: no document has two tokens.")
    return Score(np.concatenate(nats), np.concatenate(tokens), bytes)


def _batches(items: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _pass(model: PreTrainedModel, batch: list[np.ndarray], cache=None) -> tuple[np.ndarray, np.ndarray]:
    """Short windows are filled up on the right, where nothing before them can see it."""
    length = max(map(len, batch)) - 1
    ids = np.zeros((len(batch), length), dtype=np.int64)
    targets = np.full((len(batch), length), IGNORE, dtype=np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    nll = model(
        torch.from_numpy(ids).to(model.device),
        targets=torch.from_numpy(targets).to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
    ).loss
    counts = np.array([len(window) - 1 for window in batch])
    return nll.double().sum(-1).cpu().numpy(), counts


def _carried(model: PreTrainedModel, documents: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for ids in documents:
        cache = HybridCache(model.config.num_hidden_layers)
        for window in windows([ids], size):
            yield _pass(model, [window], cache)
