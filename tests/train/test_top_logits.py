"""A teacher's largest logits on disk: written by `python -m train distill --write_logits`, and learned from."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import train.__main__
from hybridlm import HybridLMForCausalLM
from hybridlm.tokenizer import byte_tokenizer
from tests.train.test_distillation import assert_same_end, interrupted, losses, train_on_two
from train import distill, distillation, files, loop, top_logits
from train.config import dump
from train.setup import build_model, open_data
from train.top_logits import open_logits, verify

K = 258  # all tokens


@pytest.fixture
def write(quiet_config, tmp_path, monkeypatch, run_main):
    """Writes the logits of a run into `name`, three samples a file; gives the folder."""

    def run(teacher, name="logits", status=0, **changes):
        config = quiet_config(distill__teacher=teacher, **changes)
        monkeypatch.setattr(top_logits, "FILE_BYTES", 3 * 32 * min(config.distill.top_k, K) * 4)
        (tmp_path / "run.yaml").write_text(dump(config))
        ended = run_main(train.__main__.main, "distill", "--config", tmp_path / "run.yaml", "--write_logits", tmp_path / name)
        assert ended[0] == status, ended
        return tmp_path / name if not status else ended

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_files_hold_what_the_teacher_says_of_each_sample(write, quiet_config, teacher):
    folder = write(teacher, distill__top_k=5, distill__temperature=2.0, train__steps=2)
    assert sorted(contents(folder)) == [f"logits-0000{i}.safetensors" for i in range(3)] + ["meta.json", "plan.json"]
    sizes = [load_file(folder / f"logits-0000{i}.safetensors")["ids"].shape for i in range(3)]
    assert sizes == [(3, 32, 5), (3, 32, 5), (2, 32, 5)]  # 2 steps x 4 samples
    kept, config = open_logits(str(folder)), quiet_config()
    assert (kept.meta["top_k"], kept.meta["temperature"], kept.meta["samples"]) == (5, 2.0, 8)
    verify(kept)
    found = kept.batch(1, 7)
    stream, _ = open_data(config, byte_tokenizer(), K, quiet=True)
    ids = {name: torch.from_numpy(array) for name, array in stream.batch(1, 7).items()}
    with torch.no_grad():
        model = HybridLMForCausalLM.from_pretrained(teacher)
        log_p = (model(ids["input_ids"], seq_idx=ids["seq_idx"]).logits / 2).log_softmax(-1)
    assert (found["teacher_ids"].dtype, found["teacher_log_probs"].dtype) == (np.int32, np.float16)
    chosen, there = torch.from_numpy(found["teacher_ids"]).long(), torch.from_numpy(found["teacher_log_probs"]).float()
    torch.testing.assert_close(log_p.gather(-1, chosen), there, rtol=2**-11, atol=1e-5)
    torch.testing.assert_close(log_p.topk(5).values, there, rtol=2**-11, atol=1e-5)
    with pytest.raises(ValueError, match="has logits of 8 samples, and number 8 is asked for"):
        kept.batch(7, 9)


def test_all_logits_from_disk_are_the_teacher_but_for_their_rounding(write, quiet_config, teacher):
    """With entries off by a share e <= 2^-11 of log p, the loss is off by p e (log p - log q - KL), summed."""
    folder = write(teacher, distill__top_k=1000, train__steps=1)
    in_memory, on_disk = quiet_config(distill__teacher=teacher), quiet_config(distill__logits=str(folder), train__steps=1)
    stream, _ = open_data(on_disk, byte_tokenizer(), K, quiet=True)
    batch = {name: torch.from_numpy(array) for name, array in stream.batch(0, 4).items()}
    model, other = build_model(in_memory), HybridLMForCausalLM.from_pretrained(teacher)
    text = {name: one for name, one in batch.items() if not name.startswith("teacher_")}
    assert text.keys() < batch.keys()
    opened = distillation.open_teacher(in_memory, K, byte_tokenizer(), torch.device("cpu"))
    with torch.no_grad():
        a, b = (
            distillation.from_teacher(in_memory, opened, model.config)(model, text),
            distillation.from_logits(on_disk)(model, batch),
        )
        inputs = {name: text[name] for name in ("input_ids", "seq_idx")}
        log_p, log_q = (one(**inputs).logits.log_softmax(-1) for one in (other, model))
    apart = (log_p.exp() * log_p.abs() * ((log_p - log_q).abs() + a[..., None])).sum(-1) * 2**-11
    assert ((a - b).abs() <= apart + 1e-5).all() and (a - b).abs().max() > 0
    assert a.max() > 1 and ((a - b).abs() / a.clamp(min=0.1)).max() < 1e-3


def test_a_run_from_disk_is_that_of_its_teacher_and_resumes_bit_for_bit(write, quiet_config, teacher, tmp_path, monkeypatch):
    folder = write(teacher, distill__top_k=258)
    runs = [
        quiet_config(run_dir=str(tmp_path / name), **changes)
        for name, changes in {
            "memory": {"distill__teacher": teacher}, "whole": {"distill__logits": str(folder)},
            "cut": {"distill__logits": str(folder)}, "ahead": {"distill__logits": str(folder), "data__workers": 2},
            "parts": {"distill__logits": str(folder), "train__micro_batch": 1},
        }.items()
    ]  # fmt: skip
    memory, whole, cut, ahead, parts = runs
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "objective", interrupted(7))
        loop.train(cut)
    for config in runs:
        loop.train(config)
    assert_same_end(whole, cut)
    assert_same_end(whole, ahead)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(whole) == pytest.approx(losses(memory), rel=1e-3) and losses(whole) != losses(memory)
    assert f"distilled from `{folder}`" in (Path(whole.run_dir) / "model/README.md").read_text()


def test_two_ranks_read_each_its_own_samples(write, quiet_config, teacher, tmp_path, run_ranks):
    folder = write(teacher, distill__top_k=7, train__steps=3)
    one, two = (
        quiet_config(run_dir=str(tmp_path / name), distill__logits=str(folder), train__steps=3) for name in ("one", "two")
    )
    loop.train(one)
    train_on_two(two, run_ranks)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def test_writing_that_was_cut_off_goes_on_and_gives_the_same_bytes(write, quiet_config, teacher, monkeypatch, tmp_path):
    whole, said, calls = write(teacher, distill__top_k=4), distill.said, []

    def counted(*arguments):
        calls.append(arguments[4])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return said(*arguments)

    monkeypatch.setattr(distill, "said", counted)
    _, _, err = write(teacher, "cut", status=1, distill__top_k=4)
    assert "finished files are kept, and the same command goes on" in err
    assert len([*(tmp_path / "cut").glob("logits-*")]) == 4
    with pytest.raises(ValueError, match=r"cut are not finished. `python -m train distill"):
        open_logits(str(tmp_path / "cut"))
    calls.extend([None] * 5)
    cut = write(teacher, "cut", distill__top_k=4)
    assert contents(cut) == contents(whole)
    assert calls[10:] == [12, 15, 18, 21, 24, 27, 30]  # one pass a file of three samples, of eleven
    del calls[10:]
    write(teacher, "cut", distill__top_k=4)
    assert len(calls) == 10 and contents(cut) == contents(whole)


def test_a_file_that_was_damaged_is_told_and_written_anew(write, quiet_config, teacher):
    folder = write(teacher, distill__top_k=4)
    before, file = contents(folder), folder / "logits-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    (folder / "logits-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002.safetensors has been altered; logits-00003.safetensors is missing. .*--write"):
        loop.train(quiet_config(distill__logits=str(folder)))
    assert not Path(quiet_config().run_dir).exists()
    write(teacher, distill__top_k=4)
    assert contents(folder) == before
    file.write_bytes(b"!")
    with pytest.raises(ValueError, match=r"logits-00002.safetensors cannot be read: "):
        open_logits(str(folder)).batch(6, 7)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data__seq_len": 16}, "seq_len: 32 -> 16"),
        ({"data__source": "other"}, "data: .* -> other"),
        ({"distill__temperature": 2.0}, "distill.temperature: 1.0 -> 2.0"),
        ({"train__steps": 3}, r"samples \(of all train.steps\): 8 -> 12"),
        ({"vocab_size": 259}, "vocab_size: 258 -> 259"),
    ],
)
def test_logits_of_another_run_are_refused(write, quiet_config, teacher, tmp_path, changes, line):
    folder = write(teacher, distill__top_k=2, train__steps=2)
    if "data__source" in changes:
        (tmp_path / "other.txt").write_text("a dog " * 500)
        changes = {"data__source": str(tmp_path / "other.txt")}
        line = line.replace("other", str(tmp_path / "other.txt"))
    if "vocab_size" in changes:
        changes = {"model__config": quiet_config().model.config | changes}
    config = quiet_config(**{"distill__logits": str(folder), "train__steps": 2, **changes})
    with pytest.raises(ValueError, match=rf"written for another run \(written -> wanted\):\n  {line}"):
        loop.train(config)
    assert not Path(config.run_dir).exists()


def test_a_shorter_run_takes_the_first_of_them(write, quiet_config, teacher):
    loop.train(quiet_config(distill__logits=str(write(teacher, distill__top_k=2)), train__steps=1))


def test_a_folder_of_something_else_is_neither_read_nor_written(write, quiet_config, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"nothing has no meta.json, so it holds no logits; make them: python -m train distill"):
        loop.train(quiet_config(distill__logits=str(tmp_path / "nothing")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "mine exists and holds no logits; give another folder" in write(teacher, "mine", status=2)[2]
    write(teacher, distill__top_k=2, train__steps=1)
    err = write(teacher, status=2, distill__top_k=3, train__steps=1)[2]
    assert "has logits of other settings (there -> now):\n  samples_per_file: " not in err and "  top_k: 2 -> 3\n" in err


def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path):
    assert [top_logits.id_type(n) for n in (258, 65_536, 65_537)] == [np.uint16, np.uint16, np.int32]
    assert top_logits.samples_per_file(4096, 64, 65_536) == 2**27 // (4096 * 64 * 4)
    plan = {"samples": 2, "samples_per_file": 1, "rows": 1, "vocab_size": 70_000}
    entries = {"ids": np.array([[[65_000, 69_999]]], np.int32), "log_probs": np.zeros((1, 1, 2), np.float16)}
    top_logits.write(tmp_path / "wide", plan, lambda start, stop: entries)
    assert open_logits(str(tmp_path / "wide")).batch(0, 2)["teacher_ids"].tolist() == [[[65_000, 69_999]]] * 2


def test_no_file_has_its_name_before_it_is_whole(tmp_path, monkeypatch):
    operations, perform = [], files.perform
    monkeypatch.setattr(files, "perform", lambda f, *a: operations.append((f.__name__, str(a[0]))) or perform(f, *a))
    plan = {"samples": 1, "samples_per_file": 1, "rows": 1, "vocab_size": 258}
    top_logits.write(tmp_path / "x", plan, lambda *_: {"ids": np.zeros((1, 1, 1), np.uint16)})
    opened = [Path(name).name for kind, name in operations if kind == "open"]
    assert opened == [".plan.json.unfinished", ".logits-00000.safetensors.unfinished", ".meta.json.unfinished"]
    assert [kind for kind, _ in operations].count("fsync") >= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to distil from: set distill.teacher"),
        (["--write_logits", "there"], "--write_logits needs the model that makes them; set distill.teacher"),
        (
            ["--write_logits", "there", "--distill.teacher", "x/y", "--data.streaming", "true"],
            "no sample is found again",
        ),
        (["--distill.teacher", "x/y", "--distill.logits", "z"], r"distill.teacher \(a model in memory\) or distill.logits"),
        (["--distill.techer", "x"], r"did you mean distill.teacher\?"),
    ],
)
def test_a_command_that_cannot_work_ends_with_2(quiet_config, tmp_path, run_main, arguments, message):
    (tmp_path / "run.yaml").write_text(dump(quiet_config()))
    status, _, err = run_main(train.__main__.main, "distill", "--config", tmp_path / "run.yaml", *arguments)
    assert status == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


def test_several_processes_do_not_write_together(quiet_config, tmp_path, teacher, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="works in one process"):
        distill.write_logits(quiet_config(distill__teacher=teacher), tmp_path / "there")


def test_the_command_trains_too_and_has_its_own_help(quiet_config, tmp_path, run_main, teacher):
    config = quiet_config(train__steps=1)
    (tmp_path / "run.yaml").write_text(dump(config))
    arguments = ("distill", "--config", tmp_path / "run.yaml", "--distill.teacher", teacher)
    assert run_main(train.__main__.main, *arguments, "--print_config")[1].count(f"teacher: {teacher}\n") == 1
    assert run_main(train.__main__.main, *arguments)[0] == 0
    saved = Path(config.run_dir) / "config.yaml"
    assert f"teacher: {teacher}" in saved.read_text() and len(losses(config)) == 1
    out = run_main(train.__main__.main, "distill", "--help")[1]
    assert "usage: python -m train distill" in out and "--write_logits DIR" in out and "--distill.temperature V" in out
    assert "{prepare,tokenizer,distill," in run_main(train.__main__.main, "--help")[1]
