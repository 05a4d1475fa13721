"""Runs with data.label_column: from labelled documents to a folder that classifies."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import train.__main__
from hybridlm import HybridLMForSequenceClassification
from hybridlm.data import preparation
from hybridlm.data.labelled import Labelled
from hybridlm.tokenizer import byte_tokenizer
from train import checkpoint
from train.config import dump
from train.loop import train as train_run
from train.objective import next_token_loss
from train.setup import build_model, closing, open_data

WAYS = (None, "sum", "concat")


def lines(config):
    return [*map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())]


def weights(config, file="model/model.safetensors", step=8):
    return load_file(Path(config.run_dir) / f"checkpoints/step-{step}" / file)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_and_its_folder_classifies(make_labelled, way):
    config = make_labelled(way, train__steps=30, train__val_every=15, train__checkpoint_every=30, train__val_sequences=None)
    train_run(config)
    validations = [line for line in lines(config) if "val_loss" in line]
    assert [line["step"] for line in validations] == [0, 15, 30]
    assert all(line.keys() == {"step", "tokens", "val_loss", "val_accuracy"} for line in validations)
    assert validations[-1]["val_accuracy"] > 0.9 > validations[0]["val_accuracy"]
    assert not (Path(config.run_dir) / "samples.jsonl").exists()
    folder = Path(config.run_dir) / "model"
    said = json.loads((folder / "config.json").read_text())
    assert said["id2label"] == {"0": "9", "1": "10", "2": "cat"} and said["label2id"] == {"9": 0, "10": 1, "cat": 2}
    assert said["architectures"] == ["HybridLMForSequenceClassification"] and said["model_type"] == "hybridlm"
    assert not (folder / "generation_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert equal(dict(model.state_dict()), weights(config, step=30))
    classify = pipeline("text-classification", model=str(folder), tokenizer=str(folder))
    texts = ["xxyzx" * 3, "q", "uuuuuuuuuuv" * 9]
    found = [classify(text, truncation=True)[0] for text in texts]
    assert [one["label"] for one in found] == ["9", "10", "cat"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits
    assert logits.softmax(-1).amax(-1).tolist() == pytest.approx([one["score"] for one in found], abs=1e-4)


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(make_labelled, tmp_path):
    whole, cut = make_labelled("sum"), make_labelled("sum", run_dir=str(tmp_path / "cut"))
    train_run(whole)
    calls = []

    def loss(model, batch):
        calls.append(model.training)
        if calls.count(True) == 7:
            raise KeyboardInterrupt
        return next_token_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train_run(cut, loss=loss)
    assert [step for step, _ in checkpoint.folders(Path(cut.run_dir))] == [4]
    train_run(cut)
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert equal(weights(whole, file), weights(cut, file))
    losses = [[(line["step"], line.get("loss"), line.get("val_loss")) for line in lines(config)] for config in (whole, cut)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_ranks_are_one(make_labelled, run_ranks, tmp_path, sharding):
    """Batches of windows with different numbers of documents, so that the mean over ranks is not that over documents."""
    alone = make_labelled("sum", train__val_sequences=5)
    two = make_labelled("sum", run_dir=str(tmp_path / "two"), train__sharding=sharding, train__val_sequences=5)
    train_run(alone)

    def work(rank):
        file = Path(two.run_dir).with_suffix(f".{rank}.yaml")
        file.write_text(dump(two))
        assert train.__main__.main(["--config", str(file)]) == 0

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [0, 0], ended
    for a, b in zip(lines(alone), lines(two), strict=True):
        assert [a.get(name) for name in ("step", "val_accuracy")] == [b.get(name) for name in ("step", "val_accuracy")]
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-4)
    a, b = weights(alone), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)


LABELS = ["9", "10", "cat"]


def begun(make_labelled, tmp_path, way, labels, seed=5):
    """A folder with the weights of another run, none of them as they begin: a classifier, or a language model."""
    model = build_model(make_labelled(way, seed=seed), labels=labels)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    model.save_pretrained(tmp_path / "begun")
    byte_tokenizer().save_pretrained(tmp_path / "begun")
    return str(tmp_path / "begun"), model


@pytest.mark.parametrize("labels", [None, ["9", "10"], ["10", "9", "cat"], LABELS])
def test_a_classifier_begins_from_other_weights(make_labelled, tmp_path, labels):
    """Of a language model, and of a classifier into others, the backbone; of one into the same all."""
    folder, other = begun(make_labelled, tmp_path, None, labels)
    fresh = build_model(make_labelled(None), labels=LABELS)
    model = build_model(make_labelled(None, model={"init_from": folder}), labels=LABELS)
    assert model.config.label_names == LABELS and model.score.out_features == 3
    assert equal(dict(model.backbone.state_dict()), dict(other.backbone.state_dict()))
    assert torch.equal(model.score.weight, (other if labels == LABELS else fresh).score.weight)


def test_a_bidirectional_classifier_begins_from_another(make_labelled, tmp_path):
    folder, other = begun(make_labelled, tmp_path, "concat", ["a", "b"])
    config = make_labelled(None, model={"init_from": folder}, train__steps=1, optim__lr=1e-12, optim__weight_decay=0.0)
    train_run(config)
    model = HybridLMForSequenceClassification.from_pretrained(Path(config.run_dir) / "model")
    assert model.config.bidirectional == "concat" and model.config.label_names == LABELS
    for a, b in zip(model.backbone.parameters(), other.backbone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_validation_label_that_training_lacks_ends_the_run_before_it_begins(make_labelled, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [("a", "9"), ("b", "cow")])
    with pytest.raises(ValueError, match=r"other\.jsonl has the label\(s\) 'cow', which no training document has; known are '9'"):
        train_run(make_labelled(data__val_source=other))
    some = write_rows(tmp_path / "some.jsonl", [("x", "9"), ("q", "10"), ("z", "9")])  # fewer, in another order
    config = make_labelled(data__val_source=some, train__steps=1)
    train_run(config)
    assert json.loads((Path(config.run_dir) / "model/config.json").read_text())["label2id"] == {"9": 0, "10": 1, "cat": 2}


def test_a_source_without_labels_or_with_one_is_refused(make_labelled, text_folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no labels; leave data\.label_column away"):
        train_run(make_labelled(data__source=str(text_folder)))
    with pytest.raises(ValueError, match="other"):
        train_run(make_labelled(data__label_column="other"))
    one = write_rows(tmp_path / "one.jsonl", [("x", "9"), ("q", "9"), ("z", "9")])
    with pytest.raises(ValueError, match="at least two labels"):
        train_run(make_labelled(data__source=one))


def test_an_interrupted_preparation_is_gone_on_with(make_labelled, monkeypatch):
    config = make_labelled(train__steps=1)

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "numbered", stopped)  # when all tokens are there, and their labels not
        train_run(config)
    (part,) = Path(config.data.cache_dir).rglob("parts/*.json")
    assert len(json.loads(part.read_text())["labels"]) == 45
    monkeypatch.setattr(preparation, "write_part", kept := Mock(wraps=preparation.write_part))
    train_run(config)
    assert [len(call.args[0]) for call in kept.call_args_list] == [15]  # those held out


def test_the_tokenizer_of_a_classifier_makes_what_it_was_trained_on(make_labelled, tmp_path):
    """Long documents are cut and closed as training cut and closed them, and the text of a special token is text."""
    texts = ["", "short", "x" * 31, "y" * 32, "abcdefgh" * 9, "a <|endoftext|> b"]
    rows = write_rows(tmp_path / "rows.jsonl", [(text, "ab"[i % 2]) for i, text in enumerate(texts)])
    config = make_labelled(data__source=rows, data__val_source=rows)
    _, (shards,) = open_data(config, byte_tokenizer(), 258, quiet=True)
    documents, trained = Labelled(shards, 32, seed=0, vocab_size=258, names=["a", "b"]), {}
    for number in range(documents.windows):
        sample = documents.sample(number)
        for place, document in enumerate(documents.chosen(number)):
            trained[texts[document]] = sample["input_ids"][sample["seq_idx"] == place].tolist()
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"  # as some have it
    closing(tokenizer, 32).save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert {text: loaded(text, truncation=True).input_ids for text in texts} == trained
    assert trained["abcdefgh" * 9] == [*(b"abcdefgh" * 9)[:31], 256] and trained[""] == [256]
    batch = loaded(texts, truncation=True, padding=True, return_tensors="np")
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.astype(bool)].tolist() == trained[text] and (np.diff(mask) <= 0).all()
