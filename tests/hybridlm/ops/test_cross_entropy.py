from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hybridlm.ops.cross_entropy import IGNORE, cross_entropy, eager

VOCABULARY, WIDTH = 11, 5


def draw(b=3, t=7, dtype=torch.float64):
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (b, t))
    labels[0, 0] = labels[-1, -1] = labels[1, 2:5] = IGNORE
    return torch.randn(b, t, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype), labels


def results(run, hidden, weight, labels):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = run(hidden, weight, labels)
    weigh = torch.randn(nll.shape, generator=torch.Generator().manual_seed(1)).to(nll.dtype)
    return nll, *torch.autograd.grad((nll * weigh).sum(), [hidden, weight])


def torchs_own(hidden, weight, labels):
    logits = hidden @ weight.T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none").view(labels.shape)


@pytest.mark.parametrize("rows", [1, 2, 4, 21, 1000])
def test_blocks_of_any_size_equal_naive_and_torch_in_outputs_and_gradients(rows, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_BYTES", rows * 4 * VOCABULARY)
    monkeypatch.setattr(eager, "LEAST_ROWS", 1)
    mine = results(cross_entropy, *draw())
    for other in (lambda *a: cross_entropy(*a, backend="naive"), torchs_own):
        for a, b in zip(mine, results(other, *draw()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_z_loss_is_in_the_gradients_and_not_in_the_value(monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_BYTES", 4 * 4 * VOCABULARY)
    monkeypatch.setattr(eager, "LEAST_ROWS", 1)

    def written_out(hidden, weight, labels):
        log_sum = torch.logsumexp(hidden @ weight.T, dim=-1)
        return torchs_own(hidden, weight, labels) + torch.where(labels != IGNORE, 0.3 * log_sum**2, 0)

    value, *gradients = results(partial(cross_entropy, z_loss=0.3), *draw())
    naive = results(partial(cross_entropy, z_loss=0.3, backend="naive"), *draw())
    torch.testing.assert_close(value, torchs_own(*draw()), rtol=1e-9, atol=1e-9)
    for mine, spelled, explicit in zip([value, *gradients], naive, results(written_out, *draw())):
        torch.testing.assert_close(mine, spelled, rtol=1e-9, atol=1e-9)
        if mine is not value:
            torch.testing.assert_close(mine, explicit, rtol=1e-9, atol=1e-9)


def test_a_block_has_at_least_so_many_rows_however_large_the_vocabulary(monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_BYTES", 1)
    monkeypatch.setattr(eager, "LEAST_ROWS", 3)
    seen, logits = [], eager._logits
    monkeypatch.setattr(eager, "_logits", lambda h, w: seen.append(len(h)) or logits(h, w))
    torch.testing.assert_close(cross_entropy(*draw()), torchs_own(*draw()), rtol=1e-9, atol=1e-9)
    assert set(seen) == {3}


def test_no_more_than_a_block_of_logits_exists_at_once(monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_BYTES", 2 * 4 * VOCABULARY)
    monkeypatch.setattr(eager, "LEAST_ROWS", 1)
    seen, logits = [], eager._logits
    monkeypatch.setattr(eager, "_logits", lambda h, w: seen.append(len(h)) or logits(h, w))
    results(cross_entropy, *draw())
    assert max(seen) == 2 and sum(seen) == 2 * 21


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_ignored_labels_give_zero_and_no_gradient(backend):
    hidden, weight, labels = draw()
    nll, grad_hidden, _ = results(lambda *a: cross_entropy(*a, backend=backend), hidden, weight, labels)
    ignored = labels == IGNORE
    assert (nll[ignored] == 0).all() and (nll[~ignored] > 0).all()
    assert (grad_hidden[ignored] == 0).all() and (grad_hidden[~ignored] != 0).any(-1).all()


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_all_labels_ignored_is_all_zero(backend):
    hidden, weight, labels = draw()
    for m in results(lambda *a: cross_entropy(*a, backend=backend), hidden, weight, torch.full_like(labels, IGNORE)):
        assert (m == 0).all()


def test_bf16_takes_the_softmax_in_fp32():
    hidden, weight, labels = draw(dtype=torch.bfloat16)
    nll, grad_hidden, grad_weight = results(cross_entropy, hidden, weight, labels)
    assert (nll.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    true = results(cross_entropy, hidden.double(), weight.double(), labels)
    torch.testing.assert_close(nll.double(), true[0], rtol=0.01, atol=0.02)
    torch.testing.assert_close(grad_weight.double(), true[2], rtol=0.02, atol=0.05)


def test_many_small_bf16_gradients_add_up_in_fp32(monkeypatch):
    """In bf16, a sum of 4,096 equal blocks would stop growing at 256 of them."""
    monkeypatch.setattr(eager, "BLOCK_BYTES", 4 * 2)
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    cross_entropy(hidden, weight, torch.zeros(1, 4096, dtype=torch.long)).sum().backward()
    assert weight.grad.flatten().tolist() == [-2048, 2048]


def test_autocast_runs_the_head_in_its_dtype_and_returns_fp32_gradients():
    hidden, weight, labels = draw(dtype=torch.float32)

    def autocast(*a):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(*a)

    nll, grad_hidden, grad_weight = results(autocast, hidden, weight, labels)
    assert {nll.dtype, grad_hidden.dtype, grad_weight.dtype} == {torch.float32}
    assert torch.equal(nll, cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(VOCABULARY, WIDTH + 1)}, "weight must have shape"),
        ({"labels": torch.zeros(3, 6, dtype=torch.long)}, "labels must have shape"),
        ({"hidden": torch.zeros(3, 0, WIDTH)}, "at least one token"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**dict(zip(("hidden", "weight", "labels"), draw())) | changes)
