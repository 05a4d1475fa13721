"""What a program written for any transformers model does with this one: save, read outputs, resize, build."""

import copy
import io
import json
import math

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMModel, modeling

PATTERNS = ["M-M*-M-", "MEM*-ME", "mrE*l-g"]
CLASSES = [HybridLMForCausalLM, HybridLMModel]
both = pytest.mark.parametrize("pattern", PATTERNS)
each_class = pytest.mark.parametrize("model_class", CLASSES)


@pytest.fixture
def build(tiny_config):
    """A model of either class with an attention that can show its weights."""

    def build(model_class, pattern, **changes):
        torch.manual_seed(0)
        config = tiny_config(hybrid_override_pattern=pattern, **changes)
        return model_class._from_config(config, attn_implementation="eager").eval()

    return build


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Folders


@both
@each_class
def test_a_model_that_was_loaded_is_saved_as_the_same_bytes(model_class, pattern, build, tmp_path):
    build(model_class, pattern).save_pretrained(tmp_path / "a")
    model_class.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab"]
    assert {"config.json", "model.safetensors"} <= files[0].keys()
    assert files[0] == files[1]


@both
def test_saving_leaves_the_model_as_it_was(pattern, tiny_model, tmp_path, draw_ids):
    model, ids = tiny_model(hybrid_override_pattern=pattern), draw_ids(2, 9)
    before, fields = model(ids).logits, model.config.to_dict()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, before)
    told = {"architectures": ["HybridLMForCausalLM"], "dtype": "float32"}  # what transformers notes when it saves
    assert model.config.to_dict() == fields | told


@both
def test_shards_hold_every_tensor_once_and_keep_their_size(pattern, tiny_model, tmp_path):
    model = tiny_model(hybrid_override_pattern=pattern)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert len(shards) > 2 and sum(map(len, shards)) == len(model.state_dict())
    assert all(sum(t.nbytes for t in shard.values()) <= 20_000 for shard in shards)
    assert_equal({name: t for shard in shards for name, t in shard.items()}, model.state_dict())
    assert_equal(HybridLMForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


@both
def test_the_stack_is_saved_and_loaded_alone_and_lacks_a_head(pattern, tiny_model, tmp_path, draw_ids):
    stack, ids = tiny_model(hybrid_override_pattern=pattern).backbone, draw_ids(2, 9)
    stack.save_pretrained(tmp_path)
    assert_equal(HybridLMModel.from_pretrained(tmp_path).state_dict(), stack.state_dict())
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight\.$"):
        HybridLMForCausalLM.from_pretrained(tmp_path)
    whole, info = HybridLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]
    assert torch.equal(whole.backbone(ids).last_hidden_state, stack(ids).last_hidden_state)


def test_weights_may_be_saved_under_another_name_and_from_another_dictionary(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, variant="twice", state_dict={name: t * 2 for name, t in model.state_dict().items()})
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path, variant="twice")
    assert_equal(loaded.state_dict(), {name: t * 2 for name, t in model.state_dict().items()})


@both
@each_class
@torch.no_grad()
def test_a_copy_is_the_model_and_shares_nothing_with_it(model_class, pattern, build, draw_ids):
    model, ids, file = build(model_class, pattern), draw_ids(2, 9), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    before = model(ids)[0]
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(copied(ids)[0], before)
        for p in copied.parameters():
            p.zero_()
        assert torch.equal(model(ids)[0], before)


# Configuration

CONFIGS = [
    {},
    {"n_group": 2, "moe_latent_size": 8},
    {"rope_theta": 100.0, "time_step_limit": (0.01, math.inf)},
    {"output_hidden_states": True, "return_dict": False, "use_cache": False, "dtype": torch.bfloat16, "eos_token_id": [3, 4]},
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_a_configuration_comes_back_from_every_form(changes, tiny_config, tmp_path):
    config = tiny_config(**{"hybrid_override_pattern": "MEM*-ME"} | changes)  # without `E` no file holds the experts' sizes
    config.to_json_file(tmp_path / "config.json")
    every_field = json.loads(config.to_json_string(use_diff=False))
    for back in (
        HybridLMConfig.from_dict(config.to_dict()),
        HybridLMConfig(**config.to_dict()),
        HybridLMConfig.from_dict(json.loads(config.to_json_string())),
        HybridLMConfig.from_json_file(tmp_path / "config.json"),
        copy.deepcopy(config),
    ):
        assert json.loads(back.to_json_string(use_diff=False)) == every_field


def test_fields_may_be_changed_while_loading(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config, unused = HybridLMConfig.from_pretrained(tmp_path, use_cache=False, unheard_of=1, return_unused_kwargs=True)
    assert not config.use_cache and unused == {"unheard_of": 1}
    assert not HybridLMForCausalLM.from_pretrained(tmp_path, use_cache=False).config.use_cache


def test_the_whole_model_has_one_configuration(tiny_model):
    model = tiny_model()
    assert all(getattr(module, "config", model.config) is model.config for module in model.modules())


# Outputs


@both
@each_class
@pytest.mark.parametrize("training", [False, True])
def test_the_same_input_gives_the_same_output_bitwise(training, model_class, pattern, build, draw_ids):
    model, ids = build(model_class, pattern).train(training), draw_ids(2, 19)
    assert torch.equal(model(ids)[0], model(ids)[0])


@torch.no_grad()
def test_hidden_states_are_every_layers_and_the_last_is_normed(tiny_model, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    output = model.backbone(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 7 + 1
    assert torch.equal(output.hidden_states[0], model.backbone.embeddings(ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert len(model(ids, return_dict=False)) == 2  # logits and cache


@both
@each_class
@torch.no_grad()
def test_hidden_states_are_what_entered_each_layer(model_class, pattern, build, draw_ids):
    model, ids, entered = build(model_class, pattern), draw_ids(2, 9), []
    for block in model.base_model.layers:
        block.register_forward_pre_hook(lambda block, arguments: entered.append(arguments[0]))
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden_states) == len(entered) + 1 == 8
    assert all(h.shape == (2, 9, 32) and torch.equal(h, x) for h, x in zip(hidden_states, entered))
    assert model(ids).hidden_states is None


@both
@pytest.mark.parametrize("cached", [0, 5])
@torch.no_grad()
def test_attention_weights_are_causal_and_sum_to_one(cached, pattern, build, draw_ids):
    model, ids = build(HybridLMForCausalLM, pattern), draw_ids(2, 9)
    there = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1], [1] * 9])
    cache = model(ids[:, :cached], there[:, :cached], use_cache=True).past_key_values if cached else None
    (weights,) = model(ids[:, cached:], there, past_key_values=cache, output_attentions=True).attentions
    assert weights.shape == (2, 4, 9 - cached, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9 - cached))
    reads = weights.amax(1) > 0
    allowed = (torch.ones(9, 9).tril().bool() & there[:, None].bool() | torch.eye(9).bool())[:, cached:]
    assert torch.equal(reads, allowed)


def test_every_attention_layer_shows_its_weights_and_no_other(build, draw_ids):
    for pattern, layers in (("M-", None), ("*", 1), ("M*-*M*", 3)):
        attentions = build(HybridLMModel, pattern)(draw_ids(1, 5), output_attentions=True).attentions
        assert (None if attentions is None else len(attentions)) == layers
        assert build(HybridLMModel, pattern)(draw_ids(1, 5)).attentions is None


def test_sdpa_keeps_no_weights_and_says_so(tiny_model, draw_ids, monkeypatch):
    model, warnings = tiny_model(), []
    monkeypatch.setattr(modeling.logger, "warning_once", warnings.append)
    assert model(draw_ids(1, 5)).attentions is None and warnings == []
    assert model(draw_ids(1, 5), output_attentions=True).attentions is None
    assert len(warnings) == 1 and "eager" in warnings[0]
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


ASKED = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}


@both
@each_class
@torch.no_grad()
def test_a_tuple_holds_the_same_as_the_output(model_class, pattern, build, draw_ids):
    model, ids = build(model_class, pattern), draw_ids(2, 9)
    labels = {"labels": ids} if model_class is HybridLMForCausalLM else {}
    first = ["loss", "logits"] if labels else ["last_hidden_state"]
    output = model(ids, **labels, **ASKED)
    assert type(output) is (CausalLMOutputWithPast if labels else BaseModelOutputWithPast)
    assert list(output.keys()) == [*first, "past_key_values", "hidden_states", "attentions"]
    plain = model(ids, **labels, **ASKED, return_dict=False)
    assert type(plain) is tuple and len(plain) == len(output)
    for named, unnamed in zip(output.values(), plain):
        if isinstance(named, tuple):
            assert all(torch.equal(a, b) for a, b in zip(named, unnamed, strict=True))
        elif isinstance(named, torch.Tensor):
            assert torch.equal(named, unnamed)
        else:
            states = [[state for state in cache.states if state is not None] for cache in (named, unnamed)]
            assert all(torch.equal(a, b) for x, y in zip(*states, strict=True) for a, b in zip(x, y, strict=True))


@each_class
@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions", "use_cache", "return_dict"])
@torch.no_grad()
def test_the_configuration_and_the_call_ask_alike_and_the_call_wins(flag, model_class, build, draw_ids):
    model, ids = build(model_class, "M*"), draw_ids(1, 5)
    seen = {}
    for configured in (True, False):
        setattr(model.config, flag, configured)
        for asked in (True, False, None):
            output = model(ids, **{flag: asked})
            seen[configured, asked] = output.keys() if isinstance(output, dict) else len(output)
    for configured in (True, False):
        assert seen[configured, True] == seen[True, None] != seen[False, None] == seen[configured, False]


def test_every_hidden_state_and_attention_weight_gets_a_gradient(build, draw_ids):
    output = build(HybridLMForCausalLM, "MEM*-ME")(draw_ids(2, 9), output_hidden_states=True, output_attentions=True)
    kept = (*output.hidden_states, *output.attentions)
    for t in kept:
        t.retain_grad()
    output.logits.square().sum().backward()
    assert len(kept) == 9 and all(t.grad.isfinite().all() and t.grad.any() for t in kept)


@both
def test_embeddings_give_what_their_ids_give(pattern, tiny_model, draw_ids):
    model, ids, mask = tiny_model(hybrid_override_pattern=pattern), draw_ids(2, 9), torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    by_id = model(ids, mask, labels=ids)
    by_embedding = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, labels=ids)
    assert torch.equal(by_embedding.logits, by_id.logits) and torch.equal(by_embedding.loss, by_id.loss)
    model(input_ids=ids.int(), attention_mask=mask)


@both
@torch.no_grad()
def test_a_row_alone_gives_what_it_gives_in_a_batch(pattern, build, draw_ids, relative):
    model, ids = build(HybridLMForCausalLM, pattern), draw_ids(3, 19)
    together = model(ids, output_hidden_states=True, output_attentions=True)
    for i in range(3):
        alone = model(ids[i : i + 1], output_hidden_states=True, output_attentions=True)
        pairs = [(alone.logits, together.logits), *zip(alone.hidden_states, together.hidden_states)]
        assert all(relative(a[0], b[i]) < 1e-5 for a, b in [*pairs, *zip(alone.attentions, together.attentions)])


# Embeddings and head


@torch.no_grad()
def test_embeddings_and_head_can_be_exchanged(tiny_config):
    model = HybridLMForCausalLM(tiny_config())
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)


SIZES = [
    ({}, 61),
    ({"new_num_tokens": 70}, 70),
    ({"new_num_tokens": 50}, 50),
    ({"pad_to_multiple_of": 16}, 64),
    ({"new_num_tokens": 65, "pad_to_multiple_of": 16}, 80),
    ({"new_num_tokens": 70, "mean_resizing": False}, 70),
]


@both
@pytest.mark.parametrize(("arguments", "size"), SIZES)
def test_the_vocabulary_grows_and_shrinks(arguments, size, pattern, tiny_model, draw_ids, tmp_path, relative):
    model, ids = tiny_model(hybrid_override_pattern=pattern), draw_ids(2, 9) % min(size, 61)
    before, old = model(ids).logits, min(size, 61)
    rows = model.backbone.embeddings.weight[:old].clone()
    assert model.resize_token_embeddings(**arguments) is model.get_input_embeddings()
    assert torch.equal(model.backbone.embeddings.weight[:old], rows)
    assert model.backbone.embeddings.weight.shape == model.lm_head.weight.shape == (size, 32)
    assert model.backbone.embeddings.num_embeddings == model.lm_head.out_features == size
    assert model.config.vocab_size == model.backbone.config.vocab_size == size
    assert relative(model(ids).logits[..., :old], before[..., :old]) < 1e-5
    last = torch.full((1, 4), size - 1)
    assert model(last, labels=last).logits.shape == model(last).logits.shape == (1, 4, size)
    assert model(last, targets=last).loss.isfinite().all()
    with pytest.raises(ValueError, match=f"vocabulary of {size}"):
        model(torch.tensor([[size]]))
    model.save_pretrained(tmp_path)
    assert relative(HybridLMForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits) < 1e-5


@torch.no_grad()
def test_the_stack_alone_can_be_resized(tiny_model):
    stack = tiny_model().backbone
    stack.resize_token_embeddings(70)
    assert stack.config.vocab_size == 70
    assert stack(torch.tensor([[69]])).last_hidden_state.isfinite().all()


@each_class
@torch.no_grad()
def test_other_embeddings_and_another_head_are_used(model_class, build, draw_ids):
    model, ids = build(model_class, "M*-"), draw_ids(2, 9)
    before, embeddings = model(ids)[0], torch.nn.Embedding(61, 32)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings is model.base_model.get_input_embeddings()
    after = model(ids)[0]
    assert not torch.equal(after, before)
    if model_class is HybridLMModel:
        assert model.get_output_embeddings() is None
        return
    assert model.get_output_embeddings() is model.lm_head
    head = torch.nn.Linear(32, 61, bias=False)
    head.weight.copy_(model.lm_head.weight * 2)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings().weight is head.weight and torch.equal(model(ids).logits, after * 2)
    with pytest.raises(ValueError, match="has no bias"):
        model.set_output_embeddings(torch.nn.Linear(32, 61))


def test_embeddings_and_head_are_never_tied(tiny_model):
    model = tiny_model()
    model.tie_weights()
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.data_ptr() != model.backbone.embeddings.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.backbone.embeddings.weight)


# Construction


def test_the_backbone_alone_builds(tiny_config):
    assert isinstance(HybridLMModel(tiny_config()).config, HybridLMConfig)


@both
@each_class
def test_on_the_meta_device_it_costs_nothing_and_counts_the_same(model_class, pattern, build, tiny_config):
    config, real = tiny_config(hybrid_override_pattern=pattern), build(model_class, pattern)
    with torch.device("meta"):
        inside = model_class(config)
    with init_empty_weights(include_buffers=True):
        accelerated = model_class(config)
    for model in (inside, accelerated):
        assert all(t.is_meta for t in model.state_dict().values())
        assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
        assert model.num_parameters() == real.num_parameters()


@both
@each_class
def test_every_missing_weight_is_initialised(model_class, pattern, build, tmp_path):
    fresh = build(model_class, pattern, initializer_range=0.02)
    fresh.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "layers.0." in name}
    save_file(kept, file, metadata={"format": "pt"})
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert info["missing_keys"] == {name for name in fresh.state_dict() if name not in kept}
    for name, t in loaded.state_dict().items():
        like = fresh.state_dict()[name]
        assert t.isfinite().all() and t.dtype == like.dtype, name
        if len(like.unique()) == 1 or name in kept:
            assert torch.equal(t, like), name
        elif t.numel() > 300:  # drawn anew, from the same distribution
            assert not torch.equal(t, like) and t.std() == pytest.approx(like.std(), rel=0.25), name


def test_no_state_dict_at_all_is_a_fresh_model(tiny_config, draw_ids):
    model = HybridLMForCausalLM.from_pretrained(None, config=tiny_config(), state_dict={})
    assert not any(t.is_meta for t in model.state_dict().values()) and model(draw_ids(1, 5)).logits.isfinite().all()


@both
@each_class
def test_every_tensor_is_a_parameter_or_a_buffer(model_class, pattern, build):
    model = build(model_class, pattern)
    assert [name for name, module in model.named_modules() for t in vars(module).values() if isinstance(t, torch.Tensor)] == []
    assert len(model.state_dict()) == len([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("auto", "model_class"), [(AutoModelForCausalLM, HybridLMForCausalLM), (AutoModel, HybridLMModel)])
@both
def test_the_auto_classes_build_from_a_configuration(auto, model_class, pattern, tiny_config, draw_ids):
    config = tiny_config(hybrid_override_pattern=pattern)
    model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is model_class and model.config._attn_implementation == "eager"
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.base_model.layers[0].mixer.A_log.dtype == torch.float32
    assert len(model(draw_ids(1, 5), output_attentions=True).attentions) == 1
    assert torch.get_default_dtype() == torch.float32


@torch.no_grad()
def test_the_attention_is_chosen_anywhere_and_never_saved(tiny_config, tiny_model, draw_ids, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    by_setter = tiny_model()
    by_setter.set_attn_implementation("eager")
    by_config = HybridLMForCausalLM(tiny_config(attn_implementation="eager"))
    by_loading = HybridLMForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for i, model in enumerate((by_setter, by_config, by_loading)):
        assert len(model(draw_ids(1, 5), output_attentions=True).attentions) == 1
        model.save_pretrained(tmp_path / str(i))
        assert HybridLMForCausalLM.from_pretrained(tmp_path / str(i)).config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="not supported"):
        by_setter.set_attn_implementation("nothing")
    assert by_setter.config._attn_implementation == "eager"


@both
def test_accelerate_never_splits_a_block(pattern, tiny_model):
    model = tiny_model(hybrid_override_pattern=pattern)
    names = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) <= names
    whole, split = sum(t.nbytes for t in model.state_dict().values()), 0
    for part in (0.2, 0.35, 0.5, 0.65, 0.8):
        limits = {"cpu": int(part * whole), "disk": 10**9}
        places = infer_auto_device_map(model, limits, no_split_module_classes=list(model._no_split_modules))
        assert [name for name in places if name.startswith("backbone.layers.") and name.count(".") > 2] == []
        split += len({place for name, place in places.items() if name.startswith("backbone.layers.")}) == 2
    assert split > 1


@both
def test_what_stays_wide_is_there(pattern, tiny_model):
    model = tiny_model(hybrid_override_pattern=pattern)
    wide = {name.rsplit(".", 1)[-1] for name in model.state_dict()} & set(model._keep_in_fp32_modules_strict)
    assert wide == {"A_log", "D", "dt_bias"} | ({"e_score_correction_bias"} if "E" in pattern else set())


@both
def test_the_helpers_of_transformers_count_and_name(pattern, tiny_model):
    model = tiny_model(hybrid_override_pattern=pattern)
    count = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == count
    assert model.num_parameters(exclude_embeddings=True) == count - 61 * 32
    model.lm_head.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == count - 61 * 32
    assert model.get_memory_footprint() == sum(t.nbytes for t in model.state_dict().values())
    assert model.base_model is model.backbone is model.get_decoder() and model.main_input_name == "input_ids"
    assert (model.device.type, model.dtype, model.can_generate()) == ("cpu", torch.float32, True)
    assert not model.backbone.can_generate()


@torch.no_grad()
def test_shapes_may_be_asked_for_on_the_meta_device(tiny_config, draw_ids):
    with torch.device("meta"):
        model = HybridLMForCausalLM(tiny_config()).eval()
    ids = draw_ids(2, 9).to("meta")
    assert model(ids, use_cache=True).logits.shape == (2, 9, 61)
    assert model.backbone(ids).last_hidden_state.shape == (2, 9, 32)
