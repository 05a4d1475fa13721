"""When a batch goes wrong: what is known about it, and when a loss is too large to learn from.

RUN/incidents.jsonl has one JSON object a line. JSON has no NaN and no infinity: they are the strings "nan", "inf" and "-inf".
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.classification import AnyModel
from train.telemetry import gradient_norms, layers
from train.tensor_files import local

NAMED = 20  # of the tensors that are not finite; the others are counted
MOST_SKIPS = 20  # steps in a row


def diagnose(model: AnyModel, loss: float, grad_norm: float, rerun: Callable[[], Tensor]) -> dict[str, Any]:
    """What went wrong in a step, before its gradients are clipped or dropped: clipping by NaN makes all of them NaN.

    Weights, gradients and random numbers are left as they were. While `rerun` works, memory holds a second set of gradients.

    Args:
        model: not wrapped. Ranks that share it must all come here, and run it together.
        loss: this rank's own, before it is summed over ranks: it tells whose batch it was.
        grad_norm: of the whole gradient.
        rerun: runs the rank's batch through `model` once more, forward and backward, and gives the loss as `loss` was.

    Returns:
        JSON: `loss`; `grad_norm`; `grad_norms` by kind; `gradients` and `weights` that are not finite, how many and the first
        names, in the order of backward, so that the gradients begin where it broke; `first_layer`, the first whose output was not
        finite in the rerun (its number, None outside the layers, and kind; None where all were finite); `own`, whether a gradient
        between layers was not finite in the rerun: ranks that share the model sum those of weights; `repeatable`, whether
        the rerun went wrong as well: if not, suspect the hardware, not the data. Of a step in which all was finite, a spike, it
        is whether the rerun gave the same loss.
    """
    parameters = [*model.named_parameters()][::-1]
    gradients = {name: p.grad for name, p in parameters}
    incident: dict[str, Any] = {
        "loss": _number(loss),
        "grad_norm": _number(grad_norm),
        "grad_norms": {kind: _number(norm) for kind, norm in gradient_norms(model).items()},
        "gradients": _not_finite((name, grad) for name, grad in gradients.items() if grad is not None),
        "weights": _not_finite(parameters),
    }
    finite: dict[int, Tensor] = {}
    passed: list[Tensor] = []  # whether gradients were finite on their way back
    places = _places(model)
    hooks = [module.register_forward_hook(_look(finite, passed, i)) for i, (_, _, module) in enumerate(places)]
    devices = {p.device for _, p in parameters if p.device.type == "cuda"}
    try:
        model.zero_grad()  # sets them aside: `gradients` has them
        with torch.random.fork_rng(devices=devices):
            again = float(rerun())
        sound = _not_finite((name, p.grad) for name, p in parameters if p.grad is not None)["count"] == 0
    finally:
        for hook in hooks:
            hook.remove()
        for name, p in parameters:
            p.grad = gradients[name]
    flags = torch.stack([*finite.values()]).tolist()
    broken = min((i for i, ok in zip(finite, flags, strict=True) if not ok), default=None)
    incident["first_layer"] = None if broken is None else {"layer": places[broken][0], "kind": places[broken][1]}
    if broken is None and not math.isfinite(again):
        incident["first_layer"] = {"layer": None, "kind": "head"}
    if math.isfinite(loss) and math.isfinite(grad_norm):
        incident["repeatable"] = math.isclose(loss, again, rel_tol=1e-3)  # kernels may sum in another order
    else:
        incident["repeatable"] = not (math.isfinite(again) and sound)
    incident["own"] = not all(flag.item() for flag in passed)
    return incident


def merge(diagnoses: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of all ranks, in the order of ranks, as one: that of the rank whose batch it was, which `rank` names.

    That is the first whose own loss was not finite, else the first whose own gradients were not in the rerun, else the first that
    went wrong again, else 0, for nothing tells them apart.
    """
    by_loss = (rank for rank, d in enumerate(diagnoses) if isinstance(d["loss"], str))
    by_gradient = (rank for rank, d in enumerate(diagnoses) if d["own"])
    by_rerun = (rank for rank, d in enumerate(diagnoses) if d["repeatable"])
    rank = next(by_loss, next(by_gradient, next(by_rerun, 0)))
    return {"rank": rank, **{key: value for key, value in diagnoses[rank].items() if key != "own"}}


def record(file: Path, incident: dict[str, Any]) -> None:
    """Appends a line, with the time (UTC)."""
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **incident}
    with file.open("a") as out:
        out.write(json.dumps(line, allow_nan=False) + "\n")


@dataclass
class Spikes:
    """Which losses are spikes: more than `sigma` standard deviations above the mean of the last `window` that were accepted.

    None is one before the window is half full. The deviation counts as a thousandth of the mean at least, so that losses that
    hardly differ have no spikes. A loss must be the same number on every rank, or they part ways.

    Args:
        sigma: None for no spikes at all.
        losses, skipped: as `state` gave them; a resumed run then decides as one that was never cut off.
    """

    sigma: float | None
    window: int
    losses: list[float] = field(default_factory=list)
    skipped: int = 0

    def is_spike(self, loss: float) -> bool:
        last = self.losses[-self.window :]
        if self.sigma is None or 2 * len(last) < self.window:
            return False
        mean = math.fsum(last) / len(last)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in last) / len(last))
        return loss > mean + self.sigma * max(deviation, abs(mean) / 1000)

    def accept(self, loss: float) -> None:
        assert math.isfinite(loss)
        self.losses = [*self.losses, loss][-self.window :]
        self.skipped = 0

    def skip(self, loss: float) -> None:
        """Counts a spike that was not learned from.

        Raises:
            FloatingPointError: the twentieth in a row: that is no spike but a new level.
        """
        self.skipped += 1
        if self.skipped == MOST_SKIPS:
            mean = math.fsum(self.losses) / len(self.losses)
            raise FloatingPointError(
                f"{MOST_SKIPS} steps in a row had a loss far above that of the last {len(self.losses)} accepted ones (mean "
                f"{mean:.4f}; now {loss:.4f}): that is no spike but a new level. None of these steps changed a weight. Lower "
                "optim.lr and go on from an earlier checkpoint (--resume), or look at the data."
            )

    def state(self) -> dict[str, Any]:
        """JSON: `Spikes(sigma, window, **state)` goes on from it. Floats pass through JSON unchanged."""
        return {"losses": self.losses, "skipped": self.skipped}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    named = dict(tensors)
    finite = torch.stack([local(t).isfinite().all() for t in named.values()]).tolist() if named else []
    names = [name for name, ok in zip(named, finite, strict=True) if not ok]
    return {"count": len(names), "names": names[:NAMED]}


def _places(model: AnyModel) -> list[tuple[int | None, str, nn.Module]]:
    """(number of the layer, kind, module), from the input to the last norm."""
    blocks = [(i, kind, block) for i, (kind, block) in enumerate(layers(model))]
    return [(None, "embedding", model.backbone.embeddings), *blocks, (None, "norm", model.backbone.norm_f)]


def _look(finite: dict[int, Tensor], passed: list[Tensor], place: int) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output  # a block gives its state as well
        ok = out.detach().isfinite().all()
        finite[place] = ok & finite.get(place, ok)  # of all micro-batches
        if out.requires_grad:
            out.register_hook(lambda gradient: passed.append(gradient.isfinite().all()))

    return look
