"""The run directory: who may use it, and what is written there line by line."""

import json
import logging
from itertools import count
from pathlib import Path

from hybridlm.strict_yaml import load_yaml, parse_yaml
from train import checkpoint
from train.config import RunConfig, differences, dump

logger = logging.getLogger(__name__)


def check(config: RunConfig, resume: str, allow_config_change: bool) -> Path | None:
    """From which checkpoint to go on (None: from the start). Changes nothing.

    Raises:
        ValueError: the directory is of another run, or of something else; `resume` names no checkpoint.
    """
    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir() or (run_dir.exists() and any(run_dir.iterdir()) and not file.exists()):
        raise ValueError(f"run_dir {run_dir}: {there} exists and is no run directory; choose another with --run_dir.")
    if file.exists():
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
        return checkpoint.newest(run_dir)
    if faults := checkpoint.validate(Path(resume)):
        raise ValueError(f"--resume {resume} is no valid checkpoint: {'; '.join(faults)}.")
    return Path(resume)


def changes(config: RunConfig) -> list[str]:
    """A line for each setting in which the directory's run differs; its own place does not count."""
    before = load_yaml(Path(config.run_dir) / "config.yaml")
    return [line for line in differences(before, parse_yaml(dump(config))) if not line.startswith("run_dir:")]


def claim(config: RunConfig, start_from: Path | None, step: int) -> None:
    """Makes the directory this run's own, to go on after `step`. What does not belong to its past is set aside, not lost."""
    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    run_dir.mkdir(parents=True, exist_ok=True)
    if file.exists() and (changed := changes(config)):
        for line in changed:
            logger.warning("changed setting: %s", line)
        file.rename(unused(run_dir / "config-before-change.yaml"))
    if not file.exists():
        unfinished = run_dir / ".config.yaml"
        unfinished.write_text(dump(config))
        unfinished.replace(file)
    checkpoint.rewind(run_dir, start_from)
    for name in ("metrics.jsonl", "samples.jsonl"):
        drop_after(run_dir / name, step if start_from else -1)


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that is not there."""
    candidates = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(2))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())


def append(file: Path, line: dict) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def last_line(file: Path, key: str) -> dict | None:
    """The last line that has `key`."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return next((line for line in reversed(list(lines)) if key in line), None)


def drop_after(file: Path, step: int) -> None:
    """Removes the lines of steps that are about to be run again, and one that was cut off in the middle."""
    if not file.exists():
        return
    kept = []
    for text in file.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except ValueError:
            logger.warning("%s: dropping a line that was cut off", file)
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text("".join(f"{text}\n" for text in kept))
    unfinished.replace(file)
