# The only door. Every target that runs something makes .venv first, from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export WANDB_SILENT ?= true

.PHONY: setup demo bench test faults scale check gpu-check clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready  ## train a small hybrid for about four minutes, then report on it
	$(BIN)/python -m train --config configs/demo.yaml
	$(BIN)/python -m eval report --run runs/demo

bench: .venv/ready  ## speed and memory beside stock transformers, in about twelve minutes; LONG=1 adds a prompt of 65,536
	$(BIN)/python -m eval bench $(if $(LONG),--long)

test: .venv/ready  ## on two cores the third process works while another waits
	$(BIN)/python -m pytest -n 3 tests

faults: .venv/ready  ## kills, starves and corrupts runs: kills at every file operation, power loss, resumes; and what the care costs; about a quarter of an hour on two cores
	$(BIN)/python -m pytest -n 2 -m faults tests

scale: .venv/ready  ## real launches of 1 to 4 ranks, sharded and not, restarts, two agents, FP8 against bf16; about a quarter of an hour on two cores
	$(BIN)/python -m pytest -m scale tests

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check: .venv/ready  ## on a CUDA machine with the packages of [cuda]: the fused operators against the specification, and their speed; FP8 beside bf16
	$(BIN)/python -m hybridlm doctor --fused
	$(BIN)/python -m pytest -m gpu tests/hybridlm/ops/test_fused.py tests/hybridlm/test_fp8.py
	$(BIN)/python -m eval gpu-check --json gpu-check.json

clean:
	rm -rf .venv build dist *.egg-info
