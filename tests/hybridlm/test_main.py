import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from hybridlm.__main__ import main

COMMANDS = ("inspect", "generate", "verify", "doctor")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(run_main):
    """Runs `python -m hybridlm …` in this process; gives its exit status, stdout and stderr."""
    return partial(run_main, main)


def test_help(command):
    status, out, _ = command("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["inspect"], "DIR|CONFIG"),
        (["inspect", "x", "--gpu", "2"], "--gpu"),  # no abbreviations
        (["inspect", "x", "--gpus", "0"], "must be a whole number of at least 1; got '0'"),
        (["inspect", "x", "--precision", "fp16"], "fp16"),
        (["inspect", "x", "--json", "no/such/folder/a.json"], "a folder that exists"),
        (["generate", "x"], "--prompt"),
        (["generate", "x", "--prompt", "a", "--temperature", "0"], "must be a number above 0; got '0'"),
        (["generate", "x", "--prompt", "a", "--temperature", "nan"], "must be a number above 0; got 'nan'"),
        (["generate", "x", "--prompt", "a", "--top-p", "1.5"], "at most 1; got '1.5'"),
        (["generate", "x", "--prompt", "a", "--seed", "-1"], "--seed"),
        (["generate", "x", "--prompt", "a", "--top-k", "5"], "error: --top-k and --top-p narrow"),
        (["generate", "/none", "--prompt", "a"], "error: there is no checkpoint folder /none"),
        (["verify", "/none"], "error: /none is no model folder"),
        (["verify", "/none", "--tokens", "31"], "must be at least 32"),
        (["inspect", "/none"], "error: there is no checkpoint folder /none"),
    ],
)
def test_bad_input_is_one_error_and_status_2(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_help_and_typos_do_not_wait_for_torch():
    """Under a package that is bare, so that what counts is what the commands themselves import."""
    probe = (
        "import sys, types; bare = types.ModuleType('hybridlm'); bare.__path__ = ['hybridlm']; sys.modules['hybridlm'] = bare\n"
    )
    probe += "from hybridlm.__main__ import main\n"
    probe += (
        "for words in (['--help'], ['inspect', '--help'], ['nonsense'], ['generate', 'x', '--prompt', 'a', '--top-p', '2']):\n"
    )
    probe += "    try: main(words)\n    except SystemExit: pass\n"
    probe += "sys.exit(7 * ('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, cwd=ROOT).returncode == 0


def test_as_a_process_it_hands_the_status_on_and_a_closed_pipe_is_no_traceback():
    shape = ROOT / "configs" / "model" / "tiny.yaml"
    line = f"{sys.executable} -m hybridlm inspect {shape} | true; echo ${{PIPESTATUS[0]}}"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    piped = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=buffered)
    assert (piped.stdout, piped.stderr) == ("1\n", "")
