"""What this machine has and what it lacks. Nothing heavy is imported at the top: it must run where torch does not."""

import importlib
import importlib.metadata
import platform
from collections.abc import Callable

from hybridlm.output import BYTES, scaled, table

# Source only, and built against the torch that is there.
BUILD = "pip install ninja packaging wheel && pip install --no-build-isolation"
PACKAGES = {  # module: (package, what it is for, what installs it)
    "torch": ("torch", "everything", "pip install 'torch>=2.9'"),
    "transformers": ("transformers", "everything", "pip install 'transformers>=5.20'"),
    "accelerate": ("accelerate", "training", "pip install 'accelerate>=1.10'"),
    "datasets": ("datasets", "reading data", "pip install 'datasets>=4.0'"),
    "wandb": ("wandb", "logging to Weights & Biases", "pip install 'wandb>=0.20'"),
    "causal_conv1d": ("causal-conv1d", "fused operators", f"{BUILD} 'causal-conv1d>=1.4'"),
    "mamba_ssm": ("mamba-ssm", "fused operators", f"{BUILD} 'mamba-ssm>=2.2'"),
    "triton": ("triton", "fused operators", "pip install triton"),
    "torchao": ("torchao", "train.precision fp8", "pip install 'torchao>=0.13'"),
    "lm_eval": ("lm-eval", "standard benchmarks", "pip install 'lm-eval>=0.4.12'"),
}
NEEDED = ("torch", "transformers")
# mamba-ssm imports its CUDA part at once. A build without it (MAMBA_SKIP_CUDA_BUILD) has all that Mamba-2 needs but that module.
WITHOUT_CUDA_PART = """touch "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/selective_scan_cuda.py\""""


def state_of(module: str) -> tuple[str, str]:
    """Whether a package works: ("works", its version), ("missing", ""), ("broken", the error of its import)."""
    try:
        version = importlib.metadata.version(PACKAGES[module][0])
    except importlib.metadata.PackageNotFoundError:
        version = ""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module and not version:
            return "missing", ""
        return "broken", said(error)
    except Exception as error:  # a missing library of the system, another torch's binary, …
        return "broken", said(error)
    return "works", version or str(getattr(imported, "__version__", "?"))


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def asked(question: Callable[[], str]) -> str:
    """The answer, or the error that came instead: nothing on a broken machine may stop the page."""
    try:
        return question()
    except Exception as error:
        return said(error)


def examine() -> tuple[str, bool, bool]:
    """The page; whether torch and transformers can be used; whether `ops.backend: fused` can."""
    states = {module: state_of(module) for module in PACKAGES}
    rows = [("package", "version", "for", "what to do")]
    for module, (package, purpose, install) in PACKAGES.items():
        state, detail = states[module]
        shown = detail if state == "works" else state
        again = WITHOUT_CUDA_PART if "selective_scan_cuda" in detail else install
        do = {"works": "", "missing": install, "broken": f"{detail}; again: {again}"}[state]
        rows.append((package, shown, purpose, do))
    usable = all(states[module][0] == "works" for module in NEEDED)
    can_fuse = "no"
    machine = [("python", platform.python_version())]
    if states["torch"][0] == "works":
        machine += [(name, asked(question)) for name, question in (("cpu", cpu), ("cuda", cuda))]
    if usable:
        can_fuse = asked(fused)
        machine += [("operators", asked(operators)), ("fused", can_fuse), ("fp8", asked(fp8))]
    else:
        machine.append(("operators", "none: torch and transformers must work first"))
    return f"{table(machine, '<<')}\n\n{table(rows, '<<<<')}", usable, can_fuse == "yes"


def cpu() -> str:
    import psutil
    import torch

    from hybridlm.ops.precision import cpu_has_bf16

    memory = scaled(psutil.virtual_memory().total, BYTES)
    units = "bf16 units" if cpu_has_bf16() else "no bf16 units: no faster in bf16"
    return f"{torch.get_num_threads()} thread(s), {memory}, {units}"


def cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"no device ({built})"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} ({scaled(device.total_memory, BYTES)})" for device in devices)


def operators() -> str:
    from hybridlm.ops import build_ops

    return ", ".join(f"{op} {backend}" for op, backend in build_ops("auto").backends.items())


def fused() -> str:
    """Whether `ops.backend: fused` runs here: "yes", or "no" and what it lacks."""
    from hybridlm.ops import build_ops

    try:
        build_ops("fused")
    except ValueError as error:
        return f"no. {error}"
    return "yes"


def fp8() -> str:
    """Whether `train.precision: fp8` runs here without emulation: "yes", or "no" and what it lacks."""
    import torch

    from hybridlm.fp8 import refusal

    fault = refusal("cuda" if torch.cuda.is_available() else "cpu")
    return "yes" if fault is None else f"no. train.precision=fp8 {fault}"
