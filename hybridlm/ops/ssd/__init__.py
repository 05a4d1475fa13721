"""SSD, the state space of Mamba-2: y_t = C_t h_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T.

Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), equations 1 and 2, discretised as in section 3.
"""

from functools import partial

from torch import Tensor

from hybridlm.ops import kernels
from hybridlm.ops.backend import pick
from hybridlm.ops.checks import check_seq_idx, check_shape, check_shapes
from hybridlm.ops.precision import without_autocast
from hybridlm.ops.ssd import eager, fused, naive

IMPLEMENTATIONS = {"eager": eager.ssd, "fused": fused.ssd, "naive": naive.ssd}
STEP_IMPLEMENTATIONS = {"eager": eager.ssd_step, "fused": fused.ssd_step, "naive": naive.ssd_step}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 128,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole sequence at once.

    Letters: b batch, t time, h heads, p head dim, g groups (h is a multiple; neighbouring heads share one), n state.

    Args:
        x: (b t h p), any floating dtype; matrix products run in it.
        dt: (b t h), step sizes after softplus; fp32, or fp64 with fp64 inputs. Decay and state have this dtype.
        A: (h), negative.
        B, C: (b t g n), the dtype of x.
        D: (h), the skip connection.
        initial_state: (b h p n), the dtype of dt; the state of the row's first document.
        seq_idx: (b t) integers that never fall along t: the document of each token. No state crosses from one to the next.
        chunk_size: how many positions one matrix product covers. The result does not depend on it.
        backend: `auto`, or a key of `IMPLEMENTATIONS`.

    Returns:
        y (b t h p) in the dtype of x, and the final state (b h p n) of the row's last document in the dtype of dt.

    Raises:
        ValueError: a shape or dtype that breaks the above, an empty sequence, or a backend that cannot run this call.
    """
    sizes = check_shapes(("x", x, "b t h p"), ("dt", dt, "b t h"), ("A", A, "h"), ("B", B, "b t g n"), ("C", C, "b t g n"))
    _check_ssd(dt, D, initial_state, sizes)
    if seq_idx is not None:
        check_seq_idx(seq_idx, sizes["b"], sizes["t"])
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1; got {chunk_size}.")
    refusal = partial(fused.refusal, x, dt, B, C, chunk_size=chunk_size, backend=backend)
    run = pick("ssd", IMPLEMENTATIONS, backend, x, refusal)
    with without_autocast(x):  # it would narrow the products with the fp32 state
        return run(x, dt, A, B, C, D=D, initial_state=initial_state, seq_idx=seq_idx, chunk_size=chunk_size)


def ssd_step(
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
    """One token: as `ssd` without the time axis. x (b h p), dt (b h), A (h), B and C (b g n), state (b h p n), D (h).

    Args:
        overwrite: whether the next state may take the place of `state`, which no gradient may need then.

    Returns:
        y (b h p) in the dtype of x, and the next state (b h p n).
    """
    sizes = check_shapes(("x", x, "b h p"), ("dt", dt, "b h"), ("A", A, "h"), ("B", B, "b g n"), ("C", C, "b g n"))
    _check_ssd(dt, D, state, sizes)
    run = pick("ssd_step", STEP_IMPLEMENTATIONS, backend, x, partial(kernels.refusal, x, dt, state))
    return run(x, dt, A, B, C, state, D=D, overwrite=overwrite)


def _check_ssd(dt: Tensor, D: Tensor | None, state: Tensor | None, sizes: dict[str, int]) -> None:
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"ssd: heads must be a multiple of groups; got {sizes['h']} heads and {sizes['g']} groups.")
    if dt.element_size() < 4:
        raise ValueError(f"ssd: dt must be float32 (or float64), so that the decay keeps its precision; got {dt.dtype}.")
    if D is not None:
        check_shape("D", D, "h", sizes)
    if state is not None:
        check_shape("state", state, "b h p n", sizes)
