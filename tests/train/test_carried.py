import pytest
import torch

from train import checkpoint, sharding
from train.carried import Carried
from train.optim import build_optimizers
from train.settings import Optim

# Two rows of 24 tokens: documents that end within windows of 8, at their border, and none at all.
DOCUMENTS = torch.tensor([[0] * 11 + [1] * 13, [0] * 8 + [1] * 3 + [2] * 13])
WINDOWS = [slice(i, i + 8) for i in (0, 8, 16)]


def continues(window):
    first = window.start
    return torch.zeros(2, dtype=torch.bool) if first == 0 else DOCUMENTS[:, first] == DOCUMENTS[:, first - 1]


def carried_over(model, x, micro_batch=2):
    """Logits of windows, one after the other, and what was carried."""
    starts = range(0, 2, micro_batch)
    carried = Carried(model.config.num_hidden_layers, [range(i, i + micro_batch) for i in starts], 2)
    logits = []
    for window in WINDOWS:
        batch = {"inputs_embeds": x[:, window], "seq_idx": DOCUMENTS[:, window], "continues": continues(window)}
        parts = [{name: value[i : i + micro_batch] for name, value in batch.items()} for i in starts]
        logits.append(torch.cat([model(**carried.hand_on(i, part)).logits for i, part in enumerate(parts)]))
        carried.advance()
    return torch.cat(logits, 1), carried


@pytest.fixture
def model(request, tiny_model):
    return tiny_model(hybrid_override_pattern=getattr(request, "param", "M-M-")).train()


every_kind = pytest.mark.parametrize("model", ["M-M-", "rl-gm"], indirect=True)


@pytest.fixture
def embedded(model, draw_ids):
    return model.get_input_embeddings()(draw_ids(2, 24)).detach()


@every_kind
@pytest.mark.parametrize("micro_batch", [2, 1])
def test_windows_that_carry_their_states_give_what_one_pass_gives(model, embedded, relative, micro_batch):
    logits, _ = carried_over(model, embedded, micro_batch)
    assert relative(logits, model(inputs_embeds=embedded, seq_idx=DOCUMENTS).logits) < 1e-5
    alone = torch.cat([model(inputs_embeds=embedded[:, w], seq_idx=DOCUMENTS[:, w]).logits for w in WINDOWS], 1)
    assert relative(logits[:, 8:11], alone[:, 8:11]) > 1e-2  # the first row's document reaches over the border …
    assert relative(logits[1, 8:16], alone[1, 8:16]) < 1e-5  # … and the second's ends there


@every_kind
def test_gradients_stop_where_a_window_begins(model, embedded, relative):
    x = embedded.requires_grad_()
    logits, carried = carried_over(model, x)
    whole = model(inputs_embeds=x, seq_idx=DOCUMENTS).logits
    a, b = (torch.autograd.grad(some[:, 8:16].square().sum(), x)[0] for some in (logits, whole))
    assert a[:, :8].abs().max() == 0 and b[0, :8].abs().max() > 1e-3
    assert relative(a[:, 8:16], b[:, 8:16]) < 1e-4
    assert not any(t.requires_grad for state in carried.states for t in state or ())


@every_kind
@pytest.mark.parametrize(("place", "later"), [((0, 3), slice(11, None)), ((0, 10), slice(11, None)), ((1, 7), slice(8, None))])
@torch.no_grad()
def test_no_bit_of_a_document_reaches_the_next(model, embedded, place, later):
    before, _ = carried_over(model, embedded)
    embedded[place] += 1
    after, _ = carried_over(model, embedded)
    row = place[0]
    assert torch.equal(before[row, later], after[row, later]) and torch.equal(before[1 - row], after[1 - row])
    assert not torch.equal(before[row, : later.start], after[row, : later.start])


@every_kind
def test_what_is_computed_again_in_backward_carries_the_same(model, embedded):
    ends = []
    for kinds in ("", "M-rlgm"):
        sharding.recompute(model, kinds)
        logits, carried = carried_over(model, embedded.clone().requires_grad_())
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters())[1:], allow_unused=True)
        ends.append([*(t for state in carried.states for t in state or ()), *(g for g in gradients if g is not None)])
    assert len(ends[0]) == len(ends[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_that_is_run_again_starts_where_it_started_and_advances_once(model, embedded):
    _, carried = carried_over(model, embedded)
    batch = {"inputs_embeds": embedded[:, :8], "continues": torch.tensor([True, True])}
    before = carried.parts()
    first, again = (model(**carried.hand_on(0, batch)).logits for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(one.local, before[name].local) for name, one in carried.parts().items())
    carried.advance()
    after = carried.parts()
    assert not any(torch.equal(one.local, before[name].local) for name, one in after.items())
    carried.advance()  # with no pass in between nothing is lost
    assert all(torch.equal(one.local, after[name].local) for name, one in carried.parts().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_in_one_layer_begins_anew_in_all(model, embedded, value):
    whole, broken = Carried(4, [range(2)], 2), Carried(4, [range(2)], 2)
    for carried in (whole, broken):
        model(**carried.hand_on(0, {"inputs_embeds": embedded, "continues": torch.tensor([False, False])}))
    broken.left[0].states[2][1].data[1, 0, 0, 0] = value
    whole.advance(), broken.advance()
    for name, one in broken.parts().items():
        assert torch.equal(one.local[0], whole.parts()[name].local[0])
        assert one.local[1].abs().max() == 0 < whole.parts()[name].local[1].abs().max()
    begun = broken.hand_on(0, {"continues": torch.tensor([False, True])})["past_key_values"]
    assert all(t.abs().max() == 0 for state in begun.states for t in state or ())


def test_a_run_that_carries_nothing_is_left_alone():
    carried, batch = Carried(4, [range(2)], 2), {"input_ids": torch.zeros(2, 3)}
    assert carried.hand_on(0, batch) is batch
    carried.advance()
    assert carried.parts() == {}


def test_a_checkpoint_has_copies_by_row_and_any_split_of_them_goes_on(model, embedded, tmp_path):
    _, carried = carried_over(model, embedded)
    optimizers = build_optimizers(model, Optim())
    state = {"samples": 6, "tokens": 48, "identity": {}, "cursor": {}, "spikes": {}, "validation": [], "step": 3}
    shot = checkpoint.snapshot(model, optimizers, state, {"config.json": b"{}"}, True, carried)
    kept = {name: one.local.clone() for name, one in carried.parts().items()}
    assert sorted(kept) == ["carried.0.0", "carried.0.1", "carried.2.0", "carried.2.1"]
    for one in carried.parts().values():
        one.local.zero_()  # the training goes on
    folder = checkpoint.write(tmp_path, shot)
    other = Carried(4, [range(1), range(1, 2)], 2)
    checkpoint.load(folder, model, optimizers, None, other)
    assert all(torch.equal(one.local, kept[name]) for name, one in other.parts().items())
    assert other.states[1] is None and other.parts().keys() == kept.keys()
    with pytest.raises(ValueError, match=r"states are carried on of 2 rows, and train\.global_batch is 4"):
        checkpoint.load(folder, model, optimizers, None, Carried(4, [range(4)], 4))
