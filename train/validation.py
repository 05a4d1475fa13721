"""How well the model does on text that is held out, and what it writes."""

import math

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm import HybridLMForCausalLM
from hybridlm.data.shards import Shards
from hybridlm.scoring import score
from train.config import RunConfig


def validation_loss(
    accelerator: Accelerator, model: HybridLMForCausalLM, shards: Shards, config: RunConfig
) -> tuple[float, float]:
    """Nats per token and bits per byte over `val_sequences` windows, spread evenly; each rank scores its share."""
    size = config.data.seq_len
    starts = np.concatenate([[0], shards.documents[:-1, 0]])
    lengths = shards.documents[:, 0] - starts - 1  # an end token is no text: it is left out, as in every evaluation
    upto = np.cumsum(-(-(lengths - 1) // size))  # windows in the documents up to and with each
    wanted = np.arange(upto[-1])
    if config.train.val_sequences is not None and config.train.val_sequences < len(wanted):
        wanted = np.linspace(0, upto[-1] - 1, config.train.val_sequences).round().astype(int)

    def window(number: int) -> np.ndarray:
        document = np.searchsorted(upto, number, side="right")
        within = number - (upto[document - 1] if document else 0)
        first, end = starts[document] + within * size, starts[document] + lengths[document]
        return shards.read(np.arange(first, min(first + size + 1, end)))

    chosen = [window(number) for number in wanted[accelerator.process_index :: accelerator.num_processes]]
    total = sum(len(ids) - 1 for ids in chosen)
    bar = tqdm(total=total, desc="validation", unit="token", leave=False, disable=not accelerator.is_main_process)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    if chosen:
        with accelerator.autocast():
            result = score(model, chosen, size, bytes=0, batch_size=max(1, 8192 // size), advance=bar.update)
        sums += torch.tensor([result.nats.sum(), result.tokens.sum()], device=accelerator.device)
    bar.close()
    nats, tokens = accelerator.reduce(sums).tolist()
    predicted = len(shards) - 2 * len(shards.documents)
    return nats / tokens, nats / tokens / math.log(2) * predicted / shards.meta["bytes"]


@torch.no_grad()
def sample_text(model: HybridLMForCausalLM, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> str:
    """What the model makes of the prompt. The run's own random numbers are left as they were."""
    prompt = tokenizer(config.log.sample_prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        ids: Tensor = model.generate(prompt, max_new_tokens=config.log.sample_tokens, do_sample=True, temperature=0.8, top_k=50)  # type: ignore[misc, assignment]
    model.train()
    return str(tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True))
