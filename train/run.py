"""The run directory: who may use it, and what is written there line by line."""

import json
import logging
from pathlib import Path

import yaml

from train import checkpoint
from train.config import RunConfig, differences, dump

logger = logging.getLogger(__name__)


def claim(config: RunConfig, resume: str, allow_config_change: bool) -> Path | None:
    """Makes the run directory this run's own and says from which checkpoint to go on (None: from the start).

    Raises:
        ValueError: the directory is of another run, or of something else; `resume` names no checkpoint.
    """
    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    here, changed = yaml.safe_load(dump(config)), []
    if run_dir.exists() and (not run_dir.is_dir() or (any(run_dir.iterdir()) and not file.exists())):
        raise ValueError(f"run_dir {run_dir} exists and is no run directory; choose another with --run_dir.")
    if file.exists():
        if resume == "never":
            raise ValueError(f"run_dir {run_dir} already holds a run, and --resume is never. Choose another with --run_dir.")
        before = yaml.safe_load(file.read_text())
        changed = [line for line in differences(before, here) if not line.startswith("run_dir:")]
        if changed and not allow_config_change:
            raise ValueError(
                "\n".join(
                    [
                        f"run_dir {run_dir} holds a run with other settings:",
                        *(f"  {line}" for line in changed),
                        "Choose another with --run_dir, or pass --allow-config-change to go on with the new ones.",
                    ]
                )
            )
        for line in changed:
            logger.warning("changed setting: %s", line)
    folder = checkpoint.newest(run_dir) if resume in ("auto", "never") else Path(resume)
    if resume not in ("auto", "never") and (faults := checkpoint.validate(Path(resume))):
        raise ValueError(f"--resume {resume} is no valid checkpoint: {'; '.join(faults)}.")
    run_dir.mkdir(parents=True, exist_ok=True)
    if changed:
        kept = next(p for i in range(1, 10_000) if not (p := run_dir / f"config-before-change-{i}.yaml").exists())
        file.rename(kept)
    if not file.exists():
        unfinished = run_dir / ".config.yaml"
        unfinished.write_text(dump(config))
        unfinished.replace(file)
    return folder


def append(file: Path, line: dict) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


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
