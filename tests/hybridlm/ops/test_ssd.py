import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from hybridlm.ops.ssd import eager as eager_ssd
from hybridlm.ops.ssd import ssd, ssd_step

Q = 4
HEADS, GROUPS, HEAD_DIM, STATE = 6, 2, 3, 5


def draw(t, b=2, seed=0, dtype=torch.float64):
    """x, dt, A, B, C, D, initial_state of one call."""
    torch.manual_seed(seed)
    x = torch.randn(b, t, HEADS, HEAD_DIM, dtype=dtype)
    dt = softplus(torch.randn(b, t, HEADS, dtype=dtype))
    A = -torch.empty(HEADS, dtype=dtype).uniform_(0.1, 4)
    B, C = torch.randn(b, t, GROUPS, STATE, dtype=dtype), torch.randn(b, t, GROUPS, STATE, dtype=dtype)
    return x, dt, A, B, C, torch.randn(HEADS, dtype=dtype), torch.randn(b, HEADS, HEAD_DIM, STATE, dtype=dtype)


def documents(t, b=2, seed=0):
    """Rows that change document at other places each, at about every third token."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(b, t, generator=generator) < 0.3).cumsum(-1)


def results(inputs, with_state, **kwargs):
    """y, the final state, and the gradient of every input of a random linear loss in both."""
    *core, D, state = (m.clone().requires_grad_() for m in inputs)
    y, final = ssd(*core, D=D, initial_state=state if with_state else None, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(m.shape, dtype=m.dtype, generator=generator) for m in (y, final)]
    loss = (y * weigh[0]).sum() + (final * weigh[1]).sum()
    return y, final, *torch.autograd.grad(loss, [*core, D, *([state] if with_state else [])])


def assert_all_close(these, those, tolerance=1e-9):
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("at_once", [1, 2, 100])  # chunks in a block
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("t", [1, Q - 1, Q, Q + 1, 3 * Q + 5])
def test_eager_equals_naive_in_outputs_and_every_gradient(t, with_state, packed, at_once, monkeypatch):
    monkeypatch.setattr(eager_ssd, "CPU_BLOCK", at_once * 2 * HEADS * Q * Q)
    inputs = draw(t)
    seq_idx = documents(t) if packed else None
    eager, naive = (results(inputs, with_state, seq_idx=seq_idx, chunk_size=Q, backend=b) for b in ("eager", "naive"))
    assert_all_close(eager, naive)


def test_a_cpu_takes_short_chunks_a_few_at_a_time_and_other_devices_all_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(eager_ssd, "blocks", lambda t, q, at_once: asked.append((q, at_once)) or [(slice(0, t), t)])
    monkeypatch.setattr(eager_ssd, "CPU_CHUNK", 8)
    monkeypatch.setattr(eager_ssd, "CPU_BLOCK", 3 * 2 * HEADS * 8 * 8)
    *core, _, _ = draw(40, dtype=torch.float32)
    ssd(*core, chunk_size=16)
    ssd(*(m.to("meta") for m in core), chunk_size=16)
    assert asked == [(8, 24), (16, 40 * 16)]


@pytest.mark.parametrize("of_y", [True, False])
def test_backward_needs_only_one_of_the_results(of_y):
    gradients = []
    for backend in ("eager", "naive"):
        *core, D, state = (m.requires_grad_() for m in draw(2 * Q + 3))
        y, final = ssd(*core, D=D, initial_state=state, chunk_size=Q, backend=backend)
        loss = y.square().sum() if of_y else final.square().sum()
        gradients.append(torch.autograd.grad(loss, [*core, D, state], allow_unused=True, materialize_grads=True))
    assert_all_close(*gradients)


def test_without_D_the_gradients_are_those_of_naive():
    gradients = []
    for backend in ("eager", "naive"):
        *core, _, _ = (m.requires_grad_() for m in draw(Q + 2))
        gradients.append(torch.autograd.grad(ssd(*core, chunk_size=Q, backend=backend)[0].square().sum(), core))
    assert_all_close(*gradients)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_step_writes_the_state_over_only_when_told(overwrite):
    x, dt, A, B, C, D, state = draw(1)
    before = state.clone()
    _, after = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D, overwrite=overwrite)
    assert (after.data_ptr() == state.data_ptr()) == overwrite and torch.equal(state, before) != overwrite


@pytest.mark.parametrize("with_D", [False, True])
def test_a_step_equals_naive_in_outputs_and_every_gradient(with_D):
    both = []
    for backend in ("eager", "naive"):
        x, dt, A, B, C, D, state = (m.requires_grad_() for m in draw(1))
        inputs = (x, dt, A, B, C, state, *([D] if with_D else []))
        found = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D if with_D else None, backend=backend)
        both.append((*found, *torch.autograd.grad(sum(m.square().sum() for m in found), inputs)))
    assert_all_close(*both)


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 20), q=st.integers(1, 24), seed=st.integers(0, 99), with_state=st.booleans(), packed=st.booleans())
def test_the_chunk_size_changes_nothing(t, q, seed, with_state, packed):
    inputs, seq_idx = draw(t, seed=seed), documents(t, seed=seed) if packed else None
    this, other = (results(inputs, with_state, seq_idx=seq_idx, chunk_size=size) for size in (q, 7))
    assert_all_close(this, other)


@pytest.mark.parametrize("backend", ["eager", "naive"])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_loop_of_steps_equals_the_full_pass(backend, with_state):
    x, dt, A, B, C, D, state = draw(3 * Q + 1)
    y, final = ssd(x, dt, A, B, C, D=D, initial_state=state if with_state else None, chunk_size=Q)
    state = state if with_state else torch.zeros_like(state)
    steps = []
    for i in range(x.shape[1]):
        step, state = ssd_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], state, D=D, backend=backend)
        steps.append(step)
    assert_all_close((torch.stack(steps, 1), state), (y, final))


@pytest.mark.parametrize("cut", [1, Q, Q + 2, 2 * Q])
def test_pieces_that_hand_on_the_state_equal_the_whole(cut):
    x, dt, A, B, C, D, state = draw(3 * Q + 1)
    y, final = ssd(x, dt, A, B, C, D=D, initial_state=state, chunk_size=Q)
    parts = []
    for s in (slice(None, cut), slice(cut, None)):
        part, state = ssd(x[:, s], dt[:, s], A, B[:, s], C[:, s], D=D, initial_state=state, chunk_size=Q)
        parts.append(part)
    assert_all_close((torch.cat(parts, 1), state), (y, final))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [Q, Q, 2], [3, 2 * Q + 1, 1], [2, 2, 3 * Q, 1, 1]])
def test_packed_documents_equal_each_run_alone(lengths):
    x, dt, A, B, C, D, state = draw(sum(lengths), b=1)
    seq_idx = torch.repeat_interleave(torch.arange(5, 5 + len(lengths)), torch.tensor(lengths))[None]
    y, final = ssd(x, dt, A, B, C, D=D, initial_state=state, seq_idx=seq_idx, chunk_size=Q)
    alone, start = [], 0
    for length in lengths:
        s = slice(start, start + length)
        first = state if start == 0 else None  # the initial state is of the first document
        part, last = ssd(x[:, s], dt[:, s], A, B[:, s], C[:, s], D=D, initial_state=first, backend="naive")
        alone.append(part)
        start += length
    assert_all_close((y, final), (torch.cat(alone, 1), last))


def test_naive_is_the_recurrence_with_neighbouring_heads_sharing_a_group():
    x, dt, A, B, C, D, state = draw(3, b=1)
    y, final = ssd(x, dt, A, B, C, D=D, initial_state=state, backend="naive")
    for head in range(HEADS):
        group, h = head // (HEADS // GROUPS), state[0, head]
        for i in range(3):
            h = torch.exp(dt[0, i, head] * A[head]) * h + dt[0, i, head] * torch.outer(x[0, i, head], B[0, i, group])
            torch.testing.assert_close(y[0, i, head], h @ C[0, i, group] + D[head] * x[0, i, head])
        torch.testing.assert_close(final[0, head], h)


def bf16_case(t):
    """bf16 x, B, C with fp32 dt, A, D and state, and the same numbers in float64."""
    x, dt, A, B, C, D, state = draw(t, dtype=torch.float32)
    narrow = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D, state]
    return narrow, [m.double() for m in narrow]


def run(inputs, **kwargs):
    *core, D, state = inputs
    return ssd(*core, D=D, initial_state=state, **kwargs)


def error(a, b):
    return ((a.double() - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_bf16_inputs_keep_an_fp32_state_and_stay_near_the_truth(backend):
    narrow, wide = bf16_case(50)
    (y, state), (true_y, true_state) = run(narrow, chunk_size=16, backend=backend), run(wide, backend="naive")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert error(y, true_y) < 0.02
    assert error(state, true_state) < 0.01


def test_a_bf16_step_keeps_an_fp32_state():
    (x, dt, A, B, C, D, state), (x64, dt64, A64, B64, C64, D64, state64) = bf16_case(1)
    y, after = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D)
    _, true = ssd_step(x64[:, 0], dt64[:, 0], A64, B64[:, 0], C64[:, 0], state64, D=D64)
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert error(after, true) < 1e-6


def test_the_decay_is_not_rounded_to_bf16():
    """A state that halves over 500 tokens: in bf16 the decay of one token would be 1, or 0.4% off each."""
    t = 500
    dt = torch.full((1, t, 1), 0.693 / t)
    x, B, C = torch.zeros(1, t, 1, 1).bfloat16(), torch.zeros(1, t, 1, 1).bfloat16(), torch.ones(1, t, 1, 1).bfloat16()
    _, state = ssd(x, dt, -torch.ones(1), B, C, initial_state=torch.ones(1, 1, 1, 1))
    assert state.item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_autocast_changes_nothing(backend):
    inputs = draw(2 * Q + 1, dtype=torch.float32)
    x, dt, A, B, C, D, state = inputs
    one = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    plain = *run(inputs, chunk_size=Q, backend=backend), *ssd_step(*one, D=D, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = *run(inputs, chunk_size=Q, backend=backend), *ssd_step(*one, D=D, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_bf16_rounds_dt_times_x_once_and_never_dt():
    torch.manual_seed(0)
    x, dt, ones = torch.randn(1, 1, 999, 1).bfloat16(), torch.rand(1, 1, 999), torch.ones(1, 1, 1, 1).bfloat16()
    _, state = ssd(x, dt, -torch.ones(999), ones, ones)
    true = x.double().flatten() * dt.double().flatten()
    assert ((state.flatten() - true).abs() <= 2**-8 * true.abs()).all()


def test_small_decays_after_a_large_dt_stay_accurate():
    inputs = [*draw(40, dtype=torch.float32)]
    inputs[1] = torch.full_like(inputs[1], 1e-3)
    inputs[1][:, 5] = 1e4
    y, state = run(inputs, chunk_size=32)
    true_y, true_state = run([m.double() for m in inputs], backend="naive")
    assert error(y[:, 6:], true_y[:, 6:]) < 1e-4
    assert error(y, true_y) < 1e-5
    assert error(state, true_state) < 1e-4


@pytest.mark.parametrize("t", [1, Q - 1, Q + 1, 3 * Q + 3])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_finite_at_any_length_and_with_a_large_A(t, packed):
    inputs = [*draw(t, dtype=torch.float32)]
    inputs[1], inputs[2] = inputs[1] * 30, inputs[2] * 1e5
    seq_idx = documents(t) if packed else None
    assert all(m.isfinite().all() for m in results(inputs, True, seq_idx=seq_idx, chunk_size=Q))


def test_a_decay_never_grows_however_the_cumulative_sum_rounds(monkeypatch):
    """Parallel sums (as on GPUs) round neighbours apart: their difference can come out positive."""
    inputs = [*draw(2 * Q, dtype=torch.float32)]
    inputs[1] = inputs[1] * 0
    inputs[1][:, 0] = 1e20
    cumsum = torch.Tensor.cumsum

    def rounding(m, dim):
        total = cumsum(m, dim)
        total[..., 1::2] *= 1 - 2**-52
        return total

    monkeypatch.setattr(torch.Tensor, "cumsum", rounding)
    y, state = run(inputs, chunk_size=Q)
    assert y.isfinite().all() and state.isfinite().all()


def call(**changes):
    names = ("x", "dt", "A", "B", "C", "D", "initial_state")
    arguments = dict(zip(names, draw(5, dtype=torch.float32))) | changes
    return ssd(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5, 6)}, r"x must have shape \(b t h p\)"),
        ({"dt": torch.ones(2, 4, 6)}, r"dt must have shape \(b t h\) with b=2, t=5, h=6; got \(2, 4, 6\)"),
        ({"A": -torch.ones(5)}, r"A must have shape \(h\) with h=6"),
        ({"C": torch.zeros(2, 5, 2, 4)}, r"C must have shape"),
        ({"D": torch.ones(1)}, r"D must have shape"),
        ({"initial_state": torch.zeros(2, 6, 5, 3)}, r"state must have shape \(b h p n\)"),
        ({"B": torch.zeros(2, 5, 4, 5), "C": torch.zeros(2, 5, 4, 5)}, "multiple of groups; got 6 heads and 4 groups"),
        ({"dt": torch.ones(2, 5, 6).bfloat16()}, "dt must be float32"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx must be integers"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.bool)}, "seq_idx must be integers"),
        ({"seq_idx": torch.zeros(2, 4, dtype=torch.long)}, "seq_idx must have shape"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"backend": "triton"}, "ops.backend must be one of"),
        ({"backend": "fused"}, r"ops\.backend=fused"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_an_empty_sequence_is_an_error():
    x, dt, A, B, C, _, _ = draw(0)
    with pytest.raises(ValueError, match="at least one token"):
        ssd(x, dt, A, B, C)


def test_a_step_checks_its_shapes():
    x, dt, A, B, C, D, state = draw(1)
    with pytest.raises(ValueError, match="state must have shape"):
        ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state[:1], D=D)
