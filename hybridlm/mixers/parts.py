"""What several kinds of layer are made of."""

from torch import Tensor, nn


class IntoResidual(nn.Linear):
    """A projection into the residual stream: it starts smaller, see `_init_weights`."""


class KeepsWide:
    """A module of which the tensors named in `WIDE` are moved by `.to(bfloat16)` and `.half()` but never narrowed."""

    WIDE: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        wide = {id(getattr(self, name)) for name in self.WIDE}

        def keep_wide(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in wide and moved.element_size() < t.element_size() else moved

        return super()._apply(keep_wide, recurse)  # type: ignore[misc]
