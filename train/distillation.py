"""Learning from a teacher: forward KL on its logits, with the teacher in memory or its largest logits read from disk.

A student that was cut out of its teacher is told which layers and channels it has kept by `pruning.json` in the folder that it
begins from: {"layers": [of the parent, one for each of the student], "channels": [likewise] or null if it has all}.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.checkpoint import load_tokenizer
from hybridlm.compress.surgery import PRUNING
from hybridlm.configuration import CLASSIFIER
from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.ops.distillation import TopK, Whole
from train import sharding
from train.settings import RunConfig
from train.setup import COMPUTE, fetch
from train.weights import load_weights

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose head is set apart.

    Attributes:
        model: gives hidden states in the place of logits.
        weight: (v e) of its head, whole on every rank: the loss makes logits of it in blocks, forward and backward.
    """

    model: HybridLMForCausalLM
    weight: Tensor

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], hidden_states: bool = False) -> tuple[Whole, tuple[Tensor, ...]]:
        """What it predicts; its hidden states too (what entered each layer, and what left the last norm) if asked for."""
        inputs = {name: batch[name] for name in ("input_ids", "seq_idx") if name in batch}
        output = self.model(**inputs, use_cache=False, output_hidden_states=hidden_states)
        return Whole(output.logits, self.weight), output.hidden_states or ()


def open_teacher(
    config: RunConfig,
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
) -> Teacher:
    """`distill.teacher`, shared by the ranks as the student is. The matrices of products are in what the run computes in, as
    autocast would round them (never FP8), all else in fp32: so it predicts as it did when it was trained.

    Args:
        vocab_size, tokenizer: the student's; None where there is none yet.

    Raises:
        ValueError: no such model, one that predicts no next token, or of other tokens than the student's.
    """
    name, compute = config.distill.teacher, COMPUTE[config.train.precision]
    assert name is not None
    try:
        folder = fetch(name)
        shape = HybridLMConfig.from_pretrained(folder)
        check_predicts(shape)
        if vocab_size not in (None, shape.vocab_size):
            raise ValueError(
                f"it has a vocabulary of {shape.vocab_size} and the student one of {vocab_size}, so their logits are of other "
                "tokens; take a teacher of the student's vocabulary."
            )
        check_tokenizer(folder, tokenizer)
        with torch.device("meta"):
            model = HybridLMForCausalLM(shape, backend=config.ops.backend).eval().requires_grad_(False)
        if mesh is not None:
            sharding.shard(model, mesh, compute)
        else:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.to(compute)
        model.to_empty(device=device)
        load_weights(folder, model, group)
    except ValueError as error:
        raise ValueError(f"distill.teacher {name}: {error}") from None
    weight = model.lm_head.weight.detach()
    whole = (weight.full_tensor() if isinstance(weight, DTensor) else weight).to(compute)
    model.lm_head = nn.Identity()  # type: ignore[assignment]
    return Teacher(model, whole)


def check_predicts(shape: HybridLMConfig) -> None:
    """
    Raises:
        ValueError: a model of this shape predicts no next token.
    """
    kind = "bidirectional" if shape.bidirectional is not None else "a classifier" if shape.architectures == [CLASSIFIER] else None
    if kind is not None:
        raise ValueError(f"it is {kind} and predicts no next token; take a language model.")


def check_tokenizer(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        ValueError: the folder has a tokenizer, and it is another.
    """
    if not any((Path(folder).expanduser() / name).exists() for name in TOKENIZER):
        return
    ours, theirs = ({i: t for t, i in one.get_vocab().items()} for one in (tokenizer, load_tokenizer(folder)))
    apart = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if apart:
        i = apart[0]
        raise ValueError(
            f"its tokenizer differs from the run's in {len(apart)} token(s): id {i} is {theirs.get(i)!r} there and "
            f"{ours.get(i)!r} here. Set data.tokenizer: {folder}, and prepare the data with it."
        )


def from_teacher(
    config: RunConfig, teacher: Teacher, student: HybridLMConfig
) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss of a run that has its teacher in memory (train.objective)."""
    distill, settings = config.distill, kl_settings(config)
    kept = read_kept(config, student, teacher.model.config) if distill.hidden_weight else None

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        predicted, taught = teacher(batch, hidden_states=kept is not None)
        if kept is None:
            return model(**batch, teacher=predicted, **settings).loss
        output = model(**batch, teacher=predicted, output_hidden_states=True, **settings)
        distance = kept.distance(output.hidden_states, taught)
        return output.loss + distill.hidden_weight * distance.where(batch["targets"] != IGNORE, 0)

    return loss


def from_logits(config: RunConfig) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss of a run whose batches bring what the teacher said (train.top_logits)."""
    settings = kl_settings(config)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        text = {name: one for name, one in batch.items() if not name.startswith("teacher_")}
        return model(**text, teacher=TopK(batch["teacher_ids"], batch["teacher_log_probs"]), **settings).loss

    return loss


def kl_settings(config: RunConfig) -> dict[str, Any]:
    return {"temperature": config.distill.temperature, "text_weight": config.distill.label_weight}


@dataclass(frozen=True)
class Kept:
    """Where the student's hidden states are in the teacher.

    Attributes:
        layers: the teacher's, one for each of the student. channels: likewise; None where it has all.
    """

    layers: list[int]
    channels: list[int] | None

    def distance(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """(b t): the mean over the layers of how far what enters them is apart, plus that of what leaves the last norm."""
        there = [*(teacher[layer] for layer in self.layers), teacher[-1]]
        if self.channels is not None:
            channels = torch.tensor(self.channels, device=there[0].device)
            there = [state.index_select(-1, channels) for state in there]
        *within, last = (apart(ours, theirs) for ours, theirs in zip(student, there, strict=True))
        return torch.stack(within).mean(0) + last


def apart(a: Tensor, b: Tensor) -> Tensor:
    """(… d) -> (…): the mean squared difference of two states, each divided by its root mean square: surgery may have changed the
    scale of the residual stream."""
    return (unit(a) - unit(b)).square().mean(-1)


def unit(state: Tensor) -> Tensor:
    state = state.float()
    return state * (state.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def read_kept(config: RunConfig, student: HybridLMConfig, teacher: HybridLMConfig) -> Kept:
    """
    Raises:
        ValueError: pruning.json is missing where it is needed, or does not fit the two models.
    """
    begun, mine, theirs = config.model.init_from, student.hybrid_override_pattern, teacher.hybrid_override_pattern
    file = None if begun is None else Path(fetch(begun)) / PRUNING
    if file is None or not file.exists():
        if len(mine) == len(theirs) and student.hidden_size == teacher.hidden_size:
            return Kept([*range(len(mine))], None)
        raise ValueError(
            f"distill.hidden_weight: the student has {len(mine)} layers of width {student.hidden_size} and the teacher "
            f"{len(theirs)} of {teacher.hidden_size}, and there is no {file or 'model.init_from'} that "
            "says which of them it has kept. Begin from a model that was cut out of the teacher, or set distill.hidden_weight: 0."
        )
    try:
        content = json.loads(file.read_text())
        kept = Kept(content["layers"], content["channels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"distill.hidden_weight: {file} cannot be read ({type(error).__name__}: {error}).") from None
    faults = index_faults("layers", kept.layers, len(mine), len(theirs))
    other = [] if faults else [(i, layer) for i, layer in enumerate(kept.layers) if mine[i] != theirs[layer]]
    faults += [f"layers: {i} of the student is {mine[i]!r}, {layer} of the teacher {theirs[layer]!r}" for i, layer in other[:1]]
    if kept.channels is not None:
        faults += index_faults("channels", kept.channels, student.hidden_size, teacher.hidden_size)
    elif student.hidden_size != teacher.hidden_size:
        faults.append(f"channels: null means all, and the student has {student.hidden_size}, the teacher {teacher.hidden_size}")
    if faults:
        raise ValueError(f"distill.hidden_weight: {file} does not fit: {'; '.join(faults)}. Is it of another teacher?")
    return kept


def index_faults(name: str, indices: Any, count: int, below: int) -> list[str]:
    if not isinstance(indices, list) or any(type(i) is not int or not 0 <= i < below for i in indices):
        return [f"{name}: must be a list of numbers below the teacher's {below}"]
    if len(indices) != count or len(set(indices)) != count:
        return [f"{name}: must be {count} different numbers, one for each of the student's; got {indices}"]
    return []
