"""What every layer of one forward pass shares."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Computed once a pass, handed to each mixer.

    Attributes:
        seq_idx: (b t) the document of each token, or None where every row is one document.
        mask: (b 1 t s) boolean, True where a query may look, over the s keys of cache and call together; None: causal.
        rotary: cosine and sine (b t head_dim) of the positions, or None without RoPE.
    """

    seq_idx: Tensor | None = None
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
