import os
import subprocess
import sys

import pytest

COMMANDS = ("perplexity", "throughput", "longcontext", "recall-texts", "roofline", "report", "bench", "gpu-check", "accuracy")


def test_help(command):
    status, out, _ = command("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert "default: None" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["report"], "--run"),
        (["report", "--run", "x", "--unknown"], "--unknown"),
        (["perplexity", "--model", "x", "--data", "y", "--win", "3"], "--win"),  # no abbreviations
        (["perplexity", "--model", "x", "--data", "y", "--window", "0"], "must be a whole number of at least 1; got '0'"),
        (["perplexity", "--model", "x", "--data", "y", "--json", "no/such/folder/a.json"], "a folder that exists"),
        (["throughput", "--model", "x", "--prompt", "1,,2"], "must be a whole number of at least 1; got ''"),
    ],
)
def test_usage_errors(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_as_a_process():
    """`python -m eval` hands the status on, and --help does not wait for torch."""
    told = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    helped = subprocess.run([sys.executable, "-m", "eval", "--help"], capture_output=True, text=True, env=told)
    assert helped.returncode == 0
    imported = {line.split("|")[-1].strip() for line in helped.stderr.splitlines()}
    assert "hybridlm.arguments" in imported
    assert "torch" not in imported
    failed = subprocess.run([sys.executable, "-m", "eval", "report", "--run", "none"], capture_output=True, text=True)
    assert failed.returncode == 2
    # One line: nothing of what the libraries below say while they are imported.
    assert failed.stderr.startswith("error: none is no run directory") and failed.stderr.count("\n") == 1
