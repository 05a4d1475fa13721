import importlib.metadata
import re
from pathlib import Path

import pytest

from hybridlm.__main__ import main
from hybridlm.cli import doctor

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.fixture
def broken(monkeypatch):
    """Makes the import of a module fail in a given way."""
    imported = importlib.import_module

    def breaks(module, error):
        def fail(name, *args):
            if name == module:
                raise error
            return imported(name, *args)

        monkeypatch.setattr(doctor.importlib, "import_module", fail)

    return breaks


def line(out, package):
    return next(line for line in out.splitlines() if line.startswith(package))


def run(capsys):
    status = main(["doctor"])
    return status, capsys.readouterr().out


def test_what_is_there_is_listed(capsys, monkeypatch):
    import torch
    import transformers

    monkeypatch.setattr("hybridlm.ops.backend.can_fuse", lambda: False)
    status, out = run(capsys)
    assert status == 0
    assert torch.__version__.split("+")[0] in line(out, "torch ")
    assert transformers.__version__ in line(out, "transformers ")
    assert "thread(s)" in line(out, "cpu") and "bf16" in line(out, "cpu")
    assert all(f"{op} eager" in line(out, "operators") for op in ("ssd", "ssd_step", "conv1d", "gated_norm", "cross_entropy"))
    assert all(package in out for package, _, _ in doctor.PACKAGES.values())


@pytest.mark.parametrize("module", ["wandb", "torchao", "mamba_ssm"])
def test_a_missing_package_comes_with_its_command(module, capsys, monkeypatch, broken):
    def no_version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", no_version)
    broken(module, ModuleNotFoundError(f"No module named {module!r}", name=module))
    status, out = run(capsys)
    package, purpose, command = doctor.PACKAGES[module]
    assert status == 0
    assert re.search(rf"^{package} +missing +{purpose} +{re.escape(command)}$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("wandb", ImportError("libcudart.so.12: cannot open shared object file\nand more")),
        ("wandb", ModuleNotFoundError("No module named 'wandb'", name="wandb")),  # though its metadata is there
        ("mamba_ssm", ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda")),
        ("wandb", RuntimeError("built for another torch")),
    ],
)
def test_a_broken_package_is_told_with_its_error_in_one_line(module, error, capsys, broken):
    broken(module, error)
    status, out = run(capsys)
    shown = line(out, doctor.PACKAGES[module][0])
    assert status == 0
    assert "broken" in shown
    assert str(error).splitlines()[0] in shown
    assert "and more" not in out


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_torch_or_transformers_nothing_works(module, capsys, broken):
    broken(module, ImportError("undefined symbol: _ZN"))
    status, out = run(capsys)
    assert status == 1
    assert "undefined symbol: _ZN" in line(out, f"{module} ")
    assert "must work first" in line(out, "operators")


def test_a_question_that_fails_leaves_the_rest(capsys, monkeypatch):
    import torch

    def fails():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", fails)
    monkeypatch.setattr("hybridlm.ops.backend.can_fuse", lambda: False)
    status, out = run(capsys)
    assert status == 0
    assert all("RuntimeError: driver too old" in line(out, question) for question in ("cuda", "fp8"))
    assert "eager" in line(out, "operators")


@pytest.mark.parametrize("faults", [{}, {"mamba-ssm": "", "a CUDA device": ""}])
def test_whether_fused_runs_is_told_and_can_be_asked(faults, capsys, monkeypatch):
    monkeypatch.setattr("hybridlm.ops.backend.lacking", lambda: faults)
    for arguments, status in ((["doctor"], 0), (["doctor", "--fused"], 1 if faults else 0)):
        assert main(arguments) == status
        out, err = capsys.readouterr()
        assert ("error: ops.backend=fused cannot run here" in err) == (status == 1)
        shown = line(out, "fused")
        assert shown.split() == ["fused", "yes"] if not faults else "missing here: mamba-ssm, a CUDA device." in shown


def test_a_mamba_ssm_without_its_cuda_part_comes_with_what_to_do(capsys, broken):
    broken("mamba_ssm", ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda"))
    _, out = run(capsys)
    assert line(out, "mamba-ssm").endswith("""purelib"))')/selective_scan_cuda.py\"""")


def test_the_packages_are_the_projects():
    project = PROJECT.read_text()
    wanted = re.findall(r"'([\w-]+>=[\d.]+)'", " ".join(command for _, _, command in doctor.PACKAGES.values()))
    assert len(wanted) == 9 and all(f'"{requirement}"' in project for requirement in wanted)


def test_whether_fp8_runs_is_told(capsys, monkeypatch):
    import torch

    assert line(run(capsys)[1], "fp8").startswith(
        "fp8        no. train.precision=fp8 needs a CUDA device, and this is cpu: use train"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hybridlm.fp8.refusal", lambda device: None if device == "cuda" else "x")
    monkeypatch.setattr("hybridlm.ops.backend.can_fuse", lambda: False)
    assert line(run(capsys)[1], "fp8").split() == ["fp8", "yes"]
