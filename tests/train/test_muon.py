"""Muon: torch's own where it stands alone, and the same numbers where ranks share the model."""

import pytest
import torch

from hybridlm.ops import precision
from train.muon import Muon, orthogonal

SHAPES = ((8, 8), (5, 12), (20, 7), (5, 12), (8, 8))
TORCHS = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}


def matrices():
    return [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(SHAPES)]


def train_with(kind):
    ours = matrices()
    optimizer = kind(ours, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(9)
    for _ in range(4):
        for p in ours:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return ours, optimizer


@pytest.mark.parametrize("units", [True, False])
def test_steps_are_torchs_own_and_without_bf16_units_taken_in_fp32(monkeypatch, units):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: units)
    (ours, own), (theirs, torchs) = train_with(Muon), train_with(torch.optim.Muon)
    for p, q in zip(ours, theirs):
        if units:
            assert torch.equal(p, q)
        else:
            assert not torch.equal(p, q) and torch.allclose(p, q, atol=0.02)
        assert torch.equal(own.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_direction_has_singular_values_near_one_and_the_vectors_of_the_matrix(monkeypatch, shape):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix[None], TORCHS)[0].float() @ vh.T
    assert torch.allclose(found, torch.diag(found.diag()), atol=0.03)
    assert (found.diag() > 0.6).all() and (found.diag() < 1.3).all()


def test_a_matrix_without_gradient_or_with_one_of_zeros_stays_whatever_its_running_mean():
    first, second, third = matrices()[:3]
    optimizer = Muon([first, second, third], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    second.grad, third.grad = torch.ones_like(second), torch.ones_like(third)
    optimizer.step()
    before = [p.detach().clone() for p in (first, second, third)]
    second.grad = torch.zeros_like(second)  # as of an expert that got no token
    mean = optimizer.state[second]["momentum_buffer"].clone()
    optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    assert torch.equal(optimizer.state[second]["momentum_buffer"], 0.95 * mean)  # it fades, as if it had been moved on
    assert third.isfinite().all() and not torch.equal(third, before[2])
