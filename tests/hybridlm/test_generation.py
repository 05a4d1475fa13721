"""The cache, padding and `generate`: each way to a text equals reading it from scratch."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from hybridlm.cache import HybridCache

EXPERTS = {"hybrid_override_pattern": "MEM*-ME"}
RECURRENT = {"hybrid_override_pattern": "rl*g-", "recurrent_size": 20}
ROPE = {"rope_theta": 100.0}


def hidden(model, ids, **kwargs):
    return model(ids, **kwargs).last_hidden_state


def assert_same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def in_pieces(model, ids, sizes, attention_mask=None):
    cache, parts, seen = None, [], 0
    for piece in ids.split(sizes, dim=1):
        seen += piece.shape[1]
        mask = None if attention_mask is None else attention_mask[:, :seen]
        output = model(piece, mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.last_hidden_state)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(parts, dim=1)


# Pieces

SIZES = [[1] * 19, [13] + [1] * 6, [2, 1, 3, 13], [3, 16], [8, 8, 3], [1, 2, 2, 2, 12], [19]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("changes", [{}, EXPERTS, ROPE, RECURRENT, {"conv_kernel": 6}])
def test_steps_and_pieces_of_any_size_equal_the_whole(sizes, changes, exact, draw_ids):
    model, ids = exact(**changes), draw_ids(2, 19)
    assert_same(in_pieces(model, ids, sizes), hidden(model, ids), 1e-5 if "rope_theta" in changes else 1e-9)


@torch.no_grad()
def test_pieces_in_fp32_equal_the_whole_to_1e_5(tiny_model, draw_ids, relative):
    for pattern in ("M-M*-M-", EXPERTS["hybrid_override_pattern"]):
        model, ids = tiny_model(hybrid_override_pattern=pattern), draw_ids(2, 40)
        assert relative(in_pieces(model.backbone, ids, [17, 1, 2, 20]), hidden(model.backbone, ids)) < 1e-5


def test_gradients_pass_through_the_cache(exact, draw_ids):
    model, ids = exact(), draw_ids(1, 12)
    gradients = []
    for sizes in ([12], [5, 1, 6]):
        embeddings = model.embeddings(ids).detach().requires_grad_()
        cache, parts = HybridCache(7), []
        for piece in embeddings.split(sizes, dim=1):
            parts.append(model(inputs_embeds=piece, past_key_values=cache).last_hidden_state)
        gradients.append(torch.autograd.grad(torch.cat(parts, 1).square().sum(), embeddings)[0])
    assert_same(*gradients)


# Padding

MASKS = {
    "left": [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1] * 12],
    "middle": [[1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1]],
    "everywhere": [[0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]],
    "longer than the window": [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1]],
    "a row of nothing else": [[0] * 12, [1] * 6 + [0] * 6],
}
PIECES = [[12], [1] * 12, [5, 7], [3, 1, 2, 6], [11, 1]]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", PIECES)
@pytest.mark.parametrize("changes", [{}, EXPERTS, ROPE, RECURRENT], ids=["M*-", "E", "rope", "rlg"])
def test_tokens_are_as_if_padding_were_not_there(name, sizes, changes, exact, draw_ids):
    model, ids, mask = exact(**changes), draw_ids(2, 12), torch.tensor(MASKS[name])
    tolerance = 1e-5 if "rope_theta" in changes else 1e-9
    padded = in_pieces(model, ids, sizes, mask) if len(sizes) > 1 else hidden(model, ids, attention_mask=mask)
    assert padded.isfinite().all()
    for row in range(2):
        there = mask[row].bool()
        if there.any():
            assert_same(padded[row, there], hidden(model, ids[row : row + 1, there])[0], tolerance)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", PIECES)
def test_padding_gives_what_the_token_before_it_gave(name, sizes, exact, draw_ids):
    model, ids, mask = exact(), draw_ids(2, 12), torch.tensor(MASKS[name])
    padded = in_pieces(model, ids, sizes, mask)
    for row in range(2):
        for i in range(1, 12):
            if not mask[row, i] and mask[row, :i].any():
                assert torch.equal(padded[row, i], padded[row, i - 1])


@pytest.mark.parametrize("name", MASKS)
def test_what_stands_at_padding_reaches_nothing_bitwise(name, tiny_model, draw_ids):
    model, ids, there = tiny_model(), draw_ids(2, 12), torch.tensor(MASKS[name]).bool()
    seen = []
    for tokens in (ids, torch.where(there, ids, (ids + 9) % 61)):
        embeddings = model.backbone.embeddings(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=there).logits
        (gradient,) = torch.autograd.grad(logits[there].square().sum(), embeddings)
        assert (gradient[~there] == 0).all() and gradient.isfinite().all()
        seen.append((logits[there], gradient[there]))
    assert all(torch.equal(a, b) for a, b in zip(*seen))


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_a_mask_may_be_of_any_kind(kind, exact, draw_ids):
    model, ids, mask = exact(), draw_ids(2, 12), torch.tensor(MASKS["middle"])
    assert torch.equal(hidden(model, ids, attention_mask=mask.to(kind)), hidden(model, ids, attention_mask=mask))


def test_a_mask_of_ones_changes_nothing(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    assert torch.equal(model(ids, torch.ones(2, 9)).logits, model(ids).logits)


def test_the_cache_knows_its_padding_without_being_told_again(exact, draw_ids):
    model, ids, mask = exact(), draw_ids(2, 14), torch.tensor(MASKS["middle"])
    cache = model(ids[:, :12], mask, use_cache=True).past_key_values
    told, untold = copy.deepcopy(cache), copy.deepcopy(cache)
    a = hidden(model, ids[:, 12:], attention_mask=torch.cat([mask, torch.ones(2, 2)], 1), past_key_values=told)
    assert torch.equal(hidden(model, ids[:, 12:], past_key_values=untold), a)


@pytest.mark.parametrize("first", [None, [[1, 1, 0, 1]]])
def test_a_mask_that_would_have_the_cache_forget_is_an_error(first, tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(1, 5)
    cache = model(ids[:, :4], None if first is None else torch.tensor(first), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot forget"):
        model(ids[:, 4:], torch.tensor([[0, 1, 1, 1, 1]]), past_key_values=cache)


# Batches that shrink and grow


@pytest.mark.parametrize("mask", [None, "middle", "right"])
def test_rows_leave_return_and_multiply(mask, exact, draw_ids):
    model, ids, more = exact(), draw_ids(2, 12), draw_ids(4, 3, seed=1)
    mask = torch.ones(2, 12) if mask is None else torch.tensor(MASKS[mask])
    cache = model(ids, mask, use_cache=True).past_key_values
    for change, rows in [
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    ]:
        changed = copy.deepcopy(cache)
        change(changed)
        assert changed.batch_size == len(rows)
        after = hidden(model, more[: len(rows)], past_key_values=changed)
        for i, row in enumerate(rows):
            text = torch.cat([ids[row, mask[row].bool()], more[i]])[None]
            assert_same(after[i], hidden(model, text)[0, -3:])


def test_a_cache_of_other_rows_is_an_error(tiny_model, draw_ids):
    model = tiny_model()
    cache = model(draw_ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"has 2 row\(s\) and the input 3"):
        model(draw_ids(3, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("cache", "got"), [(DynamicCache(), "DynamicCache"), (HybridCache(3), "HybridCache of 3"), ((), "tuple")]
)
def test_a_cache_of_another_kind_is_an_error(cache, got, tiny_model, draw_ids):
    with pytest.raises(ValueError, match=rf"HybridCache of 7 layers.*got {got}\.$"):
        tiny_model()(draw_ids(1, 4), past_key_values=cache)


def test_a_cache_that_was_reset_is_new(exact, draw_ids):
    model, ids = exact(), draw_ids(3, 9)
    cache = model(draw_ids(2, 12), torch.tensor(MASKS["middle"]), use_cache=True).past_key_values
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes()) == (0, -1, 0)
    assert torch.equal(hidden(model, ids, past_key_values=cache), hidden(model, ids))
    assert cache.get_seq_length() == 9


def test_a_copy_of_a_cache_is_worth_keeping(exact, draw_ids):
    """A prompt read once, continued twice."""
    model, prompt = exact(), draw_ids(1, 9)
    kept = model(prompt, use_cache=True).past_key_values
    for seed in (1, 2):
        more, used = draw_ids(1, 4, seed), copy.deepcopy(kept)
        continued = [hidden(model, token, past_key_values=used) for token in more.split(1, dim=1)]
        assert_same(torch.cat(continued, 1), hidden(model, torch.cat([prompt, more], 1))[:, 9:])


def test_a_recurrent_state_cannot_be_cropped(tiny_model, draw_ids):
    cache = tiny_model()(draw_ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(-1)


# `generate`


def recomputed(model, ids, new):
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.fixture
def writer(tiny_model):
    """The tiny model, with no token that ends a text."""

    def build(**changes):
        model = tiny_model(**changes)
        model.generation_config.eos_token_id = None
        return model

    return build


@pytest.mark.parametrize("t", [1, 2, 9])
@pytest.mark.parametrize("changes", [{}, EXPERTS, ROPE, RECURRENT], ids=["M*-", "E", "rope", "rlg"])
@torch.no_grad()
def test_greedy_generation_equals_recomputing_every_token(t, changes, writer, draw_ids):
    model, ids = writer(**changes), draw_ids(2, t)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), recomputed(model, ids, 12))


@pytest.mark.parametrize(
    "mask", [[[0, 0, 0, 1, 1, 1]] * 2, [[1, 1, 1, 1, 0, 0], [1] * 6], [[1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]]]
)
@torch.no_grad()
def test_generation_after_padding_anywhere_equals_each_row_alone(mask, writer, draw_ids):
    model, ids, mask = writer(), draw_ids(2, 6), torch.tensor(mask)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for i in range(2):
        assert torch.equal(together[i, 6:], recomputed(model, ids[i : i + 1, mask[i].bool()], 9)[0, -9:])


@pytest.mark.parametrize("piece", [1, 2, 4])
@torch.no_grad()
def test_a_right_padded_prompt_may_be_read_in_pieces(piece, writer, draw_ids):
    model, ids, mask = writer(), draw_ids(2, 8), torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0, 0]])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, prefill_chunk_size=piece)
    together = model.generate(ids, attention_mask=mask, generation_config=config)
    for i in range(2):
        assert torch.equal(together[i, 8:], recomputed(model, ids[i : i + 1, mask[i].bool()], 6)[0, -6:])


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["M*-", "E"])
@torch.no_grad()
def test_beam_search_with_the_cache_equals_that_without(sequences, changes, writer, draw_ids):
    model, ids = writer(**changes), draw_ids(2, 7)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    arguments = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": sequences, "do_sample": False}
    with_cache, without = (model.generate(ids, attention_mask=mask, use_cache=cached, **arguments) for cached in (True, False))
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_sampling_several_texts_equals_that_without_the_cache(writer, draw_ids):
    model, ids, texts = writer(), draw_ids(2, 5), []
    for cached in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(ids, use_cache=cached, do_sample=True, num_return_sequences=3, max_new_tokens=6))
    assert torch.equal(*texts)


@torch.no_grad()
def test_generation_goes_on_from_a_cache(writer, draw_ids):
    model, ids = writer(), draw_ids(1, 6)
    whole = model.generate(ids, max_new_tokens=10, do_sample=False)
    part = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(part.sequences, past_key_values=part.past_key_values, max_new_tokens=6, do_sample=False)
    assert torch.equal(rest, whole)
    longer = torch.cat([whole, draw_ids(1, 5, seed=3)], 1)  # a second turn of a dialogue, read behind the first one's cache
    first = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True).past_key_values
    again = model.generate(longer, past_key_values=first, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, recomputed(model, longer, 5))


@torch.no_grad()
def test_generation_from_embeddings_equals_that_from_ids(writer, draw_ids):
    model, ids = writer(), draw_ids(2, 6)
    new = model.generate(inputs_embeds=model.backbone.embeddings(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(new, recomputed(model, ids, 8)[:, 6:])


@pytest.mark.parametrize("piece", [1, 2, 5, 64])
@torch.no_grad()
def test_a_prompt_may_be_read_in_pieces(piece, writer, draw_ids):
    model, ids = writer(), draw_ids(1, 11)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, prefill_chunk_size=piece)
    assert torch.equal(model.generate(ids, generation_config=config), recomputed(model, ids, 6))


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    logits = model(ids).logits
    assert_same(model(ids, logits_to_keep=2).logits, logits[:, -2:], 1e-5)
    assert_same(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], 1e-5)


@torch.no_grad()
def test_generation_asks_for_the_last_logits_alone(writer, draw_ids, monkeypatch):
    model, shapes = writer(), []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: shapes.append(x.shape[1]) or head(x))
    model.generate(draw_ids(1, 30), max_new_tokens=3, do_sample=False)
    assert shapes == [1, 1, 1]


@pytest.mark.parametrize("shape", [(0, 4), (1, 0)])
def test_an_empty_prompt_is_an_error(shape, tiny_model):
    for arguments in ({"inputs": torch.ones(shape, dtype=torch.long)}, {"inputs_embeds": torch.ones(*shape, 32)}):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            tiny_model().generate(**arguments, max_new_tokens=2)


@pytest.mark.parametrize("shape", [(2, 3), (2, 9), (1, 5), (5,)])
def test_a_mask_that_is_not_the_prompts_is_an_error(shape, tiny_model, draw_ids):
    for mask in (torch.ones(shape), torch.zeros(shape), torch.ones(shape).tolist()):
        with pytest.raises(ValueError, match=r"attention_mask must be a tensor of shape \(2, 5\)"):
            tiny_model().generate(draw_ids(2, 5), attention_mask=mask, max_new_tokens=2)


def test_a_cache_without_a_state_knows_its_rows_too(tiny_model, draw_ids):
    model = tiny_model(hybrid_override_pattern="-E")
    cache = model(draw_ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"has 2 row\(s\) and the input 1"):
        model(draw_ids(1, 1), past_key_values=cache)
