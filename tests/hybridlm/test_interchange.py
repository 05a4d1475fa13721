"""Folders that go both ways between this library, stock transformers and what NVIDIA publishes."""

import gc
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.models import nemotron_h

from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMModel
from hybridlm.tokenizer import byte_tokenizer

WIDE = ("A_log", "D", "dt_bias", "e_score_correction_bias")
# Stock runs experts as one grouped product, whose rows must be multiples of 16 bytes.
LATENT = {"hybrid_override_pattern": "MEMEM*EME", "moe_latent_size": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
GRID = {
    "M-M*E-, 1 group": {"hybrid_override_pattern": "M-M*E-", "n_groups": 1, "mamba_num_heads": 16},
    "M-M*E-, 2 groups": {"hybrid_override_pattern": "M-M*E-", "n_groups": 2, "mamba_num_heads": 16},
    "M-M*E-, 8 groups": {"hybrid_override_pattern": "M-M*E-", "n_groups": 8, "mamba_num_heads": 16},
    "latent experts in groups": LATENT,
    "weights of experts as they are": {"hybrid_override_pattern": "ME", "norm_topk_prob": False, "num_experts_per_tok": 3},
    "no Mamba": {"hybrid_override_pattern": "*-*E"},
    "no attention": {"hybrid_override_pattern": "M-ME"},
    "biases": {"use_bias": True, "mlp_bias": True, "hybrid_override_pattern": "M*-E", "moe_latent_size": 8},
    "no bias in the convolution": {"use_conv_bias": False},
    "another window, eps and heads": {"conv_kernel": 3, "layer_norm_epsilon": 0.01, "num_key_value_heads": 1, "n_groups": 3},
}


def scatter(model):
    """Gives every tensor that starts as ones or zeros values of its own, and some heads a dt far below stock's clamp."""
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", ".D")) or "norm" in name:
                t += 0.3 * torch.randn_like(t)
            if name.endswith("dt_bias"):
                t[::3] = -11.0
    return model


def train_a_step(model, ids):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


def stock(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    assert type(model) is nemotron_h.NemotronHForCausalLM
    return model


def all_ways(model, ids):
    """The logits in one pass, in pieces (one shorter than the window) and token by token."""
    ways = [model(ids).logits]
    for sizes in ([11, 2, ids.shape[1] - 13], [5] + [1] * (ids.shape[1] - 5)):
        cache, parts = None, []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        ways.append(torch.cat(parts, 1))
    return ways


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_stock_transformers_gives_our_logits_and_gets_back_to_us(changes, trained, tiny_model, tmp_path, draw_ids, relative):
    ids = draw_ids(2, 21)
    model = scatter(tiny_model(**changes))
    if trained:
        model = train_a_step(model, ids)
    model.save_pretrained(tmp_path / "ours")
    theirs = stock(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = HybridLMForCausalLM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        ours = model(ids).logits
        # Stock's cache needs an attention layer to count its positions.
        ways = all_ways(theirs, ids) if "*" in model.config.hybrid_override_pattern else [theirs(ids, use_cache=False).logits]
        for logits in (*ways, *all_ways(model, ids), back(ids).logits):
            assert relative(logits, ours) < 1e-4
        if len(ways) > 1:
            assert torch.equal(greedy(theirs, ids), greedy(model, ids))
    kept, returned = model.state_dict(), back.state_dict()
    assert kept.keys() == returned.keys() and all(torch.equal(kept[name], returned[name]) for name in kept)


@pytest.mark.parametrize("changes", [GRID["M-M*E-, 2 groups"], LATENT], ids=["M-M*E-", "latent"])
@torch.no_grad()
def test_bf16_goes_both_ways(changes, tiny_model, tmp_path, draw_ids, relative):
    ids = draw_ids(2, 21)
    model = scatter(tiny_model(**changes)).bfloat16()
    model.save_pretrained(tmp_path / "ours")
    for name, t in load_file(tmp_path / "ours" / "model.safetensors").items():
        assert t.dtype == (torch.float32 if name.endswith(WIDE) else torch.bfloat16), name
    theirs = stock(tmp_path / "ours", dtype=torch.float32)
    ours = HybridLMForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert relative(theirs(ids).logits, ours(ids).logits) < 1e-4
    narrow, wide = model(ids).logits, ours(ids).logits
    off = (narrow - wide).abs().amax(-1) / wide.abs().max()  # of each token: near a border bf16 sends one to another expert
    assert (off < 0.06).float().mean() > 0.8
    theirs.bfloat16().save_pretrained(tmp_path / "theirs")  # A_log, D and dt_bias too
    again = HybridLMForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert relative(theirs.float()(ids).logits, again(ids).logits) < 1e-4


@torch.no_grad()
def test_without_the_lifted_clamp_stock_gives_other_logits(tiny_model, tmp_path, draw_ids, relative):
    """So the small steps of the tests above do show the clamp where there is one."""
    model, ids = scatter(tiny_model()), draw_ids(2, 21)
    model.save_pretrained(tmp_path)
    theirs = stock(tmp_path)
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (1e-3, math.inf)
    assert relative(theirs(ids).logits, model(ids).logits) > 1e-4


@torch.no_grad()
def test_a_model_that_began_in_stock_transformers_opens(tiny, tmp_path, draw_ids, relative):
    fields = tiny(time_step_min=1e-30)  # else it clamps
    del fields["hybrid_override_pattern"]
    kinds = ["linear_attention", "full_attention", "mlp", "linear_attention", "moe", "mlp"]
    torch.manual_seed(0)
    theirs = nemotron_h.NemotronHForCausalLM(nemotron_h.NemotronHConfig(**fields, layers_block_type=kinds)).eval()
    for p in theirs.parameters():
        if p.dim() > 1:
            p.normal_(std=0.3)
    scatter(theirs).save_pretrained(tmp_path)
    ours, ids = HybridLMForCausalLM.from_pretrained(tmp_path), draw_ids(2, 21)
    assert ours.config.hybrid_override_pattern == "M*-ME-"
    assert relative(ours(ids).logits, theirs(ids).logits) < 1e-4


# The published form

PUBLISHED_LIMITS = {
    "Infinity": [0.0, math.inf], "float": [0.0, {"__float__": "Infinity"}], "string": [0.0, "inf"], "null": None,
    "null above": [0.0, None], "huge": [0.0, 1e30], "absent": "absent",
}  # fmt: skip


def publish(model, folder, limit=None, shard="2KB"):
    """The model as NVIDIA's folders have it: their names, all in bf16, in shards, with code that nobody should run."""
    c = model.config
    model.save_pretrained(folder, max_shard_size=shard)
    for file in folder.glob("*.safetensors"):
        save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig", "AutoModelForCausalLM": "modeling_nemotron_h.X"},
        "hybrid_override_pattern": c.hybrid_override_pattern, "num_hidden_layers": len(c.hybrid_override_pattern),
        "attention_head_dim": c.head_dim, "rms_norm_eps": 3e-5, "num_logits_to_keep": 1, "sliding_window": None,
        "use_mamba_kernels": True, "mamba_proj_bias": False, "rope_theta": 10000, "partial_rotary_factor": 1.0,
        "time_step_rank": 256, "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4,
        "num_nextn_predict_layers": 1,
    }  # fmt: skip
    same = [name for name in HybridLMConfig.__annotations__ if name.endswith(("size", "heads", "groups", "kernel", "topk_prob"))]
    same += ["mamba_head_dim", "n_group", "topk_group", "n_routed_experts", "num_experts_per_tok", "routed_scaling_factor"]
    config |= {name: getattr(c, name) for name in same}
    if limit != "absent":
        config["time_step_limit"] = limit
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_nemotron_h.py").write_text("raise RuntimeError('remote code ran')")
    return folder


@pytest.mark.parametrize("limit", PUBLISHED_LIMITS.values(), ids=PUBLISHED_LIMITS.keys())
@torch.no_grad()
def test_the_published_form_opens_and_is_saved_for_stock(limit, tiny_model, tmp_path, draw_ids, relative):
    model, ids = scatter(tiny_model(hybrid_override_pattern="MEM*E-", layer_norm_epsilon=3e-5)), draw_ids(1, 21)
    folder = publish(model, tmp_path / "published", limit)
    assert len(list(folder.glob("*.safetensors"))) > 5
    opened = HybridLMForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (opened.config.layer_norm_epsilon, opened.config.head_dim) == (3e-5, model.config.head_dim)
    rounded = model.bfloat16().float()
    for t in (*rounded.parameters(), *rounded.buffers()):
        t.copy_(t.bfloat16())
    assert torch.equal(opened(ids).logits, rounded(ids).logits)
    opened.save_pretrained(tmp_path / "again")
    assert relative(stock(tmp_path / "again")(ids).logits, opened(ids).logits) < 1e-4


def test_heads_for_several_tokens_at_once_are_left_out(tiny_model, tmp_path):
    folder = publish(tiny_model(), tmp_path / "published", shard="50GB")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.layers.0.eh_proj.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    HybridLMForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32, torch.float16])
def test_the_parameters_of_the_decay_and_the_routers_bias_are_fp32_in_any_dtype(dtype, tiny_model, tmp_path):
    folder = publish(tiny_model(hybrid_override_pattern="MEM*-"), tmp_path / "published")
    loaded = HybridLMForCausalLM.from_pretrained(folder, dtype=dtype)
    tensors = [*loaded.named_parameters(), *loaded.named_buffers()]
    assert {t.dtype for name, t in tensors if name.endswith(WIDE)} == {torch.float32}
    assert {t.dtype for name, t in tensors if not name.endswith(WIDE)} == {torch.bfloat16 if dtype == "auto" else dtype}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what files a process has mapped")
def test_opened_in_another_dtype_it_keeps_nothing_of_the_file_in_memory(tiny_model, tmp_path):
    tiny_model(hybrid_override_pattern="M*-").save_pretrained(tmp_path)  # of E, transformers itself keeps something
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gc.collect()
    assert loaded.dtype == torch.bfloat16 and str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"torch_dtype": torch.float32},
        {"backend": "naive"},
        {"attn_implementation": "eager"},
    ],
)
@torch.no_grad()
def test_arguments_of_from_pretrained_work(arguments, tiny_model, tmp_path, draw_ids, relative):
    model, ids = tiny_model(hybrid_override_pattern="MEM*-"), draw_ids(2, 19)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert relative(HybridLMForCausalLM.from_pretrained(tmp_path, **arguments)(ids).logits, model(ids).logits) < 1e-5


@torch.no_grad()
def test_layers_may_lie_on_disk(tiny_model, tmp_path, draw_ids, relative):
    model, ids = tiny_model(hybrid_override_pattern="MEM*-"), draw_ids(2, 19)
    model.save_pretrained(tmp_path / "model")
    places = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "disk"}
    places |= {f"backbone.layers.{i}": "cpu" if i == 0 else "disk" for i in range(5)}
    spread = HybridLMForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert next(spread.backbone.layers[3].parameters()).device.type == "meta"
    assert relative(spread(ids).logits, model(ids).logits) < 1e-5
    assert relative(spread(ids, labels=ids).loss, model(ids, labels=ids).loss) < 1e-5
    assert torch.equal(greedy(spread, ids), greedy(model, ids))


@torch.no_grad()
def test_the_stack_opens_without_its_head(tiny_model, tmp_path, draw_ids):
    model, ids = tiny_model(), draw_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert torch.equal(HybridLMModel.from_pretrained(tmp_path)(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


# What others read


class VLLMConfig:
    """What vLLM's `NemotronHConfig` (vllm/transformers_utils/configs/nemotron_h.py) does with config.json.

    Keyword arguments under its own names; then every other key becomes an attribute; `layers_block_type` cannot be set.
    """

    def __init__(self, num_hidden_layers=52, hybrid_override_pattern="M-", attention_head_dim=128, mamba_n_groups=8, **kwargs):
        self.num_hidden_layers, self.hybrid_override_pattern = num_hidden_layers, hybrid_override_pattern
        self.n_groups, self.attention_head_dim = mamba_n_groups, attention_head_dim
        assert len(self.hybrid_override_pattern) == self.num_hidden_layers
        for key, value in kwargs.items():
            setattr(self, key, value)

    @property
    def layers_block_type(self):
        kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        return [kinds[symbol] for symbol in self.hybrid_override_pattern]


@pytest.mark.parametrize("pattern", ["M-M*-M-", "MEM*-ME"])
def test_vllms_configuration_takes_ours(pattern, tiny_config, tmp_path):
    config = tiny_config(hybrid_override_pattern=pattern)
    config.save_pretrained(tmp_path)
    read = VLLMConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert len(read.layers_block_type) == 7
    fields = (
        "n_groups head_dim mamba_num_heads mamba_head_dim ssm_state_size conv_kernel chunk_size layer_norm_epsilon vocab_size"
    )
    fields += " use_conv_bias use_bias mlp_bias attention_bias num_key_value_heads tie_word_embeddings"
    fields += " n_routed_experts num_experts_per_tok moe_intermediate_size norm_topk_prob" if "E" in pattern else ""
    assert {name: getattr(read, name) for name in fields.split()} == {name: getattr(config, name) for name in fields.split()}
    assert (read.model_type, read.architectures) == ("nemotron_h", ["NemotronHForCausalLM"])
    assert hasattr(read, "n_routed_experts") == ("E" in pattern)


def test_stocks_from_config_builds_from_ours(tiny_model, tmp_path, draw_ids):
    tiny_model(hybrid_override_pattern="MEM*-ME").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model) is nemotron_h.NemotronHForCausalLM
    assert model(draw_ids(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 100.0}], ids=["nemotron_h", "hybridlm"])
def test_the_pipeline_writes_text(changes, tiny_model, tmp_path):
    model = tiny_model(vocab_size=258, **changes)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path))
    text = write("def f(", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("def f(") and type(write.model).__module__.startswith("hybridlm" if changes else "transformers")
    assert pipeline("text-generation", model=model, tokenizer=byte_tokenizer())("def f(", max_new_tokens=5, do_sample=False)[0][
        "generated_text"
    ].startswith("def f(")


# Our own kind


@torch.no_grad()
def test_what_was_saved_loads(tiny_model, tmp_path, draw_ids, relative):
    model, ids = tiny_model(hybrid_override_pattern="MEM*-ME"), draw_ids(2, 19)
    model.save_pretrained(tmp_path)
    back = HybridLMForCausalLM.from_pretrained(tmp_path)
    kept, returned = model.state_dict(), back.state_dict()
    assert kept.keys() == returned.keys() and all(torch.equal(kept[name], returned[name]) for name in kept)
    assert relative(back(ids).logits, model(ids).logits) < 1e-6  # a product of one row may depend on where its weights lie
    assert type(back) is HybridLMForCausalLM and back.config.time_step_min == model.config.time_step_min
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "lm_head.weight" in names and all(n.startswith("backbone.") for n in names - {"lm_head.weight"})
    assert {"backbone.layers.1.mixer.experts.5.up_proj.weight", "backbone.layers.1.mixer.gate.e_score_correction_bias"} <= names
    assert (tmp_path / "generation_config.json").exists()


@torch.no_grad()
def test_the_backend_is_chosen_at_loading_and_never_saved(tiny_model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hybridlm.ops.backend.lacking", lambda: {"a CUDA device": ""})
    tiny_model("naive").save_pretrained(tmp_path)
    assert "naive" not in (tmp_path / "config.json").read_text()
    with caplog.at_level(logging.INFO, "hybridlm"):
        HybridLMForCausalLM.from_pretrained(tmp_path, backend="naive")
    assert "ssd=naive" in caplog.text
    with pytest.raises(ValueError, match=r"ops\.backend=fused needs"):
        HybridLMForCausalLM.from_pretrained(tmp_path, backend="fused")


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 100.0}, {"time_step_limit": (0.01, math.inf)}, {"time_step_limit": (0.0, 0.05)}, {"attention_bias": True}],
)
@torch.no_grad()
def test_what_stock_would_compute_otherwise_is_a_hybridlm(changes, tiny_model, tmp_path, draw_ids):
    model, ids = scatter(tiny_model(**changes)), draw_ids(2, 19)
    model.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert (on_disk["model_type"], on_disk["architectures"]) == ("hybridlm", ["HybridLMForCausalLM"])
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is HybridLMForCausalLM
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_bias_that_no_attention_layer_has_keeps_nothing_from_stock(tiny_config):
    assert tiny_config(attention_bias=True, hybrid_override_pattern="M-").is_nemotron_h
    assert isinstance(HybridLMConfig(**tiny_config().to_dict()), HybridLMConfig)
