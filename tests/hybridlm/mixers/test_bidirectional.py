import pytest
import torch

from hybridlm.classification import HybridLMForSequenceClassification
from hybridlm.mixers import MIXERS, build_mixer
from hybridlm.mixers.bidirectional import Bidirectional
from hybridlm.mixers.context import Context, Padding
from hybridlm.modeling import HybridLMModel
from hybridlm.ops import build_ops
from hybridlm.pattern import RECURRENT

KINDS = ("sum", "concat")
EACH = [s for s in MIXERS if s in RECURRENT]


@pytest.fixture
def both(tiny_config):
    """A backbone in float64 that reads in both directions."""

    def build(bidirectional, **changes):
        torch.manual_seed(0)
        every = {"hybrid_override_pattern": "M-l*-rgm", "bidirectional": bidirectional}
        model = HybridLMModel(tiny_config(**every | changes)).eval().double()
        return model.requires_grad_(False)

    return build


@pytest.mark.parametrize("bidirectional", KINDS)
@pytest.mark.parametrize("symbol", EACH)
@torch.no_grad()
def test_a_layer_is_two_causal_mixers_one_of_them_on_the_reverse(symbol, bidirectional, tiny_config):
    torch.manual_seed(0)
    config, ops, x = tiny_config(bidirectional=bidirectional), build_ops(), torch.randn(2, 11, 32, dtype=torch.float64)
    layer = build_mixer(symbol, config, ops).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert isinstance(layer, Bidirectional)
    ahead, back = (MIXERS[symbol](tiny_config(), ops).double() for _ in range(2))
    ahead.load_state_dict(layer.from_start.state_dict())
    back.load_state_dict(layer.from_end.state_dict())
    first, second = ahead(x, Context(), None)[0], back(x.flip(1), Context(), None)[0].flip(1)
    expected = first + second if bidirectional == "sum" else torch.cat([first, second], -1) @ layer.merge.weight.T
    context = Context(reverse=Context())
    torch.testing.assert_close(layer(x, context, None)[0], expected, rtol=1e-9, atol=1e-9)
    assert (expected - first).abs().max() > 1e-3 and (expected - second).abs().max() > 1e-3


@pytest.mark.parametrize("bidirectional", KINDS)
def test_layers_without_a_direction_and_causal_models_stay_as_they_are(bidirectional, tiny_config):
    ops = build_ops()
    for symbol in set(MIXERS) - RECURRENT:
        assert type(build_mixer(symbol, tiny_config(bidirectional=bidirectional), ops)) is MIXERS[symbol]
    assert type(build_mixer("M", tiny_config(), ops)) is MIXERS["M"]


def test_the_reverse_moves_to_a_device_with_the_rest():
    reverse = Context(reverse=Context(padding=Padding.where(torch.zeros(1, 3, dtype=torch.bool)))).to("meta").reverse
    assert reverse.padding.absent.device.type == "meta"


def test_the_reversed_rows_number_their_documents_from_the_end():
    absent = torch.tensor([[True, False, False, False]])
    context = Context(seq_idx=torch.tensor([[3, 3, 7, 9]]), documents=[[2, 1, 1]], padding=Padding.where(absent)).reversed()
    assert context.seq_idx.tolist() == [[0, 2, 6, 6]] and context.documents == [[1, 1, 2]]
    assert context.padding.absent.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("bidirectional", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_are_as_each_alone_and_never_touch(implementation, bidirectional, both, draw_ids):
    model, lengths = both(bidirectional), (5, 1, 9, 4)
    model.set_attn_implementation(implementation)
    ids, seq_idx = draw_ids(1, sum(lengths)), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(ids, seq_idx=seq_idx).last_hidden_state
    alone = [model(part).last_hidden_state for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    other = ids.clone()
    other[:, 6:15] = draw_ids(1, 9, seed=5)
    changed = model(other, seq_idx=seq_idx).last_hidden_state
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 15, 16, 17, 18])
    assert torch.equal(changed[:, kept], packed[:, kept]) and not torch.equal(changed[:, 6:15], packed[:, 6:15])


@pytest.mark.parametrize("bidirectional", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rope_theta", [None, 100.0])
def test_padding_is_as_if_it_were_not_there(rope_theta, implementation, bidirectional, both, draw_ids):
    model, ids = both(bidirectional, rope_theta=rope_theta), draw_ids(4, 10)
    model.set_attn_implementation(implementation)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, 7:], mask[1, :3], mask[2, 4:7] = 0, 0, 0
    padded = model(ids, mask).last_hidden_state
    for row in range(4):
        tokens = mask[row].bool()
        alone = model(ids[row, tokens][None]).last_hidden_state[0]
        torch.testing.assert_close(padded[row, tokens], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [None, *KINDS])
@pytest.mark.parametrize("pattern", ["*-", *EACH])
def test_the_first_token_sees_the_last(pattern, bidirectional, both, draw_ids):
    model, ids = both(bidirectional, hybrid_override_pattern=pattern), draw_ids(1, 12)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 61
    first, second = (model(x).last_hidden_state[0, 0] for x in (ids, other))
    assert torch.equal(first, second) == (bidirectional is None)


def test_there_is_no_cache(both, draw_ids):
    model, ids = both("sum"), draw_ids(1, 5)
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match="a bidirectional model has no cache"):
        model(ids, use_cache=True)
    model.config._attn_implementation = "other"
    with pytest.raises(ValueError, match="'sdpa' or 'eager'; got 'other'"):
        model(ids)


@pytest.mark.parametrize("bidirectional", KINDS)
def test_gradients_reach_both_directions_also_where_they_are_computed_again(bidirectional, tiny_config, draw_ids):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        config = tiny_config(bidirectional=bidirectional, num_labels=3, hybrid_override_pattern="M-l*-rgm")
        model = HybridLMForSequenceClassification(config).train()
        if again:
            model.activation_checkpointing_enable()
        seq_idx = torch.tensor([[0] * 5 + [1] * 4])
        targets = torch.full((1, 9), -100)
        targets[0, [4, 8]] = torch.tensor([2, 0])
        model(draw_ids(1, 9), seq_idx=seq_idx, targets=targets).loss.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
