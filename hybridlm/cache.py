"""What a model remembers between calls: one state a layer, whatever its kind."""

from torch import Tensor

State = tuple[Tensor, ...]  # (k, v) of attention, (conv, ssm) of Mamba-2; every tensor has the batch first


class HybridCache:
    """The states of all layers, and how many positions they have seen. Speaks what `generate` asks of a cache."""

    is_compileable = False

    def __init__(self, layers: int):
        self.states: list[State | None] = [None] * layers
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def nbytes(self) -> int:
        return sum(t.nbytes for state in self.states if state is not None for t in state)

    def _each(self, change) -> None:
        self.states = [None if state is None else tuple(change(t) for t in state) for state in self.states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])

    def forget(self, rows: Tensor) -> None:
        """Clears the rows marked True: all that they have seen is padding."""
        self._each(lambda t: t.masked_fill(rows.to(t.device).view(-1, *[1] * (t.dim() - 1)), 0))
