"""The run directory: who may use it, and what is written there line by line."""

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import filelock

from hybridlm.strict_yaml import load_yaml, parse_yaml
from train import checkpoint, files
from train.config import differences, dump, parse
from train.settings import RunConfig

logger = logging.getLogger(__name__)


LOCK, OWNER = ".lock", "owner.json"
ORIGIN = "started-from.json"  # of a run that began from a checkpoint of another place
# What a run that was cut off in its first moment may leave.
TRACES = {LOCK, OWNER, ORIGIN, f".{ORIGIN}.unfinished", ".config.yaml.unfinished"}


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keeps every other process from using the directory; the system frees it when this one ends, however it ends.

    Raises:
        ValueError: another process uses it, or it lies below what is no folder.
    """
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"run_dir {run_dir}: {there} exists and is no run directory; choose another with --run_dir.")
    made = [folder for folder in (run_dir, *run_dir.absolute().parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    for folder in reversed(made):
        files.sync(folder.parent)
    held = filelock.FileLock(run_dir / LOCK, timeout=1)  # `train status` holds it for a moment
    try:
        held.acquire()
    except filelock.Timeout:
        owner = run_dir / OWNER
        raise ValueError(
            f"run_dir {run_dir} is in use by another process{f': {owner.read_text().strip()}' if owner.exists() else ''}. "
            "Wait until it ends, stop it, or choose another with --run_dir."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # it must not hide what ended the run
            (run_dir / OWNER).unlink(missing_ok=True)
            if not (run_dir / "config.yaml").exists():  # it never became a run: nothing is left of it
                for name in TRACES:
                    (run_dir / name).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        held.release()


def is_locked(run_dir: Path) -> bool:
    """Whether a process uses the directory. The lock is asked for shared and only for reading, and given back at once."""
    file = run_dir / LOCK
    if not file.is_file():
        return False
    with file.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check(config: RunConfig, resume: str, allow_config_change: bool) -> Path | None:
    """From which checkpoint to go on (None: from the start). Changes nothing.

    Raises:
        ValueError: the directory is of another run, or of something else; `resume` names no checkpoint.
    """
    run_dir = Path(config.run_dir)
    refuse_foreign(config)
    if (run_dir / "config.yaml").exists():
        if resume == "never":
            raise ValueError(f"run_dir {run_dir} already holds a run, and --resume is never. Choose another with --run_dir.")
        changed = changes(config)
        if changed and not allow_config_change:
            raise ValueError(
                f"run_dir {run_dir} holds a run with other settings:\n"
                + "".join(f"  {line}\n" for line in changed)
                + "Choose another with --run_dir, or pass --allow-config-change to go on with the new ones."
            )
    if resume in ("auto", "never"):
        found = checkpoint.newest(run_dir)
        if found is None and (run_dir / ORIGIN).exists():
            origin = json.loads((run_dir / ORIGIN).read_text())["checkpoint"]
            raise ValueError(
                f"run_dir {run_dir} holds a run that goes on from {origin}, but no checkpoint yet: --resume {origin}"
            )
        return found
    if faults := checkpoint.validate(Path(resume)):
        raise ValueError(f"--resume {resume} is no valid checkpoint: {'; '.join(faults)}.")
    return Path(resume)


def refuse_foreign(config: RunConfig) -> None:
    """
    Raises:
        ValueError: the directory holds something, and no run.
    """
    run_dir = Path(config.run_dir)
    # Tokenised data may be kept in there too.
    cache = os.path.relpath(os.path.expanduser(config.data.cache_dir), run_dir).split(os.sep)[0]
    there = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if "config.yaml" not in there and there - TRACES - {cache}:
        raise ValueError(f"run_dir {run_dir}: it exists and is no run directory; choose another with --run_dir.")


def changes(config: RunConfig) -> list[str]:
    """A line for each setting in which the directory's run differs; its own place does not count.

    What came after that run was begun has its default there, but for the optimiser, which was AdamW, and the biases of experts'
    routers, which stayed.
    """
    before = load_yaml(Path(config.run_dir) / "config.yaml")
    if isinstance(before.get("optim"), dict):
        before["optim"].setdefault("name", "adamw")
        if "E" in _pattern(before):
            before["optim"].setdefault("moe_bias_rate", 0.0)
    with suppress(ValueError):  # what cannot be read any more is compared as it stands
        before = parse_yaml(dump(parse(before, type(config))))
    return [line for line in differences(before, parse_yaml(dump(config))) if not line.startswith("run_dir:")]


def _pattern(settings: dict) -> str:
    model = settings.get("model")
    shape = model.get("config") if isinstance(model, dict) else None
    return str(shape.get("hybrid_override_pattern")) if isinstance(shape, dict) else ""


def claim(config: RunConfig, start_from: Path | None, step: int, ranks: int) -> None:
    """Makes the directory this run's own, to go on after `step`. What does not belong to its past is set aside, not lost."""
    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    files.make_folder(run_dir)
    owner = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    (run_dir / OWNER).write_text(json.dumps(owner) + "\n")
    if start_from and not checkpoint.is_of(run_dir, start_from):
        files.replace_text(run_dir / ORIGIN, json.dumps({"checkpoint": str(start_from.absolute()), "step": step}) + "\n")
    if file.exists() and (changed := changes(config)):
        for line in changed:
            logger.warning("changed setting: %s", line)
        files.write_text(unused(run_dir / "config-before-change.yaml"), file.read_text())
        files.replace_text(file, dump(config))
    elif not file.exists():
        files.replace_text(file, dump(config))
    checkpoint.rewind(run_dir, start_from)
    checkpoint.prune(run_dir, config.train.keep_checkpoints, config.train.keep_every)  # a kill may have come before
    for rank, sign in ((sign.stem.removeprefix("rank-"), sign) for sign in (run_dir / "ranks").glob("rank-*.json")):
        if ranks == 1 or not rank.isdecimal() or int(rank) >= ranks:  # of a start with more ranks; the others write theirs now
            sign.unlink()
    for name in ("metrics.jsonl", "samples.jsonl", "incidents.jsonl"):
        drop_after(run_dir / name, step if (run_dir / "model").is_symlink() else -1)  # `rewind` has linked one of this run


def appears(path: Path) -> bool:
    """Whether a file that another machine wrote is there. Where the disk is shared by a network, it may take some seconds."""
    until = time.monotonic() + 10
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.5)
    return path.exists()


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that is not there."""
    candidates = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(2))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())


def append(file: Path, line: dict) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def last_line(file: Path, key: str) -> dict | None:
    """The last line that has `key`; one that is not written to its end yet, or was cut off, does not count."""
    if not file.exists():
        return None
    with file.open("rb") as content:
        end = content.seek(0, os.SEEK_END)
        for size in (min(2**16, end), end):  # of a long run as a rule the end will do
            content.seek(end - size)
            texts = content.read(size).splitlines(keepends=True)[size < end :]
            lines = (json.loads(text) for text in reversed(texts) if text.endswith(b"\n"))
            if found := next((line for line in lines if key in line), None):
                return found
    return None


def drop_after(file: Path, step: int) -> None:
    """Moves the lines of steps that are about to be run again to `…-before-resume.jsonl`; drops one that was cut off."""
    if not file.exists():
        return
    kept: list[str] = []
    dropped: list[str] = []
    for text in file.read_text(errors="replace").splitlines():
        try:
            (kept if json.loads(text)["step"] <= step else dropped).append(text)
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: dropping a line that was cut off", file)
    if dropped:  # of another future, or of a fault that may not come again
        before = file.with_name(f"{file.stem}-before-resume.jsonl")
        earlier = before.read_text().splitlines() if before.exists() else []
        files.replace_text(before, "".join(f"{text}\n" for text in [*earlier, *dropped]))
    files.replace_text(file, "".join(f"{text}\n" for text in kept))
