"""How well a model predicts text."""

import math
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from itertools import islice, pairwise
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.models import broken_part, check_vocabulary, in_batches, open_model, stock_nll
from hybridlm import HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.checkpoint import check_folder
from hybridlm.data.shards import bytes_after_first, tokenize
from hybridlm.data.sources import NoSuchSplit, Source, open_source
from hybridlm.journal import Journal, identity
from hybridlm.output import quiet
from hybridlm.scoring import Window, batch_arrays, nll, windows

COLUMNS = {
    "model": "model", "nats_per_token": "nats/token", "stderr": "± stderr", "perplexity": "perplexity",
    "bits_per_byte": "bits/byte", "tokens": "tokens", "bytes": "bytes",
}  # fmt: skip
TOKENIZE_DOCUMENTS = 256  # at a time, so that the bar moves
RESAMPLES = 1000
AT_A_TIME = 64  # batches whose results the journal keeps together


def evaluate(
    folders: list[str],
    source: str,
    window: int | None,
    *,
    stride: int | None = None,
    carry: bool = False,
    batch_size: int = 8,
    max_bytes: int | None = None,
    seed: int = 0,
    json_path: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each model, all on the same text; `measure` tells what it holds.

    Args:
        json_path: beside which results are kept until all are there, so that the same command goes on where it was stopped.

    Raises:
        ValueError: a folder without a model or tokenizer, no such data, or tokens that the model does not have.
        FloatingPointError: a loss that is no finite number.
        MemoryError: memory does not suffice for one window.
    """
    if stride is not None and (window is None or stride > window or carry):
        raise ValueError("--stride is for windows of N predictions, and at most N apart; and with --carry they do not overlap.")
    quiet()
    for folder in folders:
        check_folder(folder)
    texts = read(source, max_bytes)
    settings: dict[str, Any] = {"data": source, "window": window, "stride": stride, "carry": carry}
    facts = {"max_bytes": max_bytes, "text": digest(texts), "models": [identity(folder) for folder in folders]}
    journal = Journal(json_path, {"command": "perplexity"} | settings | facts)
    rows = []
    for folder in folders:
        model, tokenizer = open_model(folder)
        figures = measure(
            model, tokenizer, texts, window, stride=stride, carry=carry, batch_size=batch_size, seed=seed, name=folder,
            journal=journal,
        )  # fmt: skip
        del model  # before the next one is opened
        rows.append({"model": folder, **figures, **settings, "text_sha256": facts["text"]})
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


def digest(texts: list[str]) -> str:
    whole = sha256()
    for text in texts:
        whole.update(len(text).to_bytes(8, "little") + text.encode())
    return whole.hexdigest()


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    window: int | None,
    *,
    stride: int | None = None,
    carry: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    name: str,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """How well a model predicts all tokens of the texts but the first of each. No special token is added.

    Args:
        window: predictions in one window, read from nothing before it; None for whole documents. stride: as in
            `hybridlm.scoring.windows`. carry: a window starts from the state in which the one before it in the document ended.
        batch_size: windows in one pass (fewer where memory does not suffice); nothing depends on it beyond rounding.

    Returns:
        nats_per_token, perplexity, bits_per_byte, tokens, bytes (of text that the predicted tokens stand for), documents;
        stderr: of nats_per_token, by a bootstrap over documents, or over windows where there is one document (`stderr_of` says
        which; None of a single window); by_context: nats_per_token and tokens of the predictions made from `least` to `most`
        tokens; by_document: lists of `nats`, `tokens` and `bytes`, what a comparison of two models pairs.

    Raises:
        ValueError: a token id past the model's vocabulary, or nothing to predict; a model of another kind that was to carry.
        FloatingPointError: a loss that is no finite number. MemoryError: memory does not suffice for one window.
    """
    ours = isinstance(model, HybridLMForCausalLM)
    if carry and not ours:
        raise ValueError(f"{name}: --carry needs a model of this library; take a sliding window (--stride) or whole documents.")
    ids, n_bytes = encode(texts, tokenizer, model, name)
    every = list(windows(ids, window, stride))
    if not every:
        raise ValueError("there is nothing to score: no document has two tokens.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest, most = max(len(w.ids) - 1 for w in every), limit or math.inf
    if not ours and longest > most:
        raise ValueError(f"{name} reads at most {most} tokens (max_position_embeddings), not {longest}; take --window {most}.")
    contexts = [context_bins(one, carry) for one in every]
    bins = max(int(found[-1]) for found in contexts) + 1
    score = partial(nll if ours else stock_nll, model)
    sums = np.zeros((len(every), bins))  # nats of each window by context: bin i has those of 2^i to 2^(i+1)-1 tokens before
    counts = np.stack([np.bincount(found, minlength=bins) for found in contexts])
    journal = journal or Journal(None, {})
    groups = [range(i, min(i + batch_size * AT_A_TIME, len(every))) for i in range(0, len(every), batch_size * AT_A_TIME)]
    if carry:  # a group is a document
        starts = [i for i, one in enumerate(every) if one.start == 0] + [len(every)]
        groups = [range(*pair) for pair in pairwise(starts)]
    with tqdm(total=int(counts.sum()), desc=f"scoring {name}", unit=" tokens", unit_scale=True) as bar:
        for group in groups:

            def compute(group: range = group) -> list[list[float]]:
                nonlocal batch_size
                cache = HybridCache(model.config.num_hidden_layers) if carry else None
                run = partial(window_nats, score, model, every, contexts, bins, cache, name)
                left = sorted(group, key=lambda i: -len(every[i].ids))  # the longest, so that little is filled up
                found = np.zeros((len(group), bins))
                for batch, nats in in_batches(run, left, 1 if carry else batch_size):
                    found[np.array(batch) - group.start] = nats
                    bar.update(int(counts[batch].sum()))
                    if batch[-1] != left[-1]:
                        batch_size = len(batch)  # no more have gone into memory
                return found.tolist()

            key = f"{name} {group.start}-{group.stop}"
            if key in journal.results:
                bar.update(int(counts[group.start : group.stop].sum()))
            sums[group.start : group.stop] = journal.once(key, compute)
    if (mean := sums.sum() / counts.sum()) > 700:
        raise FloatingPointError(f"{name} gives a loss of {mean:.4g} nats per token; its weights or the data are broken.")
    return figures(every, sums, counts, n_bytes, seed) | {"dtype": str(model.dtype).removeprefix("torch.")}


def context_bins(window: Window, carry: bool) -> np.ndarray:
    """Of each prediction that counts, floor(log2 of the tokens that it is made from); `carry`: those before the window, too."""
    context = carry * window.start + np.arange(1, len(window.ids))[window.skip :]
    return np.frexp(context.astype(np.float64))[1] - 1


def window_nats(
    score: Callable,
    model: PreTrainedModel,
    every: list[Window],
    contexts: list[np.ndarray],
    bins: int,
    cache: Any,
    name: str,
    batch: list[int],
) -> np.ndarray:
    """(windows bins) nats.

    Raises:
        FloatingPointError: one that is no finite number.
    """
    chosen = [every[i] for i in batch]
    ids, targets = (t.to(model.device) for t in batch_arrays(chosen))
    nats = (score(ids, targets, cache) if cache is not None else score(ids, targets)).double().cpu().numpy()
    if not np.isfinite(nats).all():
        raise FloatingPointError(
            f"{name} gives a loss that is no finite number ({nats[~np.isfinite(nats)][0]}): {broken_part(model, ids)}."
        )
    rows = [
        np.bincount(contexts[i], weights=row[w.skip : len(w.ids) - 1], minlength=bins) for i, w, row in zip(batch, chosen, nats)
    ]
    return np.stack(rows)


def figures(every: list[Window], sums: np.ndarray, counts: np.ndarray, n_bytes: list[int], seed: int) -> dict[str, Any]:
    document = np.array([w.document for w in every])
    nats, tokens = (np.bincount(document, weights=x.sum(1), minlength=len(n_bytes)) for x in (sums, counts))
    has = tokens > 0
    total, n = float(nats.sum()), float(tokens.sum())
    of = "documents" if has.sum() > 1 else "windows"
    drawn = (nats[has], tokens[has]) if of == "documents" else (sums.sum(1), counts.sum(1))
    return {
        "nats_per_token": total / n,
        "perplexity": math.exp(total / n),
        "bits_per_byte": total / math.log(2) / sum(n_bytes),
        "stderr": bootstrap(drawn[0], drawn[1], seed),
        "stderr_of": of,
        "tokens": int(n),
        "bytes": int(sum(n_bytes)),
        "documents": int(has.sum()),
        "by_context": [
            {"least": 2**i, "most": 2 ** (i + 1) - 1, "nats_per_token": float(sums[:, i].sum() / count), "tokens": int(count)}
            for i, count in enumerate(counts.sum(0))
            if count
        ],
        "by_document": {"nats": nats.tolist(), "tokens": tokens.astype(int).tolist(), "bytes": list(n_bytes)},
    }


def bootstrap(nats: np.ndarray, tokens: np.ndarray, seed: int) -> float | None:
    """Standard error of sum(nats) / sum(tokens): its spread where the units are drawn anew, with replacement (Efron, 1979)."""
    n = len(nats)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(n, size=n) for _ in range(RESAMPLES))
    return float(np.std([nats[i].sum() / tokens[i].sum() for i in drawn], ddof=1))


def encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str
) -> tuple[list[np.ndarray], list[int]]:
    """Of each text its token ids, and the bytes that all but the first stand for."""
    documents, n_bytes = [], []
    left = iter(texts)
    with tqdm(total=len(texts), desc="tokenising", unit=" documents") as bar:
        while batch := list(islice(left, TOKENIZE_DOCUMENTS)):
            for text, ids in zip(batch, tokenize(batch, tokenizer)):
                n_bytes.append(bytes_after_first(text, ids, tokenizer) if ids else 0)
                documents.append(np.array(ids, dtype=np.int32))
            bar.update(len(batch))
    check_vocabulary(max((int(ids.max()) for ids in documents if len(ids)), default=0), model, name)
    return documents, n_bytes
