import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.data.pool import run_parts

NAMES = {number: f"the part called {number}" for number in range(9)}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_part_is_done_once_and_progress_comes_back(tmp_path, workers):
    def job(number, advance):
        (tmp_path / str(number)).write_text(str(os.getpid()))
        advance(number)
        advance(1)

    progress = []
    run_parts(job, NAMES, workers, progress.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in NAMES]
    pids = {path.read_text() for path in tmp_path.iterdir()}
    assert len(pids) <= workers and str(os.getpid()) not in pids
    assert sum(progress) == sum(NAMES) + len(NAMES)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_process_that_dies_is_an_error_that_names_its_part(workers):
    def job(number, advance):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"part 5 \(the part called 5\) died with exit code -9"):
        run_parts(job, NAMES, workers, lambda _: None)


def test_what_a_job_raises_is_raised_here_and_what_goes_on_elsewhere_is_ended(tmp_path):
    def job(number, advance):
        if number == 1:
            while not (tmp_path / "pid").exists():
                time.sleep(0.001)
            raise ValueError("a bad document")
        (tmp_path / "unfinished").write_text(str(os.getpid()))
        (tmp_path / "unfinished").rename(tmp_path / "pid")
        time.sleep(600)

    with pytest.raises(ValueError, match="a bad document"):
        run_parts(job, {0: "a", 1: "b"}, 2, lambda _: None)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_another_kind_of_error_names_its_part():
    def job(number, advance):
        raise KeyError("x")

    with pytest.raises(RuntimeError, match="part 0: KeyError: 'x'"):
        run_parts(job, {0: "a"}, 1, lambda _: None)


ORPHAN = """
import os, sys, time
from pathlib import Path
from hybridlm.data.pool import run_parts

def job(number, advance):
    while True:
        Path(sys.argv[1]).write_text(str(os.getpid()))
        advance(0)
        time.sleep(0.01)

run_parts(job, {0: "a"}, 1, lambda _: None)
"""


@pytest.mark.faults
def test_a_process_whose_parent_was_killed_ends(tmp_path):
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(file)], cwd=Path(__file__).parents[3])
    while not file.exists() or not file.read_text():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    worker = int(file.read_text())
    for _ in range(1000):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if "State:\tZ" in Path(f"/proc/{worker}/status").read_text():  # dead, and nobody here to bury it
            return
        time.sleep(0.01)
    raise AssertionError(f"process {worker} still runs")
