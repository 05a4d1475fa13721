import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval import perplexity

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

    run.command = command
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


def independent(folder, texts, window, stride):
    """Nats and number of predictions of the texts, by transformers' own model and the loop of its guide on perplexity."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = count = 0
    for text in texts:
        ids = torch.tensor(list(text.encode()))[None]
        made = 0
        for begin in range(0, ids.shape[1] - 1, stride):
            end = min(begin + window, ids.shape[1] - 1)
            with torch.no_grad():
                logits = model(ids[:, begin:end], use_cache=False).logits[0, -(end - made) :].double()
            nats += torch.nn.functional.cross_entropy(logits, ids[0, made + 1 : end + 1], reduction="sum").item()
            count += end - made
            made = end
            if end == ids.shape[1] - 1:
                break
    return nats, count


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 5), ("document", None)])
def test_windows_of_every_kind_equal_an_independent_computation(
    evaluate, model_folder, stock_folder, text_folder, kind, window, stride
):
    folder = model_folder() if kind == "ours" else stock_folder
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())]
    row = evaluate(folder, text_folder, "--window", window, *(["--stride", stride] if stride else []))
    length = 10**6 if window == "document" else window
    nats, tokens = independent(folder, texts, length, stride or length)
    assert row["tokens"] == tokens
    assert row["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-4)
    assert (row["window"], row["stride"]) == (None if window == "document" else window, stride)


def test_the_loss_by_context_is_that_of_the_predictions_made_from_so_many_tokens(evaluate, model_folder, text_folder):
    folder = model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = {}
    for path in sorted(text_folder.iterdir()):
        ids = torch.tensor(list(path.read_bytes()))
        if len(ids) > 1:
            with torch.no_grad():
                logits = model(ids[None, :-1], use_cache=False).logits[0]
            for i, nats in enumerate(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()):
                wanted.setdefault(int(math.log2(i + 1)), []).append(nats)
    for arguments in (["--window", "document"], ["--window", 16, "--carry"]):
        rows = evaluate(folder, text_folder, *arguments)["by_context"]
        assert [(r["least"], r["most"], r["tokens"]) for r in rows] == [
            (2**i, 2 ** (i + 1) - 1, len(wanted[i])) for i in sorted(wanted)
        ]
        assert [r["nats_per_token"] for r in rows] == pytest.approx(
            [sum(v) / len(v) for _, v in sorted(wanted.items())], abs=1e-4
        )
    slid = evaluate(folder, text_folder, "--window", 16, "--stride", 4)["by_context"]
    assert slid[-1]["most"] == 31 and sum(r["tokens"] for r in slid) == sum(map(len, wanted.values()))
    assert slid[0]["tokens"] == len(wanted[0])  # only a document's first predictions have little before them


def test_the_standard_error_is_a_bootstrap_over_documents(evaluate, model_folder, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02}.txt").write_text("".join(chr(c) for c in rng.integers(97, 99 + i % 20, size=30 + i)))
    folder = model_folder()
    row = evaluate(folder, tmp_path / "text")
    nats, tokens = (np.array(row["by_document"][key]) for key in ("nats", "tokens"))
    residual = nats - row["nats_per_token"] * tokens
    theory = math.sqrt((residual**2).sum()) / tokens.sum()  # of a ratio, to first order
    assert row["stderr_of"] == "documents"
    assert row["stderr"] == pytest.approx(theory, rel=0.1)
    assert evaluate(folder, tmp_path / "text")["stderr"] == row["stderr"]
    assert evaluate(folder, tmp_path / "text", "--seed", 1)["stderr"] != row["stderr"]


def test_of_one_document_the_windows_are_drawn(evaluate, model_folder, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one document of several windows, " * 9)
    (tmp_path / "text" / "b.txt").write_text("x")  # nothing of it is predicted
    row = evaluate(model_folder(), tmp_path / "text", "--window", 16)
    assert row["stderr_of"] == "windows" and row["documents"] == 1
    assert row["stderr"] > 0


@pytest.mark.parametrize("arguments", [["--window", 16], ["--window", 16, "--carry"]])
def test_a_stopped_command_goes_on_where_it_was(command, evaluate, model_folder, text_folder, tmp_path, monkeypatch, arguments):
    folder, out = model_folder(), tmp_path / "out.json"
    whole = evaluate(folder, text_folder, *arguments)
    monkeypatch.setattr(perplexity, "AT_A_TIME", 1)
    real, scored = perplexity.window_nats, []

    def counted(*args):
        if len(scored) == 8:
            scored.append(None)
            raise KeyboardInterrupt
        scored.append(args[-1])
        return real(*args)

    monkeypatch.setattr(perplexity, "window_nats", counted)
    run = ["perplexity", "--model", folder, "--data", text_folder, "--batch", 2, "--json", out, *arguments]
    status, _, err = command(*run)
    assert status == 130 and "interrupted" in err
    assert not out.exists()
    before = scored[:8]
    status, _, err = command(*run)
    assert status == 0, err
    assert json.loads(out.read_text())["nats_per_token"] == pytest.approx(whole["nats_per_token"], abs=1e-6)
    again = [window for batch in scored[9:] for window in batch]
    if "--carry" not in arguments:
        assert not set(again) & {window for batch in before for window in batch}
    assert len(again) < len({window for batch in before for window in batch} | set(again))
    assert not (tmp_path / "out.json.partial.jsonl").exists()


@pytest.mark.parametrize("changed", ["model/model.safetensors", "text/0.txt"])
def test_results_of_another_model_or_text_are_not_taken(command, model_folder, text_folder, tmp_path, monkeypatch, changed):
    def stops(*args, journal, **given):
        journal.keep("some", [])
        raise MemoryError("no more")

    monkeypatch.setattr(perplexity, "measure", stops)
    run = ["perplexity", "--model", model_folder(), "--data", text_folder, "--json", tmp_path / "out.json"]
    assert [command(*run)[0] for _ in range(2)] == [1, 1]
    with (tmp_path / changed).open("a") as file:
        file.write("!")
    status, _, err = command(*run)
    assert (status, "of a command with other settings" in err) == (2, True)


def test_documents_of_like_lengths_are_read_together(evaluate, model_folder, text_folder, monkeypatch):
    real, shapes = perplexity.nll, []
    monkeypatch.setattr(perplexity, "nll", lambda model, ids, targets: shapes.append(ids.shape) or real(model, ids, targets))
    evaluate(model_folder(), text_folder, "--window", "document", "--batch", 2)
    lengths = sorted((len(path.read_bytes()) - 1 for path in text_folder.iterdir()), reverse=True)
    assert shapes == [(2, lengths[0]), (2, lengths[2])]  # one of the five has nothing to predict


def test_where_memory_does_not_suffice_the_batch_is_halved(evaluate, model_folder, text_folder, monkeypatch):
    folder = model_folder()
    whole = evaluate(folder, text_folder, "--window", 16, "--batch", 8)
    real = perplexity.nll

    def small(model, ids, targets):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, targets)

    monkeypatch.setattr(perplexity, "nll", small)
    monkeypatch.setattr(perplexity, "AT_A_TIME", 1)
    status, out, err = evaluate.command("perplexity", "--model", folder, "--data", text_folder, "--window", 16, "--json", "-")
    assert status == 0
    assert json.loads(out)["nats_per_token"] == pytest.approx(whole["nats_per_token"], abs=1e-5)
    assert "going on with 4 at a time" in err and "going on with 2 at a time" in err
    assert err.count("going on with") == 2  # by the windows that the journal keeps next, too


def test_one_window_that_memory_does_not_suffice_for_ends_with_what_is_saved(
    command, model_folder, text_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(perplexity, "AT_A_TIME", 1)
    real, calls = perplexity.nll, []

    def full(model, ids, targets):
        calls.append(len(ids))
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, targets)

    monkeypatch.setattr(perplexity, "nll", full)
    out = tmp_path / "out.json"
    status, _, err = command(
        "perplexity", "--model", model_folder(), "--data", text_folder, "--window", 16, "--batch", 1, "--json", out
    )
    assert status == 1
    assert "not enough memory for a single one" in err
    assert f"The results so far are in {out}.partial.jsonl; the same command goes on from there." in err
    assert len((tmp_path / "out.json.partial.jsonl").read_text().splitlines()) == 3


def test_a_layer_that_gives_no_number_is_named(command, tiny_model, text_folder, model_folder):
    folder = model_folder()
    model = tiny_model(vocab_size=258)
    torch.nn.init.constant_(model.backbone.layers[3].mixer.o_proj.weight, 3e38)
    model.save_pretrained(folder)
    status, _, err = command("perplexity", "--model", folder, "--data", text_folder)
    assert status == 1
    assert "the first output that is not finite is that of backbone.layers.3.mixer.o_proj." in err


@pytest.mark.parametrize(
    "arguments", [["--window", 4, "--stride", 5], ["--window", "document", "--stride", 5], ["--stride", 5, "--carry"]]
)
def test_strides_that_fit_no_window(command, model_folder, text_folder, arguments):
    status, _, err = command("perplexity", "--model", model_folder(), "--data", text_folder, *arguments)
    assert status == 2
    assert "--stride is for windows" in err


def test_a_stock_model_reads_no_more_than_its_positions(command, stock_folder, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 600)
    assert command("perplexity", "--model", stock_folder, "--data", tmp_path / "a.txt", "--window", 512)[0] == 0
    status, _, err = command("perplexity", "--model", stock_folder, "--data", tmp_path / "a.txt")
    assert status == 2
    assert "reads at most 512 tokens (max_position_embeddings), not 599; take --window 512." in err


def test_a_stock_model_cannot_carry(command, stock_folder, text_folder):
    status, _, err = command("perplexity", "--model", stock_folder, "--data", text_folder, "--carry")
    assert status == 2
    assert "--carry needs a model of this library" in err


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


def test_several_models_give_a_list_and_a_table(command, opened, model_folder, text_folder, tmp_path):
    alive = opened(perplexity)
    a, b = model_folder("a"), model_folder("b")
    out = tmp_path / "rows.json"
    status, table, _ = command("perplexity", "--model", a, b, "--data", text_folder, "--json", out)
    rows = json.loads(out.read_text())
    assert status == 0
    assert [row["model"] for row in rows] == [str(a), str(b)]
    assert rows[0] == rows[1] | {"model": str(a)}
    assert len(table.splitlines()) == 3
    assert "bits/byte" in table.splitlines()[0]
    assert alive == [0, 0]  # one at a time is in memory


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


def test_a_loss_that_no_perplexity_can_tell(command, tiny_model, text_folder, model_folder):
    folder = model_folder()
    model = tiny_model(vocab_size=258)
    with torch.no_grad():
        model.lm_head.weight *= 300
    model.save_pretrained(folder)
    status, _, err = command("perplexity", "--model", folder, "--data", text_folder)
    assert status == 1
    assert "nats per token; its weights or the data are broken." in err


def test_nothing_to_predict(command, model_folder, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    status, _, err = command("perplexity", "--model", model_folder(), "--data", tmp_path / "a.txt")
    assert status == 2
    assert "nothing to score" in err
