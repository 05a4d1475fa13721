import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train.config
from hybridlm import HybridLMForCausalLM, HybridLMForSequenceClassification
from hybridlm.__main__ import main
from hybridlm.cli.inspect import RUN_DEFAULTS, cache_rows, figures, gib, page, read_config, read_plan, sum_rows, training_rows
from hybridlm.flops import forward_flops
from hybridlm.memory import GIB, Plan, cache_bytes, peak_bytes
from hybridlm.output import BYTES, COUNT, scaled, table

SHAPES = Path(__file__).parents[3] / "configs" / "model"
PUBLISHED = {"4b": "4,489,223,040  4.49 B", "8b": "8,100,852,736  8.10 B", "47b": "46.8 B", "56b": "56.3 B"}
PLAIN = Plan(seq_len=128)


@pytest.mark.parametrize(("size", "parameters"), PUBLISHED.items())
def test_the_published_sizes_come_out(size, parameters, capsys):
    assert main(["inspect", str(SHAPES / f"nemotron-h-{size}.yaml")]) == 0
    assert parameters in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))


@pytest.mark.parametrize("pattern", ["M-M*-M-", "MEM*-ME", "M", "*-*-", "m-M*mE-"])
def test_the_rows_add_up_to_the_model_and_to_its_flops(pattern, tiny_config):
    config = tiny_config(hybrid_override_pattern=pattern)
    with torch.device("meta"):
        model = HybridLMForCausalLM(config)
    content = figures(config, PLAIN)
    rows = {row["kind"]: row for row in content["layers"]}
    assert content["parameters"] == sum(p.numel() for p in model.parameters()) == sum(r["parameters"] for r in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["flops_per_token"] for row in rows.values()) == pytest.approx(content["forward_flops_per_token"])
    for symbol, layer in zip(pattern, model.backbone.layers):
        assert rows[symbol]["parameters_each"] == sum(p.numel() for p in layer.parameters())
        assert rows[symbol]["layers"] == pattern.count(symbol)


def test_a_layers_flops_are_what_the_model_has_more_with_it(tiny_config):
    rows = {row["kind"]: row for row in figures(tiny_config(hybrid_override_pattern="MM*-E"), PLAIN)["layers"]}
    with_two = sum(forward_flops(tiny_config(hybrid_override_pattern="MM*-E"), 128).values())
    with_one = sum(forward_flops(tiny_config(hybrid_override_pattern="M*-E"), 128).values())
    assert rows["M"]["flops_per_token"] == pytest.approx(2 * (with_two - with_one))


def test_experts_make_total_and_active_differ(tiny_config):
    config = tiny_config(hybrid_override_pattern="MEM*-ME")
    content = figures(config, PLAIN)
    idle = config.n_routed_experts - config.num_experts_per_tok
    expert = 2 * config.hidden_size * config.moe_intermediate_size
    assert content["parameters"] - content["active_parameters"] == 2 * idle * expert
    assert "mixture of experts" in page(content)


def test_folder_shape_file_and_config_json_read_the_same(tiny_config, tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "shape.yaml").write_text(
        "\n".join(f"{k}: {json.dumps(v)}" for k, v in tiny_config().to_dict().items() if k in ("vocab_size", "hidden_size"))
    )
    outputs = []
    for source in (tmp_path, tmp_path / "config.json"):  # no weights there, and none missed
        assert main(["inspect", str(source), "--json", "-"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1] == figures(tiny_config(), Plan())
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
    content = figures(tiny_config(num_attention_heads=64), PLAIN)
    assert "twin_bytes" not in content["cache"][0]
    assert "No Transformer twin to compare with" in page(content) and "take fewer attention heads" in page(content)


def test_the_page_says_what_it_was_asked(capsys):
    arguments = ["--gpus", "8", "--precision", "fp32", "--seq-len", "1024", "--micro-batch", "2"]
    assert main(["inspect", str(SHAPES / "nemotron-h-8b.yaml"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "Training in fp32 on 8 GPUs, sharded (fsdp2): " in out and "2 x 1,024 tokens" in out and "parameters / 8" in out
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


def test_a_run_is_inspected_as_it_would_be_trained(tiny, tmp_path):
    run = {
        "model": {"config": tiny()}, "data": {"seq_len": 64},
        "train": {"precision": "bf16", "sharding": "fsdp2", "recompute": "M", "global_batch": 12, "steps": 7},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    source = str(tmp_path / "run.yaml")
    nothing = dict.fromkeys(("precision", "sharding", "recompute", "micro_batch", "seq_len"))
    both = {"gpus": 2, "global_batch": 12, "optimizer": "muon"}
    plan = Plan(sharding="fsdp2", precision="bf16", recompute="M", micro_batch=6, seq_len=64, **both)
    assert read_plan(source, 2, nothing) == (plan, 7)
    said = {"precision": "fp8", "sharding": "none", "recompute": "", "micro_batch": 3, "seq_len": 32}
    assert read_plan(source, 2, said) == (Plan(**both, **said), 7)
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"optim": {"name": "adamw"}}))
    assert read_plan(source, 2, nothing)[0] == replace(plan, optimizer="adamw")
    for gpus, given, message in [
        (5, {}, "must be a multiple of the number of GPUs"),
        (2, {"micro_batch": 4}, "must divide a GPU's share"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_plan(source, gpus, nothing | given)
    with pytest.raises(ValueError, match=r"'Z' is no kind of layer; give some of M, \*, -, E"):
        read_plan(source, 1, nothing | {"recompute": "MZ"})


def test_a_run_that_says_nothing_has_the_defaults_of_training(tiny, tmp_path):
    defaults = train.config.parse({"run_dir": "r", "model": {"config": tiny()}})
    assert {key: getattr(defaults.train, key, None) or getattr(defaults.data, key, None) or "" for key in RUN_DEFAULTS} == {
        key: value or "" for key, value in RUN_DEFAULTS.items()
    }
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"config": tiny()}, "train": None}))
    plan, steps = read_plan(str(tmp_path / "run.yaml"), 4, {})
    assert plan.optimizer == defaults.optim.name
    assert (plan.precision, plan.sharding, plan.micro_batch, plan.seq_len, steps) == ("fp32", "none", 4, 512, 1000)


def test_one_gpu_shares_its_model_with_nobody():
    recipe = str(SHAPES.parent / "pretrain" / "nemotron-h-8b-bf16.yaml")
    assert read_plan(recipe, 1, {})[0].sharding == read_plan(recipe, 1, {"sharding": "fsdp2"})[0].sharding == "none"
    assert read_plan(recipe, 2, {})[0].sharding == "fsdp2"


def test_a_bare_shape_is_sharded_on_several_gpus():
    source = str(SHAPES / "tiny.yaml")
    assert read_plan(source, 1, {}) == (Plan(), None)
    assert read_plan(source, 8, {}) == (Plan(gpus=8, sharding="fsdp2"), None)
    assert read_plan(source, 8, {"sharding": "none"}) == (Plan(gpus=8), None)


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (["--gpus", "8"], r"^fits: 6\d\.\d of 80\.0 GiB, 2\d% left for the allocator, CUDA and NCCL \(10% must be\)$"),
        (
            ["--gpus", "8", "--micro-batch", "2"],
            r"^does not fit: 10\d\.\d of 80\.0 GiB, .* --recompute 'M\*-' \(\d\d\.\d GiB\), --micro-batch 1 \(6\d\.\d GiB\)$",
        ),
        (["--seq-len", "131072", "--gpus", "8"], "^does not fit: .* neither recomputing, nor a micro-batch of 1, nor more GPUs"),
    ],
)
def test_the_verdict(arguments, verdict, capsys):
    assert main(["inspect", str(SHAPES / "nemotron-h-8b.yaml"), "--memory", "80G", *arguments]) == 0
    assert re.search(verdict, capsys.readouterr().out, flags=re.M)


def test_a_remedy_does_what_it_says(capsys):
    shape = str(SHAPES / "nemotron-h-56b.yaml")
    assert main(["inspect", shape, "--memory", "80G", "--gpus", "8", "--json", "-"]) == 0
    (way,) = json.loads(capsys.readouterr().out)["training"]["remedies"]
    assert way["change"] == "--recompute 'M*-' --gpus 32"
    assert main(["inspect", shape, "--memory", "80G", *shlex.split(way["change"]), "--json", "-"]) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["fits"] and training["remedies"] == [] and training["peak_bytes"] == way["peak_bytes"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80G", 80 * GIB), ("80GiB", 80 * GIB), ("79.6GiB", 79.6 * GIB), ("80GB", 80e9), ("80", None), ("0G", None), ("80T", None)],
)
def test_memory_is_in_either_unit(text, size, capsys):
    command = ["inspect", str(SHAPES / "tiny.yaml"), "--memory", text, "--json", "-"]
    if size is None:
        with pytest.raises(SystemExit):
            main(command)
        assert "must be a number with G or GiB (2^30 bytes) or GB (10^9)" in capsys.readouterr().err
    else:
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["training"]["memory_bytes"] == size


def test_the_page_has_the_cost_of_a_cluster(capsys):
    command = ["inspect", "configs/pretrain/nemotron-h-56b-fp8.yaml", "--gpus", "256", "--memory", "80G"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"^at most +768 GPUs", out, flags=re.M) and re.search(
        r"^the run +[\d,]+ days +20.0 T tokens", out, flags=re.M
    )
    assert re.search(r"^sending +0\.873 to 6\.98 s +a micro-batch, at 400 and at 50 GB/s", out, flags=re.M)
    assert "activations of M- computed again" in out and "inference: its weights in bf16 do not fit in 80.0 GiB" in out
    assert main([*command, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    plan, _ = read_plan(command[1], 256, {})
    assert content["training"]["peak_bytes"] == peak_bytes(read_config(command[1]), plan)
    assert content["communication"]["most_gpus"] == 768


def test_ddp_sends_gradients_alone_and_has_buckets(capsys):
    assert main(["inspect", str(SHAPES / "nemotron-h-8b.yaml"), "--gpus", "8", "--sharding", "none", "--memory", "80G"]) == 0
    out = capsys.readouterr().out
    assert "each with the whole model (DDP)" in out and "its buckets for gradients" in out
    assert not re.search("^gathered", out, flags=re.M) and re.search("^reduced .* a step: gradients", out, flags=re.M)
    assert "inference: 80.0 GiB hold the weights in bf16 and the cache of 3,723,484 tokens" in out
    assert re.search(r"^sending +0\.126 s +a step, at 450 GB/s into a GPU$", out, flags=re.M)  # 2 x 4 x 8.1e9 x 7/8 / 450e9


def test_a_model_without_attention_takes_a_context_of_any_length(tiny, tmp_path, capsys):
    (tmp_path / "shape.yaml").write_text(json.dumps(tiny(hybrid_override_pattern="M-")))
    assert main(["inspect", str(tmp_path / "shape.yaml"), "--memory", "80G"]) == 0
    assert "inference: 80.0 GiB hold the weights in bf16 and a context of any length" in capsys.readouterr().out


def test_the_page_says_what_is_kept_and_what_the_fullest_moment_is(capsys):
    shape = str(SHAPES / "nemotron-h-8b.yaml")
    assert main(["inspect", shape, "--recompute", "M*-", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)["training"]
    sizes = content["activation_bytes"]
    assert sizes["all_recomputed"] == sizes["as_planned"] < sizes["all_kept"]
    assert main(["inspect", shape, "--recompute", "M*-"]) == 0
    out = capsys.readouterr().out
    fullest = max(content["moments"], key=lambda name: sum(content["moments"][name].values()))
    assert f"what is there all the time, and what comes at the {fullest}\n" in out
    assert "gathered" not in out  # what there is nothing of is left out


@pytest.mark.parametrize(("vocabulary", "fullest"), [(100_000, "loss"), (64, "layers")])
def test_the_peak_is_at_the_fullest_moment(vocabulary, fullest, tiny_config):
    training = figures(tiny_config(vocab_size=vocabulary), PLAIN)["training"]
    rows = {name: (size, text) for name, size, text in training_rows(training)}
    assert rows["peak"][1].endswith(f"what comes at the {fullest}")
    assert "autocast" in rows and "DDP" not in rows  # one GPU sends nothing: a row of zero is left out


def test_small_memory_is_in_smaller_units():
    assert (gib(GIB), gib(GIB / 10), gib(GIB / 10 - 2**20)) == ("1.0 GiB", "0.1 GiB", "101.4 MiB")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hybrid_override_pattern": "rlgm-"}, "convolutions, in bf16; recurrent states in fp32."),
        ({"hybrid_override_pattern": "rlgm*-", "bidirectional": "sum"}, "It has no cache"),
    ],
)
def test_the_page_says_what_is_kept_between_tokens(changes, words, tiny_config):
    assert words in page(figures(tiny_config(**changes), PLAIN))


def test_the_cache_stands_beside_the_twins(tiny_config):
    content = figures(tiny_config(), PLAIN)
    for shown, row in zip(cache_rows(content)[1:], content["cache"], strict=True):
        assert shown[3] == f"{row['twin_bytes'] / row['bytes']:,.1f}x"


def test_only_a_model_with_experts_has_idle_ones(tiny_config):
    for pattern, words in (("M-*-", "all: there are no experts"), ("MEM*", "all but the experts that a token does not go to")):
        (active,) = (row for row in sum_rows(figures(tiny_config(hybrid_override_pattern=pattern), PLAIN)) if row[0] == "active")
        assert active[2].endswith(words)


def test_what_is_counted_of_a_classifier_is_said(tiny_config, tmp_path):
    torch.manual_seed(0)
    HybridLMForSequenceClassification(tiny_config(num_labels=5)).save_pretrained(tmp_path)
    config = read_config(str(tmp_path))
    said = f"A classifier: its head is 5 x {config.hidden_size}. Counted is that of a language model, {config.vocab_size:,} x"
    assert said in page(figures(config, PLAIN))
    assert "its head is labels x 64" in page(figures(read_config(str(SHAPES / "classify.yaml")), PLAIN))
    assert "A classifier" not in page(figures(tiny_config(), PLAIN))
