"""How well the model does on text that is held out, and what it writes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm import HybridLMForCausalLM, HybridLMForSequenceClassification
from hybridlm.classification import AnyModel
from hybridlm.data.labelled import Labelled
from hybridlm.data.shards import Shards
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.scoring import Window, batch_arrays, nll
from train.settings import RunConfig

BATCH_TOKENS = 8192  # of one pass
# What a validation gives, with its unit: of a language model and of a classifier.
TEXT = {"val_loss": "nats/token", "val_bits_per_byte": "bits/byte"}
CLASSES = {"val_loss": "nats/document", "val_accuracy": "accuracy"}


def figures(config: RunConfig) -> dict[str, str]:
    return TEXT if config.data.label_column is None else CLASSES


def validation_loss(
    accelerator: Accelerator,
    model: HybridLMForCausalLM,
    sources: list[Shards],
    config: RunConfig,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """How well the model predicts `val_sequences` windows, spread evenly over all sources; each rank scores its share.

    Args:
        stopping: asked between batches; as soon as it is so on one rank, nobody needs the result.

    Returns:
        `val_loss` (nats per token) and `val_bits_per_byte`, and of several sources `val_loss_by_source` as well, by name (None
        where no window is of it). None on every rank where one of them stopped early.
    """
    size, held_out = config.data.seq_len, HeldOut.of(sources, config)

    def score(numbers: np.ndarray) -> np.ndarray:
        """(sources, 2) nats and predicted tokens of each source."""
        sums = np.zeros((len(sources), 2))
        source, ids = held_out.read(numbers)
        inputs, targets = batch_arrays([Window(tokens, document=0, start=0, skip=0) for tokens in ids])
        nats = nll(model, inputs.to(accelerator.device), targets.to(accelerator.device)).double().sum(-1).cpu().numpy()
        np.add.at(sums, source, np.stack([nats, [len(tokens) - 1 for tokens in ids]], axis=-1))
        return sums

    sums = over_windows(accelerator, model, held_out.wanted, size, score, stopping)
    if sums is None:
        return None
    nats, tokens = sums.sum(0).tolist()
    line = {"val_loss": nats / tokens, "val_bits_per_byte": bits_per_byte(nats / tokens, sources)}
    if len(sources) > 1:
        parts = zip(sources, sums.tolist())
        line["val_loss_by_source"] = {
            shards.meta["source"]: nats / tokens if tokens else None for shards, (nats, tokens) in parts
        }
    return line


@dataclass(frozen=True)
class HeldOut:
    """The windows of a validation, the same in every one.

    Attributes:
        windows: of each source, as `_windows` gives them. upto: how many the sources up to and with each have.
        wanted: the numbers, over all sources, of those that are read.
    """

    sources: list[Shards]
    windows: list[np.ndarray]
    upto: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, sources: list[Shards], config: RunConfig) -> "HeldOut":
        """`train.val_sequences` windows, spread evenly."""
        windows = [_windows(shards, config.data.seq_len) for shards in sources]
        upto = np.cumsum([len(some) for some in windows])
        wanted = np.arange(upto[-1])
        if config.train.val_sequences is not None and config.train.val_sequences < len(wanted):
            wanted = np.linspace(0, upto[-1] - 1, config.train.val_sequences).round().astype(int)
        return cls(sources, windows, upto, wanted)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Of each window its source and its tokens."""
        source = np.searchsorted(self.upto, numbers, side="right")
        places = [
            self.windows[s][n - self.upto[s]] for s, n in zip(source, numbers, strict=True)
        ]  # counted from the source's end
        return source, [self.sources[s].read(np.arange(*place)) for s, place in zip(source, places, strict=True)]


def bits_per_byte(nats_per_token: float, sources: list[Shards]) -> float:
    """Of the whole held-out text, by the loss on a part of it."""
    predicted = sum(len(shards) - 2 * len(shards.documents) for shards in sources)
    return nats_per_token / math.log(2) * predicted / sum(shards.meta["bytes"] for shards in sources)


def classification(
    accelerator: Accelerator,
    model: HybridLMForSequenceClassification,
    sources: list[Shards],
    config: RunConfig,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """How well the model classifies the documents of `val_sequences` windows, the same in every validation; as `validation_loss`.

    Returns:
        `val_loss` (nats per document) and `val_accuracy`, or None.
    """
    (shards,), size = sources, config.data.seq_len
    documents = Labelled(shards, size, 0, model.config.vocab_size, model.config.label_names)
    wanted = np.arange(min(config.train.val_sequences or documents.windows, documents.windows))  # an epoch has them shuffled

    def score(numbers: np.ndarray) -> np.ndarray:
        """(3) nats, right answers, documents."""
        samples = [documents.sample(int(n)) for n in numbers]
        batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])).to(accelerator.device) for name in samples[0]}
        with torch.no_grad():
            output = model(**batch)
        right = output.logits.argmax(-1) == batch["targets"][batch["targets"] != IGNORE]
        return np.array([output.loss.double().sum().item(), right.sum().item(), len(right)])

    sums = over_windows(accelerator, model, wanted, size, score, stopping)
    return None if sums is None else {"val_loss": sums[0] / sums[2], "val_accuracy": sums[1] / sums[2]}


def over_windows(
    accelerator: Accelerator,
    model: AnyModel,
    wanted: np.ndarray,
    size: int,
    score: Callable[[np.ndarray], np.ndarray],
    stopping: Callable[[], bool],
) -> np.ndarray | None:
    """The sum of `score` over batches of the windows `wanted` (numbers), of `size` tokens each; every rank has its share of them.
    None on all where `stopping` was so on one."""
    mine = wanted[accelerator.process_index :: accelerator.num_processes]
    batch_size = max(1, BATCH_TOKENS // size)
    # The same number of passes on every rank, since those who share a model make them together: the last may be of no account.
    passes = math.ceil(math.ceil(len(wanted) / accelerator.num_processes) / batch_size)
    sums = np.zeros(())
    model.eval()
    bar = tqdm(total=len(mine), desc="validation", unit="window", leave=False, disable=not accelerator.is_main_process)
    stopped = False
    for i in range(passes):
        if stopped := any_rank(accelerator, stopping()):
            break
        numbers = mine[i * batch_size : (i + 1) * batch_size]
        with accelerator.autocast():
            sums = sums + score(numbers if len(numbers) else wanted[:1]) * (len(numbers) > 0)
        bar.update(len(numbers))  # the main process has no less than others
    bar.close()
    model.train()
    return None if stopped else accelerator.reduce(torch.from_numpy(sums).to(accelerator.device)).cpu().numpy()


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is so on one rank; all must ask."""
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0


def _windows(shards: Shards, size: int) -> np.ndarray:
    """(windows, 2) int64: where each window of up to size + 1 tokens begins and ends."""
    starts = np.concatenate([[0], shards.documents[:-1, 0]])
    ends = shards.documents[:, 0] - 1  # an end token is no text: it is left out, as in every evaluation
    counts = -(-(ends - starts - 1) // size)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(starts, counts) + within * size
    return np.stack([first, np.minimum(first + size + 1, np.repeat(ends, counts))], axis=-1)


@torch.no_grad()
def sample_text(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    stopping: Callable[[], bool] = lambda: False,
    agreed: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> str:
    """What the model makes of the prompt, until `stopping`. The run's own random numbers are left as they were.

    Args:
        agreed: gives scores (b v) that are the same on all ranks which write together: were one to draw an end and another not,
            they would wait for each other.
    """
    ids = tokenizer(config.log.sample_prompt, add_special_tokens=False).input_ids
    prompt = torch.tensor([ids or [tokenizer.eos_token_id]], device=model.device)  # behind an end something new begins
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        text: Tensor = model.generate(  # type: ignore[misc, assignment, operator]
            prompt, max_new_tokens=config.log.sample_tokens, do_sample=True, temperature=0.8, top_k=50,
            logits_processor=[lambda ids, scores: agreed(scores)],
            stopping_criteria=[lambda ids, scores: ids.new_full(ids.shape[:1], stopping(), dtype=torch.bool)],
        )  # fmt: skip
    model.train()
    return str(tokenizer.decode(text[0, prompt.shape[1] :], skip_special_tokens=True))
