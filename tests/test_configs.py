"""Every file of configs/, found by what is there: each parses, each shape is what it counts, each run takes a step."""

import json
import os
import random
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState

import hybridlm.__main__
from hybridlm import HybridLMConfig, HybridLMForCausalLM, HybridLMForSequenceClassification
from hybridlm.cluster import communication
from hybridlm.compress.search import check_axes
from hybridlm.memory import GIB, Plan, fits, peak_bytes
from hybridlm.modeling import HybridLMModel
from hybridlm.output import BYTES, scaled
from hybridlm.strict_yaml import load_yaml, parse_yaml
from hybridlm.twin import count_parameters
from train.command_line import parse_command_line, settings_parser
from train.compress_config import CompressConfig, axes
from train.config import dump, parse, schema
from train.loop import train
from train.optim import learning_rate
from train.settings import RunConfig, Train
from train.sweep_config import SweepConfig, table_of_runs

ROOT = Path(__file__).parent.parent
FILES = sorted(file for file in (ROOT / "configs").rglob("*.*") if "experiments" not in file.parts and file.suffix != ".py")
SHAPES = [file for file in FILES if file.parent.name == "model"]
ACCELERATE = [file for file in FILES if file.parent.name == "accelerate"]
LAUNCH = [file for file in FILES if file.parent.name == "launch"]
COMPRESSIONS = [file for file in FILES if file.parent.name == "compress"]
RUNS = [file for file in FILES if file not in SHAPES + ACCELERATE + LAUNCH + COMPRESSIONS]
SWEEPS = sorted((ROOT / "configs/experiments").glob("*.yaml"))
PAPER = [file for file in RUNS if file.name.startswith("nemotron-h-")]


def every(files):
    return pytest.mark.parametrize("file", files, ids=lambda file: str(file.relative_to(ROOT / "configs")))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Where configs name their shapes from. Accelerate keeps its precision for the life of the process."""
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_there_are_files_of_every_kind():
    assert all(file.suffix == ".yaml" for file in SHAPES + ACCELERATE + RUNS)
    assert len(SHAPES) > 8 and len(RUNS) > 4 and len(ACCELERATE) > 3 and len(LAUNCH) > 1 and len(PAPER) > 2


@every(RUNS)
def test_a_run_parses_and_its_dump_reads_back_the_same(file):
    config, _ = parse_command_line(["--config", str(file)])
    assert parse(yaml.safe_load(dump(config))) == config
    assert config.model.config is None or isinstance(config.model.config, dict)


@every(COMPRESSIONS)
def test_a_compression_parses_and_begins_with_a_run_of_configs(file):
    config, _ = parse_command_line(["--config", str(file)], settings_parser(CompressConfig), CompressConfig)
    assert parse(yaml.safe_load(dump(config)), CompressConfig) == config
    (parent,) = [run for run in RUNS if f"{load_yaml(run)['run_dir']}/model" == config.model.init_from]
    begun, _ = parse_command_line(["--config", str(parent)])
    shape = HybridLMConfig.from_strict_dict(begun.model.config)
    check_axes(shape, axes(config.compress, shape))
    tokens = [run.train.steps * run.train.global_batch * run.data.seq_len for run in (config, begun)]
    assert tokens[0] <= 0.15 * tokens[1]


@every(SWEEPS)
def test_the_rows_of_a_sweep_parse_and_are_what_they_count(file):
    config, _ = parse_command_line(["--config", str(file)], settings_parser(SweepConfig), SweepConfig)
    assert parse(yaml.safe_load(dump(config)), SweepConfig) == config
    rows = table_of_runs(config)
    for row in rows:
        assert parse(yaml.safe_load(dump(row.runs[0]))) == row.runs[0]
        if row.parameters is not None:
            assert on_meta(HybridLMConfig.from_strict_dict(row.runs[0].model.config)) == row.parameters
    if config.sweep.equal_parameters:
        assert max(row.parameters for row in rows) <= 1.01 * min(row.parameters for row in rows)


@every(SHAPES)
def test_a_shape_builds_to_the_parameters_that_are_counted(file):
    config = HybridLMConfig.from_strict_dict(load_yaml(file))
    assert on_meta(config) == count_parameters(config)


def on_meta(config):
    """Parameters of the model, which takes no memory."""
    with torch.device("meta"):
        backbone = HybridLMModel(config)
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return sum(p.numel() for p in backbone.parameters()) + head


@every(RUNS)
def test_a_runs_shape_is_one_of_the_shapes(file):
    assert ROOT / load_yaml(file)["model"]["config"] in SHAPES


def narrow(shape):
    """The same kinds of layer in the same order, each kind at most twice, at widths that divide by 16."""
    seen, pattern = {}, ""
    for symbol in shape["hybrid_override_pattern"]:
        seen[symbol] = seen.get(symbol, 0) + 1
        pattern += symbol if seen[symbol] <= 2 else ""
    sizes = {
        "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "mamba_num_heads": 16, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    }  # fmt: skip
    return shape | {key: size for key, size in sizes.items() if key in shape} | {"hybrid_override_pattern": pattern}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """As many small sources as the largest blend names, with labels, and where what is made of them is kept."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for name in "abcd":
        words = [" ".join(draw.choices(["the", "cat", "sat", "on", "a", "mat"], k=20)) for _ in range(20)]
        rows = [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(words)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@every(RUNS)
def test_a_run_takes_a_step(file, texts, tmp_path):
    """With every setting of its own but sizes, sources and the number of steps."""
    values = schema(RunConfig).dump_python(parse_command_line(["--config", str(file)])[0])
    values["run_dir"] = str(tmp_path / "run")
    values["model"]["config"] = narrow(values["model"]["config"])
    data = values["data"]
    data |= {"seq_len": 32, "tokenizer": None, "cache_dir": str(texts / "cache"), "workers": 0}
    if data["blend"]:
        for entry, name in zip(data["blend"], "abcd", strict=True):
            entry["source"] = str(texts / f"{name}.jsonl")
    else:
        data["source"] = str(texts / "a.jsonl")
    data["label_column"] = data["label_column"] and "label"
    data["val_source"] = data["val_source"] and str(texts / "a.jsonl")
    values["train"] |= {"steps": 1, "global_batch": 2, "micro_batch": values["train"]["micro_batch"] and 1, "val_sequences": 2}
    values["log"] |= {"sample_tokens": min(2, values["log"]["sample_tokens"]), "wandb": False}
    if values["train"]["precision"] == "fp8":
        emulated = "fp8_emulate" in {field.name for field in fields(Train)}
        values["train"] |= {"fp8_emulate": True} if emulated else {"precision": "bf16"}
    config = parse(parse_yaml(json.dumps(values)))
    train(config)
    (line,) = [line for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in line]
    least, most = (5, 6.5) if config.data.label_column is None else (0.5, 2)  # ln(272) = 5.6, ln(3) = 1.1
    assert line["step"] == 1 and least < line["loss"] < most
    kind = HybridLMForCausalLM if config.data.label_column is None else HybridLMForSequenceClassification
    assert kind.from_pretrained(tmp_path / "run/model").config.vocab_size == config.model.config["vocab_size"]


@every(PAPER)
def test_what_the_paper_says_of_a_run(file):
    config, _ = parse_command_line(["--config", str(file)])
    tokens, batch = (20e12 if "56b" in file.name else 15e12), config.train.global_batch * config.data.seq_len
    assert (config.train.global_batch, config.data.seq_len) == (768, 8192)
    assert config.train.steps == round(tokens / batch)
    assert round(config.schedule.warmup * config.train.steps) == 2000
    assert config.data.phases[:2] == (0.6, 0.8)
    last = (1 - config.data.phases[2]) * config.train.steps * batch
    assert last == pytest.approx(380e9, rel=1e-3)
    rate = learning_rate(config.optim, config.schedule, config.train.steps)
    steps = config.train.steps
    assert rate(2000) == rate(int(0.8 * steps)) == 4.5e-4 and rate(steps) == pytest.approx(4.5e-6)
    assert config.train.sharding == "fsdp2" and config.train.precision == file.stem.rsplit("-", 1)[1]
    assert config.log.sample_tokens == 0


@every([file for file in RUNS if "# inspect: " in file.read_text()])
def test_a_run_needs_what_its_file_says(file, run_main):
    text = file.read_text()
    need, memory, gpus, left = re.search(
        r"# inspect: ([\d.]+) of (\d+) GiB on (?:each of )?(\w+) GPUs?, (\d+%) left", text
    ).groups()
    command = re.search(r"python -m hybridlm (inspect .*)", text)[1].split()
    assert str(file).endswith(command[1]) and (f"--gpus {gpus}" in text) == (gpus != "one")
    _, out, _ = run_main(hybridlm.__main__.main, *command)
    assert f"\nfits: {need} of {memory}.0 GiB, {left} left" in out
    if days := re.search(r"([\d,]+) days", text):
        assert re.search(rf"^the run +{days[1]} ", out, flags=re.M)


def test_the_tables_of_scale_are_those_of_inspect():
    text = (ROOT / "docs/scale.md").read_text()
    tables = re.findall(r"\| (8B|56B) on GPUs \| nothing (.*?)\n\n", text, flags=re.S)
    assert len(tables) == 2
    for size, rows in tables:
        config = HybridLMConfig.from_strict_dict(load_yaml(f"configs/model/nemotron-h-{size.lower()}.yaml"))
        for gpus, *cells in re.findall(r"\| (\d+)" + r" \| (\S+)" * 4, rows):
            for recompute, cell in zip(("", "M", "M-", "M*-"), cells, strict=True):
                plan = Plan(gpus=int(gpus), sharding="fsdp2", precision="fp8", recompute=recompute)
                value = f"{peak_bytes(config, plan) / GIB:.1f}"
                assert cell == (f"**{value}**" if fits(config, plan, 80 * GIB) else value), (size, gpus, recompute)


def test_what_scale_says_of_time_is_what_inspect_says():
    text = (ROOT / "docs/scale.md").read_text()
    configs = {
        size: HybridLMConfig.from_strict_dict(load_yaml(f"configs/model/nemotron-h-{size}.yaml")) for size in ("8b", "56b")
    }
    steps = {"8b": 2384186, "56b": 3178914}
    shown = lambda *values: " to ".join(dict.fromkeys(f"{v:,.0f}" if v >= 100 else f"{v:.2g}" for v in values))  # noqa: E731
    rows = {name.split(",")[0]: cells.split(" | ") for name, cells in re.findall(r"^\| (\w[^|]*?) \| (.*) \|$", text, flags=re.M)}
    for i, size in enumerate(configs):
        found = communication(configs[size], Plan(gpus=256, sharding="fsdp2", global_batch=768), None)
        assert rows["sending"][i] == shown(found["seconds_best"], found["seconds_worst"]) + " s"
        hidden = rows["tokens of a GPU in a micro-batch that hide the sending"][i]
        assert hidden == shown(found["tokens_to_hide_best"], found["tokens_to_hide_worst"])
        for name in ("gathered", "reduced"):
            assert rows[name][i] == scaled(found["bytes"][name], BYTES)
        for gpus in (64, 256, 768):
            plan = Plan(gpus=gpus, sharding="fsdp2", global_batch=768, recompute="M-" if size == "56b" else "")
            found = communication(configs[size], plan, steps[size])
            ends = [round(found[f"days_{case}"]) for case in ("best", "worst")]
            assert rows[f"{gpus} GPUs"][i] == " to ".join(dict.fromkeys(f"{days:,}" for days in ends))
    alone, whole = (peak_bytes(configs["8b"], Plan(gpus=gpus, recompute="M*-")) / GIB for gpus in (1, 8))
    assert f"On one GPU the 8B needs {alone:.0f} GiB" in text and f"(`train.sharding: none`) it needs {whole:.0f}," in text


@every(ACCELERATE)
def test_accelerate_reads_its_files(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"  # the run decides
    kind = config.distributed_type.value
    assert kind == {"single": "NO", "ddp": "MULTI_GPU"}.get(file.stem, "FSDP")
    assert config.num_processes == {"single": 1, "fsdp2-multi-node": 16}.get(file.stem, 8)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert config.num_machines == (2 if "multi" in file.stem else 1)


@every(ACCELERATE)
def test_the_command_that_a_file_names_starts_what_it_says(file):
    (command,) = re.findall(r"^#   accelerate launch ((?:.*\\\n)?.*)", file.read_text(), flags=re.M)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(command.replace("\\\n#", ""))))
    assert file.samefile(arguments.config_file)
    assert (arguments.module, arguments.training_script) == (True, "train")
    assert arguments.use_fsdp == file.stem.startswith("fsdp2")
    if "multi" in file.stem:  # else every node would take itself for the first
        assert arguments.rdzv_backend == "c10d" and arguments.main_process_ip == "HOST"


def test_the_pods_of_kubernetes_have_what_a_run_needs():
    job = load_yaml(ROOT / "configs/launch/kubernetes.yaml")
    assert job["kind"] == "PyTorchJob"
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"] == 2 and container["name"] == "pytorch"
    wait = {entry["name"]: entry["value"] for entry in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(wait) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (command,) = container["args"]
    arguments = command.split(" -m train ")[1].split()
    assert parse_command_line(arguments)[0].run_dir.startswith("/shared/")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(command.split("--nproc_per_node ")[1].split()[0])


STAND_INS = {
    "scontrol": '[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "scontrol $*" >> calls',
    "scancel": 'echo "scancel $*" >> calls; kill -USR2 "$(cat srun.pid)"',
    # As the real one: SIGTERM to it is SIGKILL to its tasks. SIGUSR2 stands for a signal to the tasks.
    "srun": 'echo $$ > srun.pid; echo "srun $*" >> calls\n'
    "trap 'echo \"the tasks were killed\" >> calls; exit 137' TERM\ntrap 'echo \"the tasks have saved\" >> calls; exit 0' USR2\n"
    'if [ -n "$SIGNALLED" ]; then kill -USR1 $PPID; for i in $(seq 100); do sleep 0.1; done; fi; exit 3',
}


@pytest.mark.parametrize("signalled", [False, True])
def test_slurms_script_stops_in_time_and_comes_again(signalled, tmp_path):
    """With stand-ins for Slurm's commands, one of which sends the signal that comes before the time limit."""
    script = ROOT / "configs/launch/slurm.sh"
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        "SIGNALLED": "yes" if signalled else "",
    }  # fmt: skip
    done = subprocess.run(["bash", str(script), "run.yaml", "--seed", "1"], cwd=tmp_path, env=environment, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "torchrun --nnodes 2 --nproc_per_node 8" in calls[0] and "--rdzv_endpoint node1:20007" in calls[0]
    assert calls[0].endswith("-m train --config run.yaml --seed 1")
    assert calls[1:] == (["scancel --signal=TERM 7", "the tasks have saved", "scontrol requeue 7"] if signalled else [])
    assert done.returncode == (0 if signalled else 3)
    ahead, grace = (int(re.search(pattern, script.read_text())[1]) for pattern in (r"USR1@(\d+)", r"SHUTDOWN_TIMEOUT=(\d+)"))
    assert 30 < grace < ahead
