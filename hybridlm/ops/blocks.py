"""How much of a sequence an operator works on at a time."""

from torch import Tensor

CPU_ELEMENTS = 2**20  # 4 MB in fp32: what is made of a block stays in the processor's cache until the next operator reads it


def time_blocks(x: Tensor, least: int = 1) -> list[slice]:
    """x (b t …): runs of at least `least` positions that are few enough for a CPU's cache; elsewhere all positions at once."""
    t = x.shape[1]
    size = max(least, CPU_ELEMENTS * t // x.numel()) if x.device.type == "cpu" else t
    return [slice(i, min(i + size, t)) for i in range(0, t, size)]
