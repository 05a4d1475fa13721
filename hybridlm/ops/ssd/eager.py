"""SSD in chunks, in pure PyTorch: linear in the length, B and C kept per group.

Within a chunk of q positions the recurrence is a masked q x q matrix product (the "dual" form); between chunks only the
state is carried. Mamba-2 paper (Dao & Gu 2024, arXiv 2405.21060), section 6 and listing 1.

On a CPU a few chunks are taken at a time, so that what is made of them stays in the processor's cache; on other devices all
at once. Backward keeps the inputs and the state at each chunk, and computes the rest again.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridlm.ops.precision import has_autocast, product_dtype, without_autocast

CPU_CHUNK = 64  # a shorter chunk passes the state on more often, a longer one has larger q x q products
CPU_BLOCK = 2**20  # elements of the q x q products, of all rows, chunks and heads, that are made at a time


def ssd(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None, chunk_size: int = 128) -> tuple[Tensor, Tensor]:
    b, t, h, p = x.shape
    q, chunks = min(chunk_size, t), t
    if x.device.type == "cpu":
        q = min(q, CPU_CHUNK)
        chunks = max(1, CPU_BLOCK // (b * h * q * q))
    state = dt.new_zeros(b, h, p, B.shape[3]) if initial_state is None else initial_state
    y, state = SSD.apply(x, dt, A, B, C, D, state, seq_idx, q, chunks * q)
    return y.to(x.dtype), state


def ssd_step(x, dt, A, B, C, state, *, D=None, overwrite=False) -> tuple[Tensor, Tensor]:
    if has_autocast(x):
        with without_autocast(x):
            return ssd_step(x, dt, A, B, C, state, D=D, overwrite=overwrite)
    (b, h, p), (g, n), narrow = x.shape, B.shape[1:], x.dtype
    if narrow != dt.dtype:
        x, B, C = (m.to(dt.dtype) for m in (x, B, C))
    decay = torch.exp(dt * A).view(b, h, 1, 1)
    update = (dt.unsqueeze(-1) * x).view(b * g, -1, 1)
    frozen = state.is_inference() and not torch.is_inference_mode_enabled()
    state = state.mul_(decay) if overwrite and not frozen else decay * state
    per_group = state.view(b * g, -1, n).addcmul_(update, B.reshape(b * g, 1, n))  # (b g) (r p) n
    y = torch.bmm(per_group, C.reshape(b * g, n, 1)).view(b, h, p)
    if D is not None:
        y = y.addcmul_(D.unsqueeze(-1), x)
    return y if narrow == y.dtype else y.to(narrow), state


class Chunks(NamedTuple):
    """c chunks of q positions, as forward and backward both need them. r heads share a group: h = g r."""

    x: Tensor  # c b g q r p, in the dtype of dt
    dt: Tensor  # c b g q r 1
    B: Tensor  # c b g q n, in the dtype of the products
    C: Tensor  # c b g q n
    sees: Tensor  # q q, or c b 1 q q with documents: whether position i sees j
    log: Tensor  # c b g q r, fp64: of the decay from the start of the chunk or document to and with position i
    from_start: Tensor  # c b g q r 1: what reaches position i of the state that arrives
    to_end: Tensor  # c b g q r 1: what reaches the end of the chunk of the input at position j
    across: Tensor  # c b h 1 1: what reaches the end of the state that arrives


def open_chunks(x, dt, A, B, C, seq_idx, now: slice, q: int) -> Chunks:
    g, wide, narrow = B.shape[2], dt.dtype, product_dtype(x)
    x, dt = (chunked(m, now, q, g) for m in (x.to(wide), dt))
    B, C = (chunked(m, now, q, g).squeeze(4).to(narrow).contiguous() for m in (B, C))
    sees = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    # In float64: differences of fp32 sums lose the small decays that follow a large dt.
    log = dt.double() * A.double().view(g, 1, -1)
    if seq_idx is None:
        log = log.cumsum(3)
    else:
        document = chunked(seq_idx[..., None], now, q, 1).squeeze(4)  # c b 1 q
        before = seq_idx[:, max(now.start - 1, 0)][None, :, None, None]
        last = document[..., -1:]
        arriving = torch.cat([before, last[:-1]])  # the document that the arriving state is of
        sees = sees & (document[..., :, None] == document[..., None, :])
        log = sees.double() @ log  # a sum that starts anew with each document: no rounding of one reaches another
    end = log[..., -1:, :]
    from_start, to_end, across = (torch.exp(m).to(wide) for m in (log, (end - log).clamp(max=0), end))
    if seq_idx is not None:
        from_start = from_start * (document == arriving)[..., None]
        to_end = to_end * (document == last)[..., None]
        across = across * (last == arriving)[..., None]
    across = across.reshape(*across.shape[:2], -1, 1, 1)
    return Chunks(x, dt[..., None], B, C, sees, log, from_start[..., None], to_end[..., None], across)


def decay_within(k: Chunks) -> Tensor:
    """(c b g r q q) exp(log_i - log_j) where position i sees j, 0 elsewhere.

    Clamped: differences of sums can round to above 0, and a decay must not grow; the logarithm of a number too small to be
    normal makes products slow, and no difference.
    """
    log, wide = k.log.mT.contiguous(), k.from_start.dtype
    least = math.log(torch.finfo(wide).tiny)
    decay = (log[..., :, None] - log[..., None, :]).to(wide).clamp_(least, 0).exp_()
    return decay.mul_(k.sees if k.sees.dim() == 2 else k.sees[:, :, :, None])


def chunked(m: Tensor, now: slice, q: int, g: int) -> Tensor:
    """(b t h …) or (b t g n) -> (c b g q r …) or (c b g q 1 n), a view."""
    m = m[:, now].unflatten(1, (-1, q)).unflatten(3, (g, -1))
    return m.permute(1, 0, 3, 2, *range(4, m.dim()))


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, laid out in the order of its dimensions, so that a matrix product takes it as it is."""
    return torch.mul(a, b, out=torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=b.dtype, device=b.device))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b without the copies that matmul makes of stacks with more than one dimension."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def blocks(t: int, q: int, at_once: int) -> list[tuple[slice, int]]:
    """Runs of whole chunks of q positions, at most `at_once` positions each; then what is left, a chunk of its own."""
    whole = t - t % q
    runs = [(slice(i, min(i + at_once, whole)), q) for i in range(0, whole, at_once)]
    return runs if whole == t else [*runs, (slice(whole, t), t - whole)]


class SSD(torch.autograd.Function):
    """One block of chunks after the other. What is made is freed once it is used: the next takes its place in the cache."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, seq_idx, q, at_once):
        (b, t, h, p), (g, n) = x.shape, B.shape[2:]
        keep = any(ctx.needs_input_grad)
        states = dt.new_empty(-(-t // q) + 1 if keep else 0, b, h, p, n)
        y = torch.empty(x.shape, dtype=dt.dtype, device=x.device)
        for now, size in blocks(t, q, at_once):
            k = open_chunks(x, dt, A, B, C, seq_idx, now, size)
            c, narrow = len(k.x), k.B.dtype

            # The state that arrives at each chunk.
            arriving = states[now.start // q :][: c + 1] if keep else dt.new_empty(c + 1, b, h, p, n)
            arriving[0] = state
            added = product(times(k.x, k.dt * k.to_end).flatten(4).mT.to(narrow), k.B).to(dt.dtype).view(c, b, h, p, n)
            for i in range(c):
                torch.addcmul(added[i], arriving[i], k.across[i], out=arriving[i + 1])
            del added
            state = arriving[c]
            out = product(k.C, arriving[:c].view(c, b, g, -1, n).to(narrow).mT).to(dt.dtype).view(k.x.shape).mul_(k.from_start)

            # Within the chunk: C B^T once per group, masked by the decay of each head.
            weights = decay_within(k).mul_(product(k.C, k.B.mT)[:, :, :, None]).to(narrow)
            xdt = times(k.x.transpose(3, 4), k.dt.transpose(3, 4)).to(narrow)
            torch.add(out, product(weights, xdt).transpose(3, 4), out=chunked(y, now, size, g))
            del out, weights, xdt
            if D is not None:
                chunked(y, now, size, g).addcmul_(k.x, D.view(g, 1, -1, 1))
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, states)
        ctx.q, ctx.at_once = q, at_once
        return y, state.clone()  # a view would keep what it is part of for as long as it lives

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, dt, A, B, C, D, seq_idx, states = ctx.saved_tensors
        (b, t, h, p), (g, n) = x.shape, B.shape[2:]
        wide = dt.dtype
        dx, ddt, dB, dC = (torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in (x, dt, B, C))
        dA, dD = A.new_zeros(A.shape, dtype=torch.float64), A.new_zeros(A.shape)
        for now, size in reversed(blocks(t, ctx.q, ctx.at_once)):
            k = open_chunks(x, dt, A, B, C, seq_idx, now, size)
            c, narrow = len(k.x), k.B.dtype
            arriving = states[now.start // ctx.q :][:c]
            dy = chunked(grad_y, now, size, g)

            # Along the states, from the last chunk to the first: leaving[i] is the gradient of the state at the end of chunk i.
            dy_start = times(dy, k.from_start)
            added = product(dy_start.flatten(4).to(narrow).mT, k.C).to(wide).view(c, b, h, p, n)
            leaving = torch.empty_like(added)
            crossing = torch.empty(c, b, h, dtype=wide, device=x.device)
            leaving[c - 1] = grad_state
            for i in reversed(range(c)):
                crossing[i] = (arriving[i] * leaving[i]).sum((-2, -1))
                torch.addcmul(added[i], leaving[i], k.across[i], out=leaving[i - 1] if i else added[0])
            grad_state = added[0]
            per_group = arriving.view(c, b, g, -1, n).to(narrow)
            dC_chunks = product(dy_start.flatten(4).to(narrow), per_group)
            from_state = product(k.C, per_group.mT).to(wide).view(k.x.shape).mul_(dy_start).sum(-1)
            del dy_start, per_group, added

            per_group = leaving.view(c, b, g, -1, n).to(narrow)
            x_end = times(k.x, k.dt * k.to_end)
            dB_chunks = product(x_end.flatten(4).to(narrow), per_group)
            dxdt = product(k.B, per_group.mT).to(wide).view(k.x.shape)
            to_state = (x_end.mul_(dxdt)).sum(-1)
            dxdt.mul_(k.to_end)
            del x_end, per_group, leaving

            # Within the chunk: y = (decay * scores) xdt.
            dy_head = torch.empty(dxdt.transpose(3, 4).shape, dtype=narrow, device=x.device).copy_(dy.transpose(3, 4))
            decay, scores = decay_within(k), product(k.C, k.B.mT).to(wide)[:, :, :, None]
            dweights = product(dy_head, times(k.x.transpose(3, 4), k.dt.transpose(3, 4)).to(narrow).mT).to(wide).mul_(decay)
            dscores = dweights.sum(3).to(narrow)
            dweights.mul_(scores)
            dlog = dweights.sum(-1).sub_(dweights.sum(-2)).mT
            del dweights
            dxdt += product(decay.mul_(scores).to(narrow).mT, dy_head).transpose(3, 4)
            del decay, dy_head
            chunked(dC, now, size, g).copy_((dC_chunks + product(dscores, k.B))[..., None, :])
            chunked(dB, now, size, g).copy_((dB_chunks + product(dscores.mT, k.C))[..., None, :])

            # The step at t is part of every path from j to i with j < t <= i.
            sees = k.sees.double()
            dstep = sees.mT @ (dlog + from_state).double() + (sees - torch.eye(size, device=x.device)) @ to_state.double()
            # With documents, across is 0 unless the whole chunk is of the arriving one.
            dstep += (crossing * k.across[..., 0, 0]).view(c, b, g, 1, -1)
            dA += (dstep * k.dt[..., 0]).sum((0, 1, 3)).flatten()
            chunked(ddt, now, size, g).copy_((k.x * dxdt).sum(-1) + dstep * A.view(g, 1, -1))
            if D is None:
                torch.mul(dxdt, k.dt, out=chunked(dx, now, size, g)) if dx.dtype == wide else chunked(dx, now, size, g).copy_(
                    dxdt * k.dt
                )
            else:
                chunked(dx, now, size, g).copy_(dxdt.mul_(k.dt).addcmul_(dy, D.view(g, 1, -1, 1)))
                dD += (dy * k.x).sum((0, 1, 3, 5)).flatten()
        return dx, ddt, dA.to(A.dtype), dB, dC, None if D is None else dD, grad_state, None, None, None
