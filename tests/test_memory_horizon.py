"""configs/experiments/memory-horizon: what it trains is valid and equal, what it measures is what it says; docs/memory-horizon.md
has what came out."""

import importlib.util
import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from hybridlm import HybridLMConfig, HybridLMForSequenceClassification
from hybridlm.twin import count_parameters
from train.config import parse

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "configs/experiments/memory-horizon/run.py"
PAGE = ROOT / "docs/memory-horizon.md"


@pytest.fixture(scope="module")
def horizon():
    spec = importlib.util.spec_from_file_location("memory_horizon_experiment", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(horizon):
    return json.loads((SCRIPT.parent / "results.json").read_text())


def test_every_training_is_valid_and_all_models_have_one_size(horizon, tmp_path):
    for config in (
        lambda model: horizon.recall_config(tmp_path, model, 0, 512),
        lambda model: horizon.recall_config(tmp_path, model, 1, 4096, clip=1e9),
        lambda model: horizon.text_config(tmp_path, "stdlib", model, 0, 10),
    ):
        settings = {model: parse(config(model)) for model in horizon.MODELS}
        sizes = [count_parameters(HybridLMConfig.from_strict_dict(one.model.config)) for one in settings.values()]
        assert max(sizes) / min(sizes) < 1.01
        tokens = {one.train.steps * one.train.global_batch * one.data.seq_len for one in settings.values()}
        assert len(tokens) == 1 and len({one.run_dir for one in settings.values()}) == len(settings)
        patterns = [one.model.config["hybrid_override_pattern"] for one in settings.values()]
        assert patterns == ["r-r-", "l-l-", "g-g-", "m-m-", "M-M-", "*-*-", "M-*-"]


@pytest.mark.parametrize("steps", [2, 3, 64, 512])
def test_the_only_capital_stands_so_many_steps_before_the_end(horizon, steps):
    for i in range(20):
        text, capital = horizon.recall_text(Random(i), steps)
        assert [c for c in text if c in horizon.MARKED] == [capital]
        ids = horizon.tokens(text)[0]
        assert ids[-1 - steps] == ord(capital) and ids[-1] == 256
    assert len({horizon.recall_text(Random(i), steps)[1] for i in range(200)}) == 26


def test_texts_to_learn_from_are_enough_and_of_all_lengths(horizon, tmp_path):
    horizon.write_recall_texts(tmp_path / "texts.jsonl", 64, 20_000)
    rows = list(map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines()))
    assert sum(len(row["text"]) + 1 for row in rows) > 1.2 * 20_000 > 1.2 * 20_000 - 70
    back = [len(row["text"]) - row["text"].index(row["label"]) for row in rows]
    assert (min(back), max(back)) == (2, 64)
    assert abs(sum(steps <= 11 for steps in back) / len(back) - 0.5) < 0.05  # half of them below the geometric middle


@pytest.mark.parametrize("pattern", ["r-", "M-*-"])
def test_a_jacobians_norm_is_that_of_the_whole_matrix(horizon, pattern, tiny_config, monkeypatch):
    model = HybridLMForSequenceClassification(tiny_config(hybrid_override_pattern=pattern, num_labels=2)).eval()
    ids = torch.randint(61, (1, 7), generator=torch.Generator().manual_seed(0))

    def last(x):
        return model.backbone(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1]

    whole = torch.autograd.functional.jacobian(last, model.backbone.embeddings(ids).detach())[:, 0].norm(dim=(0, 2))
    monkeypatch.setattr(horizon, "DIRECTIONS", 1000)
    torch.testing.assert_close(horizon.jacobian_norms(model, ids), whole, rtol=0.1, atol=0)


def test_a_horizon_ends_at_the_first_gap(horizon):
    assert horizon.horizon({2: 1.0, 4: 0.9, 8: 0.89, 16: 1.0}) == 4
    assert horizon.horizon({2: 0.5, 4: 1.0}) == 0
    assert horizon.horizon({4: 1.0, 2: 1.0}) == 4


def test_what_came_out(horizon, results):
    """Beside what the textbooks say: gates remember longer than none, and the hybrid as far as was asked."""
    reached = horizon.horizons(results["recall"])
    assert all(lstm > elman for lstm, elman in zip(reached["LSTM"], reached["Elman RNN"], strict=True))
    assert reached["hybrid"] == [512] * horizon.SEEDS


def test_the_page_has_the_figures(horizon, results):
    page = PAGE.read_text()
    tables = [
        horizon.recall_table(results["recall"]), horizon.clipping_table(results["recall"]),
        horizon.gradient_table(results["gradients"]), horizon.text_table(results["text"]),
        horizon.speed_table(results["training_speed"], results["generation_speed"]),
        horizon.text_table(json.loads((SCRIPT.parent / "tinyshakespeare.json").read_text())["text"]),
    ]  # fmt: skip
    for table in tables:
        assert table in page, table
    for row in results["recall"]:
        assert row["tokens"] == horizon.STEPS * 4096
