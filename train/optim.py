"""Pure functions of the optimiser, the schedule and the batch."""

import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import get_wsd_schedule

from hybridlm.classification import AnyModel
from train.muon import Muon
from train.settings import Optim, RunConfig, Schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Every parameter in exactly one group: matrices decay; norms, biases, A_log, D and dt_bias do not: all of them
    vectors, but for A_log in Mamba-1."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim >= 2 and not name.endswith("A_log")].append(p)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def build_optimizers(model: AnyModel, config: Optim) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the weights of the linear layers inside the stack, and AdamW for the rest:
    embedding, head, convolutions, routers, recurrent cells and vectors."""
    groups = parameter_groups(model, config.weight_decay)
    found: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        hidden = {m.weight for m in model.backbone.modules() if isinstance(m, nn.Linear)}
        groups[0]["params"] = [p for p in groups[0]["params"] if p not in hidden]
        matrices = [p for p in model.parameters() if p in hidden]
        if matrices:
            found.append(Muon(matrices, config.lr, config.weight_decay, config.momentum, adjust_lr_fn="match_rms_adamw"))
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    return [*found, adamw]


def learning_rate(optim: Optim, schedule: Schedule, steps: int) -> Callable[[int], float]:
    """The learning rate of step 1 … steps: warm-up, stable, decay (transformers' own WSD)."""
    warmup = round(schedule.warmup * steps)
    decay = min(int(schedule.decay * steps + 1e-6), steps - warmup)  # 0.29 of 100 steps is 28.999999999999996
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    multiplier = get_wsd_schedule(
        unused,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=steps,
        min_lr_ratio=schedule.min_lr_ratio,
        decay_type=schedule.decay_type,
    ).lr_lambdas[0]
    # Without a decay the last step is like those before it; the library would have it at the least rate.
    last = steps if decay else steps - 1
    return lambda step: optim.lr * (multiplier(min(step, last)) if warmup < steps else step / steps)


def mask_seed(seed: int, step: int, row: int) -> int:
    """Of the dropout masks of a micro-batch that begins with this row of the global batch: ranks draw other masks than each
    other, and a run that goes on draws those of one that was never cut off."""
    return int.from_bytes(sha256(f"dropout {seed} {step} {row}".encode()).digest()[:8], "little")


def batch_size(config: RunConfig, step: int) -> int:
    """Sequences of step 1 … steps, over all ranks."""
    return _doubled(
        config.schedule.batch_start, config.train.global_batch, config.schedule.batch_warmup * config.train.steps, step
    )


def row_length(config: RunConfig, step: int) -> int:
    """Positions of a row in step 1 … steps: those of a window, or of a part of it."""
    return _doubled(config.schedule.length_start, config.data.seq_len, config.schedule.length_warmup * config.train.steps, step)


def _doubled(start: int | None, whole: int, over: float, step: int) -> int:
    if start is None or step > over:
        return whole
    doublings = (whole // start).bit_length() - 1
    return start << int((step - 1) / over * doublings)


def samples_by(config: RunConfig, step: int) -> int:
    """Samples of the first `step` steps together."""
    rising = min(step, _rising(config))
    return sum(batch_size(config, i) for i in range(1, rising + 1)) + (step - rising) * config.train.global_batch


def stages(config: RunConfig, step: int) -> Iterator[tuple[int, int]]:
    """(sequences, number of steps) of each stretch of steps of the same batch, after `step`."""
    for size, some in groupby(batch_size(config, i) for i in range(step + 1, _rising(config) + 1)):
        yield size, sum(1 for _ in some)
    yield config.train.global_batch, config.train.steps - max(step, _rising(config))


def _rising(config: RunConfig) -> int:
    """Steps of less than the whole batch."""
    return math.floor(config.schedule.batch_warmup * config.train.steps)


def cut(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """(b t …) -> (b * t / length, length …): what is cut off from what came before begins anew."""
    return {name: tensor.unflatten(1, (-1, length)).flatten(0, 1) for name, tensor in batch.items()}


def micro_batches(
    global_batch: int, micro_batch: int | None, rank: int, ranks: int, name: str = "train.global_batch"
) -> list[range]:
    """The sample numbers, within a global batch, of each forward pass of this rank.

    Args:
        name: of the setting that the batch is from.

    Raises:
        ValueError: the batch does not divide.
    """
    share, rest = divmod(global_batch, ranks)
    if rest:
        raise ValueError(f"{name} ({global_batch}) must be a multiple of the number of ranks ({ranks}).")
    size = micro_batch or share
    if share % size:
        raise ValueError(
            f"train.micro_batch ({size}) must divide a rank's share of the batch ({name}: {global_batch} / {ranks} = {share})."
        )
    return [range(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]
