import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hybridlm import HybridLMForCausalLM
from hybridlm.masking import attention_mask, find_tokens
from hybridlm.mixers.context import Context, Padding


@pytest.fixture
def others():
    """Two attention implementations of a user: one with its mask, one without."""
    AttentionInterface.register("with_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("with_mask", sdpa_mask)
    AttentionInterface.register("without_mask", sdpa_attention_forward)
    yield
    for name in ("with_mask", "without_mask"):
        del AttentionInterface._global_mapping[name]
    del AttentionMaskInterface._global_mapping["with_mask"]


INPUTS = {
    "plain": {},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1], [0] * 9])},
    "documents": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("implementation", ["eager", "with_mask"])
def test_every_attention_implementation_gives_the_same(implementation, name, tiny_model, draw_ids, relative, others, tmp_path):
    model, ids = tiny_model(), draw_ids(2, 9)
    model.save_pretrained(tmp_path)
    other = HybridLMForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert other.config._attn_implementation == implementation and model.config._attn_implementation == "sdpa"
    seen = []
    for m in (model, other):
        logits = m(ids, **INPUTS[name]).logits
        seen.append((logits, torch.autograd.grad(logits.square().sum(), list(m.parameters()))))
    assert relative(seen[1][0], seen[0][0]) < 1e-5
    assert all(relative(a, b) < 1e-4 for a, b in zip(seen[1][1], seen[0][1]))


@pytest.mark.parametrize("implementation", ["eager", "with_mask"])
@torch.no_grad()
def test_every_attention_implementation_reads_a_cache(implementation, tiny_model, draw_ids, relative, others):
    model, ids = tiny_model(), draw_ids(2, 12)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1], [1] * 12])
    whole = model(ids, mask).logits
    model.set_attn_implementation(implementation)
    cache, parts = None, []
    for upto, piece in zip((5, 6, 12), ids.split([5, 1, 6], 1)):
        output = model(piece, mask[:, :upto], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert relative(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()]) < 1e-5


@pytest.mark.parametrize("name", ["padding", "documents"])
def test_an_implementation_without_a_mask_is_an_error_where_one_is_needed(name, tiny_model, draw_ids, others):
    model, ids = tiny_model(), draw_ids(2, 9)
    plain = model(ids).logits
    model.set_attn_implementation("without_mask")
    torch.testing.assert_close(model(ids).logits, plain)
    with pytest.raises(ValueError, match="'without_mask' has no mask"):
        model(ids, **INPUTS[name])


def test_plain_attention_has_no_mask_so_that_the_fast_kernels_take_it(tiny_model):
    config, x = tiny_model().config, torch.zeros(2, 9, 32)
    assert attention_mask(config, x, None, None, None) is None


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9), (2, 9, 9), (2, 1, 9, 9), (9,)])
def test_a_mask_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"must have shape \(2, 9\): 0 cached and 9 new positions; got"):
        find_tokens(2, 9, torch.ones(shape), None)


def test_no_padding_is_none():
    assert find_tokens(2, 3, torch.ones(2, 3), None) is None and find_tokens(2, 3, None, None) is None


def test_padding_knows_its_order_and_counts():
    padding = Padding.where(torch.tensor([[True, False, True, False], [False, False, True, True], [True] * 4]))
    assert padding.order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert padding.place.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert padding.last.tolist() == [[-1, 1, 1, 3], [0, 1, 1, 1], [-1] * 4]
    assert padding.count.tolist() == [[2], [2], [0]]


def test_a_context_moves_with_the_layers():
    """accelerate calls `.to` of what it hands to a layer on another device."""
    full = torch.zeros(1, 4)
    context = Context(False, 3, full, [[4]], Padding.where(full.bool()), full, (full, full), [])
    moved = context.to("meta")
    tensors = [moved.seq_idx, moved.mask, *moved.rotary, *vars(moved.padding).values()]
    assert all(t.device.type == "meta" for t in tensors) and moved.attentions is context.attentions
    assert Context().to("meta") == Context()


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_implementations_that_are_not_supported_are_refused(implementation, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError), match=r"does not support|is not installed|flash_attn"):
        HybridLMForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
