"""Opening any causal language model, ours or another, and what can go wrong while it runs."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hybridlm import HybridLMForCausalLM
from hybridlm.checkpoint import check_folder, check_shards, load_tokenizer, weight_faults
from hybridlm.ops.cross_entropy import IGNORE

OURS = ("hybridlm", "nemotron_h")  # model types that this library opens; transformers opens the others
LOGITS_AT_A_TIME = 1024  # positions of a stock model whose logits exist together
REFUSALS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch.OutOfMemoryError is not all of them
Item = TypeVar("Item")
Result = TypeVar("Result")


def open_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the GPU where there is one, and its tokenizer.

    Args:
        name: a folder or a name on the hub: a hybrid opens as `HybridLMForCausalLM`, anything else as transformers' own class.

    Raises:
        ValueError: no model or tokenizer there, weights that are no safetensors, or code of their own that they need.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = HybridLMForCausalLM.from_pretrained(name, dtype=dtype) if is_ours(name) else open_stock(name, dtype)
    return model.to(device).eval(), load_tokenizer(name)


def is_ours(name: str) -> bool:
    """
    Raises:
        ValueError: no model there.
    """
    check_folder(name)
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(Path(name).expanduser()) if Path(name).expanduser().exists() else name)
        return config.get("model_type") in OURS
    except (OSError, AttributeError) as error:  # what config.json has may be no object
        raise ValueError(f"{name} is no checkpoint: {error}") from None


def open_stock(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """
    Raises:
        ValueError: transformers cannot open it, or would put random numbers where its files have no weights that fit.
    """
    path = Path(name).expanduser()
    check_shards(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path if path.exists() else name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be opened by transformers: {error}") from None
    model, info = loaded
    if faults := weight_faults(info | {"unexpected_keys": []}):  # old checkpoints have some that nobody reads
        raise ValueError(f"the weights of {name} do not fit its config.json; {'; '.join(faults)}.")
    return model


@torch.no_grad()
def stock_nll(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Nats (b t) in fp32 of each target (0 where it is `IGNORE`), as transformers' model gives them."""
    nats = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    for part, logits in logits_in_pieces(model, ids):
        nats[:, part] = cross_entropy(logits.float().mT, targets[:, part], ignore_index=IGNORE, reduction="none")
    return nats


def logits_in_pieces(model: PreTrainedModel, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Stretches of `ids` (b t), and the model's logits (b t' v) there.

    The body runs once over all of `ids`. Then the model is called for a few positions at a time with the body's output in place
    of the body, so that whatever it does with its logits (scaling, capping) is done, and all logits never exist at once.
    """
    body = model.get_decoder()
    read = body(input_ids=ids, use_cache=False, return_dict=True)
    for start in range(0, ids.shape[1], LOGITS_AT_A_TIME):
        part = slice(start, start + LOGITS_AT_A_TIME)
        shown = type(read)(**read | {"last_hidden_state": read.last_hidden_state[:, part]})
        with patch.object(body, "forward", lambda *a, shown=shown, **k: shown):
            logits = model(input_ids=ids[:, part], use_cache=False).logits
        yield part, logits


def in_batches(run: Callable[[list[Item]], Result], items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], Result]]:
    """`run` on `size` items at a time, the last ones fewer; where memory does not suffice, on half as many from there on.

    Yields:
        the items of a batch and what `run` gave for them.

    Raises:
        MemoryError: memory does not suffice for one item.
    """
    done = 0
    while done < len(items):
        batch = list(items[done : done + size])
        try:
            result = run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(f"there is not enough memory for a single one: {error}") from error
            size = len(batch) // 2
        else:
            yield batch, result
            done += len(batch)
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tqdm.write(f"not enough memory for a batch of {len(batch)}: going on with {size} at a time", file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU's allocator refused."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in REFUSALS)


def check_vocabulary(largest: int, model: PreTrainedModel, name: str) -> None:
    """
    Raises:
        ValueError: the model has no token `largest`.
    """
    size = model.config.get_text_config().vocab_size
    if largest >= size:
        raise ValueError(
            f"the tokenizer of {name} gives token id {largest}, but the model's vocabulary has {size} "
            "(vocab_size). Put the tokenizer beside the model that it was trained with."
        )


@torch.no_grad()
def broken_part(model: PreTrainedModel, ids: Tensor) -> str:
    """Where the first number that is none (NaN, infinity) comes up when the model reads `ids` (b t), as a sentence."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"its weight {name} has numbers that are not finite"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        for _ in logits_in_pieces(model, ids):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return f"the first output that is not finite is that of {found[0]}" if found else "its layers' outputs are finite"


class Finite(LogitsProcessor):
    """Generation goes on with NaN as if it were a number; this does not."""

    def __init__(self, model: PreTrainedModel, name: str):
        self.model, self.name = model, name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise FloatingPointError(f"{self.name} writes with logits that are no numbers: {broken_part(self.model, input_ids)}.")
        return scores
