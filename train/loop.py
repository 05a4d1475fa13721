"""The training loop, from top to bottom."""

import logging
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, set_seed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from hybridlm.flops import peak_flops, training_flops
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.strict_yaml import parse_yaml
from train import checkpoint, files, launch, logs
from train.balance import balance, expert_loads, load_figures, routers
from train.card import model_card
from train.carried import Carried
from train.config import dump
from train.incidents import Spikes, diagnose, merge, record
from train.loader import Stage, batches
from train.objective import Loss, objective
from train.optim import batch_size, build_optimizers, cut, learning_rate, mask_seed, micro_batches, row_length, samples_by, stages
from train.ranks import agree, check_equal, everywhere, first_on_main, gather, group_timeout, patient_group, together, watch
from train.run import appears, append, check, claim, last_line, lock
from train.settings import RunConfig
from train.setup import (
    build_model,
    build_tokenizer,
    check_shape,
    check_state,
    closing,
    describe,
    open_data,
    read_labels,
    start_wandb,
)
from train.sharding import scale_weights
from train.signals import stop_signals
from train.telemetry import gradient_norms, mamba_statistics, over_ranks, rank_figures
from train.validation import any_rank, classification, figures, sample_text, validation_loss

logger = logging.getLogger(__name__)


def train(config: RunConfig, resume: str = "auto", allow_config_change: bool = False, loss: Loss | None = None) -> None:
    """Trains until `train.steps`, or until a signal asks to stop; either way the last step has a checkpoint.

    Args:
        loss: what the steps make smaller, in the place of what the configuration says (train.objective).

    Raises:
        ValueError: settings, data or a run directory that do not fit; ranks that were not started alike.
        FloatingPointError: a loss or gradient that is not finite; the weights are as before that step.
        OSError: a checkpoint or a line of metrics that could not be written; older checkpoints are as they were.
        RanksError: the ranks cannot go on together. (Where one ended or hangs, the others say so and exit.)
    """
    asked = launch.take(os.environ)
    launch.join(os.environ, group_timeout(config.train.timeout))
    accelerator = Accelerator(
        # Without it, CPU processes under torchrun would not find each other. Other accelerators lack the float64 of SSD's decay.
        cpu=not torch.cuda.is_available(),
        # FP8 is in the layers themselves; what is around them is bf16.
        mixed_precision="no" if config.train.precision == "fp32" else "bf16",
        log_with="wandb" if config.log.wandb else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=group_timeout(config.train.timeout))],
    )
    main = accelerator.is_main_process
    run_dir, metrics = Path(config.run_dir), Path(config.run_dir) / "metrics.jsonl"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    agree(accelerator, {"settings": parse_yaml(dump(config)), "launcher": asked, "resume": resume, **versions})
    launch.check(config, asked)
    rows_of = partial(
        micro_batches, micro_batch=config.train.micro_batch, rank=accelerator.process_index, ranks=accelerator.num_processes
    )
    rows = rows_of(config.train.global_batch)
    rows_of(batch_size(config, 1), name="schedule.batch_start")  # does that divide, too?

    # Signals and the log are let go last: a launcher sends SIGTERM while `watch` finds out which rank ended.
    with ExitStack() as outer, watch(accelerator, run_dir, config.train.timeout) as watching, ExitStack() as held:
        # 1. Where to go on from; model, tokenizer and data.
        everywhere(accelerator, lambda: main and held.enter_context(lock(run_dir)))
        # It reads all of a checkpoint, so one does; the others look whether they see the same.
        checked = everywhere(accelerator, lambda: check(config, resume, allow_config_change) if main else None)
        found = gather(accelerator, checked and str(checked))[0]
        start_from = None if found is None else Path(found)
        agree(accelerator, {"checkpoint (is run_dir on a disk that all share?)": start_from and checkpoint.identity(start_from)})
        set_seed(config.seed)
        shares = config.train.sharding == "fsdp2" and accelerator.num_processes > 1
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,)) if shares else None
        # Of what goes on between ranks behind the training, where each has something of its own to save.
        sharing = patient_group() if mesh is not None or (config.data.carry_state and accelerator.num_processes > 1) else None
        labels = first_on_main(accelerator, lambda: read_labels(config, start_from, quiet=not main))
        model = build_model(config, start_from, accelerator.device, mesh, sharing, labels)
        tokenizer = build_tokenizer(config, model, start_from)
        opened = first_on_main(accelerator, lambda: open_data(config, tokenizer, model.config.vocab_size, quiet=not main))
        stream, validation = opened
        held_out = [shards.meta["sha256"] for shards in validation]
        agree(accelerator, {"data": stream.identity(samples_by(config, config.train.steps)), "validation": held_out})
        loss = loss or objective(config, model, tokenizer, accelerator, mesh, sharing)
        optimizers = build_optimizers(model, config.optim)
        carried = Carried(model.config.num_hidden_layers, rows, config.train.global_batch)
        rate = learning_rate(config.optim, config.schedule, config.train.steps)
        step, samples, tokens = 0, 0, 0  # done so far; `samples` is the position in the data: the number of the next sample
        spikes, cursor = Spikes(config.train.spike_sigma, config.train.spike_window), {}
        if start_from is not None:
            if not allow_config_change:
                check_shape(start_from, model)
            state = checkpoint.load(start_from, model, optimizers, sharing, carried)
            step, samples, tokens, cursor = (state[key] for key in ("step", "samples", "tokens", "cursor"))
            spikes = Spikes(config.train.spike_sigma, config.train.spike_window, **state["spikes"])
            check_state(start_from, state, config, stream, held_out, allow_config_change)
        stream.seek(samples, cursor)
        everywhere(accelerator, lambda: claim(config, start_from, step, accelerator.num_processes) if main else None)
        if sharing is not None:  # all write checkpoints there; else it would be seen at the first of them
            seen = appears(run_dir / "config.yaml")
            agree(accelerator, {"rank 0's config.yaml is in run_dir (is that on a disk that all share?)": seen})
        rank, ranks = accelerator.process_index, accelerator.num_processes
        outer.enter_context(logs.to_file(run_dir / "logs" / f"rank-{rank}.log", rank))
        logger.info("rank %d of %d on %s, from step %d", rank, ranks, platform.node(), step)

        # 2. The machine.
        bare = model
        gathers_fp8 = mesh is not None and config.train.precision == "fp8"
        if gathers_fp8:
            scale_weights(bare)
        if mesh is None:
            model = accelerator.prepare(model)
        saved_tokenizer = tokenizer if labels is None else closing(tokenizer, config.data.seq_len)
        sidecars = checkpoint.sidecars(bare, saved_tokenizer) if main else {}
        device_name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
        peak = peak_flops(device_name, config.train.precision)
        experts = routers(bare)
        if main:
            describe(config, bare, stream, validation, accelerator, watching.machines, step)
            start_wandb(accelerator, config)
        saver = held.enter_context(ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
        saving: Future | None = None
        stopping = outer.enter_context(stop_signals())  # only from here on: what came before is not worth a wait
        bar = tqdm(total=config.train.steps, initial=step, unit="step", disable=not main, dynamic_ncols=True, smoothing=0.05)
        held.callback(bar.close)

        def log(line: dict[str, Any]) -> None:
            append(metrics, line)
            accelerator.log({key: value for key, value in line.items() if key != "step" and value is not None}, step=step)

        def validate() -> None:
            watching.phase = "validation"
            measure: Callable = validation_loss if labels is None else classification
            result = measure(accelerator, bare, validation, config, stopping)
            if result is None:
                return
            text, cut = None, False
            writes = config.log.sample_tokens and labels is None
            if writes and mesh is not None:  # those who share a model write together
                with accelerator.autocast():  # in what the weights are gathered in; a whole model's own is in its forward pass
                    text = sample_text(bare, tokenizer, config, lambda: any_rank(accelerator, stopping()), broadcast)
                cut = any_rank(accelerator, stopping())
            elif writes:  # the others wait for the main process, however long it takes
                text = everywhere(accelerator, lambda: sample_text(bare, tokenizer, config, stopping) if main else None)
                cut = stopping()
            if main and not cut:  # a sample that was cut off: both come again
                log({"step": step, "tokens": tokens, **result})
                told = ", ".join(f"{result[name]:.4f} {unit}" for name, unit in figures(config).items())
                bar.write(f"step {step}: validation loss {told}")
                if text is not None:
                    append(run_dir / "samples.jsonl", {"step": step, "prompt": config.log.sample_prompt, "text": text})
                    bar.write(f"  {config.log.sample_prompt + text[:160]!r}")

        def save() -> None:
            nonlocal saving
            watching.phase = "saving"
            check_equal(accelerator, bare, step)
            finish_saving()
            if main or sharing:  # others write their part of it
                line = last_line(metrics, "val_loss") if main else None
                card = model_card(config, bare, ", ".join(stream.names), step, tokens, line)
                position = {"samples": samples, "identity": stream.identity(samples), "cursor": stream.cursor(samples)}
                state = {"step": step, "tokens": tokens, "spikes": spikes.state(), "validation": held_out, **position}
                extra = sidecars | {"README.md": card.encode()}
                shot = checkpoint.snapshot(bare, optimizers, state, extra, config.train.checkpoint_async, carried)
                saving = saver.submit(store, shot)
            if not config.train.checkpoint_async:
                finish_saving()

        def store(shot: checkpoint.Snapshot) -> None:
            # Else a power loss could take lines of steps that the checkpoint has behind it. Together: the others wait in `write`.
            together(sharing, lambda: files.sync(metrics) if main and metrics.exists() else None)
            checkpoint.write(run_dir, shot, sharing)
            if main:
                checkpoint.prune(run_dir, config.train.keep_checkpoints, config.train.keep_every)

        def finish_saving() -> None:
            """Waits for the checkpoint at work; what went wrong with it is raised on every rank."""
            watching.phase = "saving"
            everywhere(accelerator, lambda: saving and saving.result())

        def backward(module: nn.Module, batch: list[dict[str, Tensor]], targets: int) -> Tensor:
            """Adds to the gradients those of this rank's part of the batch; its part of the loss."""
            total = torch.zeros((), device=accelerator.device)
            for i, inputs in enumerate(batch):
                if bare.config.has_dropout:
                    first = rows_of(batch_size(config, step + 1))[i].start
                    torch.manual_seed(mask_seed(config.seed, step + 1, first))
                own = module is bare or i == len(batch) - 1
                with nullcontext() if own else accelerator.no_sync(model):
                    with accelerator.autocast():  # not of backward: it would narrow once more what is fp32 on purpose
                        # The mean over all targets of the global batch; data-parallel wrappers average over ranks.
                        part = loss(module, carried.hand_on(i, inputs)).sum() / max(targets, 1)
                    accelerator.backward(part * accelerator.num_processes)
                total += part.detach()
            return total

        def report(kind: str, nats: float, grad_norm: float, diagnosis: dict[str, Any]) -> None:
            """Says and writes to incidents.jsonl that the step changes no weight."""
            if main:
                documents = stream.origin(samples, samples + batch_size(config, step + 1))
                incident = {"step": step + 1, "kind": kind, "samples": samples, "documents": documents, **diagnosis}
                record(run_dir / "incidents.jsonl", incident)
                bar.write(f"step {step + 1}: {kind}, loss {nats:.4f}, gradient norm {grad_norm:.4f}: no weight was changed")

        # 3. The steps.
        adopted = gather(accelerator, main and step > 0 and not (run_dir / "checkpoints" / f"step-{step}").exists())[0]
        if adopted:  # a checkpoint from elsewhere: until it is here too, this run has none
            save()
            finish_saving()
        last = gather(accelerator, last_line(metrics, "val_loss") if main else None)[0]
        if last is None or (last["step"] < step and validation_due(config, step)):
            validate()
        to_come = [Stage(rows_of(size), size, count) for size, count in stages(config, step)]
        left = batches(stream, samples, to_come, config.data.workers)
        saved, logged, waited, clock = step, (step, tokens), 0.0, time.perf_counter()
        while step < config.train.steps:
            watching.step, watching.phase = step + 1, "training"
            asking = time.perf_counter()
            parts = next(left)
            waited += time.perf_counter() - asking
            sequences, length = batch_size(config, step + 1), row_length(config, step + 1)
            if length < config.data.seq_len:
                parts = [cut(part, length) for part in parts]
            batch = [{name: tensor.to(accelerator.device) for name, tensor in part.items()} for part in parts]
            counted = sum(int((part["targets"] != IGNORE).sum()) for part in batch)
            failed = saving is not None and saving.done() and saving.exception() is not None
            # One message for all three: every rank stops before the same step.
            message = torch.tensor([counted, stopping(), failed], device=accelerator.device)
            targets, stop, failed = accelerator.reduce(message).tolist()
            if failed:
                finish_saving()
            if stop:
                break

            logs_now = (step + 1) % config.log.every == 0 or step + 1 == config.train.steps
            watched: AbstractContextManager[dict[str, float]] = nullcontext({})
            if logs_now:
                watched = mamba_statistics(bare, length)
            with watched as inside, expert_loads(experts, accelerator.reduce) as loads:
                own = backward(model, batch, targets)
            nats = accelerator.reduce(own).item()
            norm = over_ranks(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            grad_norm = norm.item()
            finite = math.isfinite(nats) and math.isfinite(grad_norm)
            if targets == 0:
                report("no targets", nats, grad_norm, {})
            elif not finite or spikes.is_spike(nats):
                found = diagnose(bare, own.item(), grad_norm, lambda: backward(bare, batch, targets))  # noqa: B023
                report("loss spike" if finite else "not finite", nats, grad_norm, merge(gather(accelerator, found)))
                if finite:
                    spikes.skip(nats)
                elif config.train.on_nonfinite == "stop":
                    if step > saved:
                        save()
                    finish_saving()
                    raise FloatingPointError(
                        f"step {step + 1}: loss {nats} and gradient norm {grad_norm} are not both finite. This step changed no "
                        f"weight; {run_dir / 'incidents.jsonl'} says which documents and layers it was. Lower optim.lr "
                        f"({config.optim.lr}), mend the data, or skip such steps (--train.on_nonfinite skip)."
                    )
            else:
                if logs_now:
                    inside |= {f"grad_norm/{kind}": value for kind, value in gradient_norms(bare).items()} | load_figures(loads)
                clip_grads_with_norm_(model.parameters(), config.optim.clip, norm)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = rate(step + 1)
                    optimizer.step()
                balance(experts, loads, config.optim.moe_bias_rate)
                if gathers_fp8:
                    scale_weights(bare)
                spikes.accept(nats)
            model.zero_grad()
            carried.advance()
            step += 1
            samples += sequences
            tokens += sequences * config.data.seq_len

            bar.update()
            if logs_now:
                now = time.perf_counter()
                speed = (tokens - logged[1]) / (now - clock)
                flops = training_flops(bare.config, length, head=labels is None)
                watching.memory = memory = memory_bytes(accelerator.device)
                line = {
                    "step": step, "tokens": tokens, "loss": nats if finite else None, "lr": rate(step),
                    "grad_norm": grad_norm if finite else None, "tokens_per_second": speed,
                    "tokens_per_second_per_rank": speed / accelerator.num_processes,
                    "mfu": speed * flops / (peak * accelerator.num_processes) if peak else None,
                    "memory_bytes": memory, **(inside if finite else {}),
                    **rank_figures(accelerator, memory, waited / (step - logged[0])),
                }  # fmt: skip
                logger.info("step %d: loss %.4f, %.0f tokens/s, %d bytes here", step, nats, speed, memory)
                if main:
                    log(line)
                    bar.set_postfix_str(f"loss {nats:.3f}, {speed:,.0f} tokens/s")
                logged, waited, clock = (step, tokens), 0.0, now
            paused = time.perf_counter()
            if validation_due(config, step):
                validate()
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                save()
                saved = step
            clock += time.perf_counter() - paused  # validation and saving are not training
        if step > saved:
            save()
        finish_saving()
    accelerator.end_training()
    if main:
        ended = "done" if step == config.train.steps else f"stopped at step {step} of {config.train.steps}"
        print(ended + (f": {run_dir / 'model'}" if step > 0 else ""))
        if step < config.train.steps:
            print("the same command goes on from there" if resume == "auto" else "--resume auto goes on from there")


def validation_due(config: RunConfig, step: int) -> bool:
    return step % config.train.val_every == 0 or step == config.train.steps


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on a GPU; the process's resident bytes on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
