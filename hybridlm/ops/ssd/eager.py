"""SSD in chunks, in pure PyTorch: linear in the length, B and C kept per group.

Within a chunk of q positions the recurrence is a masked q x q matrix product (the "dual" form); between chunks only the
state is carried. Mamba-2 paper (Dao & Gu 2024, arXiv 2405.21060), section 6 and listing 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def ssd(x, dt, A, B, C, *, D=None, initial_state=None, seq_idx=None, chunk_size: int = 128) -> tuple[Tensor, Tensor]:
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    r = h // g  # heads of a group: they share B and C
    q = min(chunk_size, t)
    c = -(-t // q)
    dtype = dt.dtype  # of decay and state; the matrix products run in x.dtype

    def chunks(m: Tensor) -> Tensor:
        """(b t ...) -> (b c q ...). Padded positions have dt = 0: they neither decay the state nor add to it."""
        if c * q != t:
            m = pad(m, (0, 0) * (m.dim() - 2) + (0, c * q - t))
        return m.unflatten(1, (c, q))

    # b c g r q ..., so that whatever runs per group is one matrix product.
    xs = chunks(x).unflatten(3, (g, r)).permute(0, 1, 3, 4, 2, 5)
    dts = chunks(dt).unflatten(3, (g, r)).permute(0, 1, 3, 4, 2)
    Bs = chunks(B).permute(0, 1, 3, 2, 4)
    Cs = chunks(C).permute(0, 1, 3, 2, 4)
    visible = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    # Float64 for the cumulative sum: fp32 differences lose the small decays that follow a large dt.
    log_step = dts.double() * A.double().view(g, r, 1)
    leaves = enters = crosses = None
    if seq_idx is None:
        log_decay = log_step.cumsum(-1)
    else:
        document = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, c * q - t)], dim=1).unflatten(1, (c, q))
        last = document[:, :, -1:]
        arriving = torch.cat([document[:, :1, :1], last[:, :-1]], dim=1)  # the document that the incoming state is of
        visible = (visible & (document[..., :, None] == document[..., None, :]))[:, :, None, None]
        leaves = (document == last)[:, :, None, None]  # positions whose input is in the state at the chunk's end
        enters = (document == arriving)[:, :, None, None]  # positions that the incoming state reaches
        crosses = (last == arriving)[:, :, None]  # chunks that the incoming state crosses
        # A cumulative sum that starts anew with each document: no rounding of one reaches the gradients of another.
        log_decay = log_step @ visible[:, :, 0].mT.double()

    def decay(log: Tensor, where: Tensor | None) -> Tensor:
        # A difference of cumulative sums can round to above zero; a decay must never grow.
        log = log.to(dtype).clamp(max=0)
        return torch.exp(log if where is None else log.masked_fill(~where, -torch.inf))

    xdt = xs.to(dtype) * dts[..., None]

    # 1. Within each chunk: C B^T once per group, masked by the decay of each head.
    scores = (Cs @ Bs.mT)[:, :, :, None] * DecayBetween.apply(log_decay, visible, dtype).to(x.dtype)
    y = (scores @ xdt.to(x.dtype)).to(dtype)  # b c g r q p

    # 2. What each chunk adds to the state; then, chunk after chunk, the state that arrives at each.
    to_end = decay(log_decay[..., -1:] - log_decay, leaves)
    added = ((xdt * to_end[..., None]).to(x.dtype).mT.flatten(3, 4) @ Bs).to(dtype).view(b, c, h, p, n)
    across = decay(log_decay[..., -1], crosses).view(b, c, h, 1, 1)
    state = x.new_zeros(b, h, p, n, dtype=dtype) if initial_state is None else initial_state
    states = []
    for i in range(c):
        states.append(state)
        state = across[:, i] * state + added[:, i]

    # 3. What the arrived state gives to each position of its chunk.
    arrived = torch.stack(states, dim=1).view(b, c, g, r * p, n).to(x.dtype)
    from_state = (Cs @ arrived.mT).unflatten(-1, (r, p)).transpose(3, 4)
    y = y + from_state * decay(log_decay, enters)[..., None]
    if D is not None:
        y = y + D.view(g, r, 1, 1) * xs
    return y.to(x.dtype).permute(0, 1, 4, 2, 3, 5).reshape(b, c * q, h, p)[:, :t], state


def ssd_step(x, dt, A, B, C, state, *, D=None) -> tuple[Tensor, Tensor]:
    b, h, p = x.shape
    g, n = B.shape[1:]
    x32 = x.to(dt.dtype)
    decay = torch.exp(dt * A).view(b, h, 1, 1)
    update = (dt[..., None] * x32).view(b, g, -1, 1) * B[:, :, None].to(dt.dtype)  # b g (r p) n
    state = decay * state + update.view(b, h, p, n)
    y = (state.view(b, g, -1, n) @ C[..., None].to(dt.dtype)).view(b, h, p)
    if D is not None:
        y = y + D[:, None] * x32
    return y.to(x.dtype), state


class DecayBetween(torch.autograd.Function):
    """exp(log_i - log_j) where position i sees j, 0 elsewhere: (… q) in float64 -> (… q q) in `dtype`.

    By hand, so that the largest tensor of the layer is written once and backward needs nothing but the result.
    """

    @staticmethod
    def forward(ctx, log_decay, visible, dtype):
        between = (log_decay[..., :, None] - log_decay[..., None, :]).to(dtype)
        between = between.clamp_(max=0).masked_fill_(~visible, -torch.inf).exp_()
        ctx.save_for_backward(between)
        return between

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (between,) = ctx.saved_tensors
        grad = grad * between
        return (grad.sum(-1) - grad.sum(-2)).double(), None, None
