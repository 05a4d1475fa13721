"""The selective scan of Mamba-1: y_t = h_t C_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, each row of a channel's
state with a decay of its own.

Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3 and algorithm 2.
"""

from functools import partial

from torch import Tensor

from hybridlm.ops import kernels
from hybridlm.ops.backend import pick
from hybridlm.ops.checks import check_seq_idx, check_shape, check_shapes
from hybridlm.ops.precision import without_autocast
from hybridlm.ops.selective_scan import eager, fused, naive

IMPLEMENTATIONS = {"eager": eager.selective_scan, "fused": fused.selective_scan, "naive": naive.selective_scan}
STEP_IMPLEMENTATIONS = {
    "eager": eager.selective_scan_step,
    "fused": fused.selective_scan_step,
    "naive": naive.selective_scan_step,
}


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole sequence at once.

    Letters: b batch, t time, d channels, n state.

    Args:
        x: (b t d), any floating dtype.
        dt: (b t d), step sizes after softplus; fp32, or fp64 with fp64 inputs. Decay, state and all sums have this dtype.
        A: (d n), negative.
        B, C: (b t n), shared by all channels.
        D: (d), the skip connection.
        initial_state: (b d n), the dtype of dt; the state of the row's first document.
        seq_idx: (b t) integers that never fall along t: the document of each token. No state crosses from one to the next.
        backend: `auto`, or a key of `IMPLEMENTATIONS`.

    Returns:
        y (b t d) in the dtype of x, and the final state (b d n) of the row's last document in the dtype of dt.

    Raises:
        ValueError: a shape or dtype that breaks the above, an empty sequence, or a backend that cannot run this call.
    """
    sizes = check_shapes(("x", x, "b t d"), ("dt", dt, "b t d"), ("A", A, "d n"), ("B", B, "b t n"), ("C", C, "b t n"))
    _check(dt, D, initial_state, sizes)
    if seq_idx is not None:
        check_seq_idx(seq_idx, sizes["b"], sizes["t"])
    run = pick("selective_scan", IMPLEMENTATIONS, backend, x, partial(fused.refusal, x, dt, B))
    with without_autocast(x):
        return run(x, dt, A, B, C, D=D, initial_state=initial_state, seq_idx=seq_idx)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    overwrite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: as `selective_scan` without the time axis. x, dt (b d), A (d n), B and C (b n), state (b d n), D (d).

    Args:
        overwrite: whether the next state may take the place of `state`, which no gradient may need then.

    Returns:
        y (b d) in the dtype of x, and the next state (b d n).
    """
    sizes = check_shapes(("x", x, "b d"), ("dt", dt, "b d"), ("A", A, "d n"), ("B", B, "b n"), ("C", C, "b n"))
    _check(dt, D, state, sizes)
    run = pick("selective_scan_step", STEP_IMPLEMENTATIONS, backend, x, partial(kernels.refusal, x, dt, state))
    return run(x, dt, A, B, C, state, D=D, overwrite=overwrite)


def _check(dt: Tensor, D: Tensor | None, state: Tensor | None, sizes: dict[str, int]) -> None:
    if dt.element_size() < 4:
        raise ValueError(
            f"selective_scan: dt must be float32 (or float64), so that the decay keeps its precision; got {dt.dtype}."
        )
    if D is not None:
        check_shape("D", D, "d", sizes)
    if state is not None:
        check_shape("state", state, "b d n", sizes)
