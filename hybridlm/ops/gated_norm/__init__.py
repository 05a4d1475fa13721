"""RMSNorm over each group of channels, gated before the norm: the output norm of Mamba-2 (arXiv 2405.21060, section 7)."""

from torch import Tensor

from hybridlm.ops.backend import resolve
from hybridlm.ops.checks import check_shape, check_shapes
from hybridlm.ops.gated_norm import eager, naive

IMPLEMENTATIONS = {"eager": eager.gated_norm, "naive": naive.gated_norm}


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """weight * rms_norm(x * silu(z)), the mean square taken over each of `groups` equal runs of channels.

    Args:
        x, z: (b t d); computed in fp32 or wider.
        weight: (d).
        groups: must divide d.

    Returns:
        (b t d) in the dtype of x.
    """
    sizes = check_shapes(("x", x, "b t d"), ("z", z, "b t d"))
    check_shape("weight", weight, "d", sizes)
    if groups < 1 or sizes["d"] % groups:
        raise ValueError(f"gated_norm: channels must be a multiple of groups; got {sizes['d']} channels and {groups} groups.")
    run = IMPLEMENTATIONS[resolve("gated_norm", IMPLEMENTATIONS, backend)]
    return run(x, z, weight, groups=groups, eps=eps)
