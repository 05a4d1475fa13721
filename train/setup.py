"""What a run starts from: its model, tokenizer, data and logger."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.preparation import prepare
from hybridlm.data.shards import Shards
from hybridlm.data.sources import Source
from hybridlm.ops.precision import cpu_has_bf16
from hybridlm.strict_yaml import parse_yaml
from hybridlm.tokenizer import byte_tokenizer
from train.config import RunConfig, dump

logger = logging.getLogger(__name__)


def build_model(config: RunConfig, start_from: Path | None = None) -> HybridLMForCausalLM:
    """The model of the run. One that was initialised from other weights is read from its own checkpoint once it has one."""
    if config.model.init_from is not None:
        folder = start_from / "model" if start_from else config.model.init_from
        model = HybridLMForCausalLM.from_pretrained(folder, backend=config.ops.backend, dtype=torch.float32)
        return model.train()
    assert isinstance(config.model.config, dict)
    return HybridLMForCausalLM(HybridLMConfig.from_strict_dict(config.model.config), backend=config.ops.backend).train()


def build_tokenizer(config: RunConfig, model: HybridLMForCausalLM, start_from: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; the model's configuration takes its special ids.

    Raises:
        ValueError: it has more tokens than the model has embeddings.
    """
    name = config.data.tokenizer
    if name is None and config.model.init_from is not None:
        name = str(start_from / "model") if start_from else config.model.init_from
    tokenizer = byte_tokenizer() if name in (None, "bytes") else load_tokenizer(name)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {name or 'bytes'} has {len(tokenizer)} tokens and the model only "
            f"vocab_size={model.config.vocab_size}; set vocab_size to at least {len(tokenizer)}."
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, key, getattr(tokenizer, key))
        setattr(model.generation_config, key, getattr(tokenizer, key))
    return tokenizer


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, quiet: bool) -> tuple[Shards, Shards]:
    """Training and validation shards.

    Raises:
        ValueError: no such data, nothing in it to predict, or a token id that the model does not have.
    """
    data = config.data
    train_shards, val_shards = prepare(
        Source(data.source, text_column=data.text_column),
        tokenizer,
        Path(data.cache_dir).expanduser(),
        val_source=None if data.val_source is None else Source(data.val_source, text_column=data.text_column),
        val_fraction=data.val_fraction,
        quiet=quiet,
    )
    if len(val_shards) == 2 * len(val_shards.documents):
        raise ValueError(
            f"the validation documents of {val_shards.meta['source']} have one token each, so there is nothing to predict; "
            "give longer ones (data.val_source), or hold out more (data.val_fraction)."
        )
    for shards in (train_shards, val_shards):
        if shards.meta["largest_id"] >= vocab_size:
            raise ValueError(
                f"{shards.meta['source']} has token id {shards.meta['largest_id']}, past the vocabulary of the model "
                f"(vocab_size={vocab_size}); set vocab_size to the tokenizer's, or take the model's own tokenizer."
            )
    return train_shards, val_shards


def describe(
    config: RunConfig, model: HybridLMForCausalLM, train_shards: Shards, val_shards: Shards, accelerator: Accelerator, step: int
) -> None:
    batch = config.train.global_batch * config.data.seq_len
    total = config.train.steps * batch
    print(f"model       {sum(p.numel() for p in model.parameters()):,} parameters, {model.config.hybrid_override_pattern}")
    print(f"data        {train_shards.meta['source']}: {len(train_shards):,} tokens; validation {len(val_shards):,}")
    print(f"training    {config.train.steps:,} steps of {batch:,} tokens = {total / len(train_shards):.2f} epochs")
    print(f"machine     {accelerator.num_processes} process(es) on {accelerator.device}, {config.train.precision}")
    print(f"operators   {', '.join(f'{op} {name}' for op, name in model.ops.backends.items())}")
    print(f"run         {config.run_dir}" + (f", going on from step {step}" if step else ""), flush=True)
    if config.train.precision == "bf16" and accelerator.device.type == "cpu" and not cpu_has_bf16():
        logger.warning("this CPU has no bf16 units: train.precision=bf16 rounds as bf16 does and is no faster than fp32 here.")


def start_wandb(accelerator: Accelerator, config: RunConfig) -> None:
    if config.log.wandb:
        import wandb

        mode = "online" if wandb.login(prompt=False) else "offline"
        where = {"dir": config.run_dir, "mode": mode, "name": Path(config.run_dir).name}
        accelerator.init_trackers(config.log.wandb_project, parse_yaml(dump(config)), {"wandb": where})
        print(
            f"wandb       {mode}"
            + ("" if mode == "online" else f" (no key is configured); later: wandb sync {config.run_dir}/wandb/…")
        )
