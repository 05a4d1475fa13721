"""configs/classify/baseline.py: what it counts and compares, at toy size."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from train.config import dump, parse
from train.loop import train

ROOT = Path(__file__).parent.parent
SHAPE = {
    "hybrid_override_pattern": "M-", "bidirectional": "sum", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 2, "mamba_head_dim": 16, "n_groups": 1,
    "ssm_state_size": 4, "chunk_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def baseline():
    spec = importlib.util.spec_from_file_location("classify_baseline", ROOT / "configs/classify/baseline.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_are_of_each_token(baseline):
    assert baseline.counts([[1, 1, 3], []], 4).tolist() == [[0, 2, 0, 1], [0, 0, 0, 0]]


def test_a_bag_learns_which_tokens_come_and_not_their_order(baseline):
    draw = random.Random(0)
    ids = [draw.choices(range(3) if i % 2 else range(2, 5), k=8) for i in range(60)]
    bag = baseline.bag_of_tokens(baseline.counts(ids, 5), np.array(["even", "odd"] * 30))
    seen = baseline.counts([[0, 2, 1], [1, 2, 0], [4, 2, 3]], 5)
    assert bag.predict(seen).tolist() == ["odd", "odd", "even"]


def test_both_answer_the_documents_that_were_held_out(baseline, tmp_path):
    """Two of three labels are told by a letter, which comes after the 15 tokens that are read in one document of each kind."""
    draw = random.Random(1)
    rows = [("abc"[i % 3], "".join(draw.choices("xyz" + "aab"[i % 3], k=12))) for i in range(90)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for label, text in rows))
    AcceleratorState._reset_state(reset_partial_state=True)
    values = {
        "run_dir": str(tmp_path / "run"), "model": {"config": SHAPE},
        "data": {"source": str(tmp_path / "rows.csv"), "label_column": "label", "seq_len": 16, "val_fraction": 0.2,
                 "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 2, "global_batch": 4},
    }  # fmt: skip
    config = parse(values)
    train(config)
    (_, _), (texts, labels) = baseline.splits(config.data)
    said = baseline.compare(tmp_path / "run")
    assert said[0].startswith("72 documents to train on, 18 held out, 3 labels; the first 15 tokens")
    most = said[1].split("'")[1]
    share = float(said[1].split()[-3])
    assert share == pytest.approx((labels == most).mean(), abs=5e-4)
    assert [line.split()[-2] for line in said[1:]] == ["±"] * 4 and len(texts) == 18
    bag, model, gain = (float(line.split()[-3]) for line in said[2:])
    assert bag > 0.5 and gain == pytest.approx(model - bag, abs=2e-3)
    (tmp_path / "run/config.yaml").write_text(dump(config).replace("label_column: label", "label_column: null"))
    with pytest.raises(ValueError, match="language model"):
        baseline.compare(tmp_path / "run")
