import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.tokenizer import byte_tokenizer
from train.config import parse
from train.settings import RunConfig

SHAPE = {
    "hybrid_override_pattern": "M*-", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8,
    "chunk_size": 16,
}  # fmt: skip
WIDER = SHAPE | {"hybrid_override_pattern": "M-M*-", "hidden_size": 48, "initializer_range": 0.3}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its precision for the life of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Twenty documents of words that a tiny model learns quickly."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "owl"]
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(" ".join(random.Random(i).choices(words, k=60)))
    return folder


@pytest.fixture
def make_config(text_folder, tmp_path):
    def make(**changes) -> RunConfig:
        """A run of 8 steps; changes are `section__field=value`."""
        values = {
            "run_dir": str(tmp_path / "run"),
            "model": {"config": SHAPE},
            "data": {"source": str(text_folder), "seq_len": 32, "cache_dir": str(tmp_path / "cache")},
            "optim": {"name": "adamw", "lr": 1e-2},  # Muon rounds to bf16: what should be equal would not be close
            "train": {"steps": 8, "global_batch": 4, "checkpoint_every": 4, "val_every": 4, "val_sequences": 4},
            "log": {"every": 1, "sample_tokens": 8, "sample_prompt": "the "},
        }
        for name, value in changes.items():
            *section, field = name.split("__")
            (values.setdefault(section[0], {}) if section else values)[field] = value
        return parse(values)

    return make


@pytest.fixture(scope="session")
def labelled_rows(tmp_path_factory):
    """Sixty documents of three labels, each of letters of its own; some are longer than a window of 32."""
    file, draw = tmp_path_factory.mktemp("labelled") / "rows.jsonl", random.Random(3)
    letters = {"cat": "uvw", 9: "xyz", "10": "pqr"}
    rows = [(label, "".join(draw.choices(letters[label], k=draw.randrange(2, 50)))) for label in [*letters] * 20]
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in rows))
    return file


@pytest.fixture
def make_labelled(make_config, labelled_rows):
    def make(bidirectional=None, **changes) -> RunConfig:
        """As `make_config`, of a classifier."""
        values = {"data__source": str(labelled_rows), "data__label_column": "label", "data__val_fraction": 0.25}
        return make_config(**({"model": {"config": SHAPE | {"bidirectional": bidirectional}}} | values | changes))

    return make


def save_model(folder, shape, kind=HybridLMForCausalLM, tokenizer=True, **changes) -> str:
    """The folder of a model that has learned nothing."""
    torch.manual_seed(3)
    kind(HybridLMConfig(**shape | changes)).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A model whose predictions differ."""
    return save_model(tmp_path_factory.mktemp("teacher"), WIDER)


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """One of the shape of runs."""
    return save_model(tmp_path_factory.mktemp("twin"), SHAPE, initializer_range=0.2)


@pytest.fixture
def quiet_config(make_config):
    """A run without validation in between, and without samples."""
    return lambda **changes: make_config(**{"train__val_every": 100, "log__sample_tokens": 0, **changes})


@dataclass
class Ended:
    status: int  # minus the signal that ended it, as in subprocess
    out: str
    err: str
    at: float  # seconds, by time.monotonic()


@pytest.fixture
def run_ranks(tmp_path):
    """Runs `work(rank)` in processes of one process group, forked from this one: to import torch anew would take seconds."""

    def run(ranks: int, work: Callable[[int], None], limit: float = 30, launcher: bool = False) -> list[Ended]:
        """With a `launcher` the others get SIGTERM when one fails, as from torchrun. Stopped ones that are left are killed."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        pids = [_fork(rank, ranks, port, work, tmp_path / f"rank-{rank}") for rank in range(ranks)]
        running, status, at, stopped, told = set(range(ranks)), {}, {}, set(), False
        until = time.monotonic() + limit
        while running and time.monotonic() < until:
            for rank in sorted(running):
                pid, word = os.waitpid(pids[rank], os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
                if pid and os.WIFSTOPPED(word):
                    stopped.add(rank)
                elif pid and os.WIFCONTINUED(word):
                    stopped.discard(rank)
                elif pid:
                    running.discard(rank)
                    status[rank], at[rank] = os.waitstatus_to_exitcode(word), time.monotonic()
            if status and running and running <= stopped:
                break
            if launcher and not told and any(status.values()):
                told = True
                for rank in running:
                    os.kill(pids[rank], signal.SIGTERM)
            time.sleep(0.005)
        for rank in running:
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
            status[rank], at[rank] = -signal.SIGKILL, time.monotonic()
        said = [[(tmp_path / f"rank-{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(ranks)]
        ended = [Ended(status[rank], *said[rank], at[rank]) for rank in range(ranks)]
        assert running <= stopped, f"ranks {running - stopped} ran for more than {limit} s: {ended}"
        return ended

    return run


def _fork(rank: int, ranks: int, port: int, work: Callable[[int], None], prefix) -> int:
    if pid := os.fork():
        return pid
    status = 1
    # tqdm's own is shared by forked processes: one that is killed while it holds it would stop all that come after.
    tqdm.set_lock(threading.RLock())
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        work(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
