import pytest
import torch
from torch.nn import functional as F

from hybridlm.ops import blocks
from hybridlm.ops.conv1d import conv1d

D, K = 5, 4


def draw(t, b=2, k=K):
    torch.manual_seed(0)
    shapes = (b, t, D), (D, k), (D,), (b, k - 1, D)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def documents(t, b=2):
    return (torch.rand(b, t, generator=torch.Generator().manual_seed(t)) < 0.3).cumsum(-1)


def results(inputs, with_bias, with_state, **kwargs):
    x, weight, bias, state = (m.clone().requires_grad_() for m in inputs)
    y, final = conv1d(x, weight, bias if with_bias else None, initial_state=state if with_state else None, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(m.shape, dtype=m.dtype, generator=generator) for m in (y, final)]
    loss = (y * weigh[0]).sum() + (final * weigh[1]).sum()
    return y, final, *torch.autograd.grad(loss, [x, weight, *([bias] if with_bias else []), *([state] if with_state else [])])


def assert_all_close(these, those):
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elements", [1, 2 * D * 6, 2**20])  # blocks of K positions, of 6, all
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("t", [1, 2, K - 1, K, 13])
def test_eager_equals_naive_in_outputs_and_every_gradient(t, with_bias, with_state, packed, elements, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    seq_idx = documents(t) if packed else None
    eager, naive = (results(draw(t), with_bias, with_state, seq_idx=seq_idx, backend=b) for b in ("eager", "naive"))
    assert_all_close(eager, naive)


@pytest.mark.parametrize("t", [1, 9])
def test_bf16_is_rounded_once_at_the_end(t):
    x, weight, bias, state = (m.bfloat16() for m in draw(t, b=50))
    y, _ = conv1d(x, weight, bias, initial_state=state)
    exact, _ = conv1d(*(m.double() for m in (x, weight, bias)), initial_state=state.double(), backend="naive")
    assert y.dtype == torch.bfloat16 and ((y - exact).abs() <= 2**-8 * exact.abs()).all()  # half a unit in the last place


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_equals_torchs_own_causal_convolution(k, backend):
    x, weight, bias, _ = draw(9, k=k)
    y, _ = conv1d(x, weight, bias, backend=backend)
    own = F.silu(F.conv1d(F.pad(x.mT, (k - 1, 0)), weight[:, None], bias, groups=D)).mT
    torch.testing.assert_close(y, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [[1] * 11, [2, 1, 8], [5, 6], [3, 3, 3, 2]])
def test_pieces_that_hand_on_the_state_equal_the_whole(pieces):
    x, weight, bias, state = draw(11)
    y, final = conv1d(x, weight, bias, initial_state=state)
    parts = []
    for piece in x.split(pieces, dim=1):
        part, state = conv1d(piece, weight, bias, initial_state=state)
        parts.append(part)
    assert_all_close((torch.cat(parts, 1), state), (y, final))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 7, 3], [6, 1], [1, 6]])
def test_packed_documents_equal_each_run_alone(lengths):
    x, weight, bias, state = draw(sum(lengths), b=1)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    y, final = conv1d(x, weight, bias, initial_state=state, seq_idx=seq_idx)
    alone, first = [], state
    for document in x.split(lengths, dim=1):
        part, last = conv1d(document, weight, bias, initial_state=first, backend="naive")
        alone.append(part)
        first = None
    assert_all_close((y, final), (torch.cat(alone, 1), last))


@pytest.mark.parametrize("t", [1, 6])
def test_bf16_stays_bf16(t):
    x, weight, bias, state = (m.bfloat16() for m in draw(t))
    assert {m.dtype for m in conv1d(x, weight, bias, initial_state=state)} == {torch.bfloat16}


@pytest.mark.parametrize("t", [1, 2, 3, 9])
def test_the_state_holds_no_more_than_itself(t):
    x, weight, bias, state = draw(t)
    _, final = conv1d(x, weight, bias, initial_state=state)
    assert final.untyped_storage().nbytes() == final.nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 6)}, r"x must have shape \(b t d\)"),
        ({"x": torch.zeros(2, 0, D)}, "at least one token"),
        ({"weight": torch.zeros(D + 1, K)}, "weight must have shape"),
        ({"bias": torch.zeros(D + 1)}, "bias must have shape"),
        ({"initial_state": torch.zeros(2, K, D)}, r"initial_state must have shape \(b k-1 d\) with b=2, k-1=3, d=5"),
        ({"seq_idx": torch.zeros(2, 6)}, "seq_idx must be integers"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, "seq_idx must have shape"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message):
        conv1d(**dict(zip(("x", "weight", "bias", "initial_state"), draw(6))) | changes)
