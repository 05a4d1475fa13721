"""Several trainings, each a `python -m train` of its own: on a CPU two at a time, each with half of the cores."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from train.config import dump
from train.run import last_line
from train.settings import RunConfig
from train.signals import terminated_as_interrupted

POLL = 0.3  # seconds


def alone(job: str) -> None:
    """
    Raises:
        ValueError: a launcher has started several of this job, which starts trainings itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{job} works in one process and starts the trainings itself; start it without a launcher, and name that as "
            "--launcher 'torchrun --nproc_per_node 8'."
        )


def to_the_end(work: Callable[[], None]) -> int:
    """The exit status of a job made of trainings: 1 where Ctrl-C or SIGTERM has cut it off, and it can go on."""
    try:
        with terminated_as_interrupted():
            work()
    except KeyboardInterrupt as error:
        why = f": {error}" if error.args else ""
        print(f"interrupted{why}; what is finished is kept, and the same command goes on", file=sys.stderr)
        return 1
    return 0


def succeeded(run: RunConfig, status: int) -> bool:
    return status == 0


def train_all(
    runs: list[RunConfig], told: str, launcher: str | None = None, fine: Callable[[RunConfig, int], bool] = succeeded
) -> None:
    """Trains what is not trained to its end yet; beside the directory of each run are its settings and what it printed.
    Interrupted, the trainings at work save and stop; the same call goes on.

    Args:
        launcher: what starts each of them in the place of Python, one at a time.
        fine: is told of each training that ended, with its exit status; whether the others go on.

    Raises:
        ChildProcessError: one failed.
    """
    cores = os.cpu_count() or 1
    at_once = 1 if torch.cuda.is_available() or launcher else min(2, cores)
    waiting = deque(run for run in runs if not is_done(run))
    running: dict[str, subprocess.Popen] = {}
    named = {run.run_dir: run for run in runs}
    excused = set()  # those that failed, and the others go on
    for run in waiting:
        settings_file(run).parent.mkdir(parents=True, exist_ok=True)
        settings_file(run).write_text(dump(run), encoding="utf-8")
    total, done = sum(run.train.steps for run in runs), {name: steps_done(run) for name, run in named.items()}
    with tqdm(total=total, initial=sum(done.values()), desc=told, unit="step", dynamic_ncols=True, smoothing=0.05) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    run = waiting.popleft()
                    running[run.run_dir] = start(run, max(1, cores // at_once), launcher)
                time.sleep(POLL)
                ended = [name for name, process in running.items() if process.poll() is not None]
                done |= {name: steps_done(named[name]) for name in running}  # of the others it does not change
                for name in ended:
                    status = running.pop(name).returncode
                    if not fine(named[name], status):
                        raise ChildProcessError(f"the training {name} failed; {name}.log says why{last_error(named[name])}")
                    if status:
                        excused.add(name)
                bar.update(sum(done.values()) - bar.n)
        finally:
            for process in running.values():
                process.terminate()  # it saves
            for process in running.values():
                process.wait()
    if unfinished := [run.run_dir for run in runs if run.run_dir not in excused and not is_done(run)]:
        raise KeyboardInterrupt(f"{', '.join(unfinished)} stopped before the end")


def settings_file(run: RunConfig) -> Path:
    return Path(f"{run.run_dir}.yaml")


def start(run: RunConfig, threads: int, launcher: str | None) -> subprocess.Popen:
    limited = {} if torch.cuda.is_available() or launcher else {"OMP_NUM_THREADS": str(threads)}
    with open(f"{run.run_dir}.log", "a") as file:
        command = [*(shlex.split(launcher) if launcher else [sys.executable]), "-m", "train", "--config", str(settings_file(run))]
        return subprocess.Popen(command, env=limited | os.environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def last_error(run: RunConfig) -> str:
    """It may stand between the progress of another process: of a call that was killed, the training is still at work."""
    _, found, text = Path(f"{run.run_dir}.log").read_text(errors="replace").rpartition("error: ")
    return ": " + text.partition("\n")[0] if found else "."


def steps_done(run: RunConfig) -> int:
    line = last_line(Path(run.run_dir) / "metrics.jsonl", "step")
    return 0 if line is None else line["step"]


def is_done(run: RunConfig) -> bool:
    """It has its last checkpoint and its last validation: without the second it was stopped between the two."""
    link, line = Path(run.run_dir) / "model", last_line(Path(run.run_dir) / "metrics.jsonl", "val_loss")
    last = link.exists() and link.resolve().parent.name == f"step-{run.train.steps}"
    return last and line is not None and line["step"] == run.train.steps
