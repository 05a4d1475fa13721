"""The command as a whole, on a tiny parent; trainings run in this process."""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

import hybridlm.__main__
import train.compress_search
from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.memory import inference_bytes
from hybridlm.strict_yaml import load_yaml, parse_yaml
from hybridlm.twin import count_parameters
from tests.train.conftest import WIDER, save_model
from train.__main__ import main
from train.compress import distillation
from train.compress_config import CompressConfig, axes, budget, training
from train.compress_search import Work, open_work
from train.config import dump, parse
from train.loop import train as train_here
from train.settings import Distill, Model

NAMES = [
    "parent", "parent trained on", "pruned", "pruned + distilled", "pruned + cross-entropy", "from scratch",
    "uniform depth + distilled", "uniform width + distilled",
]  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("parent"), WIDER, num_attention_heads=4, num_key_value_heads=2)


def write_settings(folder, parent, text_folder, **changes) -> Path:
    """The file of a compression whose sections are changed by keyword."""
    values = {
        "run_dir": str(folder / "run"),
        "model": {"init_from": str(parent)},
        "data": {"source": str(text_folder), "seq_len": 32, "cache_dir": str(folder / "cache")},
        "compress": {
            "max_parameters": 0.8, "prompt": 40, "new": 2, "context": 64, "turns": 1, "layer_samples": 4, "part_samples": 8,
            "score_samples": 4, "scored": 6, "timed": 3, "distilled": 2, "short_steps": 1, "intermediate_size": [32, 24, 16, 8],
            "compare": ["cross-entropy"],
        },
        "optim": {"lr": 1e-2},
        "train": {"steps": 3, "global_batch": 2, "val_sequences": 4},
        "log": {"sample_tokens": 0},
    }  # fmt: skip
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    file = folder / "compress.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def settings(parent, text_folder, tmp_path):
    return partial(write_settings, tmp_path, parent, text_folder)


def train_all_here(calls, runs):
    calls.append([Path(run.run_dir).name for run in runs])
    for run in runs:
        if not (Path(run.run_dir) / "model").exists():
            AcceleratorState._reset_state(reset_partial_state=True)
            train_here(parse(parse_yaml(dump(run))))


@pytest.fixture
def trained(monkeypatch):
    """Trainings in this process, and in the place of the report (test_compress_report, test_readme) a word that it was asked for;
    the run directories of each call of trainings, which this gives."""
    calls = []
    monkeypatch.setattr("train.compress.train_all", lambda runs, told, launcher=None: train_all_here(calls, runs))
    monkeypatch.setattr("train.compress_report.write_report", lambda folder: (folder / "reported").touch())
    return calls


@pytest.fixture(scope="module")
def done(parent, text_folder, tmp_path_factory):
    """The folder of a compression that nothing interrupted, and the file of its settings."""
    folder = tmp_path_factory.mktemp("whole")
    file = write_settings(folder, parent, text_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.compress.train_all", lambda runs, told, launcher=None: train_all_here([], runs))
        patch.setattr("train.compress_report.write_report", lambda folder: None)
        assert main(["compress", "--config", str(file)]) == 0
    return folder / "run", file


def compress(file, run_main, *arguments):
    return run_main(main, "compress", "--config", file, *arguments)


def read(tmp_path, name="summary.json"):
    return json.loads((tmp_path / "run" / name).read_text())


def test_one_command_gives_a_student_and_what_it_kept(settings, trained, run_main, tmp_path, parent):
    file = settings(compress={"compare": ["parent", "cross-entropy", "scratch", "uniform"]})
    status, out, err = compress(file, run_main)
    assert status == 0, err
    summary, search = read(tmp_path), read(tmp_path, "search.json")
    whole = count_parameters(HybridLMConfig.from_pretrained(parent))
    assert list(summary["models"]) == NAMES
    assert summary["parent"] == summary["models"]["parent"] and summary["student"] == summary["models"]["pruned + distilled"]
    assert summary["parent"]["parameters"] == whole and summary["parent"]["agreement"] == 1
    assert summary["student"]["parameters"] <= 0.8 * whole
    assert [entry["tokens"] for entry in summary["models"].values()] == [0, 192, 0, 192, 192, 192, 192, 192]
    assert summary["distillation_tokens"] == 192 and summary["parent_tokens"] is None
    for name in ("pruned + cross-entropy", "from scratch", "pruned"):
        assert {summary["models"][name][key] for key in ("parameters", "request_seconds")} == {
            summary["student"][key] for key in ("parameters", "request_seconds")
        }
    size, uniform = summary["student"]["parameters"], {name: summary["models"][name]["parameters"] for name in NAMES[-2:]}
    assert max(uniform.values()) <= size and uniform[NAMES[-1]] > 0.95 * size
    assert (tmp_path / "run" / "model").readlink() == Path("runs/distilled/model")
    assert HybridLMForCausalLM.from_pretrained(tmp_path / "run" / "model").num_parameters() == summary["student"]["parameters"]
    assert (tmp_path / "run" / "reported").exists() and "pruned + distilled" in out
    # The best of the search by its short distillation, of those that were timed, of those that were scored.
    assert search["funnel"]["scored"] == len(search["candidates"]) == 6
    assert [row["loss"] for row in search["candidates"]] == sorted(row["loss"] for row in search["candidates"])
    assert [row["request_seconds"] is not None for row in search["candidates"]] == [True] * 3 + [False] * 3
    short = {row["name"]: row["distilled_loss"] for row in search["candidates"] if row["distilled_loss"] is not None}
    assert len(short) == 2
    assert Path(summary["models"]["pruned"]["folder"]).name == min(short, key=short.get)
    assert trained[0] == [f"short-{name}" for name in short]
    # Nothing is done again.
    assert compress(file, run_main)[0] == 0
    assert read(tmp_path)["models"] == summary["models"]


def test_what_comes_out_is_an_ordinary_folder(done, run_main):
    run, _ = done
    models = json.loads((run / "summary.json").read_text())["models"]
    assert list(models) == ["parent", "pruned", "pruned + distilled", "pruned + cross-entropy"]
    for folder in (run / "model", models["pruned"]["folder"]):
        assert run_main(hybridlm.__main__.main, "verify", folder, "--tokens", "40")[0] == 0


CUTS = {"measure": 1, "score": 3, "generate": 4, "prune": 2}


@pytest.mark.parametrize("where", [*CUTS, "train"])
def test_cut_off_anywhere_it_goes_on_to_the_same_result(where, done, settings, trained, run_main, tmp_path, monkeypatch):
    file, calls = settings(), []
    with monkeypatch.context() as patch:
        home, name = (sys.modules[__name__], "train_here") if where == "train" else (train.compress_search, where)
        whole = getattr(home, name)

        def cut_off(*args, **kwargs):
            calls.append(where)
            if len(calls) == CUTS.get(where, 3):
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        patch.setattr(home, name, cut_off)
        status, _, err = compress(file, run_main)
        assert status == 1 and "the same command goes on" in err
    assert compress(file, run_main)[0] == 0
    assert found(tmp_path / "run") == found(done[0])


def test_asked_to_end_it_stops_as_by_ctrl_c_and_says_which_training_did(settings, run_main, monkeypatch):
    """Else the trainings would go on alone."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("train.compress.compress", lambda *_: signal.raise_signal(signal.SIGTERM))
    status, _, err = compress(settings(), run_main)
    assert status == 1 and err.startswith("interrupted; what is finished is kept")
    monkeypatch.setattr("train.compress.compress", Mock(side_effect=KeyboardInterrupt("run X stopped before the end")))
    assert compress(settings(), run_main)[2].startswith("interrupted: run X stopped before the end; what is")
    assert signal.getsignal(signal.SIGTERM) is before


def found(run):
    """All of a compression's figures that are no times."""
    models, candidates = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "search"))
    rows = [{key: row[key] for key in ("name", "loss", "agreement")} for row in candidates["candidates"]]
    return {name: entry["nats_per_token"] for name, entry in models["models"].items()}, rows


BAD = {
    "a budget out of reach": ({"compress": {"max_parameters": 1000}}, "the smallest shape of the grid has"),
    "memory out of reach": ({"compress": {"max_memory": 2}}, "the smallest shape of the grid takes"),
    "no limit": ({"compress": {"max_parameters": None}}, "compress.min_speedup"),
    "no parent": ({"model": {"init_from": None}}, "model.init_from"),
    "more than there is": ({"compress": {"mamba_layers": [3]}}, "mamba_layers: give one or more of 0 to 2"),
    "streams": ({"data": {"streaming": True}}, "data.streaming"),
    "logits": ({"distill": {"logits": "somewhere"}}, "distill.logits"),
    "sizes that FP8 does not take": (
        {"train": {"precision": "fp8", "fp8_emulate": True}, "compress": {"compare": ["uniform"]}},
        "train.fp8_unfit: bf16",
    ),
    "what no training will take": ({"optim": {"z_loss": 1e-4}}, "optim.z_loss: it is for the next-token loss"),
    "what the short one will not take": (
        {"schedule": {"batch_start": 1, "batch_warmup": 0.5}, "compress": {"short_steps": 1}},
        "0.5 of 1 steps are fewer than the 1 doublings",
    ),
    "no such teacher": ({"distill": {"teacher": "./nowhere"}}, "there is no checkpoint folder ./nowhere"),
    "a misspelt setting": ({"compress": {"max_parameter": 0.5}}, "did you mean compress.max_parameters?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, settings, run_main, tmp_path):
    changes, words = BAD[case]
    status, _, err = compress(settings(**changes), run_main)
    assert status == 2 and words in err


def test_it_is_one_process(settings, run_main, tmp_path, monkeypatch):
    """The others would wait for its directory, and the trainings for the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = compress(settings(), run_main)
    assert status == 2 and "--launcher" in err and not (tmp_path / "run").exists()


def test_a_parent_with_other_kinds_of_layer_is_told_which(settings, run_main, tmp_path):
    save_model(tmp_path / "other", WIDER, hybrid_override_pattern="MlE-")
    status, _, err = compress(settings(model={"init_from": str(tmp_path / "other")}), run_main)
    assert status == 2 and "'l' LSTM, 'E' mixture of experts" in err


def test_another_compression_is_not_overwritten(done, run_main):
    run, file = done
    before = (run / "summary.json").read_bytes()
    status, _, err = run_main(main, "compress", "--config", file, "--compress.scored", "5")
    assert status == 2 and "compress.scored: 6 -> 5" in err and (run / "summary.json").read_bytes() == before


def test_a_parent_that_has_changed_is_another_compression(settings, tmp_path, parent):
    file = settings(model={"init_from": str(shutil.copytree(parent, tmp_path / "parent"))})
    config = parse(load_yaml(file), CompressConfig)
    (tmp_path / "run").mkdir()
    open_work(config).journal.keep("score", 1.0)
    assert open_work(config).journal.results == {"score": 1.0}
    os.utime(tmp_path / "parent" / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match=r"The files of .*/parent or the text have changed since: .* another --run_dir"):
        open_work(config)


def test_the_model_of_a_run_that_goes_on_stays_what_it_was(settings, tmp_path, parent):
    (tmp_path / "model").symlink_to(parent)
    (tmp_path / "link").symlink_to("model")
    work = open_work(parse(load_yaml(settings(model={"init_from": str(tmp_path / "link")})), CompressConfig))
    assert str(work.place) == distillation(work, "short", tmp_path).distill.teacher == parent


def test_a_folder_of_something_else_is_left_alone(settings, run_main, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    status, _, err = compress(settings(), run_main)
    assert status == 2 and "it exists and is no run directory" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_what_was_refused_leaves_nothing_and_can_be_asked_for_again(settings, trained, run_main, tmp_path):
    assert compress(settings(compress={"max_parameters": 1000}), run_main)[0] == 2
    assert not (tmp_path / "run").exists()
    assert compress(settings(compress={"compare": []}), run_main)[0] == 0


def test_none_that_is_fast_enough(settings, trained, run_main, tmp_path, monkeypatch):
    """All layers are thought to take no time, and all requests take a second."""
    monkeypatch.setattr(train.compress_search.latency, "measure", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(train.compress_search, "generate", lambda *_: {"total": 1.0})
    status, _, err = compress(settings(compress={"min_speedup": 1.0, "compare": []}), run_main)
    assert status == 0, err
    status, _, err = compress(settings(run_dir=str(tmp_path / "other"), compress={"min_speedup": 1.5}), run_main)
    assert status == 2 and "the quickest shape of the grid takes about 1 s" in err
    seconds = iter([1.0, 0.0])  # what a layer adds, by estimate, is none after the first
    monkeypatch.setattr(train.compress_search.latency, "measure", lambda *_: (next(seconds, 0.0), 1.0))
    status, _, err = compress(settings(run_dir=str(tmp_path / "third"), compress={"min_speedup": 1.5}), run_main)
    assert status == 2 and "none of the 3 timed candidates is 1.5 times as fast as the parent; the quickest is 1.000 times" in err


def test_what_candidates_are_scored_on_no_training_reads():
    values = {"run_dir": "r", "model": {"init_from": "m"}, "data": {"source": "stdlib"}, "train": {"global_batch": 4, "steps": 9}}
    asked = Mock(side_effect=lambda start, stop: {"input_ids": np.arange(start, stop)})
    for short, first in ((3, 36), (20, 80)):
        config = parse(values | {"compress": {"short_steps": short}}, CompressConfig)
        work = Work(config, Path("m"), Mock(device="cpu"), Mock(), Mock(batch=asked), [], Mock())
        read = torch.cat([batch["input_ids"] for batch in work.windows(5, 6, "")])
        assert read.tolist() == [*range(first + 5, first + 11)]


def test_limits_are_shares_of_the_parents_or_numbers(parent):
    shape = HybridLMConfig.from_pretrained(parent)
    config = parse(
        {"run_dir": "r", "model": {"init_from": str(parent)}, "compress": {"max_parameters": 0.5, "context": 100}}, CompressConfig
    )
    assert budget(config.compress, shape).parameters == 0.5 * count_parameters(shape)
    values = {"max_parameters": 5000, "max_memory": 0.25, "context": 100, "weight_bits": 4, "cache_bits": 8, "ffn_layers": [1]}
    config = parse({"run_dir": "r", "model": {"init_from": str(parent)}, "compress": values}, CompressConfig)
    assert budget(config.compress, shape).parameters == 5000
    assert budget(config.compress, shape).memory == 0.25 * inference_bytes(shape, 100, 4, 8)
    assert axes(config.compress, shape)["ffn_layers"] == [1] and axes(config.compress, shape)["mamba_layers"] == [2]


def test_a_training_has_the_settings_of_the_distillation(parent):
    given = {"temperature": 2.0, "hidden_weight": 0.5}
    values = {
        "run_dir": "r",
        "seed": 3,
        "model": {"init_from": str(parent)},
        "distill": given,
        "optim": {"lr": 0.5},
        "compress": {},
    }
    config = parse(values, CompressConfig)
    run = training(config, "x", Model(init_from="y"), teacher="z", steps=7)
    assert (run.run_dir, run.seed, run.model.init_from, run.optim.lr, run.train.steps) == ("x", 3, "y", 0.5, 7)
    assert run.distill == Distill(teacher="z", **given) and run.data.tokenizer == str(parent)
    assert training(config, "x", Model(init_from="y")).distill == Distill()
    assert parse(parse_yaml(dump(run))) == run
