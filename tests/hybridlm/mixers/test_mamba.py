import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hybridlm import HybridLMForCausalLM
from hybridlm.cache import HybridCache
from hybridlm.mixers.context import Context, Padding
from hybridlm.mixers.mamba import Mamba
from hybridlm.ops import build_ops

PATTERN = "m-M*mE-"
INNER, N, RANK = 48, 5, 2


@pytest.fixture
def mixer(tiny_config):
    def build(backend="auto", **changes):
        torch.manual_seed(0)
        made = Mamba(tiny_config(**changes), build_ops(backend))
        for p in (made.D, made.dt_bias, made.dt_proj.weight):
            torch.nn.init.normal_(p)
        torch.nn.init.uniform_(made.A_log, 0, 1)
        return made.double().requires_grad_(False)

    return build


def draw(b, t):
    return torch.randn(b, t, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(t))


def plainly(m, x, config, limit=(0.0, math.inf)):
    """The layer of one row, one token and one channel after the other: rows of in_proj in the order x, z, of x_proj dt, B, C."""
    c, inner, n = config, config.mamba_inner_size, config.ssm_state_size
    projected = x @ m.in_proj.weight.T + (0 if m.in_proj.bias is None else m.in_proj.bias)
    u, z = projected[:, :inner], projected[:, inner:]
    u = F.pad(u.T, (c.conv_kernel - 1, 0))
    u = F.silu(F.conv1d(u[None], m.conv1d.weight, m.conv1d.bias, groups=inner))[0].T
    low, B, C = (u @ m.x_proj.weight.T).split([c.mamba_rank, n, n], dim=-1)
    dt = torch.log1p(torch.exp(low @ m.dt_proj.weight.T + m.dt_bias)).clamp(*limit)
    outputs = torch.zeros(len(x), inner, dtype=x.dtype)
    for channel in range(inner):
        h = torch.zeros(n, dtype=x.dtype)
        for t in range(len(x)):
            h = torch.exp(-dt[t, channel] * m.A_log[channel].exp()) * h + dt[t, channel] * u[t, channel] * B[t]
            outputs[t, channel] = h @ C[t] + m.D[channel] * u[t, channel]
    return (outputs * z * torch.sigmoid(z)) @ m.out_proj.weight.T + (0 if m.out_proj.bias is None else m.out_proj.bias)


@pytest.mark.parametrize("backend", ["eager", "naive"])
@pytest.mark.parametrize(
    "changes", [{}, {"conv_kernel": 3, "use_bias": True, "time_step_rank": 3}, {"use_conv_bias": False, "n_groups": 3}]
)
def test_equals_the_layer_written_plainly(backend, changes, mixer, tiny_config):
    m, x = mixer(backend, **changes), draw(2, 9)
    y, _ = m(x, Context(), None)
    expected = torch.stack([plainly(m, row, tiny_config(**changes)) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_time_step_limit_clamps_every_pass(mixer, tiny_config):
    m, x = mixer(time_step_limit=(0.4, 0.9)), draw(1, 9)
    expected = plainly(m, x[0], tiny_config(), limit=(0.4, 0.9))
    torch.testing.assert_close(m(x, Context(), None)[0][0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stepwise(m, x, Context())[0][0], expected, rtol=1e-9, atol=1e-9)


def stepwise(m, x, context):
    steps, state = [], None
    for i in range(x.shape[1]):
        step, state = m(x[:, i : i + 1], context, state)
        steps.append(step)
    return torch.cat(steps, 1), state


@pytest.mark.parametrize("inference", [False, True])
def test_one_token_after_the_other_equals_the_full_pass(inference, mixer):
    m, x = mixer(), draw(2, 13)
    y, state = m(x, Context(), None)
    steps, after = stepwise(m, x, Context(inference=inference))
    for a, b in zip((steps, *after), (y, *state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 2, 8])
def test_pieces_that_hand_on_the_state_equal_the_whole(cut, mixer):
    m, x = mixer(), draw(2, 13)
    y, _ = m(x, Context(), None)
    first, state = m(x[:, :cut], Context(), None)
    second, _ = m(x[:, cut:], Context(), state)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_each_alone_and_do_not_see_each_other(mixer):
    m, x, lengths = mixer(), draw(1, 20), [6, 1, 2, 11]
    seq_idx = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    y, state = m(x, Context(seq_idx=seq_idx), None)
    for number in range(4):
        own = seq_idx[0] == number
        alone, last = m(x[:, own], Context(), None)
        torch.testing.assert_close(y[:, own], alone, rtol=1e-9, atol=1e-9)
        others = torch.where(own[:, None], x, x * 2 + 1)
        changed, _ = m(others, Context(seq_idx=seq_idx), None)
        assert torch.equal(changed[:, own], y[:, own]) and not torch.equal(changed, y)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_padding_anywhere_is_as_if_it_were_not_there(mixer):
    m, x = mixer(), draw(2, 12)
    absent = torch.zeros(2, 12, dtype=torch.bool)
    absent[0, [0, 1, 5]] = absent[1, [3, 4, 11]] = True
    y, state = m(x, Context(padding=Padding.where(absent)), None)
    for row in range(2):
        alone, last = m(x[row : row + 1, ~absent[row]], Context(), None)
        torch.testing.assert_close(y[row, ~absent[row]], alone[0], rtol=1e-9, atol=1e-9)
        for a, b in zip(state, last, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-9, atol=1e-9)
    x[absent] = 7.0
    assert torch.equal(m(x, Context(padding=Padding.where(absent)), None)[0][~absent], y[~absent])


@pytest.mark.parametrize("autocast", [True, False])
def test_the_step_size_is_taken_in_fp32_under_bf16(autocast, tiny_config):
    seen, ops = [], build_ops()
    spy = replace(
        ops, selective_scan=lambda x, dt, A, *rest, **kw: seen.append((dt, A)) or ops.selective_scan(x, dt, A, *rest, **kw)
    )
    m, x = Mamba(tiny_config(), spy).requires_grad_(False), torch.randn(1, 9, 32)
    for p in (m.A_log, m.D, m.dt_bias):
        torch.nn.init.uniform_(p, -2, 2)
    projected = []
    m.dt_proj.register_forward_hook(lambda module, inputs, output: projected.append(output))
    m, x = (m, x) if autocast else (m.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        m(x, Context(), None)
    assert projected[0].dtype == torch.bfloat16
    ((dt, A),) = seen
    assert torch.equal(dt, F.softplus(projected[0].float() + m.dt_bias))
    assert torch.equal(A, -torch.exp(m.A_log)) and A.dtype == torch.float32


def test_the_state_has_the_shapes_of_convolution_and_scan(mixer):
    _, (conv, ssm) = mixer()(draw(2, 5), Context(), None)
    assert (conv.shape, ssm.shape) == ((2, 3, INNER), (2, INNER, N))


def test_parameters_have_the_names_and_shapes_of_mamba(mixer):
    assert {name: tuple(p.shape) for name, p in mixer(use_bias=True).named_parameters()} == {
        "A_log": (INNER, N),
        "D": (INNER,),
        "dt_bias": (INNER,),
        "in_proj.weight": (2 * INNER, 32),
        "in_proj.bias": (2 * INNER,),
        "conv1d.weight": (INNER, 1, 4),
        "conv1d.bias": (INNER,),
        "x_proj.weight": (RANK + 2 * N, INNER),
        "dt_proj.weight": (INNER, RANK),
        "out_proj.weight": (32, INNER),
        "out_proj.bias": (32,),
    }


def test_what_it_starts_from(tiny_config):
    config = tiny_config(hybrid_override_pattern="m", mamba_num_heads=64, time_step_rank=9, time_step_max=0.05)
    m = HybridLMForCausalLM(config).backbone.layers[0].mixer
    assert torch.equal(m.A_log, torch.tensor([1.0, 2, 3, 4, 5]).log().expand(512, 5)) and (m.D == 1).all()
    dt = F.softplus(m.dt_bias)
    assert 0.00099 < dt.min() < 0.0015 and 0.04 < dt.max() < 0.0501
    assert dt.log().mean().item() == pytest.approx((math.log(0.001) + math.log(0.05)) / 2, abs=0.2)
    assert 0.32 < m.dt_proj.weight.abs().max() <= 1 / 3
    assert m.dt_proj.weight.std().item() == pytest.approx(1 / 3 / 3**0.5, rel=0.05)
    assert m.x_proj.weight.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("rank", [0, 1.5, True, "2"])
def test_the_rank_is_a_size_or_null(rank, tiny_config):
    with pytest.raises(ValueError, match="time_step_rank must be null or a whole number"):
        tiny_config(time_step_rank=rank)
    assert [tiny_config(hidden_size=size).mamba_rank for size in (1, 16, 17)] == [1, 1, 2]
    assert tiny_config(time_step_rank=7).mamba_rank == 7


def test_a_model_trains_a_step_and_generates_the_same_with_and_without_cache(tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=PATTERN).train(), draw_ids(2, 19)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(ids, targets=ids).loss.sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    model.eval()
    with_cache, without = (model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_a_model_with_padding_and_documents_equals_each_alone(tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=PATTERN).double(), draw_ids(1, 17)
    alone = torch.cat([model(part).logits for part in ids.split([5, 12], 1)], 1)
    seq_idx = torch.tensor([[0] * 5 + [1] * 12])
    torch.testing.assert_close(model(ids, seq_idx=seq_idx).logits, alone, rtol=1e-9, atol=1e-9)
    mask = torch.ones(1, 17, dtype=torch.long)
    mask[:, [0, 7]] = 0
    cache = HybridCache(len(PATTERN))
    parts = [
        model(ids[:, s], attention_mask=mask[:, : s.stop], past_key_values=cache).logits for s in (slice(0, 9), slice(9, 17))
    ]
    kept = mask[0].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[:, kept], model(ids[:, kept]).logits, rtol=1e-9, atol=1e-9)


def test_a_saved_model_opens_again_with_fp32_where_it_matters(tiny_model, draw_ids, tmp_path):
    model, ids = tiny_model(hybrid_override_pattern=PATTERN, time_step_rank=3), draw_ids(1, 9)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert (told["model_type"], told["time_step_rank"]) == ("hybridlm", 3)
    assert torch.equal(HybridLMForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    for narrow in (model.to(torch.bfloat16), HybridLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        wide = {name.rpartition(".")[2] for name, p in narrow.named_parameters() if p.dtype == torch.float32}
        assert wide == {"A_log", "D", "dt_bias", *(["e_score_correction_bias"] if "e_score_correction_bias" in wide else [])}
        assert narrow(ids).logits.isfinite().all()


def test_a_stock_model_is_told_no_rank(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "time_step_rank" not in json.loads((tmp_path / "config.json").read_text())
