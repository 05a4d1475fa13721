"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982)."""

from collections.abc import Iterator
from itertools import compress, groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hybridlm.ops.precision import product_dtype
from train.sharding import put
from train.tensor_files import local

AT_ONCE = 2**26  # elements of matrices in one product


class Muon(torch.optim.Muon):
    """torch's Muon, with the update of AdamW's size (0.2 sqrt(max(rows, columns)), arXiv 2502.16982, equation 4), so that both
    take the same learning rate. Its step differs in three points, and in no number where none applies: ranks that share the
    model orthogonalise one matrix each, a processor without bf16 units does so in fp32, and a matrix whose gradient is zero
    stays as it is.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved, still = by_gradient(group["params"])
            for p in still:
                if self.state[p]:
                    self.state[p]["momentum_buffer"].mul_(group["momentum"])
            mesh = mesh_of(moved)
            for some in in_turn(moved, mesh):
                towards = [direction(p.grad, self.state[p], group["momentum"]) for p in some]  # type: ignore[arg-type]
                updates = one_each(towards, group, mesh.get_local_rank()) if mesh else orthogonal(torch.stack(towards), group)
                for p, update in zip(some, updates):
                    size = 0.2 * max(p.shape) ** 0.5
                    local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(local(update), alpha=-group["lr"] * size)


def in_turn(params: list[Tensor], mesh: DeviceMesh | None) -> Iterator[list[Tensor]]:
    """Those that are orthogonalised at a time: as many as there are ranks, or alone those of one shape, in one product."""
    if mesh is not None:
        yield from (params[i : i + mesh.size()] for i in range(0, len(params), mesh.size()))
        return
    for shape, alike in groupby(sorted(params, key=lambda p: p.shape), key=lambda p: p.shape):
        same, count = list(alike), max(1, AT_ONCE // prod(shape))
        yield from (same[i : i + count] for i in range(0, len(same), count))


def by_gradient(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those with a gradient other than zero on any rank, and those with one of zeros. An expert without tokens has that: what is
    left of its running mean would be made as large as any update."""
    some = [p for p in params if p.grad is not None]
    if not some:
        return [], []
    mesh = mesh_of(some)
    touched = torch.stack([local(p.grad).any() for p in some]).int()  # type: ignore[arg-type]
    if mesh is not None:
        distributed.all_reduce(touched, distributed.ReduceOp.MAX, group=mesh.get_group())
    there = touched.tolist()
    return list(compress(some, there)), [p for p, is_there in zip(some, there) if not is_there]


def mesh_of(params: list[Tensor]) -> DeviceMesh | None:
    """The ranks that share them: all of them or none."""
    return params[0].device_mesh if params and isinstance(params[0], DTensor) else None


def direction(grad: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    """Nesterov's: between the gradient and its running mean, which it moves on."""
    if not state:
        state["momentum_buffer"] = torch.zeros_like(grad)
    return grad.lerp(state["momentum_buffer"].lerp_(grad, 1 - momentum), momentum)


def one_each(matrices: list[Any], group: dict, rank: int) -> list[Any]:
    """Orthogonalises matrices that ranks share by rows, one on each rank, which sends the others their rows of it."""
    own = torch.empty(0, device="meta")
    for owner, matrix in enumerate(matrices):
        whole = matrix.bfloat16().full_tensor()  # as it is narrowed anyway
        if owner == rank:
            own = orthogonal(whole[None], group)[0].to(matrix.dtype)
    for owner, matrix in enumerate(matrices):
        put(matrix, own if owner == rank else torch.empty(matrix.shape, device="meta"), owner)
    return matrices


def orthogonal(matrices: Tensor, group: dict) -> Tensor:
    """U V^T of each matrix (i m n) = U S V^T, about: Newton-Schulz takes its singular values to between 0.7 and 1.2."""
    (a, b, c), narrow = group["ns_coefficients"], matrices.bfloat16()
    x, wide = narrow.to(product_dtype(narrow)), matrices.shape[-2] <= matrices.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
