"""The training loop, from top to bottom."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from hybridlm.flops import peak_flops, training_flops
from hybridlm.ops.cross_entropy import IGNORE
from train import checkpoint
from train.card import model_card
from train.config import RunConfig
from train.loader import batches
from train.optim import adamw, learning_rate, micro_batches
from train.run import append, check, claim, last_line
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
    rows = micro_batches(
        config.train.global_batch, config.train.micro_batch, accelerator.process_index, accelerator.num_processes
    )

    # 1. Where to go on from; model, tokenizer and data.
    start_from = first_on_main(accelerator, lambda: check(config, resume, allow_config_change))
    set_seed(config.seed)
    model = build_model(config, start_from)
    tokenizer = build_tokenizer(config, model, start_from)
    opened = first_on_main(accelerator, lambda: open_data(config, tokenizer, model.config.vocab_size, quiet=not main))
    stream, validation = opened
    optimizer = adamw(model, config.optim)
    rate = learning_rate(config.optim, config.schedule, config.train.steps)
    step, tokens, cursor = 0, 0, {}
    if start_from is not None:
        model.to(accelerator.device)
        state = checkpoint.load(start_from, model, optimizer)
        step, tokens = state["step"], state["tokens"]
        cursor = state["cursor"]
        if changed := stream.changed(state["identity"], tokens // config.data.seq_len):
            raise ValueError(
                f"{start_from} is of a run with other data, so its place there means nothing here:\n"
                + "".join(f"  {line}\n" for line in changed)
                + "Restore what it was, or start a new run from its model (--model.init_from)."
            )
        if step > config.train.steps:
            raise ValueError(f"{start_from} is past train.steps ({config.train.steps}); raise train.steps to go on.")
    stream.seek(tokens // config.data.seq_len, cursor)
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
        describe(config, bare, stream, validation, accelerator, step)
        start_wandb(accelerator, config)

    def validate() -> None:
        result = validation_loss(accelerator, bare, validation, config, stopping)
        if main and result is not None:
            append(metrics, {"step": step, "tokens": tokens, **result})
            accelerator.log({"tokens": tokens, **result}, step=step)
            nats, bits = result["val_loss"], result["val_bits_per_byte"]
            bar.write(f"step {step}: validation loss {nats:.4f} nats/token, {bits:.4f} bits/byte")
            if config.log.sample_tokens:
                text = sample_text(bare, tokenizer, config)
                append(run_dir / "samples.jsonl", {"step": step, "prompt": config.log.sample_prompt, "text": text})
                bar.write(f"  {config.log.sample_prompt + text[:160]!r}")

    def save() -> None:
        if main:
            card = model_card(config, bare, ", ".join(stream.names), step, tokens, last_line(metrics, "val_loss"))
            position = tokens // config.data.seq_len
            state = {"tokens": tokens, "identity": stream.identity(position), "cursor": stream.cursor(position)}
            checkpoint.save(run_dir, step, bare, tokenizer, optimizer, state, card)
            checkpoint.prune(run_dir, config.train.keep_checkpoints)
        accelerator.wait_for_everyone()

    # 3. The steps.
    bar = tqdm(total=config.train.steps, initial=step, unit="step", disable=not main, dynamic_ncols=True, smoothing=0.05)
    with stop_signals() as stopping:
        if step == 0:
            validate()
        logged_tokens, clock = tokens, time.perf_counter()
        first = tokens // config.data.seq_len  # the position in the data: the number of the next sample
        left = batches(stream, rows, first, config.train.global_batch, config.train.steps - step, config.data.workers)
        while step < config.train.steps:
            first = tokens // config.data.seq_len
            samples = next(left)
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
                batch = {name: tensor.to(accelerator.device) for name, tensor in sample.items()}
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
