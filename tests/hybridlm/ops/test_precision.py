import pytest
import torch
from torch.nn import functional as F

from hybridlm.ops import precision
from hybridlm.ops.precision import linear, product_dtype


@pytest.fixture
def without_units(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)


def draw(rows, size=24, out=10, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in ((2, rows, size), (out, size), (out,))]


@pytest.mark.parametrize("out", [10, 7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 30])
def test_few_rows_and_many_equal_torchs_own_in_output_and_gradients(rows, with_bias, out, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    results = []
    for run in (linear, F.linear):
        x, weight, bias = (m.double().float().requires_grad_() for m in draw(rows, out=out))
        y = run(x, weight, bias if with_bias else None)
        weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results.append((y, *torch.autograd.grad((y * weigh).sum(), [x, weight, *([bias] if with_bias else [])])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_few_rows_may_have_any_number_of_dimensions(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight, bias = draw(3)
    for rows in (x[0, 0], x[0, :1], x[:1, :1], x[0], x[:1], x[:, 1:2], x[None]):
        torch.testing.assert_close(linear(rows, weight, bias), F.linear(rows, weight, bias))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [2, 30])
def test_bf16_without_units_is_nearer_to_the_truth_than_torchs_own(rows, autocast, without_units):
    narrow = draw(rows, size=512, dtype=torch.bfloat16)
    inputs = [m.float() for m in narrow] if autocast else narrow
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, own = linear(*inputs), F.linear(*inputs)
    exact = F.linear(*(m.double() for m in narrow))
    assert y.dtype == own.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= (own - exact).abs().max() < 0.5


def test_bf16_without_units_runs_as_an_fp32_product_and_gives_gradients(without_units, monkeypatch):
    seen, own = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or own(x, *rest))
    x, weight, bias = (m.requires_grad_() for m in draw(30, dtype=torch.bfloat16))
    gradients = torch.autograd.grad(linear(x, weight, bias).sum(), [x, weight, bias])
    assert seen == [torch.float32] and {g.dtype for g in gradients} == {torch.bfloat16}
    linear(*draw(2, dtype=torch.bfloat16))  # few rows read bf16 weights fast as it is
    assert seen[1:] == [torch.bfloat16]


def test_products_of_narrow_numbers_are_fp32_where_the_processor_has_no_units(without_units, monkeypatch):
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [product_dtype(torch.ones(1, dtype=k)) for k in kinds] == [torch.float64, *[torch.float32] * 3]
    assert product_dtype(torch.ones(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert product_dtype(torch.ones(1, dtype=torch.bfloat16)) == torch.bfloat16


def test_autocasts_bf16_without_units_runs_as_an_fp32_product(without_units, monkeypatch):
    seen, own = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append((x.dtype, torch.is_autocast_enabled("cpu"))) or own(x, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*draw(30)).dtype == torch.bfloat16
    assert seen == [(torch.float32, False)]
