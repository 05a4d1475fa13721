"""Where products keep the width of their inputs, and where they are wider."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = 8  # up to which torch's product reads its matrix with one thread


def has_autocast(device: torch.device) -> bool:
    """Whether autocast is on. The meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, autocast narrows nothing."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device) else nullcontext()


@cache
def cpu_has_bf16() -> bool:
    """Whether this processor has units for bf16; without, torch's products in bf16 are a hundred times slower than in fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x run in: its own dtype, but fp32 for a narrower one where the processor has no units for it."""
    narrow = x.element_size() < 4 and x.device.type == "cpu"
    return torch.float32 if narrow and not (x.dtype == torch.bfloat16 and cpu_has_bf16()) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear, where a CPU is slow at it in another form.

    bf16, also autocast's, is multiplied in fp32 on a processor without bf16 units: inputs, weights and results are rounded to
    bf16 as ever, and the sums are the more exact for it. A few rows in fp32 go through a product for each thread, as torch
    reads the weights of a single product of so few rows with one.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    (out, size), rows = weight.shape, x.numel() // x.shape[-1]
    if rows <= FEW_ROWS:
        threads = torch.get_num_threads()
        if narrow == torch.float32 and out % threads == 0:
            y = torch.bmm(x.reshape(1, rows, size).expand(threads, rows, size), weight.view(threads, -1, size).mT)
            y = (y if rows == 1 else y.transpose(0, 1)).reshape(*x.shape[:-1], out)
            return y if bias is None else y + bias
    elif narrow == torch.bfloat16 and not cpu_has_bf16():
        with without_autocast(x.device):
            x, weight = x.to(narrow).float(), weight.to(narrow).float()
            return F.linear(x, weight, bias if bias is None else bias.to(narrow).float()).to(narrow)
    return F.linear(x, weight, bias)
