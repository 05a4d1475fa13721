import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.ops.recurrent import GATES, recurrent
from hybridlm.ops.recurrent import eager as eager_recurrent

D, N = 5, 7
KINDS = [*GATES]


def draw(kind, t, b=3, seed=0, dtype=torch.float64):
    """x, the weights, the initial state."""
    torch.manual_seed(seed)
    k = GATES[kind]
    weights = [0.5 * torch.randn(shape, dtype=dtype) for shape in ((k * N, D), (k * N, N), (k * N,), (k * N,))]
    return torch.randn(b, t, D, dtype=dtype), weights, [torch.randn(b, N, dtype=dtype) for _ in range(1 + (kind == "lstm"))]


def documents(t, b=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(b, t, generator=generator) < 0.3).cumsum(-1)


def padding(t, b=3, seed=0):
    """Scattered over the rows; the second row has nothing else."""
    absent = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 0.4
    absent[1] = True
    return absent


def results(kind, inputs, with_state, **kwargs):
    """y, the final state, and the gradient of every input of a random linear loss in all of them."""
    x, weights, state = (inputs[0].clone().requires_grad_(), *([m.clone().requires_grad_() for m in part] for part in inputs[1:]))
    y, final = recurrent(kind, x, tuple(weights), initial_state=tuple(state) if with_state else None, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((m * torch.randn(m.shape, dtype=m.dtype, generator=generator)).sum() for m in (y, *final))
    wanted = [x, *weights, *(state if with_state else [])]
    return y, *final, *torch.autograd.grad(loss, wanted)


def assert_all_close(these, those, tolerance=1e-9):
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["plain", "packed", "padded"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("t", [1, 2, 7, 33])
def test_eager_equals_naive_in_outputs_and_every_gradient(kind, t, with_state, way):
    inputs = draw(kind, t)
    how = {"plain": {}, "packed": {"seq_idx": documents(t)}, "padded": {"absent": padding(t)}}[way]
    assert_all_close(*(results(kind, inputs, with_state, backend=backend, **how) for backend in ("eager", "naive")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_no_number_stays_in_the_rows_first_document(kind):
    x, weights, state = draw(kind, 7)
    seq_idx = (torch.arange(7) >= 3).long().expand(3, -1)
    lost = tuple(torch.full_like(part, torch.inf) for part in state)
    y, final = recurrent(kind, x, weights, initial_state=lost, seq_idx=seq_idx)
    expected, after = recurrent(kind, x, weights, initial_state=tuple(state), seq_idx=seq_idx)
    assert_all_close([y[:, 3:], *final], [expected[:, 3:], *after], 0)


def test_the_equations_are_those_of_torchs_modules():
    """Other code of torch's than the cells that the operator takes for a step."""
    modules = {
        "rnn_tanh": torch.nn.RNN(D, N, batch_first=True), "lstm": torch.nn.LSTM(D, N, batch_first=True),
        "gru": torch.nn.GRU(D, N, batch_first=True), "rnn_relu": torch.nn.RNN(D, N, nonlinearity="relu", batch_first=True),
    }  # fmt: skip
    for kind, module in modules.items():
        x = draw(kind, 9)[0]
        y, _ = recurrent(kind, x, tuple(module.double().parameters()), backend="naive")
        torch.testing.assert_close(y, module(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_a_loop_of_steps_equals_the_full_pass(kind, backend):
    x, weights, state = draw(kind, 13)
    y, final = recurrent(kind, x, weights, initial_state=tuple(state))
    steps, state = [], tuple(state)
    for i in range(13):
        step, state = recurrent(kind, x[:, i : i + 1], weights, initial_state=state, backend=backend)
        steps.append(step)
    assert_all_close((torch.cat(steps, dim=1), *state), (y, *final))


@settings(deadline=None, max_examples=20)
@given(t=st.integers(1, 40), seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_packed_documents_are_as_each_by_itself(t, seed, kind):
    (x, weights, state), seq_idx = draw(kind, t, seed=seed), documents(t, seed=seed)
    y, final = recurrent(kind, x, weights, initial_state=tuple(state), seq_idx=seq_idx)
    for row in range(len(x)):
        for document in seq_idx[row].unique():
            here = seq_idx[row] == document
            arrives = tuple(part[row, None] * (document == seq_idx[row, 0]) for part in state)
            alone, after = recurrent(kind, x[row, None, here], weights, initial_state=arrives, backend="naive")
            torch.testing.assert_close(y[row, here], alone[0], rtol=1e-9, atol=1e-9)
        assert_all_close([part[row] for part in final], [part[0] for part in after])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_document_says_changes_no_bit_of_another(kind, dtype):
    (x, weights, _), seq_idx = draw(kind, 40, dtype=dtype), documents(40)
    chosen = seq_idx == 4
    assert 0 < chosen.sum() < chosen.numel()
    before, after = (recurrent(kind, m, weights, seq_idx=seq_idx)[0] for m in (x, torch.where(chosen[..., None], x + 1, x)))
    assert torch.equal(before[~chosen], after[~chosen]) and not torch.equal(before[chosen], after[chosen])


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_from_one_document_to_another(kind):
    (x, weights, _), seq_idx = draw(kind, 40), documents(40)
    y, _ = recurrent(kind, x.requires_grad_(), weights, seq_idx=seq_idx)
    (gradient,) = torch.autograd.grad(y[seq_idx == 4].sum(), x)
    assert gradient[seq_idx != 4].abs().max() == 0 and gradient[seq_idx == 4].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_if_it_were_not_there(kind):
    (x, weights, state), absent = draw(kind, 21), padding(21)
    y, final = recurrent(kind, x, weights, initial_state=tuple(state), absent=absent)
    assert y[absent].abs().max() == 0
    assert_all_close([part[1] for part in final], [part[1] for part in state])  # of the row without a token
    for row in (0, 2):
        begin = tuple(part[row, None] for part in state)
        alone, after = recurrent(kind, x[row, None, ~absent[row]], weights, initial_state=begin, backend="naive")
        torch.testing.assert_close(y[row, ~absent[row]], alone[0], rtol=1e-9, atol=1e-9)
        assert_all_close([part[row] for part in final], [part[0] for part in after])


def test_each_power_of_two_is_one_call(monkeypatch):
    """Of documents of 5, 4 and 1 tokens: the first two have 4, the other and the rest of the first have 1. Nothing is padded."""
    shapes, together = [], eager_recurrent.together
    monkeypatch.setattr(
        eager_recurrent, "together", lambda kind, x, *rest: shapes.append(tuple(x.shape)) or together(kind, x, *rest)
    )
    x, weights, _ = draw("gru", 5, b=2)
    recurrent("gru", x, weights, seq_idx=torch.tensor([[0, 0, 0, 0, 0], [3, 3, 3, 3, 8]]))
    assert shapes == [(2, 4, D), (2, 1, D)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_the_recurrence_is_fp32(kind, autocast):
    x, weights, _ = draw(kind, 9, dtype=torch.float32)
    x = x.bfloat16()
    expected, state = recurrent(kind, x.float(), weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, final = recurrent(kind, x, weights)
    assert y.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in final)
    assert torch.equal(y, expected.bfloat16()) and all(torch.equal(a, b) for a, b in zip(final, state))
    _, after = recurrent(kind, x, [w.bfloat16() for w in weights], initial_state=final)
    assert all(part.dtype == torch.float32 for part in after)


BAD = {
    "kind must be one of rnn_tanh, rnn_relu, lstm, gru; got 'elman'": {"kind": "elman"},
    r"x must have shape \(b t d\); got \(3, 5\)": {"x": torch.zeros(3, 5)},
    r"W_hh must have shape \(kn n\) with kn=21, n=7; got \(28, 7\)": {"w_hh": torch.zeros(28, 7)},
    "x has no time steps": {"x": torch.zeros(3, 0, D)},
    r"the state of gru is \(h\); got 2 tensors": {"initial_state": (torch.zeros(3, N),) * 2},
    r"h must have shape \(b n\) with b=3, n=7; got \(2, 7\)": {"initial_state": (torch.zeros(2, N),)},
    r"seq_idx must have shape \(b t\)": {"seq_idx": torch.zeros(3, 4, dtype=torch.long)},
    "seq_idx must be integers": {"seq_idx": torch.zeros(3, 6)},
    r"absent must have shape \(b t\)": {"absent": torch.zeros(3, 4, dtype=torch.bool)},
    "seq_idx or absent, not both": {"seq_idx": documents(6), "absent": padding(6)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told(message):
    x, weights, _ = draw("gru", 6, dtype=torch.float32)
    given = {"kind": "gru", "x": x, "w_hh": weights[1], **BAD[message]}
    kind, x, weights[1] = given.pop("kind"), given.pop("x"), given.pop("w_hh")
    with pytest.raises(ValueError, match=message):
        recurrent(kind, x, weights, **given)
