"""The layer pattern: a string with one symbol a layer, read from the input to the output."""

SYMBOLS = {
    **{"M": "Mamba-2", "*": "self-attention", "-": "FFN", "E": "mixture of experts"},
    **{"r": "Elman RNN", "l": "LSTM", "g": "GRU", "m": "Mamba-1"},
}
NEMOTRON_H_SYMBOLS = frozenset("M*-E")  # what a stock `nemotron_h` model can hold
GATES = {"r": 1, "l": 4, "g": 3}  # products of the input, and of the state before it, that a cell takes
RECURRENT = frozenset("rlgmM")  # what reads in one direction, and in a bidirectional model in both


def evenly_dispersed(depth: int, n_attention: int) -> str:
    """The pattern of `depth` layers in which `n_attention` self-attention layers stand evenly among Mamba-2 and FFN.

    The Mamba layers are split into n_attention + 1 near-equal stretches, shorter ones first; an FFN follows each Mamba but
    the one before an attention layer, which has its FFN after the attention. So the first layer is Mamba-2, the last an
    FFN, and an attention layer always stands directly before an FFN (Nemotron-H, arXiv 2504.03624, section 2.1):
    (52, 4) is the 8B, (118, 10) the 56B.

    Raises:
        ValueError: no such pattern exists.
    """
    n_mamba, odd = divmod(depth - n_attention, 2)
    if odd or n_attention < 0 or n_mamba < n_attention + 1:
        raise ValueError(
            f"evenly_dispersed needs depth - n_attention to be even, and a Mamba layer for each of the n_attention + 1 "
            f"stretches; got depth={depth}, n_attention={n_attention}. Change the depth by one or take less attention."
        )
    short, longer = divmod(n_mamba, n_attention + 1)
    stretches = [short + (i > n_attention - longer) for i in range(n_attention + 1)]
    return "*-".join("-".join("M" * length) for length in stretches) + "-"


def unknown_symbols(pattern: str) -> str:
    """The symbols of `pattern` that no mixer stands for, each once, in order."""
    return "".join(dict.fromkeys(s for s in pattern if s not in SYMBOLS))
