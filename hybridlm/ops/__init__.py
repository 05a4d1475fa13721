"""The operators, each a folder: the contract in `__init__.py`, the specification in `naive.py`, the fast path
in `eager.py`, and where a GPU package has a kernel of it, `fused.py`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hybridlm.ops import conv1d, cross_entropy, distillation, gated_norm, recurrent, rms_norm, selective_scan, ssd
from hybridlm.ops.backend import resolve

logger = logging.getLogger(__name__)

# Operators that every token of a generation passes: a mixer is handed them bare, for their checks take a tenth of a step.
EVERY_TOKEN = ("ssd_step", "selective_scan_step", "conv1d", "gated_norm", "rms_norm")


@dataclass(frozen=True)
class Ops:
    """The operators with their backend chosen: what a mixer is handed."""

    ssd: Callable
    ssd_step: Callable
    selective_scan: Callable
    selective_scan_step: Callable
    conv1d: Callable
    recurrent: Callable
    gated_norm: Callable
    rms_norm: Callable
    cross_entropy: Callable
    distillation: Callable
    backends: dict[str, str]  # which implementation each of them runs; under `auto`, `fused` on what is on a CUDA device


def build_ops(backend: str = "auto") -> Ops:
    """Resolves `backend` once for every operator and logs what was chosen.

    Raises:
        ValueError: a backend that is unknown, or `fused` where it cannot run: the error names what is missing.
    """
    table: dict[str, tuple[Callable, dict[str, Callable]]] = {
        "ssd": (ssd.ssd, ssd.IMPLEMENTATIONS),
        "ssd_step": (ssd.ssd_step, ssd.STEP_IMPLEMENTATIONS),
        "selective_scan": (selective_scan.selective_scan, selective_scan.IMPLEMENTATIONS),
        "selective_scan_step": (selective_scan.selective_scan_step, selective_scan.STEP_IMPLEMENTATIONS),
        "conv1d": (conv1d.conv1d, conv1d.IMPLEMENTATIONS),
        "recurrent": (recurrent.recurrent, recurrent.IMPLEMENTATIONS),
        "gated_norm": (gated_norm.gated_norm, gated_norm.IMPLEMENTATIONS),
        "rms_norm": (rms_norm.rms_norm, rms_norm.IMPLEMENTATIONS),
        "cross_entropy": (cross_entropy.cross_entropy, cross_entropy.IMPLEMENTATIONS),
        "distillation": (distillation.distillation, distillation.IMPLEMENTATIONS),
    }
    chosen = {op: resolve(op, implementations, backend) for op, (_, implementations) in table.items()}
    logger.info("operators: %s", ", ".join(f"{op}={name}" for op, name in chosen.items()))
    handed: dict[str, Callable] = {op: partial(function, backend=backend) for op, (function, _) in table.items()}
    for op in EVERY_TOKEN:
        if chosen[op] != "fused":  # which has to look at each call
            handed[op] = table[op][1][chosen[op]]
    return Ops(**handed, backends=chosen)
