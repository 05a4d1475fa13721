import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import nemotron_h

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.compress.importance import measure
from hybridlm.compress.search import most_important, shape_of
from hybridlm.compress.surgery import PARTS, Kept, check_kinds, prune, smaller_config
from hybridlm.twin import count_parameters

ALL = ("layers", "channels", *PARTS.values())
SHAPES = {
    "no attention": {"hybrid_override_pattern": "M-M-MM-"},
    "no Mamba": {"hybrid_override_pattern": "*-*-*-"},
    "no FFN": {"hybrid_override_pattern": "M*MM*M"},
    "no biases": {"use_bias": False, "mlp_bias": False, "use_conv_bias": False},
    "RoPE, biases in attention, bounded dt": {"rope_theta": 100.0, "attention_bias": True, "time_step_limit": [0.01, 0.5]},
    "one group": {"n_groups": 1, "num_key_value_heads": 6},
}


def documents():
    """Packed: two, and three."""
    return torch.tensor([[0] * 5 + [1] * 12, [0] * 2 + [1] * 9 + [2] * 6])


def everything_kept(**changes):
    return Kept(**{"layers": list(range(7))} | changes)


@pytest.mark.parametrize("goes", [*([one] for one in ALL), ALL], ids=[*ALL, "all"])
@torch.no_grad()
def test_what_is_zero_goes_and_changes_nothing(goes, parent, zeroed, draw_ids, relative):
    check(parent(), goes, zeroed, draw_ids(2, 17), relative)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_in_other_shapes_too(changes, parent, zeroed, draw_ids, relative):
    check(parent(**changes), ALL, zeroed, draw_ids(2, 17), relative)


def check(model, goes, zeroed, ids, relative):
    kept = zeroed(model, goes)
    small = prune(model, kept)
    channels = kept.channels or list(range(24))
    for inputs in ({}, {"seq_idx": documents()}):
        whole, left = (m.backbone(ids, **inputs).last_hidden_state for m in (model, small))
        assert relative(left, whole[..., channels]) < 1e-12
        assert relative(small(ids, **inputs).logits, model(ids, **inputs).logits) < 1e-6  # they are fp32
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(*(m.generate(ids[:, :5], **plain) for m in (model, small)))
    cache, parts = None, []
    for piece in ids.split([2, 9, 1, 1, 4], dim=1):
        output = small.backbone(piece, past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.last_hidden_state]
    assert relative(torch.cat(parts, 1), model.backbone(ids).last_hidden_state[..., channels]) < 1e-12
    assert small.num_parameters() == count_parameters(small.config) < model.num_parameters()
    assert all(p.dtype == torch.float64 for p in small.parameters())


@torch.no_grad()
def test_importance_finds_what_is_zero(parent, zeroed, draw_ids):
    """So importance and surgery mean the same heads, groups, neurons and channels by their numbers."""
    model, texts = parent(), [{"input_ids": draw_ids(8, 40)}]  # enough that every neuron is seen at work
    kept = zeroed(model, [what for what in ALL if what != "layers"])
    importance = measure(model, texts, texts)
    small = prune(model, kept)
    assert most_important(model.config, importance, shape_of(small.config)) == kept
    assert [i for i, score in enumerate(importance.channels) if score] == kept.channels


def test_the_rest_of_the_shape_is_the_parents(parent_config):
    config = parent_config(rope_theta=50.0, time_step_limit=[0.0, 1.0], eos_token_id=[2, 7], max_position_embeddings=77)
    small = smaller_config(config, everything_kept(layers=[0, 1, 3], parts={0: [1, 2, 6, 7], 1: [0], 3: [2]}, channels=[3, 4, 9]))
    changed = {
        "hybrid_override_pattern": "M-*", "hidden_size": 3, "intermediate_size": 1, "mamba_num_heads": 4,
        "num_key_value_heads": 1, "num_attention_heads": 2, "layer_norm_epsilon": 2e-2,
    }  # fmt: skip
    assert {name: getattr(small, name) for name in HybridLMConfig.__annotations__} == {
        name: getattr(config, name) for name in HybridLMConfig.__annotations__
    } | changed
    assert config.hidden_size == 24 and config.hybrid_override_pattern == "M-M*-M-"


def test_without_layers_of_a_kind_its_sizes_are_the_parents(parent_config):
    small = smaller_config(parent_config(), everything_kept(layers=[1, 4], parts={1: [0, 3], 4: [5, 6]}))
    assert [getattr(small, size) for size in PARTS.values()] == [8, 3, 2]
    assert (small.num_attention_heads, small.layer_norm_epsilon) == (6, 1e-2)


@torch.no_grad()
def test_a_saved_one_is_an_ordinary_model(parent, zeroed, tmp_path, draw_ids, relative):
    ids, model = draw_ids(2, 17), parent().float()
    kept = zeroed(model, ALL)
    small = prune(model, kept)
    small.save_pretrained(tmp_path)
    ours, theirs = HybridLMForCausalLM.from_pretrained(tmp_path).eval(), AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is nemotron_h.NemotronHForCausalLM
    assert torch.equal(ours(ids).logits, small(ids).logits)
    assert relative(theirs(ids).logits, model(ids).logits) < 1e-4
    assert relative(small(ids).logits, model(ids).logits) < 1e-5


@torch.no_grad()
def test_all_of_a_model_is_a_copy_of_it(parent):
    model = parent().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    twin = prune(model, everything_kept())
    assert prune(model, everything_kept(), "naive").ops.backends["ssd"] == "naive" != twin.ops.backends["ssd"]
    assert twin.training and not prune(model.eval(), everything_kept()).training
    assert all(p.requires_grad for p in twin.parameters())
    assert before.keys() == twin.state_dict().keys() and all(t.equal(before[name]) for name, t in twin.state_dict().items())
    for p in twin.parameters():
        p.zero_()
    twin.generation_config.eos_token_id = 40
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert model.generation_config.eos_token_id == 2
    assert {p.untyped_storage().data_ptr() for p in model.parameters()}.isdisjoint(
        p.untyped_storage().data_ptr() for p in twin.parameters()
    )


def test_in_bf16_what_decays_stays_fp32(parent):
    model = parent().bfloat16()
    heads = [0, 2, 3, 4, 5, 7]
    small = prune(model, everything_kept(parts=dict.fromkeys((0, 2, 5), heads), channels=list(range(20))))
    old, new = model.state_dict(), small.state_dict()
    assert {name: t.dtype for name, t in new.items()} == {name: t.dtype for name, t in old.items()}
    for name in ("A_log", "D", "dt_bias"):
        assert new[f"backbone.layers.2.mixer.{name}"].equal(old[f"backbone.layers.2.mixer.{name}"][heads])
        assert new[f"backbone.layers.2.mixer.{name}"].dtype == torch.float32


def test_what_stays_is_told_beside_the_weights(tmp_path):
    Kept([0, 3, 4], {3: [1], 4: [0, 5]}, [2, 3]).save(tmp_path, "runs/a/model")
    assert json.loads((tmp_path / "pruning.json").read_text()) == {
        "layers": [0, 3, 4], "parts": {"3": [1], "4": [0, 5]}, "channels": [2, 3], "parent": "runs/a/model",
    }  # fmt: skip


WRONG = {
    "no layer": ({"layers": []}, r"layers to keep must be rising numbers from 0 to 6, at least one; got \[\]"),
    "a layer past the last": ({"layers": [0, 7]}, r"layers to keep .* got \[0, 7\]"),
    "layers that fall": ({"layers": [1, 0]}, r"layers to keep .* got \[1, 0\]"),
    "a layer twice": ({"layers": [1, 1]}, r"layers to keep .* got \[1, 1\]"),
    "no channel": ({"channels": []}, r"channels to keep must be .* from 0 to 23, at least one; got \[\]"),
    "a channel below 0": ({"channels": [-1, 0]}, r"channels to keep .* got \[-1, 0\]"),
    "a channel too many": ({"channels": [24]}, r"channels to keep .* got \[24\]"),
    "no neuron": ({"parts": {1: []}}, r"intermediate_size of layer 1 to keep must be .* from 0 to 19, at least one; got \[\]"),
    "a group too many": ({"parts": {3: [0, 3]}}, r"num_key_value_heads of layer 3 to keep .* from 0 to 2, .* got \[0, 3\]"),
    "heads that fall": ({"parts": {2: [4, 0]}}, r"mamba_num_heads of layer 2 to keep .* got \[4, 0\]"),
    "unlike layers": (
        {"parts": {1: [0], 4: [0, 1], 6: [3]}},
        r"all layers of kind '-' must keep the same intermediate_size; got \{1: 1, 4: 2, 6: 1\}",
    ),
    "unlike groups": (
        {"parts": {i: [0, 4, 5] for i in (0, 2, 5)}},
        r"layer 0 must keep as many Mamba heads in each of its groups; got \[1, 2\] of 4 each",
    ),
    "parts of no layer": ({"layers": [0, 1], "parts": {4: [0], 9: [1]}}, r"do not stay: \[4, 9\]; layers \[0, 1\] stay"),
}


@pytest.mark.parametrize("kept,message", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_stay(kept, message, parent_config):
    with pytest.raises(ValueError, match=message):
        smaller_config(parent_config(), everything_kept(**kept))


def test_what_cannot_be_cut(tiny_config, tiny_model):
    with pytest.raises(ValueError, match=r"pattern 'M-E\*rE' has .* 'E' mixture of experts, 'r' Elman RNN. .* 'M' Mamba-2,"):
        check_kinds(tiny_config(hybrid_override_pattern="M-E*rE"))
    with pytest.raises(ValueError, match="a bidirectional model is a classifier"):
        check_kinds(tiny_config(bidirectional="sum"))
    with pytest.raises(ValueError, match="layers that cannot be pruned"):
        prune(tiny_model(hybrid_override_pattern="ME"), Kept([0]))
