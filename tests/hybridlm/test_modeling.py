import math

import pytest
import torch
from torch.nn import functional as F

from hybridlm import HybridLMForCausalLM, modeling
from hybridlm.ops.distillation import Whole

VOCABULARY = 61
WIDE = ("A_log", "D", "dt_bias")


def hidden(model, ids, **kwargs):
    return model(ids, **kwargs).last_hidden_state


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Causality and packing


@pytest.mark.parametrize("position", [0, 6, 8, 15, 18])
@torch.no_grad()
def test_a_token_leaves_all_logits_before_it_bitwise_equal_and_moves_its_own(position, tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 19)
    changed = ids.clone()
    changed[:, position] = (ids[:, position] + 7) % VOCABULARY
    a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, :position], b[:, :position])
    assert (a[:, position:] - b[:, position:]).abs().amax((0, 2)).gt(1e-6).all()


LENGTHS = [5, 1, 9, 3, 6]
# Chunks are of 8: documents that end on their edges, inside a window of the convolution, after one token.
CUTS = [LENGTHS, [8, 1, 7, 2, 5, 1], [1, 1, 1, 13, 8], [16, 3]]
EXPERTS = {"hybrid_override_pattern": "MEM*-ME", "initializer_range": 0.1}
RECURRENT = {"hybrid_override_pattern": "rlM*-g", "recurrent_size": 20}


def packed(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


@pytest.mark.parametrize("lengths", CUTS)
@pytest.mark.parametrize(
    "changes",
    [{}, EXPERTS, RECURRENT, {"rope_theta": 100.0}, {"hybrid_override_pattern": "M-"}, {"hybrid_override_pattern": "*"}],
)
def test_packed_documents_equal_each_run_alone(changes, lengths, exact, draw_ids):
    model, ids = exact(**changes), draw_ids(1, sum(lengths))
    alone = torch.cat([hidden(model, document) for document in ids.split(lengths, dim=1)], dim=1)
    tolerance = 1e-5 if "rope_theta" in changes else 1e-9  # the angles are fp32
    torch.testing.assert_close(hidden(model, ids, seq_idx=packed(lengths)), alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("lengths", "changed"), [(lengths, i) for lengths in CUTS for i in range(len(lengths))])
@pytest.mark.parametrize("changes", [{}, EXPERTS, RECURRENT], ids=["M*-", "E", "rlg"])
def test_a_document_cannot_touch_another_in_outputs_and_gradients(changes, lengths, changed, tiny_model, draw_ids):
    """Bitwise; with experts to 1e-6, because how many tokens an expert has decides how its product is computed."""
    model, ids, seq_idx = tiny_model(**changes), draw_ids(1, sum(lengths)), packed(lengths)
    others = seq_idx != changed
    ids_changed = torch.where(others, ids, (ids + 11) % VOCABULARY)
    seen = []
    for tokens in (ids, ids_changed):
        embeddings = model.backbone.embeddings(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, seq_idx=seq_idx).logits
        of_others = F.cross_entropy(logits[others], ids[others])
        gradient, *weights = torch.autograd.grad(of_others, [embeddings, *model.backbone.layers.parameters()])
        assert (gradient[~others] == 0).all()
        assert (gradient[others] != 0).any(-1).all()
        seen.append((logits[others], gradient[others], *weights))
    for a, b in zip(*seen):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1) if changes == EXPERTS else torch.equal(a, b)


def test_rows_pack_their_documents_each_for_itself(exact, draw_ids):
    model, ids = exact(), draw_ids(2, 12)
    seq_idx = torch.cat([packed([4, 8]), packed([9, 3])])
    rows = torch.cat([hidden(model, ids[i : i + 1], seq_idx=seq_idx[i : i + 1]) for i in range(2)])
    assert_same(hidden(model, ids, seq_idx=seq_idx), rows)


def test_document_numbers_may_start_and_jump_anywhere(exact, draw_ids):
    model, ids = exact(), draw_ids(1, 12)
    assert_same(hidden(model, ids, seq_idx=packed([4, 8]) * 5 + 3), hidden(model, ids, seq_idx=packed([4, 8])))


# Loss


def test_labels_give_the_shifted_mean_of_transformers(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6] = -100
    output = model(ids, labels=labels)
    theirs = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.logits, model(ids).logits)


def test_targets_give_the_nats_of_every_token_and_no_logits(tiny_model, draw_ids):
    model, ids, targets = tiny_model(), draw_ids(2, 9), draw_ids(2, 9, seed=1)
    targets[0, 3] = -100
    output = model(ids, targets=targets)
    theirs = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(output.loss, theirs.view(2, 9), rtol=1e-5, atol=1e-5)
    assert output.logits is None


def test_a_teacher_makes_the_loss_a_distance_from_it_with_a_share_of_the_nats(tiny_model, draw_ids):
    model, other = tiny_model(), tiny_model(hidden_size=24, num_attention_heads=3, num_key_value_heads=1)
    ids, targets = draw_ids(2, 9), draw_ids(2, 9, seed=1)
    targets[0, 3] = -100
    q, p = model(ids).logits / 2, other(ids).logits / 2
    distance = 4 * F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    distance[0, 3] = 0
    teacher = Whole(other.backbone(ids, use_cache=False).last_hidden_state, other.lm_head.weight)
    alone = model(ids, targets=targets, teacher=teacher, temperature=2.0)
    torch.testing.assert_close(alone.loss, distance, rtol=1e-4, atol=1e-5)
    assert alone.logits is None
    mixed = model(ids, targets=targets, teacher=teacher, temperature=2.0, text_weight=0.25).loss
    torch.testing.assert_close(mixed, 0.75 * distance + 0.25 * model(ids, targets=targets).loss, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pass targets beside teacher"):
        model(ids, teacher=teacher)


def test_the_loss_reaches_every_parameter(tiny_model, draw_ids):
    model = tiny_model()
    model(draw_ids(2, 19), targets=draw_ids(2, 19, seed=1)).loss.mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


def test_naive_and_eager_operators_give_the_same_model(tiny_model, draw_ids):
    ids, targets, seen = draw_ids(1, sum(LENGTHS)), draw_ids(1, sum(LENGTHS), seed=1), []
    for backend in ("eager", "naive"):
        model = tiny_model(backend).double()
        loss = model(ids, targets=targets, seq_idx=packed(LENGTHS)).loss
        seen.append([loss, *torch.autograd.grad(loss.sum(), list(model.parameters()))])
    for eager, naive in zip(*seen, strict=True):
        assert_same(eager, naive)


# Bad input


@pytest.mark.parametrize("bad", [VOCABULARY, 9999, -1])
def test_a_token_outside_the_vocabulary_is_named(bad, tiny_model):
    with pytest.raises(ValueError, match=rf"token id {bad} is outside the vocabulary of {VOCABULARY}"):
        tiny_model()(torch.tensor([[3, bad, 4]]))


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (0, 0)])
def test_an_empty_input_is_an_error(shape, tiny_model):
    model, ids = tiny_model(), torch.zeros(shape, dtype=torch.long)
    for arguments in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(*shape, 32)}, {"input_ids": ids, "labels": ids}):
        with pytest.raises(ValueError, match="has no tokens"):
            model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"input_ids": torch.tensor([3, 4])}, r"\(2,\)"),
        ({"input_ids": torch.ones(1, 2, 3, dtype=torch.long)}, r"\(1, 2, 3\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 31)}, r"\(2, 3, 31\)"),
        ({"inputs_embeds": torch.zeros(2, 32)}, r"\(2, 32\)"),
    ],
)
def test_an_input_of_another_shape_is_an_error(arguments, got, tiny_model):
    with pytest.raises(ValueError, match=rf"inputs_embeds \(batch, time, 32\); got {got}"):
        tiny_model()(**arguments)


@pytest.mark.parametrize("name", ["labels", "targets"])
def test_targets_of_another_shape_are_an_error(name, tiny_model, draw_ids):
    with pytest.raises(ValueError, match=r"shape of the input, \(2, 5\); got \(2, 4\)"):
        tiny_model()(draw_ids(2, 5), **{name: draw_ids(2, 4)})


@torch.no_grad()
def test_rows_of_nothing_but_padding_are_finite_and_change_no_other(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 6)
    logits = model(ids, torch.tensor([[0] * 6, [1] * 6])).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, rtol=1e-5, atol=1e-5)


def test_documents_that_fall_or_have_another_shape_are_an_error(tiny_model, draw_ids):
    for seq_idx in (torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match="seq_idx must"):
            tiny_model()(draw_ids(1, 3), seq_idx=seq_idx)


def test_arguments_that_contradict_are_an_error(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(1, 3)
    ones = torch.ones(1, 3, dtype=torch.long)
    cache = model(ids, use_cache=True).past_key_values
    for arguments, message in [
        ({"labels": ids, "targets": ids}, "not both"),
        ({"attention_mask": ones.clone().index_fill_(1, torch.tensor(0), 0), "seq_idx": ones}, "not both"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "exactly one"),
        ({"seq_idx": ones, "past_key_values": cache}, "seq_idx does not go with a cache"),
        ({"attention_mask": ones, "past_key_values": cache}, r"must have shape \(1, 6\): 3 cached and 3 new"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)


@torch.no_grad()
def test_documents_go_on_from_a_cache_where_nothing_attends_to_it(tiny_model, draw_ids, relative):
    model, ids = tiny_model(hybrid_override_pattern="M-M-"), draw_ids(2, 12)
    documents = torch.tensor([[0] * 8 + [1] * 4, [0] * 5 + [1] * 7])
    output = model(ids[:, :6], seq_idx=documents[:, :6], use_cache=True)
    rest = model(ids[:, 6:], seq_idx=documents[:, 6:], past_key_values=output.past_key_values).logits
    assert relative(torch.cat([output.logits, rest], 1), model(ids, seq_idx=documents).logits) < 1e-5


def test_an_unknown_argument_is_never_swallowed(tiny_model, draw_ids):
    with pytest.raises(TypeError, match="cu_seqlens"):
        tiny_model()(draw_ids(1, 3), cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_a_backend_that_cannot_run_is_an_error(backend, tiny_config, monkeypatch):
    monkeypatch.setattr("hybridlm.ops.backend.lacking", lambda: {"a CUDA device": ""})
    with pytest.raises(ValueError, match=r"ops\.backend"):
        HybridLMForCausalLM(tiny_config(), backend=backend)


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_a_target_outside_the_vocabulary_is_named(bad, tiny_model, draw_ids):
    with pytest.raises(ValueError, match=rf"{bad} is outside the vocabulary of {VOCABULARY}"):
        tiny_model()(draw_ids(1, 3), targets=torch.tensor([[3, bad, 4]]))


def test_labels_of_a_single_position_are_refused(tiny_model, draw_ids):
    with pytest.raises(ValueError, match="at least two positions"):
        tiny_model()(draw_ids(1, 1), labels=draw_ids(1, 1))


def test_a_float_seq_idx_is_refused_without_a_mamba_layer_too(tiny_model, draw_ids):
    with pytest.raises(ValueError, match="integers"):
        tiny_model(hybrid_override_pattern="*-")(draw_ids(1, 3), seq_idx=torch.zeros(1, 3))


@torch.no_grad()
def test_any_number_above_zero_in_the_mask_marks_a_token(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.equal(model(ids, mask * torch.tensor([1, 1, 2, 2, 1, 1])).logits, model(ids, mask).logits)


# Precision


def test_half_never_narrows_and_double_widens(tiny_model):
    mixer = tiny_model().half().backbone.layers[0].mixer
    assert (mixer.A_log.dtype, mixer.in_proj.weight.dtype) == (torch.float32, torch.float16)
    assert mixer.double().A_log.dtype == torch.float64
    assert mixer.float().A_log.dtype == torch.float32


def test_autocast_trains_near_the_fp32_loss(tiny_model, draw_ids):
    model, ids, targets = tiny_model(), draw_ids(2, 19), draw_ids(2, 19, seed=1)
    true = model(ids, targets=targets).loss.mean()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, targets=targets).loss.mean()
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(true.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(1, 4)}, "int64 or int32; got torch.float32"),
        ({"input_ids": [[3, 4, 5, 6]]}, "int64 or int32; got list"),
        ({"inputs_embeds": torch.ones(1, 4, 32, dtype=torch.long)}, "floating point"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask must be a tensor; got list"),
        ({"attention_mask": torch.tensor([[-math.inf, 0, 0, 0]])}, "got an additive mask"),
        ({"labels": torch.ones(1, 4)}, "labels and targets must be of int64 or int32"),
        ({"logits_to_keep": -3}, "logits_to_keep must be a number of positions"),
    ],
)
def test_an_input_of_another_kind_is_an_error(arguments, message, tiny_model, draw_ids):
    ids = {} if {"input_ids", "inputs_embeds"} & arguments.keys() else {"input_ids": draw_ids(1, 4)}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**ids, **arguments)


def test_ids_and_labels_of_32_bits_are_as_good(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    wide, narrow = (model(x, labels=x) for x in (ids, ids.int()))
    assert torch.equal(wide.logits, narrow.logits) and torch.equal(wide.loss, narrow.loss)


@pytest.mark.parametrize("pattern", ["M-M*-M-", "MEM*E", "rlgm*-"])
@pytest.mark.parametrize("t", [7, 8, 13])
@torch.no_grad()
def test_a_long_input_taken_in_pieces_gives_the_same(t, pattern, tiny_model, draw_ids, monkeypatch):
    model, ids = tiny_model(hybrid_override_pattern=pattern).double(), draw_ids(2, t)
    whole = model(ids, use_cache=True)
    pieces = []
    monkeypatch.setattr(modeling, "CPU_PIECE", 8)  # of both rows together
    for symbol, layer in zip(pattern, model.backbone.layers):
        if symbol != "*":
            layer.mixer.register_forward_pre_hook(lambda mixer, args: pieces.append(args[0].shape[1]))
    again = model(ids, use_cache=True)
    assert set(pieces) == {4, t % 4 or 4}
    torch.testing.assert_close(again.logits, whole.logits, rtol=1e-9, atol=1e-9)
    for a, b in zip(again.past_key_values.states, whole.past_key_values.states):
        for x, y in zip(a or (), b or ()):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_training_packing_and_padding_take_an_input_whole(tiny_model, draw_ids, monkeypatch):
    monkeypatch.setattr(modeling, "CPU_PIECE", 2)
    model, ids, seen = tiny_model(), draw_ids(1, 9), []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda mixer, args: seen.append(args[0].shape[1]))
    model(ids)
    with torch.no_grad():
        model(ids, seq_idx=torch.tensor([[0] * 4 + [1] * 5]))
        model(ids, attention_mask=torch.tensor([[0] + [1] * 8]))
    assert seen == [9, 9, 9]
