import pytest
import torch
from torch.nn import functional as F

from hybridlm.ops.cross_entropy import IGNORE
from hybridlm.ops.distillation import TopK, Whole, distillation, eager, largest

VOCABULARY, WIDTH = 11, 5
TEACHERS = ["whole", "top-3", "top-10", "all"]


def draw(b=3, t=7, dtype=torch.float64):
    torch.manual_seed(0)
    targets = torch.randint(0, VOCABULARY, (b, t))
    targets[0, 0] = targets[-1, -1] = targets[1, 2:5] = IGNORE
    return torch.randn(b, t, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype), targets


def teach(kind, temperature=1.0, dtype=torch.float64):
    """A teacher of another width than the student."""
    torch.manual_seed(1)
    whole = Whole(torch.randn(3, 7, 4, dtype=dtype), torch.randn(VOCABULARY, 4, dtype=dtype))
    k = {"whole": 0, "top-3": 3, "top-10": 10, "all": VOCABULARY}[kind]
    return top(whole, k, temperature) if k else whole


def top(whole, k, temperature=1.0):
    found = F.log_softmax(whole.hidden @ whole.weight.T / temperature, -1).topk(k)
    return TopK(found.indices.int(), found.values)


def results(hidden, weight, targets, teacher, **settings):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = distillation(hidden, weight, targets, teacher, **settings)
    weigh = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.dtype)
    return loss, *torch.autograd.grad((loss * weigh).sum(), [hidden, weight])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_blocks_of_any_size_equal_the_specification_in_outputs_and_gradients(rows, kind, temperature, monkeypatch):
    monkeypatch.setattr(eager, "block_rows", lambda vocabulary: rows)
    teacher = teach(kind, temperature)
    mine, spec = (results(*draw(), teacher, temperature=temperature, backend=name) for name in ("eager", "naive"))
    for a, b in zip(mine, spec, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    hidden, weight, targets = draw()
    cut = [one[:1, :3] for one in teacher]
    teacher = Whole(cut[0], teacher.weight) if kind == "whole" else TopK(*cut)
    inputs = [hidden[:1, :3].clone().requires_grad_(), weight.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda h, w: distillation(h, w, targets[:1, :3], teacher, temperature=temperature), inputs)


@pytest.mark.parametrize("backend", ["eager", "naive"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_torchs_own_divergence_times_the_temperature_squared(backend, temperature):
    hidden, weight, targets = draw()
    teacher = teach("whole")
    log_q, log_p = (F.log_softmax(h @ w.T / temperature, -1) for h, w in ((hidden, weight), teacher))
    want = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    got = distillation(hidden, weight, targets, teacher, temperature=temperature, backend=backend)
    torch.testing.assert_close(got, want.where(targets != IGNORE, 0))


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_the_rest_is_one_class(backend):
    """By hand: entries 0.5 and 0.25 of five tokens, of which the student gives each 0.2."""
    hidden, weight = torch.zeros(1, 1, 2, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    teacher = TopK(torch.tensor([[[3, 1]]]), torch.tensor([[[0.5, 0.25]]]).double().log())
    got = distillation(hidden, weight, torch.zeros(1, 1, dtype=torch.long), teacher, backend=backend)
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64)
    assert got.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_entries_are_the_whole_teacher_and_more_of_them_are_never_less_loss(temperature):
    ends = [results(*draw(), teach(kind, temperature), temperature=temperature) for kind in TEACHERS]
    for a, b in zip(ends[0], ends[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (ends[1][0] <= ends[2][0] + 1e-12).all() and (ends[2][0] <= ends[3][0] + 1e-12).all()


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_a_student_that_predicts_as_its_teacher_has_no_loss_and_no_gradient(kind, backend):
    hidden, weight, targets = draw()
    whole = Whole(hidden, weight)
    k = {"whole": 0, "top-3": 3, "top-10": 10, "all": VOCABULARY}[kind]
    for found in results(hidden, weight, targets, top(whole, k) if k else whole, backend=backend):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "naive"])
@pytest.mark.parametrize(("entries", "width"), [([0.6, 0.5], 4), ([1.0, 1e-30], 4), ([0.0, 0.0], 4), ([0.499, 0.499], 2)])
def test_rounding_that_leaves_nothing_or_less_for_the_rest_gives_numbers(entries, width, backend):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(width, 3, dtype=torch.float64)
    teacher = TopK(torch.tensor([[[1, 0]] * 2]), torch.tensor([[entries] * 2], dtype=torch.float64).log().half())
    if entries == [0.0, 0.0]:
        teacher.log_probs.fill_(-100)
    targets = torch.zeros(1, 2, dtype=torch.long)
    found = results(hidden, weight, targets, teacher, backend=backend)
    assert all(one.isfinite().all() for one in found)
    other = results(hidden, weight, targets, teacher, backend={"eager": "naive", "naive": "eager"}[backend])
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if entries == [0.6, 0.5]:
        scaled = TopK(teacher.ids, teacher.log_probs.double() - teacher.log_probs.double().logsumexp(-1, keepdim=True))
        torch.testing.assert_close(found[0], distillation(hidden, weight, targets, scaled, backend=backend))


def test_a_student_that_rules_the_rest_out_has_a_finite_gradient_back_to_it():
    hidden, weight = torch.tensor([[[1.0]]]), torch.tensor([[300.0], [0.0], [0.0]])
    teacher = TopK(torch.tensor([[[0]]]), torch.tensor([[[0.5]]]).log())
    loss, grad, _ = results(hidden, weight, torch.zeros(1, 1, dtype=torch.long), teacher)
    assert 140 < loss.item() < 150 and grad.isfinite().all() and grad.abs().item() > 10


@pytest.mark.parametrize("kind", ["whole", "top-3"])
@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_positions_without_a_target_have_no_loss_and_no_gradient(kind, backend):
    hidden, weight, targets = draw()
    loss, grad_hidden, _ = results(hidden, weight, targets, teach(kind), backend=backend)
    ignored = targets == IGNORE
    assert (loss[ignored] == 0).all() and (loss[~ignored] > 0).all()
    assert (grad_hidden[ignored] == 0).all() and (grad_hidden[~ignored] != 0).any(-1).all()
    for found in results(hidden, weight, torch.full_like(targets, IGNORE), teach(kind), backend=backend):
        assert (found == 0).all()


def test_no_more_than_a_block_of_logits_exists_at_once(monkeypatch):
    monkeypatch.setattr(eager, "block_rows", lambda vocabulary: 44 // vocabulary)
    seen, logits = [], eager._logits
    monkeypatch.setattr(eager, "_logits", lambda h, w, temperature: seen.append(len(h)) or logits(h, w, temperature))
    results(*draw(), teach("whole"))
    assert max(seen) == 2 and sum(seen) == 4 * 21  # both, forward and backward
    seen.clear()
    results(*draw(), teach("top-3"))
    assert max(seen) == 4 and sum(seen) == 2 * 21


def test_the_largest_are_those_of_all_logits_and_come_in_blocks(monkeypatch):
    monkeypatch.setattr(eager, "block_rows", lambda vocabulary: 4)
    whole = teach("whole")
    found, want = largest(whole, 3, 2.5), top(whole, 3, 2.5)
    assert torch.equal(found.ids, want.ids) and found.log_probs.shape == (3, 7, 3)
    torch.testing.assert_close(found.log_probs, want.log_probs)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = largest(Whole(*(one.float() for one in whole)), 3)
    assert torch.equal(narrow.log_probs, largest(Whole(*(one.bfloat16() for one in whole)), 3).log_probs)
    assert narrow.log_probs.dtype == torch.float32


@pytest.mark.parametrize("kind", ["whole", "top-3"])
def test_bf16_takes_the_softmax_in_fp32(kind):
    hidden, weight, targets = draw(dtype=torch.bfloat16)
    teacher = teach(kind, dtype=torch.bfloat16)
    loss, grad_hidden, grad_weight = results(hidden, weight, targets, teacher)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    wide = type(teacher)(*(one.double() if one.is_floating_point() else one for one in teacher))
    true = results(hidden.double(), weight.double(), targets, wide)
    torch.testing.assert_close(loss.double(), true[0], rtol=0.02, atol=0.03)
    torch.testing.assert_close(grad_weight.double(), true[2], rtol=0.03, atol=0.05)


@pytest.mark.parametrize("kind", ["whole", "top-3"])
def test_autocast_runs_both_heads_in_its_dtype_and_returns_fp32_gradients(kind):
    hidden, weight, targets = draw(dtype=torch.float32)
    teacher = teach(kind, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad_hidden, grad_weight = results(hidden, weight, targets, teacher)
    assert {loss.dtype, grad_hidden.dtype, grad_weight.dtype} == {torch.float32}
    narrow = Whole(*(one.bfloat16() for one in teacher)) if kind == "whole" else teacher
    assert torch.equal(loss, distillation(hidden.bfloat16(), weight.bfloat16(), targets, narrow))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(VOCABULARY, WIDTH + 1)}, "weight must have shape"),
        ({"targets": torch.zeros(3, 6, dtype=torch.long)}, "targets must have shape"),
        ({"hidden": torch.zeros(3, 0, WIDTH)}, "at least one token"),
        ({"teacher": Whole(torch.zeros(3, 7, 4), torch.zeros(VOCABULARY + 1, 4))}, r"teacher.weight must have .* with v=11, e=4"),
        ({"teacher": Whole(torch.zeros(3, 6, 4), torch.zeros(VOCABULARY, 4))}, "teacher.hidden must have shape"),
        ({"teacher": TopK(torch.zeros(3, 7, 2).long(), torch.zeros(3, 7, 3))}, "teacher.log_probs must have shape"),
        (
            {"teacher": TopK(torch.zeros(3, 7, 12).long(), torch.zeros(3, 7, 12))},
            "12 entries a token, .* only 11",
        ),
        ({"temperature": 0.0}, "temperature must be a number above 0; got 0.0"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_it(changes, message):
    names = ("hidden", "weight", "targets", "teacher")
    with pytest.raises(ValueError, match=message):
        distillation(**dict(zip(names, (*draw(), teach("whole")))) | changes)
