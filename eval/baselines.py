"""What a language model must beat: a byte model that looks three bytes back, and a compressor.

The byte model is interpolated with Witten-Bell's estimate of how often something new follows (method C of Witten & Bell, "The
zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991; interpolated as in Chen & Goodman, 1998, 2.4):

    p_k(b | c) = (n(c b) + d(c) p_{k-1}(b | c without its first byte)) / (n(c) + d(c))

where c is the context of k bytes, n counts in the training text, d(c) is how many different bytes have followed c, and p_{-1} is
1/256.
"""

import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

ORDER = 3
BLOCK_BYTES = 2**24  # counted at a time: bounds the memory, whatever the size of the training text


@dataclass(frozen=True)
class Counts:
    """How often each string of `k + 1` bytes occurs, for one k.

    Attributes:
        codes: the strings, sorted; the bytes of one, first to last, are the digits of its code in base 256.
        counts: of each.
        contexts, totals, distinct: the contexts c, sorted, n(c) and d(c).
    """

    codes: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray


def order3_bits_per_byte(train_documents: Iterable[str], validation_documents: Iterable[str]) -> float:
    """Bits per byte on the validation documents, every byte predicted, of the byte model counted on all training documents.

    Raises:
        ValueError: no byte to predict.
    """
    model = count(train_documents)
    bits, n_bytes = 0.0, 0
    for text in validation_documents:
        document = np.frombuffer(text.encode(), dtype=np.uint8)
        bits -= float(np.log2(probabilities(model, *strings([document]))).sum())
        n_bytes += len(document)
    return _per_byte(bits, n_bytes)


def xz_bits_per_byte(documents: Iterable[str]) -> float:
    """Bits per byte of `xz -9` on each document as a file of its own.

    Raises:
        ValueError: the documents have no byte.
    """
    compressed = n_bytes = 0
    for text in documents:
        data = text.encode()
        compressed += len(lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9))
        n_bytes += len(data)
    return _per_byte(8 * compressed, n_bytes)


def _per_byte(bits: float, n_bytes: int) -> float:
    if not n_bytes:
        raise ValueError("the validation documents have no byte; give text to compare models on.")
    return bits / n_bytes


def count(documents: Iterable[str]) -> list[Counts]:
    """The counts of each order from 0 to ORDER."""
    empty = (np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
    merged = [empty] * (ORDER + 1)
    for block in _blocks(documents):
        codes, before = strings(block)
        for k in range(ORDER + 1):
            found = np.unique(codes[before >= k] & _mask(k), return_counts=True)
            merged[k] = _merge(merged[k], found)
    return [_with_contexts(*pair) for pair in merged]


def _blocks(documents: Iterable[str]) -> Iterator[list[np.ndarray]]:
    block, n_bytes = [], 0
    for text in tqdm(documents, desc="counting bytes of the training text", unit=" documents"):
        block.append(np.frombuffer(text.encode(), dtype=np.uint8))
        n_bytes += len(block[-1])
        if n_bytes >= BLOCK_BYTES:
            yield block
            block, n_bytes = [], 0
    if n_bytes:
        yield block


def strings(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For every byte of the documents, the code of it and the ORDER bytes before it, and how many of those its document has."""
    data = np.concatenate(documents).astype(np.uint32)
    codes = data.copy()
    for back in range(1, ORDER + 1):
        codes[back:] |= data[:-back] << np.uint32(8 * back)
    before = np.concatenate([np.minimum(np.arange(len(document)), ORDER) for document in documents])
    return codes, before


def _mask(k: int) -> np.uint32:
    """Keeps the last k + 1 bytes of a code."""
    return np.uint32(2 ** (8 * (k + 1)) - 1)


def _merge(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    codes, position = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    counts = np.zeros(len(codes), dtype=np.int64)
    np.add.at(counts, position, np.concatenate([one[1], other[1]]))
    return codes, counts


def _with_contexts(codes: np.ndarray, counts: np.ndarray) -> Counts:
    contexts, starts, distinct = np.unique(codes >> np.uint32(8), return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, starts) if len(counts) else counts
    return Counts(codes, counts, contexts, totals, distinct)


def probabilities(model: list[Counts], codes: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Of the last byte of each code, given the `before` bytes in front of it (at most ORDER)."""
    p = np.full(len(codes), 1 / 256)
    for k, counts in enumerate(model):
        string = codes & _mask(k)
        n = _look_up(counts.codes, counts.counts, string)
        total = _look_up(counts.contexts, counts.totals, string >> np.uint32(8))
        new = _look_up(counts.contexts, counts.distinct, string >> np.uint32(8))
        known = (total > 0) & (before >= k)
        p[known] = ((n + new * p) / np.maximum(total + new, 1))[known]
    return p


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 where it is none of the sorted keys."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    position = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[position] == wanted, values[position], 0)
