"""What a model remembers between calls: one state a layer, whatever its kind."""

from torch import Tensor
from transformers import Cache

State = tuple[Tensor, ...]  # (k, v) of attention, (conv, ssm) of Mamba, (h[, c]) of a cell; every tensor has the batch first


class HybridCache(Cache):
    """The states of all layers, and which positions they have seen. Speaks what `generate` asks of a cache.

    Where gradients are wanted, a state is replaced, never written into. Without them it is moved on in place: keep a
    `copy.deepcopy` of a cache that is to be gone on from more than once.

    Attributes:
        states: of each layer, None before its first call and in layers that have none.
        seen: positions read so far, padding included.
        tokens: (b seen) True for tokens, False for padding; None where no row has any.
        last: (b d) what the model gave at the last token; None before the first call.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layers: int):
        self.states: list[State | None] = [None] * layers
        self.seen = 0
        self.tokens: Tensor | None = None
        self.last: Tensor | None = None

    def __repr__(self) -> str:
        return f"HybridCache({len(self)} layers, {self.seen} positions seen, {self.nbytes():,} bytes)"

    def __len__(self) -> int:
        return len(self.states)

    def reset(self) -> None:
        """As new: ready for other texts, of any number of rows."""
        self.states = [None] * len(self)
        self.seen, self.tokens, self.last = 0, None, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.last is None else self.last.shape[0]

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    def nbytes(self) -> int:
        """Of the states; keys and values (b h s d) count as far as they were seen, not the room kept for more."""
        grows = [state is not None and state[0].dim() == 4 for state in self.states]
        return sum(
            (t[:, :, : self.seen] if grow else t).nbytes
            for state, grow in zip(self.states, grows, strict=True)
            if state is not None
            for t in state
        )

    def _each(self, change) -> None:
        self.states = [None if state is None else tuple(change(t) for t in state) for state in self.states]
        self.tokens, self.last = (None if t is None else change(t) for t in (self.tokens, self.last))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows, side by side."""
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows named: numbers, or a mask."""
        self._each(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError("a recurrent state cannot be rolled back, so this cache cannot be cropped; keep a copy.deepcopy of it.")
