"""RMSNorm (arXiv 1910.07467): each token divided by its root mean square."""

from torch import Tensor

from hybridlm.ops.backend import resolve
from hybridlm.ops.checks import check_shape, check_shapes
from hybridlm.ops.rms_norm import eager, naive

IMPLEMENTATIONS = {"eager": eager.rms_norm, "naive": naive.rms_norm}


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), the mean taken over the channels.

    Args:
        x: (b t d); computed in fp32 or wider.
        weight: (d).

    Returns:
        (b t d) in the dtype of x.
    """
    sizes = check_shapes(("x", x, "b t d"))
    check_shape("weight", weight, "d", sizes)
    return IMPLEMENTATIONS[resolve("rms_norm", IMPLEMENTATIONS, backend)](x, weight, eps=eps)
