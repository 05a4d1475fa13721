import pytest
import torch
from torch.nn.functional import silu

from hybridlm.ops import blocks
from hybridlm.ops.gated_norm import gated_norm


def draw(channels=15, t=7):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in ((2, t, channels), (2, t, channels), (channels,))]


def results(inputs, **kwargs):
    x, z, weight = (m.clone().requires_grad_() for m in inputs)
    y = gated_norm(x, z, weight, **kwargs)
    weigh = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad((y * weigh).sum(), [x, z, weight])


@pytest.mark.parametrize("elements", [1, 70, 2**20])
@pytest.mark.parametrize("groups", [1, 3, 5, 15])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("t", [1, 7])
def test_eager_equals_naive_in_outputs_and_every_gradient(t, groups, eps, elements, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    eager, naive = (results(draw(t=t), groups=groups, eps=eps, backend=backend) for backend in ("eager", "naive"))
    for a, b in zip(eager, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_each_group_is_normalised_by_itself_after_the_gate(backend):
    x, z, weight = draw()
    y = gated_norm(x, z, weight, groups=3, backend=backend)
    gated = x[..., 5:10] * silu(z[..., 5:10])
    expected = weight[5:10] * gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y[..., 5:10], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [1, 7])
@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_bf16_is_rounded_once_at_the_end(backend, t):
    x, z, weight = (m.bfloat16() for m in draw(300, t))
    y = gated_norm(x, z, weight, groups=3, backend=backend)
    exact = gated_norm(x.double(), z.double(), weight.double(), groups=3, backend="naive")
    assert y.dtype == torch.bfloat16 and ((y - exact).abs() <= 2**-8 * exact.abs()).all()  # half a unit in the last place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 7, 14)}, "z must have shape"),
        ({"weight": torch.ones(3)}, "weight must have shape"),
        ({"groups": 4}, "multiple of groups; got 15 channels and 4 groups"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message):
        gated_norm(**dict(zip(("x", "z", "weight"), draw())) | changes)
