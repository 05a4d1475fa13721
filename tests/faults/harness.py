"""Whole runs in forked children, which share their parent's imports and so take well below a second; ways to disturb them.

A child calls `train.__main__.main`, as the command line does. What is to go wrong in it is a function that the child calls
before that, and that may replace what it likes: the parent does not see it.
"""

import itertools
import json
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

import train.__main__
from train import files
from train.config import dump, parse
from train.objective import next_token_loss

SHAPE = {
    "hybrid_override_pattern": "M", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4,
    "chunk_size": 16,
}  # fmt: skip
STEPS, BATCH, SEQ_LEN = 6, 4, 32
LIMIT = 120  # seconds after which a child counts as hung


def make_text(folder: Path) -> Path:
    """Six documents; an epoch of the five that are trained on is three and a half steps."""
    (folder / "text").mkdir()
    for i in range(6):
        words = random.Random(i).choices(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "owl"], k=25)
        (folder / "text" / f"{i}.txt").write_text(" ".join(words))
    return folder / "text"


def write_config(folder: Path, name: str, **train_settings) -> Path:
    """The configuration of the run folder/name, beside it; folder/text is its data."""
    values = {
        "run_dir": str(folder / name),
        "model": {"config": SHAPE},
        "data": {"source": str(folder / "text"), "seq_len": SEQ_LEN, "cache_dir": str(folder / "cache")},
        "optim": {"lr": 1e-2},
        "train": {
            "steps": STEPS, "global_batch": BATCH, "checkpoint_every": 2, "keep_checkpoints": 2, "val_every": 100,
            "val_sequences": 2, **train_settings,
        },
        "log": {"every": 1, "sample_tokens": 0},
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(dump(parse(values)))
    return file


def run_of(config: Path) -> Path:
    return config.with_suffix("")


def log_of(config: Path) -> str:
    """What all children of this configuration have printed."""
    return config.with_suffix(".log").read_text()


def warm_up(folder: Path) -> None:
    """A run in this process: what is imported at first use, the children find there. Also prepares the data."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    tqdm.monitor_interval = 0  # nor does a thread of its own
    assert train.__main__.main(["--config", str(write_config(folder, "warm", steps=1))]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)


def start(config: Path, disturb: Callable[[int], object] = lambda rank: None, ranks: int = 1) -> list[int]:
    """Begins the run of `config`, in a process group; each child calls `disturb(rank)` before. Returns the process ids."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children: list[int] = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            _be_child(
                config, partial(disturb, rank), {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            )
        children.append(child)
        os.setpgid(child, children[0])  # here too: whichever comes first
    return children


def _be_child(config: Path, disturb: Callable[[], object], environment: dict[str, int]) -> None:
    status = 1
    # tqdm's own is shared by forked processes: one that is killed while it holds it would stop all that come after.
    tqdm.set_lock(threading.RLock())
    try:
        log = config.with_suffix(".log").open("a", buffering=1)
        sys.stdout = sys.stderr = log
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        logging.getLogger().handlers.clear()  # the test runner's; `main` adds its own
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if environment["WORLD_SIZE"] > 1:
            os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
        disturb()
        status = train.__main__.main(["--config", str(config)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(children: list[int], limit: float = LIMIT) -> list[int | None]:
    """Exit statuses, minus the signal where one ended the child; None for one that `limit` seconds were too few for: killed."""
    statuses: dict[int, int | None] = {}
    deadline = time.monotonic() + limit
    while waiting := [child for child in children if child not in statuses]:
        late = time.monotonic() > deadline
        for child in waiting:
            if late:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                statuses[child] = None if late else os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    return [statuses[child] for child in children]


def run(config: Path, disturb: Callable[[int], object] = lambda rank: None, ranks: int = 1) -> list[int | None]:
    return end(start(config, disturb, ranks))


def kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_all_ranks() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


# What may go wrong in a child, for `disturb`.


def around_operations(wrapped: Callable[..., object]) -> None:
    """From now on a file operation is `wrapped(perform, operation, *arguments)`."""
    files.perform = partial(wrapped, files.perform)


def without_waiting_for_the_disk() -> None:
    """No fsync: it takes most of the time of a save, and the kernel keeps what a killed process has written without it."""
    around_operations(lambda perform, operation, *arguments: None if operation is os.fsync else perform(operation, *arguments))


def after_operation(number: int, action: Callable[[], object]) -> None:
    """Does `action` right after the process's file operation of this number, counted from 1."""
    numbers = itertools.count(1)

    def wrapped(perform, operation, *arguments):
        result = perform(operation, *arguments)
        if next(numbers) == number:
            action()
        return result

    around_operations(wrapped)


def list_operations(file: Path) -> None:
    """A line for each file operation: its name and the name of the file that it makes, changes or removes."""

    def wrapped(perform, operation, *arguments):
        result = perform(operation, *arguments)
        paths = [argument.name for argument in arguments if isinstance(argument, Path)]
        with file.open("a") as out:
            out.write(" ".join([operation.__name__, *paths[-1:]]) + "\n")
        return result

    around_operations(wrapped)


def before_each_step(action: Callable[[int, dict], object]) -> None:
    """`action(number, batch)` before the forward pass of each of the process's steps, counted from 1: a rank has one a step."""
    numbers, inner = itertools.count(1), train.__main__.train
    forward = inner.keywords["loss"] if isinstance(inner, partial) else next_token_loss

    def loss(model, batch):
        if model.training:
            action(next(numbers), batch)
        return forward(model, batch)

    train.__main__.train = partial(inner, loss=loss)


def in_step(number: int, action: Callable[[], object]) -> None:
    before_each_step(lambda current, batch: current == number and action())


# What is left on the disk.


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run_dir / "checkpoints").glob("step-*"))


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    varying = {"tokens_per_second", "tokens_per_second_per_rank", "memory_bytes", "mfu"}
    return [{key: value for key, value in line.items() if key not in varying and "ranks/" not in key} for line in lines]


def end_of(config: Path) -> dict[str, object]:
    """All that two runs of one configuration must have in common, bit for bit, whatever happened to one of them on the way."""
    run_dir = run_of(config)
    final = run_dir / "checkpoints" / f"step-{STEPS}"
    names = ("model/model.safetensors", "optimizer.safetensors", "state.json")
    return {name: (final / name).read_bytes() for name in names} | {
        "metrics": lines_of(run_dir),
        "unfinished": [path.name for path in run_dir.rglob(".*") if path.name != ".lock"],
        "model": os.readlink(run_dir / "model"),
    }
