import pytest
import torch
from torch.nn import functional as F

from hybridlm.ops import blocks
from hybridlm.ops.rms_norm import rms_norm


def draw(t=7, channels=15):
    torch.manual_seed(0)
    return torch.randn(2, t, channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)


def results(run, inputs):
    x, weight = (m.clone().requires_grad_() for m in inputs)
    y = run(x, weight)
    weigh = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad((y * weigh).sum(), [x, weight])


@pytest.mark.parametrize("elements", [1, 70, 2**20])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("t", [1, 2, 7])
def test_eager_equals_naive_and_torch_in_outputs_and_every_gradient(t, eps, elements, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    eager = results(lambda x, w: rms_norm(x, w, eps=eps), draw(t))
    for other in (
        lambda x, w: rms_norm(x, w, eps=eps, backend="naive"),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, eps),
    ):
        for a, b in zip(eager, results(other, draw(t)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [1, 7])
@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_bf16_is_rounded_once_at_the_end(backend, t):
    x, weight = (m.bfloat16() for m in draw(t, channels=300))
    y, exact = rms_norm(x, weight, backend=backend), rms_norm(x.double(), weight.double(), backend="naive")
    assert y.dtype == torch.bfloat16 and ((y - exact).abs() <= 2**-8 * exact.abs()).all()  # half a unit in the last place


def test_a_broken_contract_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(torch.zeros(2, 3, 5), torch.ones(4))


@pytest.mark.parametrize("t", [1, 7])
def test_autocast_narrows_nothing(t):
    x, weight = (m.float() for m in draw(t))
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, weight)
    torch.testing.assert_close(y, rms_norm(x, weight), rtol=1e-6, atol=1e-6)
