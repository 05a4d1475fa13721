"""What a training program written for any transformers model does with this one."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hybridlm import HybridLMForCausalLM

PATTERNS = ["M-M*-M-", "MEM*-ME"]
REENTRANT = [True, False]
both = pytest.mark.parametrize("pattern", PATTERNS)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its new name is younger than 5.20


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def train_step(model, ids, **arguments):
    """Loss and every gradient of one pass."""
    model.zero_grad()
    loss = model(ids, labels=ids, **arguments).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@both
def test_a_step_of_training_reaches_every_parameter_and_lowers_the_loss(pattern, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern).train(), draw_ids(2, 19)
    loss, grads = train_step(model, ids)
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    # An expert to which no token went has a gradient of zeros.
    assert all(g.any() for name, g in grads.items() if ".experts." not in name)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert model(ids, labels=ids).loss < loss


@both
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_checkpointing_changes_no_loss_and_no_gradient(reentrant, precision, pattern, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern).train(), draw_ids(2, 19)
    calls = []
    model.backbone.layers[3].mixer.register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(ids, labels=ids, attention_mask=torch.tensor([[0] * 3 + [1] * 16, [1] * 19])).loss
        model.zero_grad()
        loss.backward()
        return {"loss": loss.detach(), **{name: g.clone() for name, g in gradients(model).items()}}, len(calls)

    plain, once = step()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    checkpointed, twice = step()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    again, once_more = step()
    assert (once, twice, once_more) == (1, 2, 1)
    assert_equal(checkpointed, plain)
    assert_equal(again, plain)


@both
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_checkpointing_goes_with_a_cache(reentrant, pattern, tiny_model, draw_ids):
    model, ids, seen = tiny_model(hybrid_override_pattern=pattern).train(), draw_ids(2, 19), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.no_grad():
            cache = model.eval()(ids[:, :7]).past_key_values
        seen.append(train_step(model.train(), ids[:, 7:], past_key_values=cache))
        assert cache.get_seq_length() == 19
    assert torch.equal(seen[0][0], seen[1][0])
    assert_equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_gradients_pass_through_a_cache_under_checkpointing(reentrant, tiny_model, draw_ids):
    model, ids, seen = tiny_model().double().train(), draw_ids(2, 12), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        cache = model(ids[:, :5], use_cache=True).past_key_values
        seen.append(train_step(model, ids[:, 5:], past_key_values=cache)[1])
    assert_equal(*seen)


@pytest.mark.parametrize("reentrant", [*REENTRANT, None])
def test_one_layer_trains_alone_below_frozen_ones(reentrant, tiny_model, draw_ids):
    """As an adapter does: under re-entrant checkpointing the embeddings must ask for gradients, though they are frozen."""
    model, ids = tiny_model().train(), draw_ids(2, 9)
    weight = model.backbone.layers[3].mixer.q_proj.weight
    train_step(model, ids)
    expected = weight.grad.clone()
    model.requires_grad_(False)
    weight.requires_grad_()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, grads = train_step(model, ids)
    assert torch.equal(weight.grad, expected) and [name for name, g in grads.items() if g is not None] == [
        "backbone.layers.3.mixer.q_proj.weight"
    ]


def test_embeddings_may_be_asked_for_gradients_and_released(tiny_model, draw_ids):
    model = tiny_model().requires_grad_(False)
    model.enable_input_require_grads()
    assert model(draw_ids(1, 5)).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(draw_ids(1, 5)).logits.requires_grad


@both
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_the_losses_of_parts_sum_to_that_of_the_whole(kind, pattern, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern).double().train(), draw_ids(4, 9)
    labels = ids.clone()
    labels[0, :6] = labels[3] = -100
    whole = model(ids, labels=labels).loss
    whole.backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    items, total = kind((labels[:, 1:] != -100).sum().item()), 0
    for rows in ([0], [1, 2], [3]):
        loss = model(ids[rows], labels=labels[rows], num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_without_targets_has_loss_zero_and_finite_gradients(items, tiny_model, draw_ids):
    model, ids = tiny_model().train(), draw_ids(2, 9)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss.item() == 0 and all((g == 0).all() for g in gradients(model).values())


def test_keeping_few_logits_keeps_the_loss_of_all(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    whole, last = model(ids, labels=ids), model(ids, labels=ids, logits_to_keep=1)
    assert torch.equal(last.loss, whole.loss) and torch.equal(last.logits, whole.logits[:, -1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@both
def test_a_cast_model_runs_trains_and_generates(pattern, dtype, tiny_model, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern).to(dtype), draw_ids(2, 19)
    assert model.dtype in (dtype, torch.float32) and model.lm_head.weight.dtype == dtype
    loss, grads = train_step(model, ids)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    assert model.backbone(ids).last_hidden_state.dtype == dtype
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 22)


@both
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers_trains_on_our_mean(accumulate, checkpointing, pattern, tiny_model, draw_ids, tmp_path):
    model, rows = tiny_model(hybrid_override_pattern=pattern), draw_ids(4, 9)
    labels = rows.clone()
    labels[1, :5] = labels[2, 3] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels)]
    twin = copy.deepcopy(model)
    optimizer, losses = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0), []
    for _ in range(2):  # the whole batch, whatever its parts
        optimizer.zero_grad()
        logits = twin(rows).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1,
        gradient_checkpointing=checkpointing, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-5)
    final = F.cross_entropy(twin(rows).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(final, rel=1e-3)
    model.config.use_cache = True  # the trainer had turned it off
    assert trainer.predict(data).predictions.shape == (4, 9, 61)  # logits alone, no cache
    trainer.save_model(tmp_path / "saved")
    assert_equal(HybridLMForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict())
