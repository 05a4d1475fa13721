import pytest
import torch

from hybridlm.mixers import attention
from hybridlm.mixers.attention import Attention, rotary, rotate
from hybridlm.mixers.context import Context
from hybridlm.ops import build_ops, precision


@pytest.fixture
def mixer(tiny_config):
    def build(**changes):
        torch.manual_seed(0)
        config = tiny_config(**changes)
        config._attn_implementation = "sdpa"  # as a model sets it
        return Attention(config, build_ops()).double().requires_grad_(False)

    return build


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "attention_bias": True}])
def test_equals_softmax_attention_written_plainly(changes, mixer):
    m, x = mixer(**changes), torch.randn(7, 32, dtype=torch.float64)
    y, _ = m(x[None], Context(), None)
    heads_of_a_key = 4 // changes.get("num_key_value_heads", 2)
    outputs = []
    for head in range(4):
        s, kv = slice(8 * head, 8 * head + 8), slice(8 * (head // heads_of_a_key), 8 * (head // heads_of_a_key) + 8)
        q, k, v = m.q_proj(x)[:, s], m.k_proj(x)[:, kv], m.v_proj(x)[:, kv]
        scores = (q @ k.T / 8**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(y[0], m.o_proj(torch.cat(outputs, -1)), rtol=1e-9, atol=1e-9)


def test_the_state_is_every_key_and_value(mixer):
    m, x = mixer(), torch.randn(2, 6, 32, dtype=torch.float64)
    _, whole = m(x, Context(), None)
    _, state = m(x[:, :4], Context(), None)
    _, state = m(x[:, 4:5], Context(past=4), state)
    _, state = m(x[:, 5:], Context(past=5), state)
    assert whole[0].shape == (2, 2, 6, 8)
    for a, b in zip(state, whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rope_turns_pairs_of_channels_by_position_times_frequency():
    cos, sin = rotary(torch.tensor([[0, 3, 5]]), 8, 100.0)
    x = torch.randn(1, 2, 3, 8)
    y = rotate(x, cos, sin)
    for t, position in enumerate((0, 3, 5)):
        for i in range(4):
            turn = torch.polar(torch.tensor(1.0), torch.tensor(position * 100.0 ** (-2 * i / 8)))
            expected = torch.complex(x[0, :, t, i], x[0, :, t, i + 4]) * turn
            torch.testing.assert_close(torch.complex(y[0, :, t, i], y[0, :, t, i + 4]), expected, rtol=1e-5, atol=1e-5)


def test_rope_scores_depend_on_the_difference_of_positions_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i, j):
        return (rotate(q, *rotary(torch.tensor([[i]]), 8, 100.0)) * rotate(k, *rotary(torch.tensor([[j]]), 8, 100.0))).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_rope_keeps_the_dtype():
    assert rotate(torch.randn(1, 1, 2, 8).bfloat16(), *rotary(torch.arange(2)[None], 8, 1e4)).dtype == torch.bfloat16


def test_autocast_does_not_narrow_what_is_wide_on_purpose(mixer, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    seen, own = [], attention.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append((args[0].dtype, torch.is_autocast_enabled("cpu")))
        return own(*args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        mixer().float()(torch.randn(2, 9, 32), Context(), None)
    assert seen == [(torch.float32, False)]


@pytest.mark.parametrize("units", [False, True])
def test_the_scores_of_one_token_are_not_rounded_to_bf16(units, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: units)
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, heads, t, 8).mul(scale).bfloat16() for heads, t, scale in ((4, 1, 10), (2, 50, 1), (2, 50, 1)))
    y, exact = (attention.sdpa(*inputs, Context()) for inputs in ((q, k, v), (q.double(), k.double(), v.double())))
    assert (y - exact).abs().max() < 2**-8 * exact.abs().max()
