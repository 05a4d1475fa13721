"""Where products keep the width of their inputs, and where they are wider."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = 8  # up to which torch's product reads its matrix with one thread


def has_autocast(x: Tensor) -> bool:
    """Whether autocast is on for operators on x. The meta device has none."""
    return torch.is_autocast_enabled("cpu") if x.is_cpu else not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Inside, autocast narrows nothing on the device of x."""
    return torch.autocast(x.device.type, enabled=False) if has_autocast(x) else nullcontext()


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
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    (out, size), threads, autocast = weight.shape, torch.get_num_threads(), torch.is_autocast_enabled("cpu")
    narrow = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if x.numel() <= FEW_ROWS * size:
        if narrow == torch.float32 and out % threads == 0:
            rows = x if len(x) == 1 and x.dim() == 3 else x.reshape(1, -1, size)
            y = torch.bmm(rows.expand(threads, -1, -1), weight.view(threads, -1, size).mT)  # threads rows out/threads
            y = (y if x.numel() == size else y.transpose(0, 1)).reshape(*x.shape[:-1], out)
            return y if bias is None else y + bias
    elif narrow == torch.bfloat16 and not cpu_has_bf16():
        with without_autocast(x):
            x, weight = x.to(narrow).float(), weight.to(narrow).float()
            return F.linear(x, weight, bias if bias is None else bias.to(narrow).float()).to(narrow)
    return F.linear(x, weight, bias)
