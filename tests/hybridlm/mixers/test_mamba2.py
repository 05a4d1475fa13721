import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hybridlm.mixers.context import Context
from hybridlm.mixers.mamba2 import Mamba2
from hybridlm.ops import build_ops


@pytest.fixture
def mixer(tiny_config):
    def build(backend="auto", **changes):
        torch.manual_seed(0)
        made = Mamba2(tiny_config(**changes), build_ops(backend))
        for p in (made.D, made.dt_bias, made.norm.weight):
            torch.nn.init.normal_(p)
        torch.nn.init.uniform_(made.A_log, 0, 1)
        return made.double().requires_grad_(False)

    return build


def plainly(m, x, config, limit=(0.0, math.inf)):
    """The layer of one row, one token and one head after the other: rows of in_proj in the order z, x, B, C, dt."""
    c, inner, gn = config, config.mamba_inner_size, config.n_groups * config.ssm_state_size
    z, u, B, C, dt = m.in_proj(x).split([inner, inner, gn, gn, c.mamba_num_heads], dim=-1)
    xBC = F.pad(torch.cat([u, B, C], -1).T, (c.conv_kernel - 1, 0))
    xBC = F.silu(F.conv1d(xBC[None], m.conv1d.weight, m.conv1d.bias, groups=xBC.shape[0]))[0].T
    u, B, C = xBC.split([inner, gn, gn], dim=-1)
    dt = torch.log1p(torch.exp(dt + m.dt_bias)).clamp(*limit)
    outputs = torch.zeros(len(x), inner, dtype=x.dtype)
    for head in range(c.mamba_num_heads):
        group = head // (c.mamba_num_heads // c.n_groups)
        channels = slice(head * c.mamba_head_dim, (head + 1) * c.mamba_head_dim)
        rows = slice(group * c.ssm_state_size, (group + 1) * c.ssm_state_size)
        h = torch.zeros(c.mamba_head_dim, c.ssm_state_size, dtype=x.dtype)
        for t in range(len(x)):
            h = torch.exp(-dt[t, head] * m.A_log[head].exp()) * h + dt[t, head] * torch.outer(u[t, channels], B[t, rows])
            outputs[t, channels] = h @ C[t, rows] + m.D[head] * u[t, channels]
    gated = (outputs * F.silu(z)).view(len(x), c.n_groups, -1)
    normed = gated / (gated.square().mean(-1, keepdim=True) + c.layer_norm_epsilon).sqrt()
    return m.out_proj(normed.flatten(1) * m.norm.weight)


@pytest.mark.parametrize("backend", ["eager", "naive"])
@pytest.mark.parametrize("changes", [{}, {"n_groups": 3, "conv_kernel": 3, "use_bias": True}, {"use_conv_bias": False}])
def test_equals_the_layer_written_plainly(backend, changes, mixer, tiny_config):
    m, x = mixer(backend, **changes), torch.randn(2, 11, 32, dtype=torch.float64)
    y, _ = m(x, Context(), None)
    expected = torch.stack([plainly(m, row, tiny_config(**changes)) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_time_step_limit_clamps_every_pass(mixer, tiny_config):
    m, x = mixer(time_step_limit=(0.4, 0.9)), torch.randn(1, 11, 32, dtype=torch.float64)
    y, _ = m(x, Context(), None)
    expected = plainly(m, x[0], tiny_config(), limit=(0.4, 0.9))
    torch.testing.assert_close(y[0], expected, rtol=1e-9, atol=1e-9)
    steps, state = [], None
    for i in range(11):
        step, state = m(x[:, i : i + 1], Context(), state)
        steps.append(step[0, 0])
    torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_step_size_is_taken_in_fp32_under_bf16(autocast, tiny_config):
    seen, ops = [], build_ops()
    spy = replace(ops, ssd=lambda x, dt, A, *rest, **kwargs: seen.append((dt, A)) or ops.ssd(x, dt, A, *rest, **kwargs))
    m, x = Mamba2(tiny_config(), spy).requires_grad_(False), torch.randn(1, 9, 32)
    for p in (m.A_log, m.D, m.dt_bias):
        torch.nn.init.uniform_(p, -2, 2)
    m, x = (m, x) if autocast else (m.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        projected = m.in_proj(x)[..., -6:]
        m(x, Context(), None)
    assert projected.dtype == torch.bfloat16
    ((dt, A),) = seen
    assert torch.equal(dt, F.softplus(projected.float() + m.dt_bias))
    assert torch.equal(A, -torch.exp(m.A_log)) and A.dtype == torch.float32


def test_the_state_has_the_shapes_of_convolution_and_ssd(mixer):
    _, (conv, ssm) = mixer()(torch.randn(2, 5, 32, dtype=torch.float64), Context(), None)
    assert (conv.shape, ssm.shape) == ((2, 3, 48 + 2 * 2 * 5), (2, 6, 8, 5))


def test_parameters_have_the_names_and_shapes_of_nemotron_h(mixer):
    assert {name: tuple(p.shape) for name, p in mixer(use_bias=True).named_parameters()} == {
        "A_log": (6,),
        "D": (6,),
        "dt_bias": (6,),
        "in_proj.weight": (48 + 68 + 6, 32),
        "in_proj.bias": (48 + 68 + 6,),
        "conv1d.weight": (68, 1, 4),
        "conv1d.bias": (68,),
        "norm.weight": (48,),
        "out_proj.weight": (32, 48),
        "out_proj.bias": (32,),
    }
