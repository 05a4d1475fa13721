"""Where products keep the width of their inputs, and where they are wider."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, autocast narrows nothing. The meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


FEW_ROWS = 8


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
    autocast, few = torch.is_autocast_enabled("cpu"), x.numel() <= FEW_ROWS * x.shape[-1]
    narrow = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if narrow == torch.bfloat16 and not few and not cpu_has_bf16():
        with without_autocast(x.device):
            x, weight = x.to(narrow).float(), weight.to(narrow).float()
            return F.linear(x, weight, bias if bias is None else bias.to(narrow).float()).to(narrow)
    threads = torch.get_num_threads()
    if narrow == torch.float32 and few and len(weight) % threads == 0:
        rows = x.reshape(1, -1, x.shape[-1]).expand(threads, -1, -1)
        y = torch.bmm(rows, weight.view(threads, -1, weight.shape[1]).mT).transpose(0, 1).reshape(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)
