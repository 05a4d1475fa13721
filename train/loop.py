"""The training loop, from top to bottom."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from hybridlm.data.sampler import Sampler
from hybridlm.flops import peak_flops, training_flops
from hybridlm.ops.cross_entropy import IGNORE
from train import checkpoint
from train.card import model_card
from train.config import RunConfig
from train.optim import adamw, learning_rate, micro_batches
from train.run import append, check, claim, last_line, lock
from train.setup import build_model, build_tokenizer, describe, open_data, start_wandb
from train.validation import sample_text, validation_loss

T = TypeVar("T")
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
        # Without it, CPU processes under torchrun would not find each other. Other accelerators lack the float64 of SSD's decay.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if config.train.precision == "fp32" else config.train.precision,
        log_with="wandb" if config.log.wandb else None,
    )
    main = accelerator.is_main_process
    run_dir, metrics = Path(config.run_dir), Path(config.run_dir) / "metrics.jsonl"
    batches = micro_batches(
        config.train.global_batch, config.train.micro_batch, accelerator.process_index, accelerator.num_processes
    )

    # 1. Where to go on from; model, tokenizer and data.
    held = ExitStack()
    first_on_main(accelerator, lambda: main and held.enter_context(lock(run_dir)))
    start_from = first_on_main(accelerator, lambda: check(config, resume, allow_config_change))
    set_seed(config.seed)
    model = build_model(config, start_from)
    tokenizer = build_tokenizer(config, model, start_from)
    shards = first_on_main(accelerator, lambda: open_data(config, tokenizer, model.config.vocab_size, quiet=not main))
    train_shards, val_shards = shards
    sampler = Sampler(train_shards, config.data.seq_len, config.seed)
    optimizer = adamw(model, config.optim)
    rate = learning_rate(config.optim, config.schedule, config.train.steps)
    step, tokens = 0, 0
    # What the position in the data means.
    identity = {"data": train_shards.meta["sha256"], "seq_len": config.data.seq_len, "seed": config.seed}
    if start_from is not None:
        model.to(accelerator.device)
        state = checkpoint.load(start_from, model, optimizer)
        step, tokens = state["step"], state["tokens"]
        if changed := [key for key, value in identity.items() if state["identity"][key] != value]:
            raise ValueError(
                f"{start_from} is of a run with another {' and another '.join(changed)}, so its place in the data means nothing "
                "here. Restore what it was, or start a new run from its model (--model.init_from)."
            )
        if step > config.train.steps:
            raise ValueError(f"{start_from} is past train.steps ({config.train.steps}); raise train.steps to go on.")
    accelerator.wait_for_everyone()
    if main:
        claim(config, start_from, step)

    # 2. The machine.
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    device_name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    peak = peak_flops(device_name, config.train.precision)
    step_flops = training_flops(bare.config, config.data.seq_len)
    if main:
        describe(config, bare, train_shards, val_shards, accelerator, step)
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
            card = model_card(config, bare, train_shards.meta["source"], step, tokens, last_line(metrics, "val_loss"))
            state = {
                "step": step, "samples": tokens // config.data.seq_len, "tokens": tokens, "identity": identity, "cursor": {},
                "spikes": {},
            }  # fmt: skip
            files = checkpoint.sidecars(bare, tokenizer) | {"README.md": card.encode()}
            checkpoint.write(run_dir, checkpoint.snapshot(bare, optimizer, state, files, copy=False))
            checkpoint.prune(run_dir, config.train.keep_checkpoints, config.train.keep_every)
        accelerator.wait_for_everyone()

    # 3. The steps.
    bar = tqdm(total=config.train.steps, initial=step, unit="step", disable=not main, dynamic_ncols=True, smoothing=0.05)
    with stop_signals() as stopping:
        if step == 0:
            validate()
        logged_tokens, clock = tokens, time.perf_counter()
        while step < config.train.steps:
            first = tokens // config.data.seq_len  # the position in the data: the number of the next sample
            samples = [sampler.batch(first + rows.start, first + rows.stop) for rows in batches]
            counted = sum(int((sample["targets"] != IGNORE).sum()) for sample in samples)
            # One message for both: all ranks stop before the same step.
            targets, stop = accelerator.reduce(torch.tensor([counted, stopping()], device=accelerator.device))
            if stop:
                if step > 0:
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
                    "step": step, "tokens": tokens, "loss": total.item(),
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item(),
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
        ended = "done" if step == config.train.steps else f"stopped at step {step} of {config.train.steps}"
        print(ended + (f": {run_dir / 'model'}" if step > 0 else ""))
        if step < config.train.steps:
            print("the same command goes on from there")


def first_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Does `work` on the main process, then on the others; where it is a ValueError there, all of them raise it."""
    error, result = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except ValueError as fault:
            error = str(fault)
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise ValueError(error)
    return result if accelerator.is_main_process else work()  # type: ignore[return-value]


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on a GPU; the process's resident bytes on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


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
