import json
from pathlib import Path

import pytest
import torch

from hybridlm import HybridLMForCausalLM
from hybridlm.__main__ import main
from hybridlm.cache import HybridCache
from hybridlm.cli.inspect import activation_bytes, block_activations, cache_bytes, figures, page, read_config, state_bytes
from hybridlm.flops import forward_flops
from hybridlm.mixers.context import Context
from hybridlm.ops import precision
from hybridlm.ops.ssd import eager
from hybridlm.output import BYTES, COUNT, scaled, table

SHAPES = Path(__file__).parents[3] / "configs" / "model"
PUBLISHED = {"4b": "4,489,223,040  4.49 B", "8b": "8,100,852,736  8.10 B", "47b": "46.8 B", "56b": "56.3 B"}
PLAIN = {"gpus": 1, "precision": "bf16", "seq_len": 128, "micro_batch": 1}


@pytest.mark.parametrize(("size", "parameters"), PUBLISHED.items())
def test_the_published_sizes_come_out(size, parameters, capsys):
    assert main(["inspect", str(SHAPES / f"nemotron-h-{size}.yaml")]) == 0
    assert parameters in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))


@pytest.mark.parametrize("pattern", ["M-M*-M-", "MEM*-ME", "M", "*-*-"])
def test_the_rows_add_up_to_the_model_and_to_its_flops(pattern, tiny_config):
    config = tiny_config(hybrid_override_pattern=pattern)
    with torch.device("meta"):
        model = HybridLMForCausalLM(config)
    content = figures(config, **PLAIN)
    rows = {row["kind"]: row for row in content["layers"]}
    assert content["parameters"] == sum(p.numel() for p in model.parameters()) == sum(r["parameters"] for r in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["flops_per_token"] for row in rows.values()) == pytest.approx(content["forward_flops_per_token"])
    for symbol, layer in zip(pattern, model.backbone.layers):
        assert rows[symbol]["parameters_each"] == sum(p.numel() for p in layer.parameters())
        assert rows[symbol]["layers"] == pattern.count(symbol)


def test_a_layers_flops_are_what_the_model_has_more_with_it(tiny_config):
    rows = {row["kind"]: row for row in figures(tiny_config(hybrid_override_pattern="MM*-E"), **PLAIN)["layers"]}
    with_two = sum(forward_flops(tiny_config(hybrid_override_pattern="MM*-E"), 128).values())
    with_one = sum(forward_flops(tiny_config(hybrid_override_pattern="M*-E"), 128).values())
    assert rows["M"]["flops_per_token"] == pytest.approx(2 * (with_two - with_one))


def test_experts_make_total_and_active_differ(tiny_config):
    config = tiny_config(hybrid_override_pattern="MEM*-ME")
    content = figures(config, **PLAIN)
    idle = config.n_routed_experts - config.num_experts_per_tok
    expert = 2 * config.hidden_size * config.moe_intermediate_size
    assert content["parameters"] - content["active_parameters"] == 2 * idle * expert
    assert "mixture of experts" in page(content)


@pytest.mark.parametrize("pattern", ["M-M*-M-", "M", "**-", "-"])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
@torch.no_grad()
def test_cache_bytes_are_those_of_a_real_cache(pattern, length, tiny_model, draw_ids):
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = tiny_model(hybrid_override_pattern=pattern).to(dtype)
        cache = HybridCache(len(pattern))
        model(draw_ids(1, length), past_key_values=cache)
        # A state may hold a view of a longer tensor: what counts is its own size.
        assert cache_bytes(model.config, length, size) == cache.nbytes()


def bytes_kept(block, x):
    """What autograd keeps of a block's forward pass, parameters left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, Context())
    return sum(t.untyped_storage().nbytes() for t in kept.values())


WIDE = {
    "hybrid_override_pattern": "M*-E", "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "head_dim": 16,
    "mamba_num_heads": 12, "mamba_head_dim": 16, "n_groups": 3, "ssm_state_size": 24, "chunk_size": 32,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 80,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"chunk_size": 64, "mamba_num_heads": 6}, {"moe_latent_size": 40}])
@pytest.mark.parametrize(("dtype", "w"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_keeps(changes, dtype, w, tiny_model, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)  # without, products keep fp32 copies of bf16 inputs
    monkeypatch.setattr(eager, "CPU_CHUNK", 1000)
    model = tiny_model("eager", **WIDE | changes).to(dtype)
    for symbol, block in zip("M*-E", model.backbone.layers):
        x = torch.randn(2, 256, 96, dtype=dtype, requires_grad=True)
        counted = block_activations(model.config, symbol, w, 256) * x.shape[0] * x.shape[1]
        assert counted == pytest.approx(bytes_kept(block, x), rel=0.1), symbol


def test_recomputing_keeps_the_inputs_and_the_largest_block(tiny_config):
    config = tiny_config(hybrid_override_pattern="M-")
    largest = max(block_activations(config, symbol, 4, 64) for symbol in "M-")
    kept = activation_bytes(config, 4, 64, 64)
    of_norm = kept["all_kept"] / 64 - sum(block_activations(config, symbol, 4, 64) for symbol in "M-")
    assert kept["recomputed"] / 64 == pytest.approx(2 * config.hidden_size * 4 + largest + of_norm)
    assert activation_bytes(config, 4, 128, 64)["all_kept"] == 2 * kept["all_kept"]


def test_the_training_state_is_shared_and_the_copy_is_not():
    config = read_config(str(SHAPES / "nemotron-h-8b.yaml"))
    one, eight, more = (state_bytes(config, gpus, 2) for gpus in (1, 8, 64))
    assert sum(one.values()) == 18 * 8_100_852_736  # 4 + 4 + 8, and autocast's 2
    assert one["moments"] == 8 * eight["moments"]
    # embedding, head, last norm and an FFN; weight and gradient, 2 bytes each
    assert eight["compute_copy"] == more["compute_copy"] == 4 * (2 * 131072 * 4096 + 4096 + 2 * 4096 * 21504 + 4096)
    assert state_bytes(config, 1, 4)["compute_copy"] == 0


def test_folder_shape_file_and_config_json_read_the_same(tiny_config, tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "shape.yaml").write_text(
        "\n".join(f"{k}: {json.dumps(v)}" for k, v in tiny_config().to_dict().items() if k in ("vocab_size", "hidden_size"))
    )
    outputs = []
    for source in (tmp_path, tmp_path / "config.json"):  # no weights there, and none missed
        assert main(["inspect", str(source), "--json", "-"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1] == figures(tiny_config(), **PLAIN | {"seq_len": 8192})
    assert read_config(str(tmp_path / "shape.yaml")).hidden_size == tiny_config().hidden_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "hiden_size: 8", "did you mean hidden_size"),
        ("a.yaml", "- 1", "must hold `key: value` lines; got list"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.yaml", "vocab_size: 0", "vocab_size must be a whole number"),
        ("config.json", "{", "cannot be read"),
        ("config.json", '{"model_type": "llama"}', "model_type 'llama'"),
        ("other.txt", "{}x", "cannot be read"),
    ],
)
def test_bad_files_are_told(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_twin_says_why(tiny_config):
    content = figures(tiny_config(num_attention_heads=64), **PLAIN)
    assert "twin_bytes" not in content["cache"][0]
    assert "No Transformer twin to compare with" in page(content) and "take fewer attention heads" in page(content)


def test_the_page_says_what_it_was_asked(capsys):
    arguments = ["--gpus", "8", "--precision", "fp32", "--seq-len", "1024", "--micro-batch", "2"]
    assert main(["inspect", str(SHAPES / "nemotron-h-8b.yaml"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "Training in fp32 on 8 GPUs" in out and "2 x 1,024 tokens" in out and "parameters / 8" in out
    # 4 attention layers x 2 x 8 x 128 x 2 bytes x 65,536 tokens + 24 x (3 x 10,240 x 2 + 8,192 x 128 x 4)
    assert cache_bytes(read_config(str(SHAPES / "nemotron-h-8b.yaml")), 65536) == 1073741824 + 102137856
    assert "64k      1.18 GB" in out


def test_figures_for_people():
    assert [scaled(x, COUNT) for x in (0, 999, 1000, 8_100_852_736, 999_999, 2e15)] == [
        "0",
        "999",
        "1.00 K",
        "8.10 B",
        "1.00 M",
        "2,000 T",
    ]
    assert [scaled(x, BYTES) for x in (5, 16.2e9, 128e6)] == ["5 B", "16.2 GB", "128 MB"]
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"
    assert table([("a", "bb"), ("ccc", "d")], "<<") == "a    bb\nccc  d"


@pytest.mark.parametrize("inline", [True, False])
def test_the_config_of_a_run_reads_as_its_shape(inline, tiny, tmp_path):
    (tmp_path / "shape.yaml").write_text(json.dumps(tiny()))
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"config": tiny() if inline else str(tmp_path / "shape.yaml")}}))
    read, shape = (read_config(str(tmp_path / name)) for name in ("run.yaml", "shape.yaml"))
    assert read.to_dict() == shape.to_dict()


def test_a_run_from_other_weights_reads_as_they_are(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"init_from": str(tmp_path / "model")}}))
    assert read_config(str(tmp_path / "run.yaml")).hybrid_override_pattern == "M-M*-M-"
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {}}))
    with pytest.raises(ValueError, match=r"neither model\.config nor"):
        read_config(str(tmp_path / "run.yaml"))


def test_a_run_that_names_itself_is_an_error(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"init_from": str(tmp_path / "run.yaml")}}))
    with pytest.raises(ValueError, match="names itself"):
        read_config(str(tmp_path / "run.yaml"))
