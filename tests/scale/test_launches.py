"""The same run from one process, from several, from two machines' worth of agents, killed and started again."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scale.conftest import SHAPE
from tests.scale.harness import HERE, end, logged, start, torchrun

pytestmark = pytest.mark.scale
WAYS = [(1, "none"), (2, "none"), (4, "none"), (2, "fsdp2"), (4, "fsdp2")]


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The run in one process, against which all others are held."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    end(start(settings, run_dir))
    return run_dir


@pytest.mark.parametrize(("ranks", "sharding"), WAYS)
def test_any_number_of_ranks_has_the_losses_of_one_process(settings, one, tmp_path, ranks, sharding):
    out = end(start(settings, tmp_path / "run", "--train.sharding", sharding, launcher=torchrun(ranks)))
    assert f"{ranks} process(es) on 1 machine(s)" in out and out.count("machine  ") == 1  # rank 0 alone prints
    assert ("each rank has the whole model" in out) == (sharding == "none")
    a, b = logged(one), logged(tmp_path / "run")
    assert a.keys() == b.keys() == set(range(1, 21))
    assert max(abs(a[step] - b[step]) for step in a) < 1e-5
    a, b = logged(one, "val_loss"), logged(tmp_path / "run", "val_loss")
    assert a.keys() == b.keys() == {0, 10, 20} and max(abs(a[step] - b[step]) for step in a) < 1e-5
    logs = [(tmp_path / f"run/logs/rank-{rank}.log").read_text() for rank in range(ranks)]
    assert all(f"rank {rank} of {ranks}" in text and "step 20: loss" in text for rank, text in enumerate(logs))


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two") / "run"
    end(start(settings, run_dir, "--train.sharding", "fsdp2", launcher=torchrun(2)))
    return run_dir


@pytest.mark.parametrize(("ranks", "sharding"), [(1, "none"), (3, "fsdp2"), (4, "fsdp2"), (3, "none")])
def test_a_checkpoint_of_two_ranks_that_share_the_model_goes_on_with_any_number(settings, one, two, tmp_path, ranks, sharding):
    flags = ["--resume", str(two / "checkpoints/step-10"), "--train.sharding", sharding]
    end(start(settings, tmp_path / "run", *flags, launcher=torchrun(ranks)))
    a, b = logged(one), logged(tmp_path / "run")
    assert b.keys() == set(range(11, 21)) and max(abs(a[step] - b[step]) for step in b) < 1e-5


def test_two_agents_do_what_one_with_two_processes_does(settings, two, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "one-run"]
    flags = ["--train.sharding", "fsdp2"]
    agents = [start(settings, tmp_path / "run", *flags, launcher=torchrun(1, *meeting)) for _ in range(2)]
    said = [end(agent) for agent in agents]
    assert sum("2 process(es)" in out for out in said) == 1
    assert logged(tmp_path / "run") == logged(two)
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / "checkpoints/step-20" / file) for folder in (tmp_path / "run", two))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_is_named_and_the_launcher_starts_all_again(settings, tmp_path, sharding, dies):
    flags = ["--train.sharding", sharding, "--train.checkpoint_every", "5"]
    whole = tmp_path / "whole"
    end(start(settings, whole, *flags, launcher=torchrun(2)))
    passes = 12 // 2 * 7 + 3  # in the 8th step: validation does not come by this loss
    died = start(
        settings, tmp_path / "run", *flags, launcher=torchrun(2, "--standalone", "--max-restarts", "1"),
        script=[str(HERE / "dies.py")], DIES=str(dies), AT=str(passes), PYTHONPATH=".",
    )  # fmt: skip
    out = end(died)
    assert re.search(rf"rank {dies} \(.*\).* ended without a word \(killed\?\)", out)
    assert re.search(r"restart 1 of at most 1", out) and "going on from step 5" in out
    assert logged(tmp_path / "run") == logged(whole) and logged(tmp_path / "run", "val_loss") == logged(whole, "val_loss")
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / "checkpoints/step-20" / file) for folder in (tmp_path / "run", whole))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    survivor = (tmp_path / f"run/logs/rank-{1 - dies}.log").read_text()
    assert "ended without a word" in survivor and survivor.count(f"rank {1 - dies} of 2") == 2


@pytest.mark.parametrize(("name", "sharding"), [("ddp", "none"), ("fsdp2", "fsdp2")])
def test_accelerates_files_start_what_torchrun_does(settings, two, tmp_path, name, sharding):
    file = f"configs/accelerate/{name}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    out = end(start(settings, tmp_path / "run", "--train.sharding", sharding, launcher=launcher))
    assert "accelerate launch, restart 0 of at most 0" in out and "2 process(es) on 1 machine(s)" in out
    a, b = logged(two), logged(tmp_path / "run")
    assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) < 1e-5
    if name == "fsdp2":
        assert a == b
        out = end(start(settings, tmp_path / "other", launcher=launcher), 1)  # of the launcher; that of the ranks is 2
        assert "it asks for FSDP, and train.sharding is none" in out and not (tmp_path / "other").exists()


def test_fp8_is_shared_and_goes_on_bit_for_bit(settings, tmp_path):
    """The weights are gathered in FP8, whose scales are those of the whole tensors."""
    shape = SHAPE | {
        "mamba_num_heads": 16,
        "mamba_head_dim": 2,
        "intermediate_size": 32,
        "head_dim": 16,
        "num_attention_heads": 2,
    }
    shape |= {"num_key_value_heads": 1}
    flags = ["--model.config", json.dumps(shape), "--train.precision", "fp8", "--train.fp8_emulate", "true"]
    shared = [*flags, "--train.sharding", "fsdp2"]
    out = end(start(settings, tmp_path / "one", *flags))
    assert "fp8         emulated, 8 of 17 linear layers" in out
    end(start(settings, tmp_path / "two", *shared, launcher=torchrun(2)))
    a, b = logged(tmp_path / "one"), logged(tmp_path / "two")
    # Roundings of activations and gradients differ, since each rank scales those of its own sequences.
    assert max(abs(a[step] - b[step]) for step in a) < 0.02 and abs(a[1] - b[1]) < 1e-3
    resume = ["--resume", str(tmp_path / "two/checkpoints/step-10")]
    end(start(settings, tmp_path / "again", *shared, *resume, launcher=torchrun(2)))
    assert logged(tmp_path / "again").items() <= logged(tmp_path / "two").items()
    a, b = (load_file(tmp_path / run / "checkpoints/step-20/model/model.safetensors") for run in ("two", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_launcher_that_disagrees_with_the_configuration_is_told(settings, tmp_path):
    out = end(start(settings, tmp_path / "run", ACCELERATE_MIXED_PRECISION="fp16", ACCELERATE_USE_FSDP="true"), 2)
    assert "mixed_precision is fp16 and train.precision fp32" in out and "train.sharding is none" in out
    assert not (tmp_path / "run").exists()


def test_a_run_that_ranks_share_opens_as_a_model(two):
    from hybridlm import HybridLMForCausalLM

    model = HybridLMForCausalLM.from_pretrained(two / "model")
    assert json.loads(Path(two / "model/config.json").read_text())["architectures"] == ["NemotronHForCausalLM"]
    for name in ("A_log", "D", "dt_bias"):
        assert getattr(model.backbone.layers[0].mixer, name).dtype == torch.float32
