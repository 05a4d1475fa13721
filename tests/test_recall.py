"""configs/experiments/recall: what it trains is valid, equal and apart from what it asks; docs/recall.md says what came out."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm import HybridLMConfig
from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.shards import tokenize
from hybridlm.twin import count_parameters
from train.config import parse

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "configs/experiments/recall/run.py"


@pytest.fixture(scope="module")
def recall():
    spec = importlib.util.spec_from_file_location("recall_experiment", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mqar", "phonebook"])
def test_plan(recall, tmp_path, monkeypatch, name):
    experiment = replace(recall.EXPERIMENTS[name], steps=20)
    monkeypatch.setitem(recall.EXPERIMENTS, name, experiment)
    recall.write_texts(tmp_path, name)
    tokenizer = load_tokenizer(str(tmp_path / name / "tokenizer"))
    trained = []
    for kind in experiment.texts:
        texts = [json.loads(line)["text"] for line in (tmp_path / name / f"{kind.length}.jsonl").read_text().splitlines()]
        # So that windows, of the length of the last ones, cut none of them.
        assert {len(ids) + 1 for ids in tokenize(texts, tokenizer)} == {kind.length}
        assert experiment.length % kind.length == 0
        trained += texts
    for pairs in experiment.pairs:
        assert experiment.task.smallest <= pairs <= experiment.task.largest
        asked = recall.questions(experiment.task, pairs, 5)
        assert asked == recall.questions(experiment.task, pairs, 5)
        assert not [q for q in asked if any(text.startswith(q.prompt) for text in trained)]
        assert all(len(ids) == 1 for ids in tokenize([f" {q.answer}" for q in asked], tokenizer))
    sizes = []
    for model in recall.MODELS:
        settings = parse(recall.run_config(tmp_path, name, model, 0, len(tokenizer)))
        sizes.append(count_parameters(HybridLMConfig.from_strict_dict(settings.model.config)))
    assert max(sizes) / min(sizes) < 1.01


def test_page_has_the_figures(recall):
    rows = json.loads(recall.RESULTS.read_text())["rows"]
    assert {row["task"] for row in rows} == set(recall.EXPERIMENTS)
    page = (ROOT / "docs/recall.md").read_text()
    assert recall.table(rows) in page
    for row in rows:
        assert row["steps"] == recall.EXPERIMENTS[row["task"]].steps
