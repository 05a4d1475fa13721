"""The short causal depthwise convolution with SiLU that Mamba puts before its state space (arXiv 2312.00752, section 3.4)."""

from functools import partial

from torch import Tensor

from hybridlm.ops.backend import pick
from hybridlm.ops.checks import check_seq_idx, check_shape, check_shapes
from hybridlm.ops.conv1d import eager, fused, naive

IMPLEMENTATIONS = {"eager": eager.conv1d, "fused": fused.conv1d, "naive": naive.conv1d}


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """silu(bias_d + sum_j weight_dj x_{t-k+1+j, d}), each channel for itself.

    Letters: b batch, t time, d channels, k window. A step is the same call with t = 1.

    Args:
        x: (b t d).
        weight: (d k), the last column for the newest position.
        bias: (d).
        initial_state: (b k-1 d), the inputs before x; they are of the row's first document. Zeros if absent.
        seq_idx: (b t) integers that never fall along t: no window reaches into another document.
        backend: `auto`, or a key of `IMPLEMENTATIONS`.

    Returns:
        y (b t d), and the last k-1 inputs (b k-1 d), zero where they are not of the row's last document.
    """
    sizes = check_shapes(("x", x, "b t d"), ("weight", weight, "d k"))
    if bias is not None:
        check_shape("bias", bias, "d", sizes)
    if initial_state is not None:
        check_shape("initial_state", initial_state, "b k-1 d", sizes | {"k-1": sizes["k"] - 1})
    if seq_idx is not None:
        check_seq_idx(seq_idx, sizes["b"], sizes["t"])
    run = pick("conv1d", IMPLEMENTATIONS, backend, x, partial(fused.refusal, x, weight))
    return run(x, weight, bias, initial_state=initial_state, seq_idx=seq_idx)
