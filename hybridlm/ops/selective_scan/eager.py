"""The selective scan in pure PyTorch, a block of time after the other.

Within a block everything that is (q b n d) is made at once, but for the recurrence, which is one operator a position. Where few
rows and channels would make those operators small, the block is cut into chunks that all take their positions at the same time,
each from a state of zeros; what the state that arrives at each adds to its positions is put in afterwards.

Time comes first, so that a position is one piece of memory, and channels last, so that operators run along them. Backward keeps
the inputs and the state that arrives at each block, and computes the rest again.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridlm.ops.precision import has_autocast, without_autocast

BLOCK = 256  # positions in a block
CPU_ELEMENTS = 2**18  # of what is (q b n d), on a CPU: some of these stay in its cache at a time
CPU_LEAST = 16  # positions in a block on a CPU: a state is kept for each block
CPU_STEP = 2**14  # elements of a position, (b n d), from which on a CPU loses nothing by taking one at a time


def selective_scan(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    (b, t, d), n = x.shape, A.shape[1]
    size, chunks = sizes(b * n * d, t, x.device.type == "cpu")
    state = dt.new_zeros(b, d, n) if initial_state is None else initial_state
    # A row's first token is no new document: the initial state is of its own.
    first = None if seq_idx is None else torch.cat([seq_idx[:, :1] != seq_idx[:, :1], seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1)
    return SelectiveScan.apply(x, dt, A, B, C, D, state, first, size, chunks)


def selective_scan_step(x, dt, A, B, C, state, *, D=None, overwrite=False) -> tuple[Tensor, Tensor]:
    if has_autocast(x):
        with without_autocast(x):
            return selective_scan_step(x, dt, A, B, C, state, D=D, overwrite=overwrite)
    narrow = x.dtype
    if narrow != dt.dtype:
        x, B, C = (m.to(dt.dtype) for m in (x, B, C))
    decay = torch.exp(dt.unsqueeze(-1) * A)
    frozen = state.is_inference() and not torch.is_inference_mode_enabled()
    state = state.mul_(decay) if overwrite and not frozen else decay * state
    state.addcmul_((dt * x).unsqueeze(-1), B.unsqueeze(1))
    y = torch.bmm(state, C.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = y.addcmul_(D, x)
    return y if narrow == y.dtype else y.to(narrow), state


def sizes(step: int, t: int, cpu: bool) -> tuple[int, int]:
    """Positions in a block, and chunks of one; `step`: elements of a position."""
    if not cpu:
        return min(t, BLOCK), math.isqrt(min(t, BLOCK))
    size = min(t, BLOCK, max(CPU_LEAST, CPU_ELEMENTS // step))
    return size, max(1, min(math.isqrt(size), CPU_STEP // step))


def scan(u: Tensor, a: Tensor, carried: Tensor, chunks: int, back: bool = False) -> Tensor:
    """In place: u_i += a_i u_{i-1}, `carried` before the first; `back`: u_i += a_i u_{i+1}, `carried` behind the last.

    Args:
        u, a: (q …). carried: (…).
        chunks: how many parts of u go at the same time.

    Returns:
        The last one, which may be a view of u.
    """
    if (chunks := min(chunks, len(u))) == 1:
        pairs = zip(u.unbind(), a.unbind())
        for u_i, a_i in reversed([*pairs]) if back else pairs:
            carried = u_i.addcmul_(a_i, carried)
        return carried
    q = len(u) // chunks
    rest = slice(chunks * q, None)
    if back and chunks * q < len(u):
        carried = scan(u[rest], a[rest], carried, 1, back)
    order = range(q)[:: -1 if back else 1]
    parts, decay = (m[: chunks * q].unflatten(0, (chunks, q)) for m in (u, a))
    reach = torch.empty_like(decay)  # how much of what arrives at a chunk reaches each of its positions
    reach[:, order[0]] = decay[:, order[0]]
    for before, i in pairwise(order):
        torch.mul(decay[:, i], reach[:, before], out=reach[:, i])
        parts[:, i].addcmul_(decay[:, i], parts[:, before])
    arriving = torch.empty_like(parts[:, 0])
    for k in range(chunks)[:: -1 if back else 1]:
        arriving[k] = carried
        carried = torch.addcmul(parts[k, order[-1]], reach[k, order[-1]], carried)
    parts.addcmul_(reach, arriving[:, None])
    return carried if back or chunks * q == len(u) else scan(u[rest], a[rest], carried, 1)


def blocks(t: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, t)) for i in range(0, t, size)]


def ahead(m: Tensor, now: slice, dtype: torch.dtype) -> Tensor:
    """(b t …) -> (q b …), in `dtype`."""
    return m[:, now].transpose(0, 1).to(dtype).contiguous()


def decays(dt: Tensor, A: Tensor, first: Tensor | None, now: slice, out: Tensor) -> Tensor:
    """(q b n d) exp(dt A), and exactly 0 at the first token of a document; dt (q b d), A (n d)."""
    A = A / math.log(2)  # torch's exp2 takes a third of the time of its exp
    if first is not None:
        dt = dt.masked_fill(first[:, now].T[..., None], math.inf)
        A = A.clamp(max=-torch.finfo(A.dtype).tiny)  # inf * 0 is no number
    return torch.mul(dt[:, :, None], A, out=out).exp2_()


def outer(rows: Tensor, channels: Tensor, out: Tensor) -> Tensor:
    """(q b n) and (q b d): (q b n d)."""
    return torch.mul(channels[:, :, None], rows[..., None], out=out)


def over_rows(rows: Tensor, m: Tensor) -> Tensor:
    """(q b n) and (q b n d): the sum of their products over n, (q b d)."""
    return torch.bmm(rows.flatten(0, 1)[:, None], m.flatten(0, 1)).view(*m.shape[:2], -1)


def over_channels(m: Tensor, channels: Tensor, out: Tensor) -> Tensor:
    """(q b n d) and (q b d): the sum of their products over d, (q b n). A matrix product would take five times as long."""
    return torch.mul(m, channels[:, :, None], out=out).sum(-1)


class SelectiveScan(torch.autograd.Function):
    """What is (q b n d) is written over in every block: memory that is new to the process takes longer than the arithmetic."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, first, size, chunks):
        (b, t, d), n, wide = x.shape, A.shape[1], dt.dtype
        runs = blocks(t, size)
        states = dt.new_empty(len(runs) if any(ctx.needs_input_grad) else 0, b, n, d)
        room = dt.new_empty(2, size, b, n, d)
        y, a = torch.empty(x.shape, dtype=x.dtype, device=x.device), A.to(wide).T.contiguous()
        state = state.mT.contiguous()
        for k, now in enumerate(runs):
            if len(states):
                states[k] = state
            u, step, rows, columns = (ahead(m, now, wide) for m in (x, dt, B, C))
            h, decay = room[:, : len(u)]
            outer(rows, step * u, out=h)
            state = scan(h, decays(step, a, first, now, out=decay), state, chunks).clone()
            out = over_rows(columns, h)
            if D is not None:
                out.addcmul_(u, D)
            y[:, now] = out.transpose(0, 1)
        ctx.save_for_backward(x, dt, A, B, C, D, first, states)
        ctx.size, ctx.chunks = size, chunks
        return y, state.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, dt, A, B, C, D, first, states = ctx.saved_tensors
        wide, a = dt.dtype, A.to(dt.dtype).T.contiguous()
        dx, ddt, dB, dC = (torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in (x, dt, B, C))
        dA, dD = torch.zeros_like(a), torch.zeros_like(a[0])
        room = dt.new_empty(3, ctx.size, *states.shape[1:])
        crossing = grad_state.mT.contiguous()  # the gradient of the state that leaves the block
        for k, now in reversed([*enumerate(blocks(x.shape[1], ctx.size))]):
            u, step, rows, columns, dy = (ahead(m, now, wide) for m in (x, dt, B, C, grad_y))
            h, decay, dh = room[:, : len(u)]
            xdt = step * u
            decays(step, a, first, now, out=decay)
            scan(outer(rows, xdt, out=h), decay, states[k], ctx.chunks)
            dC[:, now] = over_channels(h, dy, out=dh).transpose(0, 1)

            # dh_i = C_i dy_i + a_{i+1} dh_{i+1}
            outer(columns, dy, out=dh)[-1] += crossing
            if len(dh) > 1:
                scan(dh[:-1], decay[1:], dh[-1], ctx.chunks, back=True)
            crossing = decay[0] * dh[0]
            dxdt = over_rows(rows, dh)

            # The gradient of dt_i A is dh_i a_i h_{i-1}.
            dlog = decay.mul_(dh)
            dlog[0].mul_(states[k])
            dlog[1:].mul_(h[:-1])
            dB[:, now] = over_channels(dh, xdt, out=dh).transpose(0, 1)
            dA += torch.mul(dlog, step[:, :, None], out=h).sum((0, 1))
            ddt[:, now] = dlog.mul_(a).sum(2).addcmul_(dxdt, u).transpose(0, 1)
            dxdt.mul_(step)
            if D is not None:
                dD += (dy * u).sum((0, 1))
                dxdt.addcmul_(dy, D)
            dx[:, now] = dxdt.transpose(0, 1)
        return dx, ddt, dA.T.to(A.dtype), dB, dC, None if D is None else dD.to(D.dtype), crossing.mT, None, None, None
