"""Which implementation of an operator runs: one rule for all of them."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "fused", "naive")


def resolve(op: str, implementations: dict[str, Callable], backend: str) -> str:
    """The key of `implementations` that `backend` means for `op` on this machine.

    `auto` is `fused` where that can run, else `eager`. Under `fused`, an operator that has no such kernel takes `eager`.

    Raises:
        ValueError: an unknown name, or `fused` where it cannot run: the error names what is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ops.backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if backend == "fused" and (faults := lacking()):
        raise ValueError(
            f"ops.backend=fused needs mamba-ssm, causal-conv1d (pip install --no-build-isolation causal-conv1d mamba-ssm) and a "
            f"CUDA device; missing here: {told(faults)}. ops.backend=auto runs without; `python -m hybridlm doctor` has more."
        )
    if backend == "fused" or (backend == "auto" and can_fuse()):
        return "fused" if "fused" in implementations else "eager"
    return "eager" if backend == "auto" else backend


def pick(op: str, implementations: dict[str, Callable], backend: str, x: Tensor, refusal: Callable[[], str | None]) -> Callable:
    """The implementation that runs this call.

    Args:
        x: the input whose device decides.
        refusal: says why the fused kernel cannot take this call, or None.

    Raises:
        ValueError: as `resolve`, or `fused` and a call that it cannot take.
    """
    name = resolve(op, implementations, backend)
    if name != "fused":
        return implementations[name]
    on_device = x.device.type == "cuda"
    fault = refusal() if on_device else f"runs on a CUDA device; got tensors on {x.device.type}: move model and inputs there"
    if fault is None:
        return implementations["fused"]
    if backend == "fused":
        raise ValueError(f"{op}: ops.backend=fused {fault}. Or use ops.backend=auto, which takes eager there.")
    if on_device and op not in _warned:
        _warned.add(op)
        logger.warning("%s: ops.backend=auto takes eager here, since fused %s.", op, fault)
    return implementations["eager"]


_warned: set[str] = set()  # operators whose way around the kernel was told: once is enough


@functools.cache
def can_fuse() -> bool:
    """Whether `auto` may take the fused kernels. A package that is installed and cannot be imported is told, once."""
    if not torch.cuda.is_available():
        return False
    faults = lacking()
    if broken := {name: reason for name, reason in faults.items() if reason}:
        logger.warning("ops.backend=auto takes eager, since the fused kernels cannot run: %s.", told(broken))
    return not faults


@functools.cache
def lacking() -> dict[str, str]:
    """What `fused` needs and is not here; with it the error of its import, where it is installed but broken."""
    from hybridlm.ops.conv1d import fused as conv1d  # here, since they stand on this module
    from hybridlm.ops.ssd import fused as ssd

    faults = {}
    for package, adapter in (("mamba-ssm", ssd), ("causal-conv1d", conv1d)):
        try:
            adapter.load()
        except Exception as error:  # not there; or another torch's binary, a missing library, …
            absent = isinstance(error, ModuleNotFoundError) and error.name == package.replace("-", "_")
            faults[package] = "" if absent else f"{type(error).__name__}: {error}".splitlines()[0]
    return faults if torch.cuda.is_available() else faults | {"a CUDA device": ""}


def told(faults: dict[str, str]) -> str:
    return ", ".join(name + (f" (it is installed, but cannot be imported: {why})" if why else "") for name, why in faults.items())
