import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh

from hybridlm import HybridLMForCausalLM
from hybridlm.data.labelled import Labelled
from hybridlm.data.sources import Source, split_source
from hybridlm.scoring import batch_arrays
from hybridlm.tokenizer import byte_tokenizer
from train import validation
from train.loop import train
from train.setup import build_model, build_tokenizer, open_data
from train.validation import classification, sample_text, validation_loss


def lines(config, key):
    rows = [json.loads(text) for text in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def test_validation_is_the_loss_on_the_held_out_text_to_the_last_token(make_config, text_folder):
    config = make_config(train__steps=2, train__val_sequences=None)
    train(config)
    model = HybridLMForCausalLM.from_pretrained(Path(config.run_dir) / "model")
    nats = tokens = 0
    held_out = split_source(Source(str(text_folder)), None, 0.1)[1]
    assert len(held_out) == 2  # a tenth of twenty documents
    for text in held_out:
        ids = torch.tensor([*text.encode()])
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

    def arrays(batch):
        scored["chosen"] = [window.ids for window in batch]
        return batch_arrays(batch)

    monkeypatch.setattr("train.validation.batch_arrays", arrays)
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


@pytest.fixture
def two_sources(make_config, tmp_path):
    """A configuration of two sources of different text, and their validation shards."""
    for name, word in (("a", "the cat "), ("b", "zebra? ")):
        (tmp_path / f"{name}.txt").write_text(word * 400)
    blend = [{"source": str(tmp_path / f"{name}.txt"), "weight": 1} for name in "ab"]
    config = make_config(data__source=None, data__blend=blend, train__val_sequences=None)
    return config, open_data(config, byte_tokenizer(), 258, quiet=True)[1]


def test_the_loss_of_several_sources_is_pooled_by_tokens_and_told_for_each(two_sources, monkeypatch):
    config, sources = two_sources
    model, accelerator = build_model(config), Accelerator(cpu=True)
    line = validation_loss(accelerator, model, sources, config)
    alone = [validation_loss(accelerator, model, [shards], config) for shards in sources]
    assert all("val_loss_by_source" not in result for result in alone)
    assert line["val_loss_by_source"] == {
        shards.meta["source"]: pytest.approx(result["val_loss"], abs=1e-6) for shards, result in zip(sources, alone, strict=True)
    }
    assert alone[0]["val_loss"] != pytest.approx(alone[1]["val_loss"], abs=1e-3)
    tokens = [len(shards) - 2 for shards in sources]
    pooled = sum(n * result["val_loss"] for n, result in zip(tokens, alone, strict=True)) / sum(tokens)
    assert line["val_loss"] == pytest.approx(pooled, abs=1e-6)
    assert line["val_bits_per_byte"] == pytest.approx(pooled / math.log(2), abs=1e-6)  # a byte is a token


def test_a_source_of_which_no_window_is_taken_has_no_loss(two_sources):
    config, sources = two_sources
    config = replace(config, train=replace(config.train, val_sequences=1))
    line = validation_loss(Accelerator(cpu=True), build_model(config), sources, config)
    assert [value is None for value in line["val_loss_by_source"].values()] == [False, True]
    assert line["val_loss"] == pytest.approx(next(iter(line["val_loss_by_source"].values())))


@pytest.mark.parametrize("answers", [[True], [False, True]])
def test_a_validation_that_is_stopped_gives_nothing_and_scores_no_further(two_sources, monkeypatch, answers):
    config, sources = two_sources
    config = replace(config, data=replace(config.data, seq_len=8192))  # one window a batch
    scored = []

    def nll(model, ids, targets):
        scored.append(len(ids))
        return torch.ones(ids.shape)

    monkeypatch.setattr("train.validation.nll", nll)
    asked = iter(answers)
    model = build_model(config).train()
    assert validation_loss(Accelerator(cpu=True), model, sources, config, lambda: next(asked)) is None
    assert scored == [1] * (len(answers) - 1)
    assert model.training


@pytest.mark.parametrize(("ranks", "sharding", "wanted"), [(2, "none", 5), (2, "fsdp2", 5), (3, "fsdp2", 2)])
def test_ranks_together_have_the_loss_of_one_and_stop_together(two_sources, run_ranks, ranks, sharding, wanted):
    """With one window a batch, so that the ranks have different numbers of them, or none at all."""
    config, _ = two_sources
    config = replace(config, data=replace(config.data, seq_len=128), train=replace(config.train, val_sequences=wanted))
    sources = open_data(config, byte_tokenizer(), 258, quiet=True)[1]
    alone = validation_loss(Accelerator(cpu=True), build_model(config), sources, config)
    AcceleratorState._reset_state(reset_partial_state=True)

    def work(rank):
        accelerator = Accelerator(cpu=True)
        mesh = init_device_mesh("cpu", (ranks,)) if sharding == "fsdp2" else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validation, "BATCH_TOKENS", 128)
            model = build_model(config, mesh=mesh)
            line = validation_loss(accelerator, model, sources, config)
            assert line["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-6)
            assert line["val_loss_by_source"] == pytest.approx(alone["val_loss_by_source"], abs=1e-6)
            assert validation_loss(accelerator, model, sources, config, lambda: rank == 1) is None

    ended = run_ranks(ranks, work)
    assert [one.status for one in ended] == [0] * ranks, ended


def test_an_empty_prompt_begins_a_new_text(make_config):
    config = make_config(train__steps=1, log__sample_prompt="")
    train(config)
    assert [json.loads(line)["prompt"] for line in (Path(config.run_dir) / "samples.jsonl").read_text().splitlines()] == ["", ""]


def test_a_sample_is_drawn_from_the_scores_that_are_agreed_on(make_config):
    config = make_config(log__sample_tokens=5)
    model = build_model(config)
    tokenizer = build_tokenizer(config, model)
    agreed = torch.full((1, 258), -math.inf)
    agreed[0, tokenizer("z", add_special_tokens=False).input_ids] = 0
    assert sample_text(model, tokenizer, config, agreed=lambda scores: agreed) == "zzzzz"


def test_a_sample_ends_when_the_run_is_to_stop(make_config):
    config = make_config(log__sample_tokens=50)
    model = build_model(config)
    tokenizer = build_tokenizer(config, model)
    asked = []
    text = sample_text(model, tokenizer, config, lambda: asked.append(1) or len(asked) == 3)
    assert len(asked) == 3
    assert len(sample_text(model, tokenizer, config)) > len(text)


LABELS = ["9", "10", "cat"]


def of_labels(config, **where):
    """A classifier that tells nothing apart and is sure of it, and the documents held out."""
    model = build_model(config, labels=LABELS, **where)
    with torch.no_grad():
        model.score.weight.mul_(100)
    return model, open_data(config, byte_tokenizer(), 258, quiet=True)[1]


@pytest.mark.parametrize("way", [None, "sum", "concat"])
@pytest.mark.parametrize("wanted", [None, 3, 99])
def test_a_classifier_is_measured_as_document_by_document(make_labelled, monkeypatch, way, wanted):
    """In float64, with several windows a pass and fewer in the last."""
    config = make_labelled(way, train__val_sequences=wanted)
    model, (shards,) = of_labels(config)
    monkeypatch.setattr(validation, "BATCH_TOKENS", 160)
    line = classification(Accelerator(cpu=True), model.double(), [shards], config)
    assert model.training
    packed = Labelled(shards, 32, config.seed, 258, LABELS)
    assert packed.windows > 10 and packed.windows % 5 and packed.cut
    numbers = [d for n in range(packed.windows if wanted != 3 else 3) for d in packed.chosen(n)]
    assert len(numbers) == len(set(numbers)) and (wanted == 3 or len(numbers) == 15)
    nats, right = [], []
    for number in numbers:
        ids = shards.read(np.arange(shards.documents[number - 1, 0] if number else 0, shards.documents[number, 0]))
        ids = torch.tensor([*ids[:-1][:31], 256])
        label = torch.tensor(LABELS.index(shards.meta["labels"][shards.labels[number]]))
        with torch.no_grad():
            logits = model.eval()(ids[None]).logits[0]
        nats.append(torch.nn.functional.cross_entropy(logits, label).item())
        right.append(int(logits.argmax()) == label)
    assert line["val_loss"] == pytest.approx(np.mean(nats), rel=1e-12) and line["val_loss"] > 0.5
    assert line["val_accuracy"] == pytest.approx(np.mean(right)) and (wanted == 3 or 0 < line["val_accuracy"] < 1)


@pytest.mark.parametrize(("ranks", "sharding", "wanted"), [(2, "none", 5), (3, "fsdp2", 2)])
def test_ranks_together_have_the_accuracy_of_one_and_stop_together(make_labelled, run_ranks, ranks, sharding, wanted):
    """With one window a batch, so that the ranks have different numbers of them, or none at all."""
    config = make_labelled("sum", train__val_sequences=wanted)
    alone = classification(Accelerator(cpu=True), *of_labels(config), config)
    AcceleratorState._reset_state(reset_partial_state=True)

    def work(rank):
        accelerator = Accelerator(cpu=True)
        model, sources = of_labels(config, mesh=init_device_mesh("cpu", (ranks,)) if sharding == "fsdp2" else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validation, "BATCH_TOKENS", 32)
            line = classification(accelerator, model, sources, config)
            assert line == pytest.approx(alone, abs=1e-5)
            assert classification(accelerator, model, sources, config, lambda: rank == 1) is None
            assert model.training

    ended = run_ranks(ranks, work)
    assert [one.status for one in ended] == [0] * ranks, ended
