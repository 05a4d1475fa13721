"""Every command of the README is run, with shorter settings where it is long."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState

import eval.__main__
import hybridlm.__main__
import train.__main__
from hybridlm.data.blend import Blend
from tests.train.test_compress import train_all_here

ROOT = Path(__file__).parent.parent
SHORT = (
    "--model.config configs/model/tiny.yaml --data.seq_len 32 --train.steps 2 --train.global_batch 2 --train.val_sequences 2 "
    "--log.sample_tokens 4 --data.cache_dir cache"
)
SMALL_SEARCH = (
    " --compress.compare [] --compress.distilled 1 --compress.prompt 64 --compress.new 2 --compress.turns 1 --compress.scored 2 "
    "--compress.timed 1 --compress.min_speedup null --compress.mamba_num_heads null --compress.intermediate_size null "
    "--compress.layer_samples 2 --compress.part_samples 2 --compress.score_samples 2 --distill.hidden_weight 0"
)
# What a command gets added; the first rule that it begins with counts.
RULES = [
    (
        "python -m train --config configs/demo.yaml --run_dir runs/more",
        SHORT.replace("--model.config configs/model/tiny.yaml", ""),
    ),
    ("python -m train tokenizer", ""),
    ("python -m train merge", ""),
    ("python -m train prepare", ""),
    ("python -m train status", ""),
    ("python -m train compress", SHORT.replace("--model.config configs/model/tiny.yaml", "") + SMALL_SEARCH),
    ("python -m train sweep", SHORT + " --grid optim.lr=1e-3 seed=0"),  # a training is a process, which takes its time to begin
    ("python -m train", SHORT),
    ("torchrun --nproc_per_node 2 -m train", SHORT + " --data.source my-text.txt"),
    ("accelerate launch -m train", SHORT + " --data.source my-text.txt"),
    ("python -m eval perplexity", ""),
    ("python -m eval accuracy", "--limit 2 --shots 0"),
    ("python -m eval longcontext", "--lengths 256 --questions 1"),
    ("python -m eval compare", "--max-bytes 1000 --prompt 16 --new 2"),
    ("python -m eval throughput", "--repeats 1 --prompt 64 --new 2 --no-twin"),
    ("python -m eval report", "--prompt 16"),
    ("python -m hybridlm inspect", ""),
    ("python -m hybridlm generate", "--max-new 5"),
    ("python -m hybridlm verify", "--tokens 32"),
    ("python -m hybridlm doctor", ""),
]
# Commands run in this process, which has torch already; what the launchers start are processes of their own.
LAUNCHERS = {
    "torchrun": lambda words: torch.distributed.run.main(["--standalone", *words]),
    "accelerate": lambda words: launch_command(launch_command_parser().parse_args(words[1:])),
}
MAINS = {"train": train.__main__.main, "eval": eval.__main__.main, "hybridlm": hybridlm.__main__.main}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if not line.startswith("make ")]


def run(line):
    launcher, *arguments = shlex.split(line)
    if launcher == "python":
        AcceleratorState._reset_state(reset_partial_state=True)
        assert arguments[0] == "-m"
        assert MAINS[arguments[1]](arguments[2:]) == 0, line
    else:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)}
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
            LAUNCHERS[launcher](arguments)  # raises, or exits, where what it starts fails
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a person has after cloning, with the run of `make demo` made short, and a text of their own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("hybridlm", "train", "eval", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "my-text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return folder


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """Some packages of the standard library in the place of all: the report counts every byte of it. It scores less of it."""
    monkeypatch.setattr("eval.report.COMPARED_BYTES", 2_000)
    real = Path(sysconfig.get_paths()["stdlib"])
    for name in ("asyncio", "email", "importlib", "json", "unittest"):
        shutil.copytree(real / name, tmp_path / "stdlib" / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})


def interrupt_in_second_step(patch):
    """Ctrl-C while the batch of the second step is read."""
    batch, calls = Blend.batch, count(1)
    patch.setattr(Blend, "batch", lambda *a: (next(calls) == 2 and os.kill(os.getpid(), signal.SIGINT)) or batch(*a))


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # of torchrun, in a process that has no stderr of its own
def test_the_commands_run_in_their_order(checkout, small_stdlib, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    # The trainings of the sweep are processes, those of the compression are in this one.
    monkeypatch.setattr("train.compress.train_all", lambda runs, told, launcher: train_all_here([], runs))
    (recipe,) = re.findall(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)
    demo = [line.strip().replace("$(BIN)/", "") for line in recipe.splitlines()]
    assert len(demo) == 2
    assert "make demo" in blocks("sh")[0]
    mine = "python -m train --config configs/demo.yaml --run_dir runs/mine --data.source my-text.txt"
    assert commands().count(mine) == 2  # to begin, and to go on after Ctrl-C
    seen = set()
    for line in [*demo, *commands()]:
        extra = next((extra for start, extra in RULES if line.startswith(start)), None)
        assert extra is not None, f"no rule runs this command of the README: {line}"
        with monkeypatch.context() as patch:
            if line == mine and line not in seen:
                interrupt_in_second_step(patch)
            run(f"{line} {extra}")
        assert ("going on from step 1" in capsys.readouterr().out) == (line in seen)
        seen.add(line)
    assert (checkout / "runs/compressed/report/index.html").exists()
    assert (checkout / "runs/demo/report/index.html").is_file()
    assert (checkout / "speed.json").is_file()
    check_python(checkout)


def check_python(checkout):
    """The code block, on the model of the run above; `hybridlm` and what only it needs are kept from being imported."""
    (code,) = blocks("python")
    guard = "import sys\nfor name in ('hybridlm', 'accelerate', 'datasets', 'pydantic'): sys.modules[name] = None\n"
    code = guard + code.replace("max_new_tokens=100", "max_new_tokens=3")
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main(")
