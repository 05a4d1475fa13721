import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from train.card import model_card
from train.loop import train


def test_the_card_tells_data_tokens_settings_and_the_measured_loss(make_config, text_folder):
    train(make_config(train__steps=6, train__checkpoint_every=6))
    run_dir = Path(make_config().run_dir)
    card, text = ModelCard.load(run_dir / "model" / "README.md"), (run_dir / "model" / "README.md").read_text()
    *_, measured = [line for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "val_loss" in line]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"val_loss": measured["val_loss"], "val_bits_per_byte": measured["val_bits_per_byte"]}
    assert f"{measured['val_loss']:.4f} nats/token" in text and "4 windows" in text
    assert "6 of 6 steps, 768 tokens\nin windows of 32" in text and str(text_folder) in text
    assert "lr: 0.01" in text and "hybrid_override_pattern: M*-" in text
    assert str(run_dir.parent / "cache") not in text and "run_dir" not in text
    assert (run_dir / "model" / "tokenizer.json").is_file()
    assert card.data.tags == ["hybrid", "mamba2", "nemotron_h"]


def test_the_python_of_the_card_runs(make_config):
    train(make_config(train__steps=1))
    folder = Path(make_config().run_dir) / "model"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {"folder": folder}
    exec(code, scope)
    assert scope["model"](torch.tensor([scope["tokenizer"]("the cat")["input_ids"]])).logits.isfinite().all()


def test_the_card_of_a_classifier_tells_its_labels_its_accuracy_and_how_to_open_it(make_labelled):
    config = make_labelled("sum", train__steps=2)
    train(config)
    folder = Path(config.run_dir) / "model"
    card, text = ModelCard.load(folder / "README.md"), (folder / "README.md").read_text()
    *_, measured = map(json.loads, (folder.parent / "metrics.jsonl").read_text().splitlines())
    assert card.data.pipeline_tag == "text-classification" and card.data.tags == ["hybrid", "mamba2", "hybridlm"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"val_loss": measured["val_loss"], "val_accuracy": measured["val_accuracy"]}
    assert f"{measured['val_loss']:.4f} nats/document, {measured['val_accuracy']:.4f} accuracy" in text
    assert "4 windows, drawn once, of" in text and "A classifier into 3 labels of" in text
    scope = {"folder": folder}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    model = scope["model"]
    assert f"of {sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert model(torch.tensor([scope["tokenizer"]("the cat")["input_ids"]])).logits.shape == (1, 3)


@pytest.mark.parametrize("changes", [{"rope_theta": 1e4}, {"hybrid_override_pattern": "ME"}])
def test_the_card_says_what_kind_of_model_it_is(changes, make_config, tiny):
    config = make_config(model__init_from="some/model")
    model = HybridLMForCausalLM(HybridLMConfig(**tiny(**changes)))
    text = model_card(config, model, "a text", 3, 384, None)
    assert "from the weights of `some/model`" in text and "Not evaluated yet." in text and "model-index" not in text
    assert ("import hybridlm" in text) == ("rope_theta" in changes)
    assert ("work on a token" in text) == ("rope_theta" not in changes)
