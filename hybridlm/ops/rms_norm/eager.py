"""RMSNorm, with or without a gate before it, a few positions at a time; backward keeps the inputs and the scale of each token."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from hybridlm.ops.blocks import time_blocks
from hybridlm.ops.precision import has_autocast


def rms_norm(x, weight, *, eps: float) -> Tensor:
    return normed(x, None, weight, 1, eps)


def normed(x: Tensor, z: Tensor | None, weight: Tensor, groups: int, eps: float) -> Tensor:
    """weight * u / rms(u) with u = x, or x silu(z) where there is a gate z; the mean over each of `groups` runs of channels."""
    if x.shape[1] > 1 or has_autocast(x):  # which would narrow the product below
        return RMSNorm.apply(x, z, weight, groups, eps)
    # A step of generation: as few operators as can be.
    u = x.float() if x.element_size() < 4 else x
    if z is not None:
        u = silu(z.to(u.dtype)) * u
    if groups > 1:
        u = u.reshape(-1, 1, x.shape[2] // groups)
    # One product for the sum of squares: torch's own rms_norm takes three times as long for one token.
    y = u * torch.baddbmm(u.new_full((1, 1, 1), eps), u, u.mT, alpha=1 / u.shape[2]).rsqrt_()
    y = (y if groups == 1 else y.view(x.shape)) * weight
    return y if y.dtype == x.dtype else y.to(x.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, groups, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(*x.shape[:-1], groups, 1, dtype=wide, device=x.device)
        for now in time_blocks(x):
            u = x[:, now].to(wide) if z is None else silu(z[:, now].to(wide)).mul_(x[:, now])
            u = u.unflatten(-1, (groups, -1))
            scale[:, now] = u.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            y[:, now] = (u * scale[:, now]).flatten(-2).mul_(weight)
        ctx.save_for_backward(x, z, weight, scale)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dweight = torch.zeros(weight.shape, dtype=scale.dtype, device=x.device)
        for now in time_blocks(x):
            u, grad = x[:, now].to(scale.dtype), dy[:, now].to(scale.dtype)
            if z is not None:
                wide_x, wide_z = u, z[:, now].to(scale.dtype)
                gate = silu(wide_z)
                u = wide_x * gate
            unit = u.unflatten(-1, (ctx.groups, -1)) * scale[:, now]
            dweight += (grad * unit.flatten(-2)).sum((0, 1))
            grad = (grad * weight).view(unit.shape)
            along = (grad * unit).mean(-1, keepdim=True)
            du = torch.sub(grad, unit.mul_(along), out=grad).mul_(scale[:, now]).flatten(-2)
            if dz is not None:
                dz[:, now] = torch.ops.aten.silu_backward(wide_x * du, wide_z)
                du *= gate
            dx[:, now] = du
        return dx, dz, dweight.to(weight.dtype), None, None
