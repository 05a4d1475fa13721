import json
import math

import pytest
from transformers import AutoConfig, configuration_utils
from transformers.models.nemotron_h import NemotronHConfig

from hybridlm import HybridLMConfig
from hybridlm.configuration import MOE_FIELDS, from_disk, to_disk


def own(config):
    """The fields that we declare, by name."""
    unused = set() if "E" in config.hybrid_override_pattern else MOE_FIELDS  # not written
    names = [name for name in HybridLMConfig.__annotations__ if name not in unused and hasattr(config, name)]
    return {name: getattr(config, name) for name in names}


def test_all_faults_come_in_one_message(tiny_config):
    with pytest.raises(ValueError) as error:
        tiny_config(vocab_size=0, hidden_size=2.5, head_dim="8", layer_norm_epsilon=0.0, hybrid_override_pattern="MX-?")
    message = str(error.value)
    for fault in ("5 fault(s)", "vocab_size", "got 0", "got 2.5", "got '8'", "layer_norm_epsilon", "unknown symbol(s) 'X?'"):
        assert fault in message


def test_all_broken_relations_come_in_one_message(tiny_config):
    with pytest.raises(ValueError) as error:
        tiny_config(
            **{"n_groups": 4, "num_key_value_heads": 3, "head_dim": 7, "rope_theta": 1e4, "time_step_min": 0.5},
            **{"time_step_limit": [1.0, 0.5], "hidden_dropout": 1.0, "tie_word_embeddings": True, "mlp_hidden_act": "gelu"},
        )
    message = str(error.value)
    relations = ("6 heads and 4 groups", "num_key_value_heads; got 4 and 3", "head_dim even", "time_step_min must not exceed")
    for fault in ("8 fault(s)", *relations, "two rising numbers", "hidden_dropout", "tie_word_embeddings", "'gelu'"):
        assert fault in message


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": ""},
        {"hybrid_override_pattern": None},
        {"hybrid_override_pattern": "MG-"},
        {"conv_kernel": 0},
        {"vocab_size": 10**12},
        {"chunk_size": True},
        {"time_step_floor": math.inf},
        {"initializer_range": -1},
        {"A_init_min": 0.0},
        {"A_init_min": 3.0, "A_init_max": 2.0},
        {"time_step_limit": [0.1]},
        {"rope_theta": -1.0},
        {"rope_theta": "10000"},
        {"bidirectional": "both"},
        {"time_step_limit": None},
        {"time_step_limit": ["a", "b"]},
        {"use_bias": "no"},
        {"attention_dropout": -0.1},
        {"attention_dropout": True},
        {"hidden_dropout": math.nan},
        {"residual_in_fp32": True},
        {"mamba_ssm_cache_dtype": "bfloat16"},
        {"mamba_hidden_act": "relu"},
    ],
)
def test_a_fault_names_its_field(changes, tiny_config):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 7, "n_group": 2},
        {"n_routed_experts": 6, "n_group": 6},
        {"topk_group": 3, "n_group": 2},
        {"num_experts_per_tok": 4, "n_group": 2, "topk_group": 1},
        {"num_experts_per_tok": 0},
        {"moe_latent_size": 0},
        {"moe_latent_size": 2.5},
        {"routed_scaling_factor": math.nan},
        {"n_shared_experts": 0},
        {"norm_topk_prob": 1},
    ],
)
def test_a_fault_of_the_experts_names_its_field_where_there_are_experts(changes, tiny_config):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny_config(hybrid_override_pattern="ME", **changes)


def test_fields_of_experts_are_on_disk_where_there_are_experts(tiny_config):
    assert not MOE_FIELDS & to_disk(tiny_config()).keys()
    config = tiny_config(hybrid_override_pattern="ME", moe_latent_size=8, n_group=3, topk_group=2, norm_topk_prob=False)
    assert to_disk(config).keys() >= MOE_FIELDS
    assert own(HybridLMConfig(**from_disk(to_disk(config)))) == own(config)


SPELLINGS = {  # those of vLLM's class and of older configurations
    "mamba_n_groups": ("n_groups", 3), "mamba_d_conv": ("conv_kernel", 3), "mamba_chunk_size": ("chunk_size", 16),
    "mamba_expand": ("expand", 3), "mamba_conv_bias": ("use_conv_bias", False), "mamba_dt_min": ("time_step_min", 0.01),
    "mamba_dt_max": ("time_step_max", 0.2), "mamba_dt_init_floor": ("time_step_floor", 1e-3),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
    "mamba_dt_limit": ("time_step_limit", [0.0, 0.5]), "num_local_experts": ("n_routed_experts", 4),
    "layer_types": ("hybrid_override_pattern", "M*-E"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_read(spelling, tiny, tmp_path):
    name, value = SPELLINGS[spelling]
    fields = tiny(model_type="nemotron_h")
    fields.pop(name, None)
    written = ["linear_attention", "full_attention", "mlp", "moe"] if spelling == "layer_types" else value
    (tmp_path / "config.json").write_text(json.dumps(fields | {spelling: written}))
    assert getattr(HybridLMConfig.from_pretrained(tmp_path), name) == value


def test_infinity_as_transformers_writes_it_is_read_from_a_dictionary_too(tiny):
    config = HybridLMConfig.from_dict(tiny(model_type="nemotron_h", time_step_limit=[0.0, {"__float__": "Infinity"}]))
    assert config.time_step_limit == [0.0, math.inf] and config.is_nemotron_h


def test_key_value_heads_of_null_are_as_many_as_query_heads(tiny, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny(model_type="nemotron_h", num_key_value_heads=None)))
    assert HybridLMConfig.from_pretrained(tmp_path).num_key_value_heads == 4


@pytest.mark.parametrize("limit", [[0.1], "inf", [0.0, "much"], [{}, 1.0], [0.0, [1]]])
def test_a_limit_of_no_known_spelling_is_an_error(limit, tiny, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny(model_type="nemotron_h", time_step_limit=limit)))
    with pytest.raises(ValueError, match="time_step_limit must be two"):
        HybridLMConfig.from_pretrained(tmp_path)


def test_an_unknown_key_is_an_error_with_the_nearest(tiny):
    assert HybridLMConfig.from_strict_dict(tiny()).hidden_size == 32
    with pytest.raises(ValueError, match=r"hiden_size \(did you mean hidden_size\?\), zzz\.$"):
        HybridLMConfig.from_strict_dict(tiny(hiden_size=3, zzz=1))


def test_the_depth_is_the_length_of_the_pattern(tiny_config):
    assert tiny_config().num_hidden_layers == 7
    assert tiny_config(hybrid_override_pattern="M-", num_hidden_layers=99).num_hidden_layers == 2


def test_derived_widths_do_not_use_expand(tiny_config):
    config = tiny_config(expand=17)
    assert config.mamba_inner_size == 6 * 8
    assert config.mamba_conv_size == 6 * 8 + 2 * 2 * 5


CHANGES = [
    {},
    {"rope_theta": 5000.0},
    {"bidirectional": "concat"},
    {"time_step_limit": (0.01, 0.5)},
    {"time_step_limit": (0.01, math.inf), "rope_theta": 1e4},
    {"time_step_min": 0.02, "pad_token_id": None, "bos_token_id": None, "eos_token_id": [3, 4]},
    {"use_conv_bias": False, "use_bias": True, "mlp_bias": True, "attention_bias": True, "layer_norm_epsilon": 1e-6},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_way_to_disk_and_back_changes_nothing(changes, tiny_config, tmp_path):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    back = HybridLMConfig.from_pretrained(tmp_path)
    there, here = own(config), own(back)
    assert list(there.pop("time_step_limit")) == list(here.pop("time_step_limit"))
    assert there == here
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(to_disk(config)))
    assert back.model_type == "hybridlm"


def test_opening_a_nemotron_h_folder_warns_of_nothing(tiny_config, tmp_path, monkeypatch):
    tiny_config().save_pretrained(tmp_path)
    warnings = []
    monkeypatch.setattr(configuration_utils.logger, "warning", warnings.append)
    HybridLMConfig.from_pretrained(tmp_path)
    assert warnings == []


def test_from_disk_undoes_to_disk(tiny_config):
    config = tiny_config(time_step_min=0.01)
    assert own(HybridLMConfig(**from_disk(to_disk(config)))) == own(config)


def test_on_disk_it_is_a_nemotron_h_that_every_reader_takes(tiny_config, tmp_path):
    tiny_config(time_step_min=0.02).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    on_disk = json.loads(text)
    expected = {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "M-M*-M-",
        "num_hidden_layers": 7,
        "head_dim": 8,
        "layer_norm_epsilon": 1e-5,
        "mamba_ssm_cache_dtype": "float32",
        "time_step_min": 1e-30,
    }
    assert {key: on_disk[key] for key in expected} == expected
    assert not {"layers_block_type", "attention_head_dim", "rms_norm_eps", "rope_theta", "backend", "ops"} & on_disk.keys()
    assert "Infinity" not in text
    stock = AutoConfig.from_pretrained(tmp_path)
    assert type(stock) is NemotronHConfig
    assert stock.layers_block_type == [{"M": "linear_attention", "*": "full_attention", "-": "mlp"}[s] for s in "M-M*-M-"]
    assert (stock.head_dim, stock.mamba_num_heads, stock.n_groups) == (8, 6, 2)


def test_with_rope_it_is_a_hybridlm_on_disk(tiny_config, tmp_path):
    tiny_config(rope_theta=1e4).save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert (on_disk["model_type"], on_disk["rope_theta"], on_disk["time_step_min"]) == ("hybridlm", 1e4, 0.001)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HybridLMConfig


def test_a_config_that_stock_transformers_saved_opens(tiny, tmp_path):
    fields = tiny(layer_norm_epsilon=1e-6, time_step_min=0.002)
    del fields["hybrid_override_pattern"]
    kinds = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]
    NemotronHConfig(**fields, layers_block_type=kinds).save_pretrained(tmp_path)
    assert "hybrid_override_pattern" not in json.loads((tmp_path / "config.json").read_text())
    config = HybridLMConfig.from_pretrained(tmp_path)
    assert config.hybrid_override_pattern == "M-M*-"
    assert {key: getattr(config, key) for key in fields} == fields
    assert list(config.time_step_limit) == [0.0, math.inf]


@pytest.mark.parametrize("kinds", [["mamba", "mlp", "convolution"], ["sliding_attention"]])
def test_layers_that_we_lack_are_an_error(kinds, tiny, tmp_path):
    fields = tiny(layers_block_type=kinds, model_type="nemotron_h")
    del fields["hybrid_override_pattern"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="unknown symbol"):
        HybridLMConfig.from_pretrained(tmp_path)


def test_nvidias_spellings_open(tiny, tmp_path):
    fields = tiny(model_type="nemotron_h", num_hidden_layers=7, time_step_limit=[0.0, float("inf")])
    del fields["head_dim"], fields["n_groups"]
    fields |= {"attention_head_dim": 12, "rms_norm_eps": 1e-6, "mamba_n_groups": 3, "architectures": ["NemotronHForCausalLM"]}
    fields |= {"auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = HybridLMConfig.from_pretrained(tmp_path)
    assert (config.head_dim, config.layer_norm_epsilon, config.n_groups) == (12, 1e-6, 3)
    assert config.hybrid_override_pattern == "M-M*-M-"


def test_the_defaults_are_the_8b():
    assert HybridLMConfig().hybrid_override_pattern == "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


@pytest.mark.parametrize("swap", [False, True])
def test_what_stock_transformers_ignores_is_ignored_here(swap):
    """Another spelling beside the stock one, in either order, and a position embedding that the stock model has not."""
    spellings = [("layer_norm_epsilon", 1e-5), ("rms_norm_eps", 1e-2), ("head_dim", 8), ("attention_head_dim", 16)]
    values = {"model_type": "nemotron_h", **dict(reversed(spellings) if swap else spellings), "rope_theta": 10000.0}
    read = from_disk(values)
    assert (read["layer_norm_epsilon"], read["head_dim"]) == (1e-5, 8)
    assert "rope_theta" not in read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"hybrid_override_pattern": "M?"}, "unknown symbol"),
        ({"n_groups": 4}, "6 heads and 4 groups"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is the length of hybrid_override_pattern"),
    ],
)
def test_fields_changed_while_loading_are_judged_too(changes, message, tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        HybridLMConfig.from_pretrained(tmp_path, **changes)


def test_fields_may_be_changed_while_loading(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config, unused = HybridLMConfig.from_pretrained(tmp_path, chunk_size=32, something=3, return_unused_kwargs=True)
    assert config.chunk_size == 32 and unused == {"something": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold an object; got list"),
        ('{"model_type": "nemotron_h", "dtype": "evil"}', "dtype 'evil', which is no dtype"),
        ('{"model_type": "nemotron_h", "torch_dtype": "nn"}', "torch_dtype 'nn', which is no dtype"),
        ('{"model_type": "nemotron_h", "quantization_config": {"quant_method": "bitsandbytes"}}', "floating point numbers alone"),
        ('{"model_type": "nemotron_h", "eos_token_id": "x"}', "eos_token_id must be"),
        ('{"model_type": "nemotron_h", "eos_token_id": [2, null]}', "eos_token_id must be"),
    ],
)
def test_a_config_json_of_another_kind_is_an_error(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        HybridLMConfig.from_pretrained(tmp_path)


def test_a_config_json_chooses_no_implementation_and_no_code(tiny, tmp_path):
    chosen = {"attn_implementation": "evil/kernel", "_attn_implementation": "eager", "auto_map": {"AutoConfig": "evil.X"}}
    (tmp_path / "config.json").write_text(json.dumps(tiny(model_type="nemotron_h", quantization_config=None, **chosen)))
    config = HybridLMConfig.from_pretrained(tmp_path)
    assert config._attn_implementation is None and not hasattr(config, "auto_map")
