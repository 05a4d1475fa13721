import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from hybridlm import HybridLMForCausalLM, HybridLMForSequenceClassification, HybridLMModel
from hybridlm.tokenizer import byte_tokenizer

WAYS = (None, "sum", "concat")


@pytest.fixture
def classifier(tiny_config):
    def build(bidirectional=None, **changes):
        torch.manual_seed(0)
        return HybridLMForSequenceClassification(tiny_config(bidirectional=bidirectional, num_labels=4, **changes)).eval()

    return build


@pytest.mark.parametrize("bidirectional", WAYS)
@torch.no_grad()
def test_what_is_read_of_a_document(bidirectional, classifier, draw_ids):
    """The last token that is none of padding, or the mean over all tokens."""
    model, ids = classifier(bidirectional), draw_ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:], mask[1, :2], mask[1, 5] = 0, 0, 0
    logits = model(ids, mask).logits
    assert logits.shape == (3, 4) and logits.dtype == torch.float32
    for row in range(3):
        hidden = model.backbone(ids[row, mask[row].bool()][None]).last_hidden_state[0]
        vector = hidden[-1] if bidirectional is None else hidden.mean(0)
        torch.testing.assert_close(logits[row], model.score.weight @ vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", WAYS)
def test_packed_documents_have_the_loss_of_each_alone(bidirectional, classifier, draw_ids):
    model, lengths, ids = classifier(bidirectional), (5, 1, 8, 4), draw_ids(2, 18)
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).repeat(2, 1)
    targets = torch.full((2, 18), -100)
    targets[0, [4, 5, 13]], targets[1, [4, 17]] = torch.tensor([1, 0, 3]), torch.tensor([2, 1])  # not each has a class
    output = model(ids, seq_idx=seq_idx, targets=targets)
    wanted = targets != -100
    assert output.loss.shape == (2, 18) and (output.loss[~wanted] == 0).all()
    documents = [ids[0, :5], ids[0, 5:6], ids[0, 6:14], ids[1, :5], ids[1, 14:]]
    labels = torch.tensor([1, 0, 3, 2, 1])
    alone = [model(document[None], labels=label[None]) for document, label in zip(documents, labels)]
    torch.testing.assert_close(output.loss[wanted], torch.stack([one.loss for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone]), rtol=1e-4, atol=1e-5)
    other = ids.clone()
    other[0, 6:14] = draw_ids(1, 8, seed=3)
    changed = model(other, seq_idx=seq_idx, targets=targets).loss
    assert (changed != output.loss).nonzero().tolist() == [[0, 13]]


@pytest.mark.parametrize("bidirectional", WAYS)
def test_padding_is_no_part_of_a_document_that_has_a_target(bidirectional, classifier, draw_ids):
    model, ids, labels = classifier(bidirectional), draw_ids(2, 9), torch.tensor([1, 3])
    mask, targets = torch.ones(2, 9, dtype=torch.long), torch.full((2, 9), -100)
    mask[0, 6:] = mask[1, :2] = 0
    targets[0, 5], targets[1, 8] = labels
    by_row = model(ids, mask, labels=labels)
    by_target = model(ids, mask, targets=targets)
    assert torch.equal(by_target.logits, by_row.logits) and torch.isclose(by_target.loss.sum() / 2, by_row.loss)


@pytest.mark.parametrize("bidirectional", WAYS)
def test_rows_without_a_target_give_no_loss_and_gradients_of_zero(bidirectional, classifier, draw_ids):
    """As a rank meets it that has none in its part of a batch."""
    model = classifier(bidirectional)
    model(draw_ids(1, 6), targets=torch.full((1, 6), -100)).loss.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_the_loss_of_labels_is_the_mean(classifier, draw_ids):
    model, labels = classifier(), torch.tensor([3, 0])
    output = model(draw_ids(2, 7), labels=labels)
    assert torch.equal(output.loss, cross_entropy(output.logits, labels))
    assert torch.equal(model(draw_ids(2, 7), labels=labels, return_dict=False)[0], output.loss)
    embedded = model.backbone.embeddings(draw_ids(2, 7))
    assert torch.equal(model(inputs_embeds=embedded).logits, output.logits)


@pytest.mark.parametrize("bidirectional", WAYS)
def test_in_bfloat16_the_logits_are_wide(bidirectional, classifier, draw_ids, relative):
    model, ids = classifier(bidirectional), draw_ids(2, 7)
    wide, narrow = model(ids).logits, model.bfloat16()(ids).logits
    assert narrow.dtype == torch.float32 and relative(narrow, wide) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": torch.tensor([0, 1]), "targets": torch.zeros(2, 5, dtype=torch.long)}, "not both"),
        ({"labels": torch.tensor([0, 4])}, r"target 4 is outside the 4 labels \(num_labels\)"),
        ({"labels": torch.tensor([0])}, r"labels must have shape \(2,\), one a row; got \(1,\)"),
        ({"labels": torch.tensor([[0], [1]])}, r"one a row; got \(2, 1\)"),
        ({"labels": torch.tensor([0, -100])}, "class of every row; got -100"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64 or int32; got torch.float32"),
        ({"targets": torch.full((2, 5), 4)}, r"target 4 is outside the 4 labels"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1]] * 2)}, "packed documents"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "a row has no tokens"),
        ({"attention_mask": [[1] * 5] * 2}, "attention_mask must be a tensor; got list"),
        ({"attention_mask": torch.ones(5)}, r"attention_mask must have shape \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message, classifier, draw_ids):
    with pytest.raises(ValueError, match=message):
        classifier()(draw_ids(2, 5), **call)


def test_one_label_is_nothing_to_learn(tiny_config):
    with pytest.raises(ValueError, match="at least two labels; got num_labels=1"):
        HybridLMForSequenceClassification(tiny_config(num_labels=1))


def test_a_language_model_reads_in_one_direction(tiny_config):
    with pytest.raises(ValueError, match="'sum' is for classification"):
        HybridLMForCausalLM(tiny_config(bidirectional="sum"))


@pytest.mark.parametrize("bidirectional", WAYS)
def test_what_is_saved_opens_with_the_auto_class_and_is_no_nemotron_h(bidirectional, classifier, draw_ids, tmp_path):
    model, ids = classifier(bidirectional), draw_ids(2, 7)
    model.config.id2label = dict(enumerate("wxyz"))
    model.config.label2id = {name: number for number, name in enumerate("wxyz")}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "hybridlm" and config["architectures"] == ["HybridLMForSequenceClassification"]
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(opened, HybridLMForSequenceClassification) and opened.config.bidirectional == bidirectional
    assert opened.config.id2label == dict(enumerate("wxyz"))
    assert torch.equal(opened(ids).logits, model(ids).logits)
    backbone = HybridLMModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


@pytest.mark.parametrize("bidirectional", WAYS)
def test_the_pipeline_of_transformers_runs_it(bidirectional, classifier, tmp_path):
    model, tokenizer = classifier(bidirectional, vocab_size=258), byte_tokenizer()
    model.config.id2label, model.config.pad_token_id = dict(enumerate("wxyz")), tokenizer.pad_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["import os", "a longer text than that", "x"]
    found = pipeline("text-classification", str(tmp_path), batch_size=3, top_k=None)(texts)
    for text, scores in zip(texts, found):
        expected = model(torch.tensor([list(text.encode())])).logits.softmax(-1)[0]
        by_name = {one["label"]: one["score"] for one in scores}
        torch.testing.assert_close(torch.tensor([by_name[name] for name in "wxyz"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", WAYS)
def test_a_classifier_is_not_opened_as_a_language_model(bidirectional, classifier, tmp_path):
    classifier(bidirectional).save_pretrained(tmp_path)
    for kind in (HybridLMForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"data\.label_column.*AutoModelForSequenceClassification"):
            kind.from_pretrained(tmp_path)
