"""What several kinds of layer are made of."""

from functools import partial

import torch
from torch import Tensor, nn

from hybridlm.ops import Ops
from hybridlm.ops.precision import linear


class Linear(nn.Linear):
    """As torch's, but not as slow on a CPU at a few rows, and in bf16 without units for it: `ops.precision.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class IntoResidual(Linear):
    """A projection into the residual stream: it starts smaller, see `_init_weights`."""


class RMSNorm(nn.RMSNorm):
    """Of a token's channels."""

    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__(size, eps=eps)
        self.op = partial(ops.rms_norm, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight)


class KeepsWide:
    """A module of which the tensors named in `WIDE` are fp32 at least, whatever `.to(bfloat16)` makes of the rest."""

    WIDE: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        wide = {id(getattr(self, name)) for name in self.WIDE}

        def keep_wide(t: Tensor) -> Tensor:
            moved = fn(t)
            narrow = id(t) in wide and moved.element_size() < 4
            return t.to(moved.device, torch.float32) if narrow else moved

        return super()._apply(keep_wide, recurse)  # type: ignore[misc]
