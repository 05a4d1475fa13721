import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from hybridlm import HybridLMForCausalLM
from hybridlm.__main__ import main
from hybridlm.cli.verify import KERNELS, STEPS, odd_sizes, without_kernels
from hybridlm.mixers.mamba2 import Mamba2
from hybridlm.tokenizer import byte_tokenizer


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model with a tokenizer; half the heads of its first layer take very small steps."""

    def write(tokenizer=True, **changes):
        model = tiny_model(**{"vocab_size": 258} | changes)
        with torch.no_grad():
            model.backbone.layers[0].mixer.dt_bias[::2] = -11.0
        model.save_pretrained(tmp_path)
        if tokenizer:
            byte_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    return write


def verify(folder, capsys, *arguments):
    status = main(["verify", str(folder), "--tokens", "70", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_same_logits_in_every_way(folder, capsys):
    status, out, err = verify(folder(), capsys, "--json", "-")
    content = json.loads(out)
    assert (status, content["same"]) == (0, True)
    ways = ("one pass", "prefill in pieces", "cached decode")
    assert [(case["input"], case["way"]) for case in content["cases"]] == [(i, w) for i in ("random", "text") for w in ways]
    assert all(0 < case["difference"] < 1e-4 for case in content["cases"])
    assert content["clamp"] == {"bound": 1e-30, "difference": 0.0}
    assert content["greedy"] == {"tokens": STEPS, "equal": STEPS}
    assert "opening it with transformers" in err


def test_the_clamp_is_told_apart_and_does_not_fail(folder, capsys):
    path = folder(tokenizer=False) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_min": 0.001}))
    status, out, _ = verify(path.parent, capsys)
    assert status == 0
    clamp = next(line for line in out.splitlines() if line.startswith("clamp: "))
    assert "dt at 0.001 or above" in clamp
    assert float(clamp.split()[-1]) > 1e-4
    assert "text" not in out  # no tokenizer


def test_without_small_steps_the_clamp_has_no_effect(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    status, out, _ = verify(tmp_path, capsys)
    assert status == 0
    assert "clamp: no effect" in out


def test_experts_pass_too(folder, capsys):
    assert verify(folder(tokenizer=False, hybrid_override_pattern="MEM*-ME"), capsys)[0] == 0


@pytest.mark.parametrize("where", ["weights", "pieces", "no number"])
def test_a_difference_is_a_failure(where, folder, capsys, monkeypatch):
    forward = Mamba2.forward

    def wrong(self, x, context, state):
        y, after = forward(self, x, context, state)
        if where == "pieces" and state is not None:  # only what is read from a cache
            y = y * 1.01
        return y * (float("nan") if where == "no number" else 1.01 if where == "weights" else 1), after

    monkeypatch.setattr(Mamba2, "forward", wrong)
    status, out, _ = verify(folder(tokenizer=False), capsys, "--json", "-")
    content = json.loads(out)
    passed = {case["way"]: case["difference"] is not None and case["difference"] < 1e-4 for case in content["cases"]}
    assert (status, content["same"]) == (1, False)
    assert passed == {"one pass": where == "pieces", "prefill in pieces": False, "cached decode": False}


def test_the_tolerance_decides_and_the_page_says_so(folder, capsys):
    path = folder(tokenizer=False)
    status, out, _ = verify(path, capsys, "--tolerance", "1e-12")
    assert status == 1
    assert "NOT the same logits: difference at most " in out and "tolerance 1.0e-12" in out


def test_what_stock_does_not_open_is_told(folder, capsys):
    status, out, err = verify(folder(rope_theta=100.0), capsys)
    assert (status, out) == (2, "")
    assert "model_type 'hybridlm', which stock transformers does not open" in err


def test_a_broken_folder_is_told(folder, capsys):
    path = folder()
    (path / "model.safetensors").write_bytes(b"no weights")
    assert verify(path, capsys)[0] == 2
    (path / "config.json").write_text("{")
    status, _, err = verify(path, capsys)
    assert status == 2 and "config.json cannot be read" in err


@pytest.mark.parametrize("tokens", [32, 70, 512, 513])
def test_the_pieces_are_odd_and_cover_all(tokens):
    sizes = odd_sizes(tokens)
    assert sum(sizes) == tokens
    assert all(size % 2 for size in sizes[:-1])
    assert 1 in sizes and max(sizes) > 4


def test_ours_is_the_model_of_this_library(folder, capsys, monkeypatch):
    """One model at a time, ours first, both in fp32."""
    opened = []
    from_pretrained = HybridLMForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        opened.append(kwargs["dtype"])
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(HybridLMForCausalLM, "from_pretrained", spy)
    verify(folder(tokenizer=False), capsys)
    assert opened == [torch.float32]


def test_stock_is_imported_without_the_gpu_packages(monkeypatch):
    there, absent = KERNELS
    monkeypatch.setitem(sys.modules, there, ModuleType(there))
    monkeypatch.delitem(sys.modules, absent, raising=False)
    with without_kernels():
        for name in KERNELS:
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)
    assert isinstance(sys.modules[there], ModuleType) and absent not in sys.modules


def test_the_stock_model_runs_on_the_cpu_where_the_gpu_packages_are(folder, tmp_path):
    """In a process in which they import, and anything taken from them fails."""
    for name in KERNELS:
        code = f"def fails(*args, **kwargs): raise RuntimeError('{name} on a CPU')\ndef __getattr__(name): return fails\n"
        (tmp_path / f"{name}.py").write_text(code)
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import mamba_ssm; from hybridlm.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, str(tmp_path), "verify", str(folder()), "--tokens", "32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
