"""Dropout where it is configured: in training mode alone, and nothing else changes."""

import pytest
import torch
from transformers import NemotronHForCausalLM

from hybridlm import HybridLMForCausalLM
from hybridlm.mixers.attention import sdpa
from hybridlm.mixers.context import Context

BOTH = {"attention_dropout": 0.3, "hidden_dropout": 0.2}


def loss(model, ids, seed=0):
    torch.manual_seed(seed)
    return model(ids, targets=ids).loss


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.3}, {"hidden_dropout": 0.2}, BOTH])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_changes_training_by_the_seed_and_evaluation_by_no_bit(changes, attention, tiny_model, draw_ids):
    ids, plain, model = draw_ids(2, 13), tiny_model(), tiny_model(**changes)
    for each in (plain, model):
        each.set_attn_implementation(attention)
    assert torch.equal(loss(model, ids), loss(plain, ids))
    for each in (plain, model):
        each.train()
    assert torch.equal(loss(plain, ids), loss(plain, ids, seed=1))
    assert torch.equal(loss(model, ids), loss(model, ids))
    assert not torch.equal(loss(model, ids), loss(model, ids, seed=1))


def weights(context, dropout, queries=12):
    """Those of attention (1 2 t s), as its product gives them of values that are the unit vectors."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 12, 12), torch.randn(1, 1, 12, 12), torch.eye(12)[None, None]
    return sdpa(q[:, :, -queries:], k, v, context, dropout=dropout)


@pytest.mark.parametrize(("kind", "queries"), [("causal", 12), ("documents", 12), ("mask", 12), ("causal", 1), ("mask", 1)])
def test_weights_of_attention_are_dropped_or_grow_to_make_up_for_it(kind, queries):
    mask = torch.ones(1, 1, queries, 12, dtype=torch.bool)
    context = {"causal": Context(), "documents": Context(documents=[[5, 7]]), "mask": Context(mask=mask)}[kind]
    full, dropped = weights(context, 0.0, queries), weights(context, 0.5, queries)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, 2 * full))
    share = ((dropped == 0) & (full != 0)).sum() / (full != 0).sum()
    assert 0.2 < share < 0.8


def test_eager_attention_shows_the_weights_that_it_dropped(tiny_model, draw_ids):
    model = tiny_model(attention_dropout=0.5)
    model.set_attn_implementation("eager")
    (full,), (dropped,) = (model.train(mode)(draw_ids(1, 13), output_attentions=True).attentions for mode in (False, True))
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, 2 * full))
    assert 0.3 < ((dropped == 0) & (full != 0)).sum() / (full != 0).sum() < 0.7


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_layer_adds_is_dropped_and_what_it_adds_to_is_not(grad, tiny_model, monkeypatch):
    monkeypatch.setattr("hybridlm.modeling.CPU_PIECE", 4)  # a long input passes in pieces where nothing is to be dropped
    block, x = tiny_model(hidden_dropout=0.25).double().backbone.layers[0], torch.randn(1, 13, 32, dtype=torch.float64)
    context = Context(inference=not grad)
    with torch.set_grad_enabled(grad):
        full, dropped = block(x, context)[0] - x, block.train()(x, context)[0] - x
    kept = dropped.abs() > 1e-12
    torch.testing.assert_close(dropped, torch.where(kept, full / 0.75, 0), rtol=1e-7, atol=1e-9)
    assert 0.6 < kept.double().mean() < 0.9


def test_stock_transformers_opens_it_with_the_same_logits(tiny_model, draw_ids, relative, tmp_path):
    model, ids = tiny_model(**BOTH), draw_ids(2, 13)
    model.save_pretrained(tmp_path)
    stock, again = (kind.from_pretrained(tmp_path).eval() for kind in (NemotronHForCausalLM, HybridLMForCausalLM))
    assert (stock.config.attention_dropout, again.config.hidden_dropout) == (0.3, 0.2)
    with torch.no_grad():
        assert relative(model(ids).logits, stock(ids).logits) < 1e-4
        assert torch.equal(model(ids).logits, again(ids).logits)
