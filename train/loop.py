"""The training loop, from top to bottom."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.checkpoint import load_model, load_tokenizer
from hybridlm.data.sampler import Sampler
from hybridlm.data.shards import Shards, prepare
from hybridlm.data.sources import split_source
from hybridlm.flops import peak_flops, training_flops
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.scoring import score, windows
from hybridlm.tokenizer import byte_tokenizer
from train import checkpoint
from train.config import RunConfig
from train.optim import adamw, learning_rate, micro_batches
from train.run import append, claim, drop_after

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Nats of every position (b t), 0 where there is no target."""
    return model(**batch).loss


def train(config: RunConfig, resume: str = "auto", allow_config_change: bool = False, loss: Loss = next_token_loss) -> None:
    """Trains until `train.steps`, or until a signal asks to stop; either way the last step has a checkpoint.

    Raises:
        ValueError: settings, data or a run directory that do not fit.
        FloatingPointError: a loss or gradient that is not finite; the weights are as before that step.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, CPU processes under torchrun would not find each other
        mixed_precision="no" if config.train.precision == "fp32" else config.train.precision,
        log_with="wandb" if config.log.wandb else None,
    )
    main = accelerator.is_main_process
    run_dir, metrics = Path(config.run_dir), Path(config.run_dir) / "metrics.jsonl"
    batches = micro_batches(
        config.train.global_batch, config.train.micro_batch, accelerator.process_index, accelerator.num_processes
    )

    # 1. Model, tokenizer and data.
    set_seed(config.seed)
    model = build_model(config)
    tokenizer = build_tokenizer(config, model)
    with accelerator.main_process_first():
        start_from = claim(config, resume, allow_config_change) if main else None
        train_shards, val_shards = open_data(config, tokenizer, model.config.vocab_size, quiet=not main)
    if not main and resume != "never":
        start_from = checkpoint.newest(run_dir) if resume == "auto" else Path(resume)
    sampler = Sampler(train_shards, config.data.seq_len, config.seed)
    identity = {"data": train_shards.folder.name, "validation": val_shards.folder.name}
    optimizer = adamw(model, config.optim)
    rate = learning_rate(config.optim, config.schedule, config.train.steps)

    # 2. Where to go on from.
    step, tokens = 0, 0
    if start_from is not None:
        model.to(accelerator.device)
        state = checkpoint.load(start_from, model, optimizer)
        step, tokens = state["step"], state["tokens"]
        if state["identity"] != identity:
            raise ValueError(
                f"the data of {config.data.source!r} is not what {start_from} was trained on; restore it, or start a new run."
            )
    if step > config.train.steps:
        raise ValueError(f"{start_from} is past train.steps ({config.train.steps}); raise train.steps to go on.")
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    device_name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    peak = peak_flops(device_name, config.train.precision)
    step_flops = training_flops(bare.config, config.data.seq_len)
    if main:
        describe(config, bare, train_shards, val_shards, accelerator, step)
        drop_after(metrics, step)
        drop_after(run_dir / "samples.jsonl", step)
        start_wandb(accelerator, config)

    def validate() -> None:
        val_loss, bits_per_byte = validation_loss(accelerator, bare, val_shards, config)
        if main:
            line = {"step": step, "tokens": tokens, "val_loss": val_loss, "val_bits_per_byte": bits_per_byte}
            append(metrics, line)
            accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
            bar.write(f"step {step}: validation loss {val_loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
            if config.log.sample_tokens:
                text = sample_text(bare, tokenizer, config)
                append(run_dir / "samples.jsonl", {"step": step, "prompt": config.log.sample_prompt, "text": text})
                bar.write(f"  {config.log.sample_prompt + text[:160]!r}")

    def save() -> None:
        if main:
            folder = checkpoint.save(run_dir, step, bare, tokenizer, optimizer, {"tokens": tokens, "identity": identity})
            checkpoint.prune(run_dir, config.train.keep_checkpoints)
            logger.info("saved %s", folder)
        accelerator.wait_for_everyone()

    # 3. The steps.
    bar = tqdm(total=config.train.steps, initial=step, unit="step", disable=not main, dynamic_ncols=True, smoothing=0.05)
    with stop_signals() as stopping:
        if step == 0:
            validate()
        logged_tokens, clock = tokens, time.perf_counter()
        while step < config.train.steps:
            first = step * config.train.global_batch
            samples = [sampler.batch(first + rows.start, first + rows.stop) for rows in batches]
            counted = sum(int((sample["targets"] != IGNORE).sum()) for sample in samples)
            # One message for both: all ranks stop before the same step.
            targets, stop = accelerator.reduce(torch.tensor([counted, stopping()], device=accelerator.device))
            if stop:
                save()
                break
            if targets == 0:
                raise ValueError(f"step {step + 1}: no position of the batch has a target; the documents are of one token each.")

            total = torch.zeros((), device=accelerator.device)
            for i, sample in enumerate(samples):
                batch = {name: torch.from_numpy(array).to(accelerator.device) for name, array in sample.items()}
                last = i == len(samples) - 1
                with nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
                    # The mean over all targets of the global batch; data-parallel wrappers average over ranks.
                    part = loss(model, batch).sum() / targets
                    accelerator.backward(part * accelerator.num_processes)
                total += part.detach()
            total = accelerator.reduce(total)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.clip)
            if not (torch.isfinite(total) and torch.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"step {step + 1}: loss {total.item()} and gradient norm {grad_norm.item()} are not both finite. "
                    f"This step changed no weight. Lower optim.lr ({config.optim.lr}), or look at samples {first} to "
                    f"{first + config.train.global_batch - 1} of the data."
                )
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
            tokens += config.train.global_batch * config.data.seq_len

            bar.update()
            if step % config.log.every == 0 or step == config.train.steps:
                now = time.perf_counter()
                speed = (tokens - logged_tokens) / (now - clock)
                line = {
                    "step": step, "tokens": tokens, "loss": total.item(), "lr": rate(step), "grad_norm": grad_norm.item(),
                    "tokens_per_second": speed,
                    "mfu": speed * step_flops / (peak * accelerator.num_processes) if peak else None,
                    "memory_bytes": memory_bytes(accelerator.device),
                }  # fmt: skip
                if main:
                    append(metrics, line)
                    accelerator.log({k: v for k, v in line.items() if v is not None and k != "step"}, step=step)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:,.0f} tokens/s")
                logged_tokens, clock = tokens, now
            paused = time.perf_counter()
            if step % config.train.val_every == 0 or step == config.train.steps:
                validate()
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                save()
            clock += time.perf_counter() - paused  # validation and saving are not training
    bar.close()
    accelerator.end_training()
    if main:
        ended = (
            "done"
            if step == config.train.steps
            else f"stopped at step {step} of {config.train.steps}; the same command goes on from there"
        )
        print(f"{ended}: {run_dir / 'model'}")


def build_model(config: RunConfig) -> HybridLMForCausalLM:
    if config.model.init_from is not None:
        return load_model(config.model.init_from, backend=config.ops.backend).train()
    assert isinstance(config.model.config, dict)
    return HybridLMForCausalLM(HybridLMConfig.from_strict_dict(config.model.config), backend=config.ops.backend).train()


def build_tokenizer(config: RunConfig, model: HybridLMForCausalLM) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; the model's configuration takes its special ids.

    Raises:
        ValueError: it has more tokens than the model has embeddings.
    """
    name = config.data.tokenizer or config.model.init_from
    tokenizer = byte_tokenizer() if name is None else load_tokenizer(name)
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
    data = config.data
    documents = split_source(data.source, data.val_source, data.val_fraction, data.text_column)
    train_shards, val_shards = (prepare(d, tokenizer, Path(data.cache_dir).expanduser(), quiet) for d in documents)
    for shards in (train_shards, val_shards):
        if shards.meta["largest_id"] >= vocab_size:
            raise ValueError(
                f"{shards.meta['source']} has token id {shards.meta['largest_id']}, past the vocabulary of the model "
                f"(vocab_size={vocab_size}); set vocab_size to the tokenizer's, or take the model's own tokenizer."
            )
    return train_shards, val_shards


def validation_loss(
    accelerator: Accelerator, model: HybridLMForCausalLM, shards: Shards, config: RunConfig
) -> tuple[float, float]:
    """Nats per token and bits per byte over `val_sequences` windows, spread evenly; each rank scores its share."""
    size = config.data.seq_len
    starts = np.concatenate([[0], shards.documents[:-1, 0]])
    # An end token is no text: it is left out here, as in every evaluation.
    documents = (shards.read(np.arange(start, end - 1)) for start, end in zip(starts, shards.documents[:, 0], strict=True))
    chosen = list(windows(documents, size))
    if config.train.val_sequences is not None and config.train.val_sequences < len(chosen):
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, config.train.val_sequences).round().astype(int)]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(
        total=sum(len(w) - 1 for w in mine), desc="validation", unit="token", leave=False, disable=not accelerator.is_main_process
    )
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    if mine:
        with accelerator.autocast():
            result = score(model, mine, size, bytes=0, batch_size=max(1, 8192 // size), advance=bar.update)
        sums += torch.tensor([result.nats.sum(), result.tokens.sum()], device=accelerator.device)
    bar.close()
    nats, tokens = accelerator.reduce(sums).tolist()
    if tokens == 0:
        raise ValueError("the validation documents have no position with a target; give longer ones (data.val_source).")
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


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on a GPU; the process's resident bytes on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def describe(
    config: RunConfig, model: HybridLMForCausalLM, train_shards: Shards, val_shards: Shards, accelerator: Accelerator, step: int
) -> None:
    batch = config.train.global_batch * config.data.seq_len
    total = config.train.steps * batch
    print(f"model       {sum(p.numel() for p in model.parameters()):,} parameters, {model.config.hybrid_override_pattern}")
    print(f"data        {train_shards.meta['source']}: {len(train_shards):,} tokens; validation {len(val_shards):,}")
    print(f"training    {config.train.steps:,} steps of {batch:,} tokens = {total / len(train_shards):.2f} epochs")
    print(f"machine     {accelerator.num_processes} process(es) on {accelerator.device}, {config.train.precision}")
    print(f"run         {config.run_dir}" + (f", going on from step {step}" if step else ""), flush=True)
    if config.train.precision == "bf16" and accelerator.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning("this CPU has no bf16 units: train.precision=bf16 will be many times slower than fp32 here.")


def start_wandb(accelerator: Accelerator, config: RunConfig) -> None:
    if config.log.wandb:
        import wandb

        mode = "online" if wandb.login(prompt=False) else "offline"
        where = {"dir": config.run_dir, "mode": mode, "name": Path(config.run_dir).name}
        accelerator.init_trackers(config.log.wandb_project, init_kwargs={"wandb": where})
        print(
            f"wandb       {mode}"
            + ("" if mode == "online" else f" (no key is configured); later: wandb sync {config.run_dir}/wandb/…")
        )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run after the step at hand; a second one ends it at once."""
    received: list[int] = []

    def note(number, frame):
        received.append(number)
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once", flush=True)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
