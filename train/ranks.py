"""Ranks that die, hang or disagree: found, named and ended together, so that no run waits for ever without a word.

A rank is one process of a run. What ranks tell each other is JSON and numbers, in tensors: nothing is unpickled.
"""

import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any, NoReturn, TypeVar

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from train.config import differences

logger = logging.getLogger(__name__)

T = TypeVar("T")
BEAT = 0.5  # seconds between two signs of life
GRACE = 1.0  # seconds in which the main thread may find out by itself, from a failed collective, that a rank has ended
SEARCH = 3.0  # seconds in which the rank that ended is looked for when a collective has failed
NEIGHBOURS = 8  # ranks that a rank looks after: the others of its machine, as a rule; all after all would be n^2 files
BLOCK = 2**17  # elements of a tensor that are summed at a time
FACTOR = 3202034522624059733  # odd; twice it is below 2^63
PATIENCE = timedelta(days=30)
AGAIN = "The same command goes on from the newest checkpoint."


class RanksError(RuntimeError):
    """The ranks of a run cannot go on together; raised on all of them."""


def group_timeout(seconds: float) -> timedelta:
    """Of the collectives of gloo and NCCL: longer than `watch` waits, which can say for whom."""
    return timedelta(seconds=seconds + 30.5)  # Accelerate drops its own default, 600


def exchange(group: ProcessGroup | None, value: Any, device: torch.device | str = "cpu") -> list[Any]:
    """The `value`, JSON, of every rank of a group (None: of this process alone), in their order.

    Args:
        device: from which the group's backend sends.
    """
    text = json.dumps(value).encode()
    if group is None:
        return [json.loads(text)]
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    distributed.all_gather(lengths, torch.tensor([len(own)], device=device), group)
    longest = int(max(lengths))
    rows = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    distributed.all_gather(rows, nn.functional.pad(own, (0, longest - len(own))), group)
    return [json.loads(row[:length].cpu().numpy().tobytes()) for row, length in zip(rows, lengths)]


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The `value`, JSON, of every rank, in their order."""
    return exchange(distributed.group.WORLD, value, accelerator.device)


def agree(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Compares `facts`, JSON, with those of rank 0, before the first step: gloo aborts without a traceback where ranks differ in
    what they send.

    Raises:
        ValueError: on all ranks; a line for each leaf in which a rank differs.
    """
    everyone = gather(accelerator, facts)
    lines = [f"  rank {rank}: {line}" for rank, own in enumerate(everyone) for line in differences(everyone[0], own)]
    if lines:
        raise ValueError(
            "the ranks of this run were not started alike (rank 0 -> the other):\n"
            + "".join(f"{line}\n" for line in lines)
            + "Start all of them with the same code, packages and command."
        )


def patient_group() -> ProcessGroup:
    """A group of all ranks for what may take one of them hours while the others wait: the usual timeout is for steps. All ranks
    must call it."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def together(group: ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """Does `work` on each rank of a gloo group (None: this process alone); the results, JSON, by rank. Where it fails on one, all
    raise. A `work` that sends to other ranks must send all of it, even if it fails.

    Raises:
        ValueError, OSError (with its errno): as `work` did; RanksError: it raised something else. The message names the ranks.
    """
    if group is None:
        return [work()]
    result = fault = None
    try:
        result = work()
    except Exception as error:
        fault = error
    kind = next((base for base in (ValueError, OSError) if isinstance(fault, base)), RanksError)
    text = f"{type(fault).__name__}: {fault}" if kind is RanksError else str(fault)
    found = exchange(group, [result, fault and [kind.__name__, text, getattr(fault, "errno", None)]])
    faults = {rank: said for rank, (_, said) in enumerate(found) if said}
    if not faults:
        return [value for value, _ in found]
    ranks_of: dict[str, list[int]] = {}
    for rank, (_, text, _) in faults.items():
        ranks_of.setdefault(text, []).append(rank)
    name, _, number = next(iter(faults.values()))
    merged = {"ValueError": ValueError, "OSError": OSError}.get(name, RanksError)(
        "\n".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())
    )
    if isinstance(merged, OSError):
        merged.errno = number
    raise merged from fault


def everywhere(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Does `work`, in which no collective may be, on each rank, however long one takes; where it fails on one, all raise as in
    `together`."""
    if accelerator.num_processes == 1:
        return work()
    results: list[T] = []
    group = patient_group()  # of its own: the others may wait for hours, say for rank 0 to tokenise
    try:
        together(group, lambda: results.append(work()))
    finally:
        distributed.destroy_process_group(group)
    return results[0]


def first_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Does `work` on the main process, then on the others, which so find done what it leaves on disk; raises as `everywhere`."""
    main = accelerator.is_main_process
    first = everywhere(accelerator, work if main else lambda: None)
    rest = everywhere(accelerator, work if not main else lambda: None)
    return first if main else rest  # type: ignore[return-value]


def check_equal(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """Compares the parameters and buffers of all ranks, bit for bit, for before a checkpoint is written. Sharded ones (DTensor)
    are left out: each part of them is on one rank only.

    Raises:
        RanksError: on all ranks; names ranks and tensors that differ.
    """
    if accelerator.num_processes == 1:
        return
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = {name: tensor for name, tensor in named if not isinstance(tensor, DTensor)}
    if not tensors:
        return
    table = accelerator.gather(torch.stack([digest(tensor) for tensor in tensors.values()])[None]).cpu()
    usual = table.mode(dim=0).values
    majority = bool(((table == usual).sum(0) * 2 > len(table)).all())
    wrong = table != (usual if majority else table[0])
    if not wrong.any():
        return
    hosts = gather(accelerator, platform.node())
    lines = []
    for rank in wrong.any(1).nonzero()[:, 0].tolist():
        names = [name for name, differs in zip(tensors, wrong[rank]) if differs]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"  rank {rank} ({hosts[rank]}): {', '.join(names[:5])}{more}\n")
    raise RanksError(
        f"step {step}: the weights of the ranks are no longer equal; nothing was saved. "
        + ("These differ from most:\n" if majority else "These differ from rank 0, which may itself be the wrong one:\n")
        + "".join(lines)
        + "Suspect the memory or the device of such a machine. The same command goes on from the newest checkpoint."
    )


@torch.no_grad()
def digest(tensor: Tensor, first: int = 0) -> Tensor:
    """int64 (), on the tensor's device: a weighted sum of its bits, which one flipped bit always changes and, but for a chance of
    about 2^-60, any other fault that is not made for it. Digests of consecutive parts add up to that of the whole, modulo 2^64.

    Args:
        first: the number, in the whole, of the first element.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    # In blocks, since the products are int64: all at once they would take twice the memory of the weights.
    blocks = tensor.detach().reshape(-1).view(integers).split(BLOCK)
    # The weight of element i is 2 K i + 1, modulo 2^64: odd, for an even one would lose the highest bit. In a block from s on
    # that is 2 K j + 1 for its own element j, the same in every block, and 2 K s.
    weights = torch.arange(min(BLOCK, tensor.numel()), device=tensor.device) * (2 * FACTOR) + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, block in enumerate(blocks):
        offset = (2 * FACTOR * (first + number * BLOCK) + 2**63) % 2**64 - 2**63
        total += (block * weights[: len(block)]).sum() + block.sum() * offset
    return total


class Watch:
    """What this rank shows of itself and sees of the others. The loop sets `step`, the one at hand, `phase` and `memory`
    (bytes); a thread does the rest. Only in the phase "training" must steps follow each other within the timeout."""

    def __init__(self, accelerator: Accelerator, run_dir: Path, timeout: float):
        self.step, self.phase, self.memory = 0, "starting", 0
        self.rank, self.ranks, self.timeout = accelerator.process_index, accelerator.num_processes, timeout
        self.run_dir, self.folder = run_dir, run_dir / "ranks"
        me = psutil.Process()
        # With the time at which the process began: a file from before a restart may have the same host and pid.
        self.who = gather(accelerator, {"host": platform.node(), "pid": me.pid, "started": me.create_time()})
        self.machines = len({who["host"] for who in self.who})
        self.near = {rank: process for rank in range(self.ranks) if (process := self._process(rank))}
        self.main = threading.get_ident()
        self.leaving = False  # the main thread knows of an end: the thread shows signs of life and says nothing
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.keep, daemon=True)

    def _process(self, rank: int) -> psutil.Process | None:
        """The process of a rank, if on this machine. Containers may share a host's name, so its start must fit too."""
        who = self.who[rank]
        try:
            process = psutil.Process(who["pid"])
            here = who["host"] == platform.node() and abs(process.create_time() - who["started"]) < 2
        except psutil.Error:
            return None
        return process if here else None

    def show(self, state: str) -> None:
        """Writes RUN/ranks/rank-<k>.json, once RUN is a run's directory. `state`: running, done, `failed: …`, `followed: …`."""
        if not (self.run_dir / "config.yaml").exists():
            return
        self.folder.mkdir(exist_ok=True)
        frame = sys._current_frames()[self.main]
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        place = {"step": self.step, "phase": self.phase, "where": where, "memory_bytes": self.memory}
        unfinished = self.folder / f".rank-{self.rank}.json"
        unfinished.write_text(json.dumps({"rank": self.rank, **self.who[self.rank], **place, "time": time(), "state": state}))
        unfinished.replace(self.folder / f"rank-{self.rank}.json")

    def read(self, rank: int) -> dict[str, Any] | None:
        """What the rank last wrote; None where it is not there to be read, or of another process."""
        try:
            sign = json.loads((self.folder / f"rank-{rank}.json").read_text())
        except (OSError, ValueError):
            return None
        return sign if isinstance(sign, dict) and self.who[rank].items() <= sign.items() else None

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.who[rank]['host']}, pid {self.who[rank]['pid']})"

    def ended(self, ranks: list[int]) -> str | None:
        """Which of `ranks` have failed or are gone, with their last words; where all of those followed another, that one's."""
        causes, followers = [], []
        for rank in ranks:
            gone = self._gone(rank)  # first: what it wrote before its end is then there
            sign = self.read(rank) or {"state": "running"}
            state, _, words = sign["state"].partition(": ")
            if state == "followed":
                followers.append(words)
            elif state == "failed" or (gone and state == "running"):
                at = f", seen at step {sign['step']} ({sign['phase']})," if "step" in sign else ""
                causes.append(f"{self.name(rank)}{at} ended {f'with {words}' if words else 'without a word (killed?)'}. ")
        return "".join([*causes, self.too()]) if causes else next(iter(followers), None)

    def too(self) -> str:
        return f"Rank {self.rank} stops too, at step {self.step} ({self.phase}). {AGAIN}"

    def _gone(self, rank: int) -> bool:
        process = self.near.get(rank)
        try:
            return process is not None and (not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def search(self) -> str | None:
        """Who may have broken a collective: who ended, else who has given no sign of life while it was looked for."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        before = {rank: self.read(rank) for rank in others}
        until = monotonic() + SEARCH
        while monotonic() < until:
            if message := self.ended(others):
                return message
            sleep(0.1)
        silent = [rank for rank in others if before[rank] is not None and self.read(rank) == before[rank]]
        return f"{', '.join(map(self.name, silent))} gives no sign of life any more. {self.too()}" if silent else None

    def keep(self) -> None:
        """The thread: shows this rank, looks at its neighbours, and ends the process where it cannot go on."""
        neighbours = [(self.rank + i) % self.ranks for i in range(1, min(self.ranks, NEIGHBOURS + 1))]
        last = monotonic()
        seen: dict[int, Any] = {}
        moved = dict.fromkeys(range(self.ranks), last)  # when this rank last saw another do something, by its own clock
        found = None  # when the end of another was first seen
        while not self.over.wait(BEAT):
            now = monotonic()
            try:
                self.show("running")
                trusted = now - last < 10 * BEAT
            except OSError:
                trusted = False
            last = now
            for rank in (self.rank, *neighbours):
                sign = (self.step, self.phase) if rank == self.rank else self.read(rank)
                # Where this process was stopped itself, or cannot write, the silence of others says nothing.
                if sign is None or sign != seen.get(rank) or not trusted:
                    seen[rank], moved[rank] = sign, now
            stands = self.phase == "training" and now - moved[self.rank] > self.timeout
            # A step stands still sooner than the rank is silent that stopped in the middle of it.
            silent = [rank for rank in neighbours if now - moved[rank] > (4 * BEAT if stands else self.timeout)]
            message = self.ended(neighbours)
            if message:
                found = found or now
                if now - found < GRACE:
                    continue
            elif silent:
                message = self.silence(silent[0])
            elif stands:
                message = self.standstill()
            if message and not self.leaving:
                self.end(message)

    def silence(self, rank: int) -> str:
        sign = self.read(rank) or {}
        return (
            f"{self.name(rank)} gives no sign of life, and train.timeout ({self.timeout:g} s) is over. It was last at step "
            f"{sign.get('step')} ({sign.get('phase')}), {sign.get('where')}: stopped, or its machine is gone. {self.too()}"
        )

    def standstill(self) -> str:
        signs = {rank: self.read(rank) for rank in range(self.ranks)}
        unseen = {"step": "unknown", "phase": "no sign of life so far", "where": "its file may not be shared"}
        places = {rank: sign or unseen for rank, sign in signs.items()}
        lines = [f"  {self.name(k)}: step {at['step']} ({at['phase']}), {at['where']}\n" for k, at in places.items()]
        return (
            f"step {self.step} has taken more than {self.timeout:g} s (train.timeout). Where the ranks are:\n{''.join(lines)}"
            "Look at the one that is behind the others or not waiting for them; raise train.timeout if steps may be so slow.\n"
            + self.too()
        )

    def end(self, message: str, raised: BaseException | None = None) -> NoReturn:
        """Says why and ends the process here: the main thread may be in a collective that never returns, and to take down torch
        takes seconds in which the launcher's SIGTERM comes. What was `raised` here is said too, should it be another fault."""
        print(f"error: {message}" + (f"\n(raised here: {raised})" if raised else ""), file=sys.stderr, flush=True)
        logger.info("ended: %s", message)
        self.last_words(f"followed: {message}")
        os._exit(1)

    def last_words(self, state: str) -> None:
        self.over.set()
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            self.thread.join(timeout=2 * BEAT)  # it may hang in a write to a disk that is away
        try:
            self.show(state)
        except OSError as error:  # a full disk may be what ends the run: it must not hide why
            print(f"{self.folder} cannot be written: {error}", file=sys.stderr, flush=True)


@contextmanager
def watch(accelerator: Accelerator, run_dir: Path, timeout: float) -> Iterator[Watch]:
    """Around all that ranks do together, inside of `stop_signals`: a launcher sends SIGTERM while it is found out who ended.

    Each rank writes RUN/ranks/rank-<k>.json every half second, as soon as RUN is a run's directory, and looks at the next few
    ranks. Where one of them ended, or was silent for `timeout` seconds by this rank's own clock, or a step takes longer, this
    process says so on stderr and ends with status 1; so it does in place of the RuntimeError of a collective that a rank's end
    has broken. Where the directory is not shared, missing files mean nothing. With one process nothing is written or watched.
    """
    watching = Watch(accelerator, run_dir, timeout)
    if accelerator.num_processes == 1:
        yield watching
        return
    watching.thread.start()
    state = "done"
    try:
        yield watching
        accelerator.wait_for_everyone()  # a rank that is gone has then died, not finished
    except BaseException as error:
        watching.leaving = True
        # What all ranks raise alike needs no search for one that broke it.
        if isinstance(error, RuntimeError) and not isinstance(error, RanksError) and (message := watching.search()):
            sys.stdout.flush()
            watching.end(message, error)
        state = f"failed: {type(error).__name__}: {error}"
        raise
    finally:
        watching.last_words(state)
