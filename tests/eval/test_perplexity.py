import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

FIELDS = {
    "model", "nats_per_token", "perplexity", "bits_per_byte", "stderr", "stderr_of", "tokens", "bytes", "documents", "by_context",
    "by_document", "dtype", "data", "window", "stride", "carry", "text_sha256",
}  # fmt: skip


@pytest.fixture
def evaluate(command):
    def run(model, data, *arguments):
        status, out, err = command("perplexity", "--model", model, "--data", data, "--json", "-", *arguments)
        assert status == 0, err
        return json.loads(out)

    return run


@torch.no_grad()
def stock(folder, texts, window):
    """Nats and number of predictions of each window, one at a time, by transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__.startswith("transformers.")
    found = []
    for text in texts:
        ids = torch.tensor(list(text.encode()))
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window + 1]
            logits = model(piece[None, :-1], use_cache=False).logits[0].double()
            found.append((torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item(), len(piece) - 1))
    return found


@pytest.mark.parametrize("window", [16, 1000])
def test_equals_stock_transformers_on_the_same_windows(evaluate, model_folder, text_folder, window):
    folder = model_folder()
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())]
    row = evaluate(folder, text_folder, "--window", window)
    assert row.keys() == FIELDS
    found = stock(folder, texts, window)
    nats, tokens = sum(n for n, _ in found), sum(t for _, t in found)
    assert row["tokens"] == row["bytes"] == tokens == sum(len(text.encode()) - 1 for text in texts)
    assert row["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(nats / tokens / math.log(2), abs=1e-4)
    documents = [(sum(n for n, _ in stock(folder, [text], window)), len(text.encode()) - 1) for text in texts]
    assert row["by_document"]["nats"] == pytest.approx([n for n, _ in documents], abs=1e-3)
    assert row["by_document"]["tokens"] == row["by_document"]["bytes"] == [t for _, t in documents]


def test_batch_size_does_not_matter(evaluate, model_folder, text_folder):
    folder = model_folder()
    rows = [evaluate(folder, text_folder, "--window", 16, "--batch", batch) for batch in (1, 3, 64)]
    for row in rows[1:]:
        assert row["nats_per_token"] == pytest.approx(rows[0]["nats_per_token"], abs=1e-5)
        assert row["stderr"] == pytest.approx(rows[0]["stderr"], rel=1e-4)


def test_carry_is_one_long_pass(evaluate, model_folder, text_folder):
    folder = model_folder()
    long = evaluate(folder, text_folder, "--window", 1000)
    carried = evaluate(folder, text_folder, "--window", 16, "--carry")
    assert carried["nats_per_token"] == pytest.approx(long["nats_per_token"], abs=1e-5)
    assert carried["carry"] is True
    cut = evaluate(folder, text_folder, "--window", 16)
    assert abs(cut["nats_per_token"] - long["nats_per_token"]) > 1e-3


def test_a_single_window_has_no_standard_error(evaluate, model_folder, tmp_path):
    (tmp_path / "a.txt").write_text("one window")
    assert evaluate(model_folder(), tmp_path / "a.txt")["stderr"] is None


def test_max_bytes_takes_whole_documents_until_they_reach_it(evaluate, model_folder, text_folder):
    sizes = [len(path.read_bytes()) for path in sorted(text_folder.iterdir())]
    row = evaluate(model_folder(), text_folder, "--max-bytes", sizes[0] + 1)
    assert row["bytes"] == sizes[0] - 1  # the second document is one byte, which nothing precedes
    row = evaluate(model_folder(), text_folder, "--max-bytes", sizes[0] + 2)
    assert row["bytes"] == sizes[0] - 1 + sizes[2] - 1


def test_the_validation_split_is_taken_where_there_is_one(evaluate, model_folder):
    row = evaluate(model_folder(), "stdlib", "--max-bytes", 1)
    assert row["data"] == "stdlib"
    from hybridlm.data.sources import Source, open_source

    assert row["bytes"] == len(open_source(Source("stdlib"), "validation")[0].encode()) - 1


def test_several_models_give_a_list_and_a_table(command, model_folder, text_folder, tmp_path):
    a, b = model_folder("a"), model_folder("b")
    out = tmp_path / "rows.json"
    status, table, _ = command("perplexity", "--model", a, b, "--data", text_folder, "--json", out)
    rows = json.loads(out.read_text())
    assert status == 0
    assert [row["model"] for row in rows] == [str(a), str(b)]
    assert rows[0] == rows[1] | {"model": str(a)}
    assert len(table.splitlines()) == 3
    assert "bits/byte" in table.splitlines()[0]


def test_a_folder_without_a_model(command, text_folder):
    status, out, err = command("perplexity", "--model", text_folder, "--data", text_folder)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {text_folder} is no checkpoint folder")


def test_a_token_past_the_vocabulary_is_named(command, model_folder, tmp_path):
    (tmp_path / "a.txt").write_text("abcz")
    status, _, err = command("perplexity", "--model", model_folder(vocab_size=120), "--data", tmp_path / "a.txt")
    assert status == 2
    assert "token id 122" in err
    assert "120 (vocab_size)" in err


def test_weights_that_give_no_number(command, tiny_model, text_folder, model_folder):
    folder = model_folder()
    model = tiny_model(vocab_size=258)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    model.save_pretrained(folder)
    status, _, err = command("perplexity", "--model", folder, "--data", text_folder)
    assert status == 1
    assert "its weight lm_head.weight has numbers that are not finite" in err


def test_nothing_to_predict(command, model_folder, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    status, _, err = command("perplexity", "--model", model_folder(), "--data", tmp_path / "a.txt")
    assert status == 2
    assert "nothing to score" in err
