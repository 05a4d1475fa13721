import pytest
import torch
from torch import nn

from hybridlm import HybridLMForCausalLM
from hybridlm.mixers import MIXERS
from hybridlm.mixers.context import Context, Padding
from hybridlm.ops import build_ops
from hybridlm.twin import count_parameters, parameters_by_kind

KINDS = {"r": {}, "r relu": {"rnn_activation": "relu"}, "l": {}, "g": {}}
GATES = {"r": 1, "l": 4, "g": 3}
SIZE = 20  # of the state, beside a residual stream of 32


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def mixer(kind, tiny_config):
    torch.manual_seed(0)
    config = tiny_config(recurrent_size=SIZE, use_bias=True, **KINDS[kind])
    made = MIXERS[kind[0]](config, build_ops()).double().requires_grad_(False)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def plainly(m, kind, x):
    """The layer of one row (t d), one token after the other, from the equations of the papers."""
    w_ih, w_hh, b_ih, b_hh = (m.cell.weight_ih, m.cell.weight_hh, m.cell.bias_ih, m.cell.bias_hh)
    h, c = x.new_zeros(SIZE), x.new_zeros(SIZE)
    logistic = lambda z: 1 / (1 + torch.exp(-z))  # noqa: E731
    outputs = []
    for token in x:
        i, r = w_ih @ token + b_ih, w_hh @ h + b_hh
        if kind == "l":
            enter, forget, new, out = (i + r).view(4, SIZE)
            c = logistic(forget) * c + logistic(enter) * torch.tanh(new)
            h = logistic(out) * torch.tanh(c)
        elif kind == "g":
            (reset_i, keep_i, new_i), (reset_r, keep_r, new_r) = i.view(3, SIZE), r.view(3, SIZE)
            keep = logistic(keep_i + keep_r)
            h = (1 - keep) * torch.tanh(new_i + logistic(reset_i + reset_r) * new_r) + keep * h
        else:
            h = torch.tanh(i + r) if kind == "r" else (i + r).clamp(min=0)
        outputs.append(m.out_proj.weight @ h + m.out_proj.bias)
    return torch.stack(outputs)


def test_equals_the_layer_written_plainly_in_outputs_and_every_gradient(kind, mixer):
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    mixer.requires_grad_(True)
    both = []
    for y in (mixer(x, Context(), None)[0], torch.stack([plainly(mixer, kind, row) for row in x])):
        both.append((y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_loop_of_steps_and_pieces_equal_the_full_pass(mixer):
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    y, final = mixer(x, Context(), None)
    for sizes in ([1] * 13, [5, 1, 7]):
        parts, state = [], None
        for piece in x.split(sizes, dim=1):
            part, state = mixer(piece, Context(inference=True), state)
            parts.append(part)
        for a, b in zip((torch.cat(parts, dim=1), *state), (y, *final), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_padding_anywhere_is_as_if_it_were_not_there(mixer):
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    absent = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    y, state = mixer(x, Context(padding=Padding.where(absent)), None)
    for row in range(2):
        alone, after = mixer(x[row, None, ~absent[row]], Context(), None)
        torch.testing.assert_close(y[row, ~absent[row]], alone[0], rtol=1e-9, atol=1e-9)
        for a, b in zip(state, after, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-9, atol=1e-9)


def test_what_a_document_says_changes_no_bit_of_another(mixer):
    mixer, x = mixer.float(), torch.randn(2, 24, 32)
    seq_idx = torch.tensor([[0] * 9 + [1] * 7 + [2] * 8, [4] * 3 + [5] * 20 + [6]])
    y, (h, *_) = mixer(x, Context(seq_idx=seq_idx), None)
    other, (same_h, *_) = mixer(torch.where((seq_idx == 1)[..., None], x + 1, x), Context(seq_idx=seq_idx), None)
    assert torch.equal(y[seq_idx != 1], other[seq_idx != 1]) and not torch.equal(y[seq_idx == 1], other[seq_idx == 1])
    assert torch.equal(h, same_h)


@pytest.mark.parametrize("symbol", GATES)
def test_parameters_are_those_of_the_formulas_and_torchs_second_bias(symbol, tiny_config):
    """RNN: d_h (d_x + d_h + 1); LSTM 4 times, GRU 3 times as many; then the projection."""
    config = tiny_config(hybrid_override_pattern=symbol, recurrent_size=SIZE)
    model = HybridLMForCausalLM(config)
    mixer = model.backbone.layers[0].mixer
    second_bias = mixer.cell.bias_hh.numel()
    assert sum(p.numel() for p in mixer.cell.parameters()) == GATES[symbol] * SIZE * (32 + SIZE + 1) + second_bias
    assert second_bias == GATES[symbol] * SIZE
    assert parameters_by_kind(config)[symbol] == 32 + sum(p.numel() for p in mixer.parameters())
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_first_weights(tiny_config):
    model = HybridLMForCausalLM(tiny_config(hybrid_override_pattern="rlg", recurrent_size=SIZE, lstm_forget_bias=2.5))
    eye = torch.eye(SIZE)
    for block in model.backbone.layers:
        cell = block.mixer.cell
        for gate in cell.weight_hh.detach().split(SIZE):
            torch.testing.assert_close(gate @ gate.T, eye)
            assert not torch.allclose(gate, eye)
        assert cell.bias_hh.abs().max() == 0
        bound = (6 / sum(cell.weight_ih.shape)) ** 0.5
        assert 0.8 * bound < cell.weight_ih.abs().max() <= bound
    r, l, g = (block.mixer.cell.bias_ih for block in model.backbone.layers)
    assert r.abs().max() == g.abs().max() == 0
    assert torch.equal(l, torch.tensor([0.0, 2.5, 0, 0]).repeat_interleave(SIZE))
    relu = HybridLMForCausalLM(tiny_config(hybrid_override_pattern="r", rnn_activation="relu"))
    assert torch.equal(relu.backbone.layers[0].mixer.cell.weight_hh, torch.eye(32))


def test_a_folder_keeps_the_model_and_is_of_model_type_hybridlm(tmp_path, tiny_config, draw_ids):
    model = HybridLMForCausalLM(tiny_config(hybrid_override_pattern="rMl-g*", recurrent_size=SIZE, rnn_activation="relu")).eval()
    model.save_pretrained(tmp_path)
    assert '"model_type": "hybridlm"' in (tmp_path / "config.json").read_text()
    again = HybridLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(draw_ids(2, 9)).logits, model(draw_ids(2, 9)).logits)
    ids = draw_ids(2, 9)
    cached, whole = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    narrow = HybridLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = narrow(ids, use_cache=True)
    assert {part.dtype for i in (0, 2, 4) for part in out.past_key_values.states[i]} == {torch.float32}
