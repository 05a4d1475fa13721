"""Training with FP8 products, by torchao: E4M3 for weights and activations, E5M2 for gradients. Every tensor is scaled as a
whole, by its own greatest value at that moment (current scaling), as Nemotron-H was trained (arXiv 2504.03624).
"""

import re
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hybridlm.classification import AnyModel
from hybridlm.ops.precision import has_autocast

EDGE = 2  # layers at each end that stay in bf16
MULTIPLE = 16  # what divides all sizes of a product that torch._scaled_mm takes, but for the rows of its first matrix
CAPABILITY = (8, 9)  # the first CUDA devices with FP8 units
CONVERTED, EDGES, HEAD, UNFIT = "fp8", "first and last two layers", "head", "sizes not divisible by 16"


def convert(
    model: AnyModel,
    device: torch.device | str,
    *,
    unfit: str = "stop",
    emulate: bool = False,
    ranks: int = 1,
) -> None:
    """Replaces in place the linear layers of the stack, but those of its first two and last two layers, by ones that multiply in
    FP8, forward and backward. Names and weights stay as they are; head, embedding and routers are not touched.

    Args:
        model: on any device, also the meta device.
        device: where it is to run.
        unfit: what to do where a layer's sizes do not divide by 16: "stop", or leave it in "bf16".
        emulate: round as FP8 does and multiply in fp32: the same numbers on any device, slowly.
        ranks: that are going to share the model with `fully_shard`, which then gathers in FP8 the weights whose rows divide by
            them, the others in bf16: uneven parts would have to be padded, which torchao's are not.

    Raises:
        ValueError: FP8 cannot run on the device, a layer is unfit, or there is nothing to convert.
    """
    if fault := refusal(device, emulate):
        raise ValueError(f"train.precision=fp8 {fault}")
    fates = sort_out(model)
    if fates[UNFIT] and unfit == "stop":
        raise ValueError(
            f"train.precision=fp8 multiplies matrices whose sizes divide by {MULTIPLE}; these (out x in) do not: "
            f"{_named(model, fates[UNFIT])}. Change the sizes of the model, or leave these in bf16 (train.fp8_unfit=bf16)."
        )
    chosen = set(fates[CONVERTED])
    if not chosen:
        raise ValueError(
            f"train.precision=fp8 finds nothing to convert: {summary(model)}. It takes a model of at least "
            f"{2 * EDGE + 1} layers; use train.precision=bf16."
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    narrow = {name for name in chosen if ranks > 1 and cast(nn.Linear, model.get_submodule(name)).weight.shape[0] % ranks == 0}
    for names, gathered in ((narrow, True), (chosen - narrow, False)):
        config = Float8LinearConfig(emulate=emulate, enable_fsdp_float8_all_gather=gathered)
        convert_to_float8_training(model, module_filter_fn=lambda module, name: name in names, config=config)  # noqa: B023
    for name in chosen:
        model.get_submodule(name).__class__ = linear_class()


def refusal(device: torch.device | str, emulate: bool = False) -> str | None:
    """Why FP8 cannot run on a device and what to do about it, or None."""
    try:
        linear_class()
    except Exception as error:  # not there; or another torch's binary, a missing library, …
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torchao"
        why = (
            "" if absent else f" (it is installed, but cannot be imported: {type(error).__name__}: {error}".splitlines()[0] + ")"
        )
        return f"needs torchao{why}: pip install 'hybridlm[fp8]', or use train.precision=bf16."
    if emulate:
        return None
    instead = "use train.precision=bf16, or train.fp8_emulate=true, which computes the same numbers, slowly."
    device = torch.device(device)
    if device.type != "cuda":
        return f"needs a CUDA device, and this is {device.type}: {instead}"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name, has, needed = torch.cuda.get_device_name(device), *(".".join(map(str, c)) for c in (capability, CAPABILITY))
        return f"needs a device of compute capability {needed} or more, and {name} has {has}: {instead}"
    return None


def sort_out(model: AnyModel) -> dict[str, list[str]]:
    """The names of all linear layers by what FP8 has to do with them."""
    fates: dict[str, list[str]] = {CONVERTED: [], EDGES: [], HEAD: [], UNFIT: []}
    middle = range(EDGE, len(model.backbone.layers) - EDGE)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module is model.head:
                fate = HEAD
            elif int(name.split(".")[2]) not in middle:
                fate = EDGES
            else:
                fate = UNFIT if any(size % MULTIPLE for size in module.weight.shape) else CONVERTED
            fates[fate].append(name)
    return fates


@cache
def linear_class() -> type[nn.Linear]:
    """torchao's linear layer, made to take any number of tokens and to heed autocast on every device.

    Raises:
        Exception: of any kind, where torchao is not there or broken.
    """
    from torchao.float8.float8_linear import Float8Linear

    class FP8Linear(Float8Linear):
        def forward(self, x: Tensor) -> Tensor:
            if has_autocast(x):  # torchao asks about that of CUDA alone
                x = x.to(torch.get_autocast_dtype(x.device.type))
            rows = x.flatten(0, -2)
            # The gradient of the weight is a sum over tokens, whose number must divide too; and an expert may have none, which
            # have no greatest value. Rows of zeros change no scale and no sum.
            missing = -len(rows) % MULTIPLE if len(rows) else MULTIPLE
            y = super().forward(pad(rows, (0, 0, 0, missing)) if missing else rows)
            return y[: len(rows)].unflatten(0, x.shape[:-1])

    return FP8Linear


def summary(model: AnyModel) -> str:
    """What becomes, or has become, of the linear layers, for people."""
    fates = sort_out(model)
    kept = [f"{fate} ({len(names)})" for fate, names in fates.items() if names and fate != CONVERTED]
    named = f": {_named(model, fates[UNFIT])}" if fates[UNFIT] else ""
    return f"{len(fates[CONVERTED])} of {sum(map(len, fates.values()))} linear layers; in bf16: {', '.join(kept)}{named}"


def _named(model: nn.Module, names: list[str]) -> str:
    """Names with sizes, those that differ in the number of the layer or of the expert as one."""
    alike: dict[tuple[str, str], dict[str, None]] = {}
    for name in names:
        out, size = cast(nn.Linear, model.get_submodule(name)).weight.shape
        start, layer, rest = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name).groups()  # type: ignore[union-attr]
        alike.setdefault((start, f"{re.sub(r'[.][0-9]+[.]', '.*.', rest)} ({out} x {size})"), {})[layer] = None
    return ", ".join(
        start + (",".join(layers) if len(layers) == 1 else "{" + ",".join(layers) + "}") + rest
        for (start, rest), layers in alike.items()
    )
