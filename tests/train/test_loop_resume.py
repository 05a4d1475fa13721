"""Going on from elsewhere, with other things, or with what a fault has left."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint, files, loop
from train.loop import train
from train.objective import next_token_loss
from train.run import drop_after


def rows(config, name="metrics", key="loss"):
    file = Path(config.run_dir) / f"{name}.jsonl"
    return [line for line in map(json.loads, file.read_text().splitlines()) if key in line] if file.exists() else []


def steps(config):
    return [step for step, _ in checkpoint.folders(Path(config.run_dir))]


def interrupted_in(call):
    calls = []

    def loss(model, batch):
        calls.append(model.training)
        if calls.count(True) == call:
            raise KeyboardInterrupt
        return next_token_loss(model, batch)

    return loss


def test_a_checkpoint_from_elsewhere_is_the_runs_own_before_its_first_step(make_config, tmp_path):
    first, second = make_config(), make_config(run_dir=str(tmp_path / "second"), seed=0)
    train(first)
    with pytest.raises(KeyboardInterrupt):
        train(second, resume=str(Path(first.run_dir) / "checkpoints/step-4"), loss=interrupted_in(2))
    assert steps(second) == [4]
    train(second)
    a, b = (load_file(Path(config.run_dir) / "checkpoints/step-8/optimizer.safetensors") for config in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [line["step"] for line in rows(second)] == [5, 6, 7, 8]


def test_a_run_that_was_to_begin_from_elsewhere_never_begins_anew_without_a_word(make_config, tmp_path, monkeypatch):
    first, second = make_config(), make_config(run_dir=str(tmp_path / "second"))
    train(first)
    start_from = str(Path(first.run_dir) / "checkpoints/step-4")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write", killed)
        train(second, resume=start_from)
    assert steps(second) == []
    with pytest.raises(ValueError, match=rf"goes on from {start_from}, but no checkpoint yet: --resume {start_from}"):
        train(second)
    train(second, resume=start_from)
    assert [line["step"] for line in rows(second)] == [5, 6, 7, 8]


def test_a_finished_checkpoint_from_elsewhere_is_taken_over_whole(make_config, tmp_path):
    first, second = make_config(), make_config(run_dir=str(tmp_path / "second"))
    train(first)
    train(second, resume=str(Path(first.run_dir) / "checkpoints/step-8"))
    assert steps(second) == [8]
    assert (Path(second.run_dir) / "model/config.json").exists()


def test_metrics_of_another_future_are_kept_apart(make_config, tmp_path):
    first, second = make_config(), make_config(run_dir=str(tmp_path / "second"), seed=1)
    train(first)
    train(second)
    own = rows(second)
    with pytest.raises(ValueError, match="with other data"):  # the seed is part of what the place in the data means
        train(second, resume=str(Path(first.run_dir) / "checkpoints/step-4"))
    assert rows(second) == own
    train(make_config(run_dir=second.run_dir), resume=str(Path(first.run_dir) / "checkpoints/step-4"), allow_config_change=True)
    assert [line["step"] for line in rows(second)] == [5, 6, 7, 8]
    assert rows(second, "metrics-before-resume") == own


def test_a_run_whose_checkpoints_were_all_set_aside_does_not_begin_anew(make_config):
    config = make_config()
    train(config)
    checkpoint.rewind(Path(config.run_dir), None)
    with pytest.raises(
        ValueError, match=r"set aside; go on from one with --resume PATH:\n.*set-aside-1/step-4\n.*set-aside-1/step-8"
    ):
        train(config)
    train(config, resume=str(Path(config.run_dir) / "checkpoints/set-aside-1/step-8"))
    assert steps(config) == [8]


def test_a_copy_of_a_checkpoint_under_another_name_is_one_to_go_on_from(make_config):
    config = make_config()
    train(config)
    run = Path(config.run_dir)
    shutil.copytree(run / "checkpoints/step-4", run / "checkpoints/best")
    train(config, resume=str(run / "checkpoints/best"))
    assert steps(config) == [4, 8]
    assert (run / "checkpoints/set-aside-1/step-8/manifest.json").exists()


def test_what_went_wrong_once_stays_on_record(make_config):
    config = make_config()
    bad = lambda model, batch: next_token_loss(model, batch) * (float("nan") if model.training else 1.0)  # noqa: E731
    with pytest.raises(FloatingPointError):
        train(config, loss=bad)
    (before,) = rows(config, "incidents", "kind")
    train(config)
    assert rows(config, "incidents", "kind") == []
    assert rows(config, "incidents-before-resume", "kind") == [before]


def test_a_save_that_failed_is_told_though_the_next_step_is_not_finite(make_config, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    calls = []

    def loss(model, batch):
        calls.append(model.training)
        return next_token_loss(model, batch) * (float("nan") if calls.count(True) == 5 else 1.0)

    with pytest.raises(OSError, match="No space left"):
        train(make_config(train__checkpoint_async=True), loss=loss)


def test_bytes_that_are_no_text_in_the_metrics_cost_one_line(make_config):
    train(make_config(train__steps=4, schedule__decay=0.0), allow_config_change=True)
    config = make_config(schedule__decay=0.0)
    with (Path(config.run_dir) / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "\xff\xfe')
    train(config, allow_config_change=True)
    assert [line["step"] for line in rows(config)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_validation_text_that_was_edited_is_noticed(make_config, tmp_path):
    file = tmp_path / "held-out.txt"
    file.write_text("the cat sat on an owl " * 30)
    config = make_config(data__val_source=str(file))
    with pytest.raises(KeyboardInterrupt):
        train(config, loss=interrupted_in(6))
    file.write_text("an owl saw the mat " * 30)
    with pytest.raises(ValueError, match=r"validated on other text.*--allow-config-change"):
        train(config)
    train(config, allow_config_change=True)


def test_a_checkpoint_of_another_architecture_of_the_same_sizes_is_refused(make_config, tmp_path):
    first = make_config()
    train(first)
    shape = first.model.config | {"layer_norm_epsilon": 0.5}
    second = make_config(run_dir=str(tmp_path / "second"), model__config=shape)
    start_from = str(Path(first.run_dir) / "checkpoints/step-4")
    with pytest.raises(ValueError, match=r"(?s)of another model:\n  layer_norm_epsilon: 1e-05 -> 0\.5"):
        train(second, resume=start_from)
    assert not Path(second.run_dir).exists()
    train(second, resume=start_from, allow_config_change=True)


def test_borders_of_phases_do_not_move_with_the_batch(make_config, text_folder):
    blend = {"data__source": None, "data__blend": [{"source": str(text_folder), "weight": [1.0, 2.0]}], "data__phases": [0.5]}
    train(make_config(**blend, train__steps=4, schedule__decay=0.0))
    with pytest.raises(ValueError, match=r"data\.phases are counted in steps, and the 4 so far were of other batches"):
        train(make_config(**blend, train__global_batch=2, schedule__decay=0.0), allow_config_change=True)


@pytest.mark.parametrize(("resume", "says"), [("auto", "the same command goes on"), ("never", "--resume auto goes on")])
def test_what_to_type_next_is_true(make_config, capsys, monkeypatch, resume, says):
    from train import loop

    monkeypatch.setattr(loop, "stop_signals", StopAtOnce)
    train(make_config(), resume=resume)
    assert says in capsys.readouterr().out


class StopAtOnce:
    def __enter__(self):
        return lambda: True

    def __exit__(self, *error):
        pass


def test_a_resumed_run_keeps_no_file_of_its_checkpoint_open(make_config):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps, which only Linux has")
    train(make_config(train__steps=4, schedule__decay=0.0), allow_config_change=True)
    seen = []
    config = make_config(schedule__decay=0.0)
    train(
        config, allow_config_change=True, loss=lambda model, batch: seen.append(maps.read_text()) or next_token_loss(model, batch)
    )
    assert "optimizer.safetensors" not in seen[-1]


def test_a_sample_that_was_cut_off_comes_again(make_config, tmp_path, monkeypatch):
    whole, cut = make_config(), make_config(run_dir=str(tmp_path / "cut"))
    train(whole)
    sample_text, calls = loop.sample_text, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample_text(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample_text", interrupted)
        train(cut)
    assert steps(cut) == [4]
    train(cut)
    for name, key in (("samples", "text"), ("metrics", "val_loss")):
        assert rows(cut, name, key) == rows(whole, name, key)


def test_a_directory_that_was_only_about_to_begin_from_elsewhere_does_not_begin_anew(make_config):
    run_dir = Path(make_config().run_dir)
    run_dir.mkdir()
    (run_dir / "started-from.json").write_text('{"checkpoint": "/elsewhere/step-4"}')
    with pytest.raises(ValueError, match="--resume /elsewhere/step-4"):
        train(make_config())


def test_lines_are_where_they_go_before_they_are_gone_where_they_were(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    names = []
    rename = files.rename
    monkeypatch.setattr(files, "rename", lambda old, new: names.append(new.name) or rename(old, new))
    for step in (2, 3):
        file.write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
        drop_after(file, 1)
    assert names == ["metrics-before-resume.jsonl", "metrics.jsonl"] * 2
    assert (tmp_path / "metrics-before-resume.jsonl").read_text() == '{"step": 2}\n{"step": 3}\n'
