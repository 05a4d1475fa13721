"""A folder with a model and a tokenizer, and a run directory as `python -m train` writes it."""

import gc
import json
import weakref
from functools import partial

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from eval.__main__ import main
from hybridlm.tokenizer import byte_tokenizer

PROSE = "The quick brown fox — it jumps over the lazy dog.\nAnd again: the fox, the dog, the end. "


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    """Writes a tiny byte model; `vocab_size` may be too small for its tokenizer."""

    def write(name="model", vocab_size=258):
        tiny_model(vocab_size=vocab_size).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def text_folder(tmp_path):
    """Five documents of different lengths, one of a single byte, one with two- and three-byte characters."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate([PROSE, "x", PROSE[::-1] + PROSE, "naïve", PROSE * 2]):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def fake_run(model_folder, text_folder, tmp_path):
    run = tmp_path / "run"
    model_folder("run/checkpoints/step-20/model")
    (run / "model").symlink_to("checkpoints/step-20/model")
    data = {"source": str(text_folder), "val_source": None, "val_fraction": 0.4, "text_column": "text", "seq_len": 32}
    (run / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(run), "data": data, "train": {"steps": 40}}))
    metrics = [{"step": 0, "tokens": 0, "val_loss": 5.6, "val_bits_per_byte": 8.1}]
    metrics += [
        {"step": s, "tokens": 512 * s, "loss": 2 + 3 / s, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9e3, "mfu": None}
        for s in range(1, 21)
    ]
    metrics.append({"step": 20, "tokens": 10240, "val_loss": 2.25, "val_bits_per_byte": 3.3})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    samples = [{"step": s, "prompt": "def f(", "text": f"<script>alert({s})</script>\0&amp;"} for s in range(0, 21, 2)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return run


@pytest.fixture
def command(run_main):
    """Runs `python -m eval …` in this process; gives its exit status, stdout and stderr."""
    return partial(run_main, main)


@pytest.fixture
def opened(monkeypatch):
    """Call it with a module: as many numbers as it opens models come up, each of models that were there still."""

    def watch(module):
        models, alive, real = [], [], module.open_model

        def open_model(*arguments):
            gc.collect()
            alive.append(sum(model() is not None for model in models))
            found = real(*arguments)
            models.append(weakref.ref(found[0]))
            return found

        monkeypatch.setattr(module, "open_model", open_model)
        return alive

    return watch


@pytest.fixture
def stock_folder(tmp_path):
    """A tiny Llama of transformers' own, with the byte tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"
