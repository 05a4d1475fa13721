import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hybridlm import HybridLMForCausalLM
from train.loop import train
from train.setup import build_model, build_tokenizer, open_data
from train.validation import sample_text, validation_loss


def lines(config, key):
    rows = [json.loads(text) for text in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def test_validation_is_the_loss_on_the_held_out_text_to_the_last_token(make_config, text_folder):
    config = make_config(train__steps=2, train__val_sequences=None)
    train(config)
    model = HybridLMForCausalLM.from_pretrained(Path(config.run_dir) / "model")
    nats = tokens = 0
    for file in sorted(text_folder.iterdir())[-2:]:  # a tenth of twenty documents
        ids = torch.tensor([*file.read_bytes()])
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            tokens += len(window) - 1
    assert lines(config, "val_loss")[-1]["val_loss"] == pytest.approx(nats / tokens, abs=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_windows_are_spread_evenly_over_the_held_out_text(make_config, monkeypatch, count):
    """The first and the last window are among them, and the gaps are equal to rounding."""
    config = make_config(train__val_sequences=count)
    model = build_model(config)
    shards = open_data(config, build_tokenizer(config, model), 258, quiet=True)[1][0]
    scored = {}

    def score(model, documents, size, **rest):
        from hybridlm.scoring import score as real

        scored["chosen"] = documents
        return real(model, documents, size, **rest)

    monkeypatch.setattr("train.validation.score", score)
    validation_loss(Accelerator(cpu=True), model, [shards], config)
    every = []
    start = 0
    for end in shards.documents[:, 0]:
        ids = shards.read(np.arange(start, end - 1))
        every += [ids[i : i + 33].tolist() for i in range(0, len(ids) - 1, 32)]
        start = end
    places = [every.index(window.tolist()) for window in scored["chosen"]]
    assert len(places) == count
    assert places[0] == 0
    assert count == 1 or places[-1] == len(every) - 1
    assert np.ptp(np.diff(places)) <= 1 if count > 2 else True


def test_sampling_text_does_not_touch_the_random_numbers_of_the_run(make_config):
    config = make_config()
    model = build_model(config)
    tokenizer = build_tokenizer(config, model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    text = sample_text(model, tokenizer, config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert sample_text(model, tokenizer, config) == text  # nor they it
    assert model.training
