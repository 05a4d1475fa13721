"""The selective scan on mamba_ssm's CUDA kernel (package mamba-ssm, built with its extension `selective_scan_cuda`).

The kernel knows neither documents nor an initial state, and its last state has no gradient. All three are tokens of their own
here, which put nothing else in: one with a step so long that nothing is left of the state, before each document but the first;
one for each row of the initial state, that adds it, with a step so short that nothing decays; and one for each row of the final
state, that reads it out, with a step of 0.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridlm.ops import kernels
from hybridlm.ops.selective_scan import eager
from hybridlm.ops.ssd import fused as ssd

ENDLESS = 2.0**60  # a step after which a decay is 0, also in float64; the kernel multiplies it by no more than |A|
SHORT = 2.0**-40  # a step after which a decay rounds to 1: a power of two, so that dividing by it is exact
CHUNK = 2048  # positions between which the kernel keeps states


def load():
    import mamba_ssm  # noqa: F401  as of SSD
    from mamba_ssm.ops import selective_scan_interface as interface

    if not hasattr(getattr(interface, "selective_scan_cuda", None), "fwd"):
        raise ImportError("it was built without its CUDA extension selective_scan_cuda")
    return interface.selective_scan_fn


@cache
def fault() -> str | None:
    """Why there is no kernel, or None. SSD does without it, so `backend.lacking` does not ask."""
    try:
        load()
    except Exception as error:  # another torch's binary, a missing library, …
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def refusal(x, dt, B) -> str | None:
    """Why the kernel cannot take this call, or None."""
    if why := fault():
        return f"needs mamba-ssm with its CUDA extension selective_scan_cuda, and it cannot be imported: {why}"
    (b, t, d), n = x.shape, B.shape[2]
    if n > 256 or d > 65535:
        return f"takes states of up to 256 rows and up to 65,535 channels; got {n} and {d}"
    most = 2 * (t + n)  # with every token a document of its own
    return kernels.refusal(x, dt, B, largest_inside=b * d * max(most, 2 * n * -(-most // CHUNK)))


def selective_scan(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    (b, t, _), n, wide = x.shape, A.shape[1], dt.dtype
    u, rows, columns, step = (m.to(wide) for m in (x, B, C, dt))
    place = torch.arange(t, device=x.device).expand(b, t)
    if seq_idx is not None:
        number = kernels.number_documents(seq_idx)
        place = place + number
        more = t + int(number.max())
        u, rows, columns, step = (spread(m, place, more) for m in (u, rows, columns, step))
        between = torch.ones(b, more, dtype=torch.bool, device=x.device).scatter(1, place, False)
        between &= torch.arange(more, device=x.device) < place[:, -1:]  # behind the last token a step of 0
        step = step.masked_fill(between[..., None], ENDLESS)
    unit = torch.eye(n, dtype=wide, device=x.device).expand(b, n, n)
    if initial_state is not None:
        place = place + n
        u = torch.cat([initial_state.mT / SHORT, u], dim=1)
        step = torch.cat([torch.full_like(u[:, :n], SHORT), step], dim=1)
        rows, columns = torch.cat([unit, rows], dim=1), pad(columns, (0, 0, n, 0))
    u, step, rows = (pad(m, (0, 0, 0, n)) for m in (u, step, rows))
    columns = torch.cat([columns, unit], dim=1)
    D = None if D is None else D.to(wide).contiguous()
    inputs = [m.mT.contiguous() for m in (u, step)], [m.mT.contiguous() for m in (rows, columns)]
    out = load()(*inputs[0], A.to(wide).contiguous(), *inputs[1], D=D)  # (b d t)
    y = out.mT.gather(1, place[..., None].expand(x.shape))
    return y.to(x.dtype), out[:, :, -n:].contiguous()


def spread(m: Tensor, place: Tensor, length: int) -> Tensor:
    """m (b t …) at its places among (b length …) zeros."""
    return m.new_zeros(len(m), length, m.shape[2]).scatter(1, place[..., None].expand(m.shape), m)


def selective_scan_step(x, dt, A, B, C, state, *, D=None, overwrite=False) -> tuple[Tensor, Tensor]:
    if kernels.records_gradient(x, dt, A, B, C, state, D):
        return eager.selective_scan_step(x, dt, A, B, C, state, D=D)  # the kernel has no backward, as of SSD
    _, state_update = ssd.load()
    if not overwrite:
        state = state.clone()
    bias, D = torch.zeros_like(A[:, 0]), torch.zeros_like(A[:, 0]) if D is None else D  # it reads the strides of both
    # All channels are one head.
    y = state_update(state[:, None], x[:, None], dt[:, None], A[None], B[:, None], C[:, None], D=D[None], dt_bias=bias[None])
    return y[:, 0], state
