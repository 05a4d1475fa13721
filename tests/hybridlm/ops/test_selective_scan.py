from functools import cache

import pytest
import torch
from torch.nn.functional import softplus

from hybridlm.ops.selective_scan import eager, selective_scan, selective_scan_step

CHANNELS, STATE = 6, 5
# Positions of a block at least and at most, and from how many elements of a position on it is one chunk.
BLOCKS = {"one chunk": (16, 2**18, 1), "chunks": (16, 2**18, 2**13), "short blocks": (3, 1, 1), "of chunks": (7, 1, 2**13)}


@pytest.fixture
def cut(monkeypatch):
    """Sets how time is cut up on a CPU: a key of BLOCKS."""

    def set_sizes(name):
        for constant, value in zip(("CPU_LEAST", "CPU_ELEMENTS", "CPU_STEP"), BLOCKS[name], strict=True):
            monkeypatch.setattr(eager, constant, value)

    return set_sizes


def draw(t, b=2, d=CHANNELS, n=STATE, dtype=torch.float64):
    """x, dt, A, B, C, D, initial_state of one call."""
    torch.manual_seed(0)
    x, dt = torch.randn(b, t, d, dtype=dtype), softplus(torch.randn(b, t, d, dtype=dtype))
    A = -torch.empty(d, n, dtype=dtype).uniform_(0.1, 4)
    B, C = torch.randn(b, t, n, dtype=dtype), torch.randn(b, t, n, dtype=dtype)
    return x, dt, A, B, C, torch.randn(d, dtype=dtype), torch.randn(b, d, n, dtype=dtype)


def documents(t, b=2):
    """Rows that change document at other places each, at about every third token."""
    return (torch.rand(b, t, generator=torch.Generator().manual_seed(t)) < 0.3).cumsum(-1)


def run(inputs, **kwargs):
    *core, D, state = inputs
    return selective_scan(*core, D=D, initial_state=state, **kwargs)


def results(inputs, with_state=True, **kwargs):
    """y, the final state, and the gradient of every input of a random linear loss in both."""
    *core, D, state = (m.clone().requires_grad_() for m in inputs)
    y, final = run([*core, D, state if with_state else None], **kwargs)
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(m.shape, dtype=torch.float64, generator=generator).to(m) for m in (y, final)]
    loss = (y * weigh[0]).sum() + (final * weigh[1]).sum()
    return y, final, *torch.autograd.grad(loss, [*core, D, *([state] if with_state else [])])


def assert_all_close(these, those, tolerance=1e-9):
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def case(t, with_state, packed, backend):
    return results(draw(t), with_state, seq_idx=documents(t) if packed else None, backend=backend)


@cache
def naive_case(t, with_state, packed):
    return case(t, with_state, packed, "naive")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("t", [1, 2, 7, 65, 130])
@pytest.mark.parametrize("name", BLOCKS)
def test_eager_equals_naive_in_outputs_and_every_gradient(name, t, with_state, packed, cut):
    cut(name)
    assert_all_close(case(t, with_state, packed, "eager"), naive_case(t, with_state, packed))


@pytest.mark.parametrize(("b", "d", "n"), [(1, 1, 1), (3, 1, 4), (1, 7, 1)])
def test_sizes_of_one(b, d, n):
    assert_all_close(*(results(draw(9, b, d, n), backend=backend) for backend in ("eager", "naive")))


@pytest.mark.parametrize(
    ("step", "t", "cpu", "expected"),
    [
        (2**14, 512, True, (16, 1)),  # what fits a cache, a position at a time
        (2**11, 512, True, (128, 8)),
        (2**20, 512, True, (16, 1)),  # a state is kept for each block
        (60, 100, True, (100, 10)),
        (60, 1, True, (1, 1)),
        (2**20, 9999, False, (256, 16)),
    ],
)
def test_how_time_is_cut_up(step, t, cpu, expected):
    assert eager.sizes(step, t, cpu) == expected


@pytest.mark.parametrize("of_y", [True, False])
def test_backward_needs_only_one_of_the_results(of_y):
    gradients = []
    for backend in ("eager", "naive"):
        inputs = [m.requires_grad_() for m in draw(11)]
        loss = run(inputs, backend=backend)[not of_y].square().sum()
        gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    assert_all_close(*gradients)


def test_without_D_the_gradients_are_those_of_naive():
    gradients = []
    for backend in ("eager", "naive"):
        *core, _, _ = (m.requires_grad_() for m in draw(11))
        gradients.append(torch.autograd.grad(selective_scan(*core, backend=backend)[0].square().sum(), core))
    assert_all_close(*gradients)


def test_naive_is_the_recurrence():
    inputs = draw(3, b=1)
    x, dt, A, B, C, D, state = (m[0] if m.dim() == 3 else m for m in inputs)
    y, final = run(inputs, backend="naive")
    for channel in range(CHANNELS):
        for row in range(STATE):
            h = state[channel, row]
            for i in range(3):
                h = torch.exp(dt[i, channel] * A[channel, row]) * h + dt[i, channel] * x[i, channel] * B[i, row]
            torch.testing.assert_close(final[0, channel, row], h)
    torch.testing.assert_close(y[0, -1], final[0] @ C[-1] + D * x[-1])


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_a_loop_of_steps_equals_the_full_pass(backend):
    x, dt, A, B, C, D, state = inputs = draw(13)
    y, final = run(inputs, backend="eager")
    steps = []
    for i in range(13):
        step, state = selective_scan_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], state, D=D, backend=backend)
        steps.append(step)
    assert_all_close((torch.stack(steps, 1), state), (y, final))


@pytest.mark.parametrize("with_D", [False, True])
def test_a_step_equals_naive_in_outputs_and_every_gradient(with_D):
    both = []
    for backend in ("eager", "naive"):
        x, dt, A, B, C, D, state = (m.requires_grad_() for m in draw(1))
        given = (x, dt, A, B, C, state, *([D] if with_D else []))
        token = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
        found = selective_scan_step(*token, D=D if with_D else None, backend=backend)
        both.append((*found, *torch.autograd.grad(sum(m.square().sum() for m in found), given)))
    assert_all_close(*both)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_step_writes_the_state_over_only_when_told(overwrite):
    x, dt, A, B, C, D, state = draw(1)
    before = state.clone()
    _, after = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D, overwrite=overwrite)
    assert (after.data_ptr() == state.data_ptr()) == overwrite and torch.equal(state, before) != overwrite


@pytest.mark.parametrize("backend", ["eager", "naive"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_document_is_as_if_alone_to_the_bit_whatever_is_in_the_others(name, backend, cut):
    cut(name)
    lengths = [5, 1, 14, 2, 19]
    inputs = draw(41, b=1)
    seq_idx = torch.arange(5).repeat_interleave(torch.tensor(lengths))[None] * 3 - 4
    y, final = run(inputs, seq_idx=seq_idx, backend=backend)
    for number in range(len(lengths)):
        own = seq_idx[0] == number * 3 - 4
        others = [m.clone() for m in inputs]
        for m in (others[i] for i in (0, 1, 3, 4)):
            m[:, ~own] = m[:, ~own] * 1.7 + 0.1
        if number:
            others[-1] *= 100
        other_y, other_final = run(others, seq_idx=seq_idx, backend=backend)
        assert torch.equal(y[:, own], other_y[:, own])
        assert torch.equal(final, other_final) == (number == 4)
        state = inputs[-1] if number == 0 else None  # the initial state is of the first document
        x, dt, A, B, C, D, _ = inputs
        alone = selective_scan(x[:, own], dt[:, own], A, B[:, own], C[:, own], D=D, initial_state=state, backend="naive")
        assert_all_close((y[:, own], *([final] if number == 4 else [])), alone[: 2 if number == 4 else 1])


@pytest.mark.parametrize("cut_at", [1, 9, 24])
def test_pieces_that_hand_on_the_state_equal_the_whole(cut_at):
    x, dt, A, B, C, D, state = inputs = draw(25)
    y, final = run(inputs)
    parts = []
    for s in (slice(None, cut_at), slice(cut_at, None)):
        part, state = selective_scan(x[:, s], dt[:, s], A, B[:, s], C[:, s], D=D, initial_state=state)
        parts.append(part)
    assert_all_close((torch.cat(parts, 1), state), (y, final))


@pytest.mark.parametrize("name", BLOCKS)
def test_documents_are_apart_where_A_has_underflowed_to_0(name, cut):
    cut(name)
    inputs = draw(20)
    inputs[2].zero_()
    assert_all_close(*(results(inputs, seq_idx=documents(20), backend=backend) for backend in ("eager", "naive")))


def error(a, b):
    return ((a.double() - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_bf16_inputs_keep_fp32_sums_and_state(backend):
    x, dt, A, B, C, D, state = draw(50, dtype=torch.float32)
    narrow = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D, state]
    y, final, *gradients = results(narrow, backend=backend)
    true_y, true_final, *true = results([m.double() for m in narrow], backend="naive")
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert [m.dtype for m in gradients] == [m.dtype for m in narrow]
    assert error(y, true_y) < 0.004  # one rounding
    assert error(final, true_final) < 1e-6
    assert all(error(a, b) < 0.02 for a, b in zip(gradients, true, strict=True))
    token = [m[:, 0] for m in (narrow[0], dt)], [m[:, 0] for m in (narrow[3], narrow[4])]
    step, after = selective_scan_step(*token[0], A, *token[1], state, D=D, backend=backend)
    assert (step.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert error(step, true_y[:, 0]) < 0.004


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_autocast_changes_nothing(backend):
    inputs = draw(9, dtype=torch.float32)
    x, dt, A, B, C, D, state = inputs
    token = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    plain = *run(inputs, backend=backend), *selective_scan_step(*token, D=D, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = *run(inputs, backend=backend), *selective_scan_step(*token, D=D, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("packed", [False, True])
def test_decays_that_vanish_leave_finite_and_right_results(name, packed, cut):
    """Cumulative decays of 0, which a quotient would make infinite; at padding steps of 0."""
    cut(name)
    inputs = [*draw(40)]
    inputs[1] = inputs[1] * torch.tensor([0.0, 1e-4, 1.0, 1e4]).repeat(10)[None, :, None]
    inputs[2] = inputs[2] * torch.logspace(-30, 5, STATE)
    seq_idx = documents(40) if packed else None
    found = results(inputs, seq_idx=seq_idx, backend="eager")
    assert all(m.isfinite().all() for m in found)
    for a, b in zip(found, results(inputs, seq_idx=seq_idx, backend="naive"), strict=True):
        assert error(a, b) < 1e-9


def call(**changes):
    names = ("x", "dt", "A", "B", "C", "D", "initial_state")
    return selective_scan(**dict(zip(names, draw(5, dtype=torch.float32))) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x must have shape \(b t d\)"),
        ({"dt": torch.ones(2, 5, 1)}, r"dt must have shape \(b t d\) with b=2, t=5, d=6; got \(2, 5, 1\)"),
        ({"A": -torch.ones(6)}, r"A must have shape \(d n\)"),
        ({"C": torch.zeros(2, 5, 4)}, r"C must have shape"),
        ({"D": torch.ones(1)}, r"D must have shape"),
        ({"initial_state": torch.zeros(2, 5, 6)}, r"state must have shape \(b d n\)"),
        ({"dt": torch.ones(2, 5, 6).bfloat16()}, "dt must be float32"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx must be integers"),
        ({"seq_idx": torch.zeros(2, 4, dtype=torch.long)}, "seq_idx must have shape"),
        ({"backend": "triton"}, "ops.backend must be one of"),
        ({"backend": "fused"}, r"ops\.backend=fused"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_an_empty_sequence_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        selective_scan(*draw(0)[:5])


def test_a_step_checks_its_shapes():
    x, dt, A, B, C, _, state = draw(1)
    with pytest.raises(ValueError, match="state must have shape"):
        selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state[:1])
