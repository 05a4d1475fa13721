"""What the care costs."""

import time
from itertools import pairwise
from statistics import median

import pytest

from hybridlm.strict_yaml import load_yaml
from train.config import parse
from train.loop import train
from train.objective import next_token_loss

EVERY, SAVES = 20, 7  # steps between saves here


@pytest.mark.faults
@pytest.mark.parametrize("behind", [True, False])
def test_saving_takes_less_than_three_percent_of_the_demo(tmp_path, record_property, behind):
    """Half of the steps between two saves, with the first, against the other half: pairs inside of one loop."""
    demo = load_yaml("configs/demo.yaml")
    every = demo["train"]["checkpoint_every"]
    settings = {
        "steps": SAVES * EVERY,
        "checkpoint_every": EVERY,
        "val_every": 10**6,
        "val_sequences": 2,
        "checkpoint_async": behind,
    }
    demo |= {"run_dir": str(tmp_path / "run"), "train": demo["train"] | settings}
    demo["data"]["cache_dir"] = str(tmp_path / "cache")
    starts = []

    def loss(model, batch):
        if model.training:
            starts.append(time.perf_counter())
        return next_token_loss(model, batch)

    train(parse(demo | {"log": {"sample_tokens": 0}}), loss=loss)
    # The save of step k x EVERY lies between the beginning of that step and that of the next.
    bounds = [(k * EVERY - 1, k * EVERY - 1 + EVERY // 2, (k + 1) * EVERY - 1) for k in range(1, SAVES)]
    costs = [(starts[b] - starts[a]) - (starts[c] - starts[b]) for a, b, c in bounds]
    step = median(b - a for a, b in pairwise(starts))
    how = "behind the training" if behind else "waiting"
    record_property(f"seconds that a save costs the training of the demo, {how}", median(costs))
    record_property(f"share of the demo's time that saving takes, {how}", median(costs) / (every * step))
    assert median(costs) < 0.03 * every * step
