"""What several kinds of layer are made of."""

import torch
from torch import Tensor, nn


class IntoResidual(nn.Linear):
    """A projection into the residual stream: it starts smaller, see `_init_weights`."""


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
