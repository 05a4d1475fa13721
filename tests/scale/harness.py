"""Starts runs as a person would, by torchrun or accelerate, and reads what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start(settings, run_dir, *flags, launcher=(), script=("-m", "train"), **environment) -> subprocess.Popen:
    command = [*launcher, *script] if launcher else [sys.executable, *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(
        [*command, "--config", str(settings), "--run_dir", str(run_dir), *flags],
        cwd=HERE.parents[1], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen, status: int = 0) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == status, out[-4000:]
    return out


def torchrun(ranks, *flags):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *(flags or ["--standalone"])]


def logged(run_dir, key="loss") -> dict[int, float]:
    """By step."""
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}
