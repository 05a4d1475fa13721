import random

import pytest
import yaml

# Every kind of layer but experts, which route by the last bit; sizes that the ranks do not divide.
SHAPE = {
    "hybrid_override_pattern": "M-M*-M-", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8,
    "chunk_size": 16, "initializer_range": 0.06,
}  # fmt: skip


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """The file of a run of 20 steps, with several documents in a window and several passes in a step."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "text").mkdir()
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "owl"]
    for i in range(60):
        (folder / "text" / f"{i:02d}.txt").write_text(" ".join(random.Random(i).choices(words, k=3 + i)))
    values = {
        "run_dir": str(folder / "run"),
        "model": {"config": SHAPE},
        "data": {"source": str(folder / "text"), "seq_len": 48, "cache_dir": str(folder / "cache")},
        "optim": {"lr": 5e-3},
        "train": {"steps": 20, "global_batch": 12, "micro_batch": 1, "checkpoint_every": 10, "val_every": 10, "val_sequences": 7},
        "log": {"every": 1, "sample_tokens": 4, "sample_prompt": "the "},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"
