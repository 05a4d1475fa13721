"""What the experiments share: trainings by `python -m train`, two at a time with a thread each. What is trained already is not
trained again."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from hybridlm import HybridLMConfig
from hybridlm.twin import count_parameters


def train_all(runs: list[dict[str, Any]]) -> list[Path]:
    """Trains what these settings of `python -m train` say.

    Returns:
        The folder of each run; beside it are its settings, its output and the CPU seconds that it took.

    Raises:
        RuntimeError: one failed.
    """
    files = []
    for values in runs:
        files.append(Path(f"{values['run_dir']}.yaml"))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(yaml.safe_dump(values), encoding="utf-8")
    with ThreadPoolExecutor(2) as pool:  # of processes: the threads only wait for them
        list(tqdm(pool.map(train, files), desc="training", total=len(files), unit=" models"))
    return [file.with_suffix("") for file in files]


def train(file: Path) -> None:
    kept = file.with_suffix(".seconds")
    if kept.exists():
        return
    with file.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "train", "--config", str(file)]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed; see {log.name}.")
    kept.write_text(f"{used.ru_utime + used.ru_stime:.0f}\n")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def facts(run_dir: Path) -> dict[str, Any]:
    """Parameters of the language model of this shape, tokens, steps and CPU seconds of a run."""
    last, shape = metrics(run_dir)[-1], HybridLMConfig.from_pretrained(run_dir / "model")
    seconds = int(run_dir.with_suffix(".seconds").read_text())
    return {"parameters": count_parameters(shape), "tokens": last["tokens"], "steps": last["step"], "cpu_seconds": seconds}
