"""Several trainings, each a `python -m train` of its own: on a CPU two at a time, each with half of the cores."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import torch
from tqdm import tqdm

from hybridlm.machine import cores
from train.config import dump
from train.run import is_locked, last_line
from train.settings import RunConfig
from train.signals import terminated_as_interrupted, unstoppable

POLL = 0.3  # seconds
BEGIN = "\n$ "  # in the log, before the command of each start


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
    Interrupted, the trainings at work save and stop; the same call goes on. Killed, it leaves them at work, and the next call
    waits for them.

    Args:
        launcher: what starts each of them in the place of Python, one at a time.
        fine: is told of each training that ended, with its exit status; whether the others go on.

    Raises:
        ChildProcessError: one failed.
    """
    at_once = 1 if torch.cuda.is_available() or launcher else min(2, cores())
    waiting = [run for run in runs if not is_done(run)]
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
                elsewhere = [run for run in waiting if is_locked(Path(run.run_dir))]
                free = [run for run in waiting if run not in elsewhere]
                for run in free[: max(0, at_once - len(running) - len(elsewhere))]:
                    waiting.remove(run)
                    if not is_done(run):
                        running[run.run_dir] = start(run, max(1, cores() // at_once), launcher)
                time.sleep(POLL)
                ended = [name for name, process in running.items() if process.poll() is not None]
                at_work = [*running, *(run.run_dir for run in elsewhere)]
                done |= {name: steps_done(named[name]) for name in at_work}  # of the others it does not change
                for name in ended:
                    status = running.pop(name).returncode
                    if not fine(named[name], status):
                        raise ChildProcessError(failure(named[name], status))
                    if status:
                        excused.add(name)
                        bar.total = total = total - named[name].train.steps + done[name]
                bar.update(sum(done.values()) - bar.n)
        finally:
            with unstoppable():
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
    command = [*(shlex.split(launcher) if launcher else [sys.executable]), "-m", "train", "--config", str(settings_file(run))]
    with open(f"{run.run_dir}.log", "a") as file:
        file.write(f"{BEGIN}{shlex.join(command)}\n")
        file.flush()
        return subprocess.Popen(command, env=limited | os.environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def failure(run: RunConfig, status: int) -> str:
    if status == -signal.SIGKILL:
        return f"the training {run.run_dir} was killed, as when memory runs out; {run.run_dir}.log has what it said."
    return f"the training {run.run_dir} failed; {run.run_dir}.log says why{last_error(run)}"


def last_error(run: RunConfig) -> str:
    """Of the last start: a line, and the list below it. It may stand between lines of progress."""
    said = Path(f"{run.run_dir}.log").read_text(errors="replace").rpartition(BEGIN)[2]
    _, found, text = said.rpartition("error: ")
    first, *others = text.split("\n")
    return ": " + "\n".join([first, *takewhile(lambda line: line.startswith("  "), others)]) if found else "."


def steps_done(run: RunConfig) -> int:
    line = last_line(Path(run.run_dir) / "metrics.jsonl", "step")
    return 0 if line is None else line["step"]


def is_done(run: RunConfig) -> bool:
    """It has its last checkpoint and its last validation: without the second it was stopped between the two."""
    link, line = Path(run.run_dir) / "model", last_line(Path(run.run_dir) / "metrics.jsonl", "val_loss")
    last = link.exists() and link.resolve().parent.name == f"step-{run.train.steps}"
    return last and line is not None and line["step"] == run.train.steps
