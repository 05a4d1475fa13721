"""The convolution as k shifted multiply-adds: no transposes, and no im2col as in `torch.nn.functional.conv1d`.

A few positions at a time, in fp32 or wider. Backward keeps the input alone and computes the rest again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from hybridlm.ops.blocks import time_blocks


def conv1d(x, weight, bias, *, initial_state=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    b, t, d = x.shape
    k = weight.shape[1]
    before = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state
    if t == 1:  # a step of generation: as few operators as can be
        window = torch.cat([before, x], dim=1)
        wide = window.float() if window.element_size() < 4 else window
        y = (wide * weight.T).sum(1, keepdim=True)
        y = silu(y if bias is None else y + bias)
        return y if y.dtype == x.dtype else y.to(x.dtype), window[:, 1:].clone()
    final_state = torch.cat([before[:, t:], x[:, max(0, t - k + 1) :]], dim=1)
    if seq_idx is not None:
        document = torch.cat([seq_idx[:, :1].expand(-1, k - 1), seq_idx], dim=1)
        final_state = final_state * (document[:, t:] == document[:, -1:])[..., None]
    return Conv1d.apply(x, weight, bias, before, seq_idx), final_state


def shifted(x: Tensor, before: Tensor, seq_idx: Tensor | None, now: slice) -> list[Tensor]:
    """x at `now`, one position earlier, …, k - 1 earlier; 0 where that is of another document."""
    k, size = before.shape[1] + 1, now.stop - now.start
    run = x[:, now.start - k + 1 : now.stop] if now.start else torch.cat([before, x[:, now]], dim=1)
    run = run.to(torch.promote_types(x.dtype, torch.float32))
    views = [run[:, k - 1 - back :][:, :size] for back in range(k)]
    if seq_idx is None:
        return views
    return [views[0], *(view * same(seq_idx, now.start, size, back) for back, view in enumerate(views[1:], 1))]


def same(seq_idx: Tensor, start: int, size: int, back: int) -> Tensor:
    """(b size 1) whether each position from `start` on and the one `back` before it are of one document.

    What comes before the row is of its first document.
    """
    positions = torch.arange(start, start + size, device=seq_idx.device)
    here, earlier = (seq_idx[:, p.clamp(0, seq_idx.shape[1] - 1)] for p in (positions, positions - back))
    return (here == earlier)[..., None]


def weighted(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = bias + sum of weight[k - 1 - back] inputs[back]; weight (k d)."""
    torch.mul(inputs[0], weight[-1], out=out)
    for back, past in enumerate(inputs[1:], 1):
        out.addcmul_(past, weight[-1 - back])
    return out if bias is None else out.add_(bias)


class Conv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, before, seq_idx):
        ctx.save_for_backward(x, weight, bias, before, seq_idx)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty(x.shape, dtype=wide, device=x.device)
        w = weight.T.to(wide)
        for now in time_blocks(x, least=len(w)):
            silu(weighted(shifted(x, before, seq_idx, now), w, bias, out=y[:, now]), inplace=True)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, before, seq_idx = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        w = weight.T.to(wide)
        k = len(w)
        dx = torch.empty(x.shape, dtype=wide, device=x.device)
        dw, dbias = torch.zeros_like(w), w.new_zeros(w.shape[1])
        ahead = dx.new_zeros(before.shape)  # the gradients of the sums at the k - 1 positions after the block
        for now in reversed(time_blocks(x, least=k)):
            inputs = shifted(x, before, seq_idx, now)
            da = torch.ops.aten.silu_backward(dy[:, now].to(wide), weighted(inputs, w, bias, out=torch.empty_like(inputs[0])))
            dbias += da.sum((0, 1))
            for back, past in enumerate(inputs):
                dw[-1 - back] += (da * past).sum((0, 1))
            run, size = torch.cat([da, ahead], dim=1), now.stop - now.start
            later = [run[:, back:][:, :size] for back in range(k)]
            if seq_idx is not None:
                later[1:] = [m * same(seq_idx, now.start + back, size, back) for back, m in enumerate(later[1:], 1)]
            weighted(later, w, None, out=dx[:, now])
            ahead = run[:, : k - 1]
        if seq_idx is not None:
            ahead = ahead * same(seq_idx, 0, k - 1, k - 1)
        dbefore = torch.zeros_like(before)
        for i in range(k - 1):  # the input k - 1 - i positions before x reaches the positions up to i
            dbefore[:, i] = sum(w[i - j] * ahead[:, j] for j in range(i + 1))
        return dx.to(x.dtype), dw.T.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), dbefore, None
