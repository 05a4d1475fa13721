import random

import pytest
from accelerate.state import AcceleratorState

from train.config import RunConfig, parse

SHAPE = {
    "hybrid_override_pattern": "M*-", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8,
    "chunk_size": 16,
}  # fmt: skip


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
            "optim": {"lr": 1e-2},
            "train": {"steps": 8, "global_batch": 4, "checkpoint_every": 4, "val_every": 4, "val_sequences": 4},
            "log": {"every": 1, "sample_tokens": 8, "sample_prompt": "the "},
        }
        for name, value in changes.items():
            *section, field = name.split("__")
            (values.setdefault(section[0], {}) if section else values)[field] = value
        return parse(values)

    return make
