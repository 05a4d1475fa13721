"""How well a model predicts text."""

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlm import HybridLMForCausalLM
from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.shards import bytes_after_first, tokenize
from hybridlm.data.sources import NoSuchSplit, Source, open_source
from hybridlm.output import quiet
from hybridlm.scoring import score

COLUMNS = {
    "model": "model", "nats_per_token": "nats/token", "stderr": "± stderr", "perplexity": "perplexity",
    "bits_per_byte": "bits/byte", "tokens": "tokens", "bytes": "bytes",
}  # fmt: skip
TOKENIZE_DOCUMENTS = 256  # at a time, so that the bar moves


def evaluate(
    folders: list[str], source: str, window: int, *, carry: bool = False, batch_size: int = 8, max_bytes: int | None = None
) -> list[dict[str, Any]]:
    """A row for each model, all on the same text.

    Raises:
        ValueError: a folder without a model or tokenizer, no such data, or tokens that the model does not have.
    """
    quiet()
    texts = None
    rows = []
    for folder in folders:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = HybridLMForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        tokenizer = load_tokenizer(folder)
        texts = texts or read(source, max_bytes)
        figures = measure(model, tokenizer, texts, window, carry=carry, batch_size=batch_size, name=folder)
        rows.append({"model": folder, **figures, "data": source, "window": window, "carry": carry})
    return rows


def read(source: str, max_bytes: int | None) -> list[str]:
    """The validation split where the source has one of its own, else all of it; whole documents until they have max_bytes."""
    try:
        documents = open_source(Source(source), "validation")
    except NoSuchSplit:
        documents = open_source(Source(source), "train")
    texts: list[str] = []
    left = math.inf if max_bytes is None else max_bytes
    for text in tqdm(documents, desc=f"reading {documents.name}", unit=" documents"):
        texts.append(text)
        left -= len(text.encode())
        if left <= 0:
            break
    return texts


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    window: int,
    *,
    carry: bool = False,
    batch_size: int = 8,
    name: str,
) -> dict[str, Any]:
    """nats_per_token, perplexity, bits_per_byte, stderr (of nats_per_token; None for one window), tokens and bytes predicted.

    Raises:
        ValueError: a token id past the model's vocabulary, nothing to predict, or a loss that is no finite number.
    """
    ids, n_bytes = encode(texts, tokenizer, model.config.vocab_size, name)
    with tqdm(total=sum(len(document) - 1 for document in ids), desc=f"scoring {name}", unit=" tokens", unit_scale=True) as bar:
        result = score(model, ids, window, bytes=n_bytes, batch_size=batch_size, carry=carry, advance=bar.update)
    perplexity = float(np.exp(result.nats_per_token))
    if not math.isfinite(perplexity):
        raise ValueError(f"{name} gives a loss of {result.nats_per_token} nats per token; its weights or the data are broken.")
    return {
        "nats_per_token": result.nats_per_token,
        "perplexity": perplexity,
        "bits_per_byte": result.bits_per_byte,
        "stderr": result.stderr,
        "tokens": int(result.tokens.sum()),
        "bytes": result.bytes,
    }


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str) -> tuple[list[np.ndarray], int]:
    """Token ids of each text that has any, and the bytes that all but the first of each stand for."""
    documents, n_bytes = [], 0
    with tqdm(total=len(texts), desc="tokenising", unit=" documents") as bar:
        for start in range(0, len(texts), TOKENIZE_DOCUMENTS):
            batch = texts[start : start + TOKENIZE_DOCUMENTS]
            for text, ids in zip(batch, tokenize(batch, tokenizer)):
                if ids:
                    n_bytes += bytes_after_first(text, ids, tokenizer)
                    documents.append(np.array(ids, dtype=np.int32))
            bar.update(len(batch))
    largest = max((int(ids.max()) for ids in documents), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {name} gives token id {largest}, but the model's vocabulary has {vocab_size} (vocab_size). "
            "Put the tokenizer beside the model that it was trained with."
        )
    return documents, n_bytes
