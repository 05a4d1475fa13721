import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from hybridlm.strict_yaml import load_yaml
from tests.train.conftest import SHAPE
from train.run import LOCK, append, check, claim, drop_after, last_line, lock


def start(config, resume="auto", allow_config_change=False):
    """Locks, checks and claims, as a run does."""
    with lock(Path(config.run_dir)):
        start_from = check(config, resume, allow_config_change)
        claim(config, start_from, 0, 1)
    return start_from


def test_a_run_of_other_settings_is_refused_with_the_difference(make_config):
    start(make_config())
    with pytest.raises(ValueError, match=r"(?s)optim\.lr: 0\.01 -> 0\.02.*--allow-config-change"):
        start(make_config(optim__lr=0.02))
    assert load_yaml(Path(make_config().run_dir) / "config.yaml")["optim"]["lr"] == 0.01


def test_changes_that_were_asked_for_keep_the_old_settings_beside_the_new(make_config):
    for lr in (0.01, 0.02, 0.03):
        start(make_config(optim__lr=lr), allow_config_change=True)
    run = Path(make_config().run_dir)
    names = ["config-before-change.yaml", "config-before-change-2.yaml", "config.yaml"]
    assert [load_yaml(run / name)["optim"]["lr"] for name in names] == [0.01, 0.02, 0.03]


def test_settings_that_an_older_run_did_not_have_yet_have_their_defaults(make_config):
    config = make_config()
    start(config)
    file = Path(config.run_dir) / "config.yaml"
    older = load_yaml(file)
    del older["ops"], older["train"]["timeout"]
    file.write_text(yaml.safe_dump(older))
    assert check(config, "auto", False) is None
    with pytest.raises(ValueError, match=r"other settings:\n  train\.timeout: \d+\.0 -> 7\.0\n"):
        check(make_config(train__timeout=7.0), "auto", False)
    file.write_text(yaml.safe_dump(older | {"gone": 1}))  # no configuration of today
    with pytest.raises(ValueError, match=r"gone: 1 -> None\n(.*\n)*  train\.timeout: None -> 600\.0"):
        check(config, "auto", False)


def test_a_run_from_before_there_was_a_choice_of_optimisers_had_adamw(make_config):
    config = make_config(optim__name="adamw")
    start(config)
    file = Path(config.run_dir) / "config.yaml"
    older = load_yaml(file)
    del older["optim"]["name"]
    file.write_text(yaml.safe_dump(older))
    assert check(config, "auto", False) is None
    with pytest.raises(ValueError, match=r"other settings:\n  optim\.name: 'adamw' -> 'muon'\n"):
        check(make_config(optim__name="muon"), "auto", False)


@pytest.mark.parametrize("pattern", ["ME", "M-"])
def test_in_a_run_from_before_biases_were_balanced_they_stayed(make_config, pattern):
    """Without experts there is nothing to be told."""
    shape = SHAPE | {"hybrid_override_pattern": pattern}
    config = make_config(model__config=shape)
    start(config)
    file = Path(config.run_dir) / "config.yaml"
    older = load_yaml(file)
    del older["optim"]["moe_bias_rate"]
    file.write_text(yaml.safe_dump(older))
    if pattern == "M-":
        assert check(config, "auto", False) is None
        return
    assert check(make_config(model__config=shape, optim__moe_bias_rate=0.0), "auto", False) is None
    with pytest.raises(ValueError, match=r"other settings:\n  optim\.moe_bias_rate: 0\.0 -> 0\.001\n"):
        check(config, "auto", False)


def test_the_last_line_with_a_key_is_found_however_far_back_it_is(tmp_path):
    file = tmp_path / "metrics.jsonl"
    others = "".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(5000))
    assert len(others) > 2**16
    file.write_text('{"step": 0, "val_loss": 9.0}\n' + others + '{"step": 5000, "lo')
    assert last_line(file, "val_loss") == {"step": 0, "val_loss": 9.0}
    assert last_line(file, "step") == {"step": 4999, "loss": 1.0}
    assert last_line(file, "none") is None and last_line(tmp_path / "none", "step") is None


def test_never_refuses_a_run_and_what_is_something_else_is_left_alone(make_config):
    config = make_config()
    assert start(config, "never") is None
    with pytest.raises(ValueError, match="already holds a run"):
        start(config, "never")
    other = make_config(run_dir=config.run_dir + "-other")
    Path(other.run_dir).mkdir()
    (Path(other.run_dir) / "thesis.txt").write_text("years of work")
    for run_dir in (other.run_dir, other.run_dir + "/thesis.txt", other.run_dir + "/thesis.txt/below"):
        with pytest.raises(ValueError, match="exists and is no run directory"):
            start(make_config(run_dir=run_dir))
    assert [p.name for p in Path(other.run_dir).iterdir()] == ["thesis.txt"]


def test_auto_on_an_empty_or_absent_directory_starts_fresh(make_config):
    assert start(make_config()) is None
    empty = make_config(run_dir=make_config().run_dir + "-empty")
    Path(empty.run_dir).mkdir()
    assert start(empty) is None


def test_an_explicit_path_never_falls_back(make_config, tmp_path):
    with pytest.raises(ValueError, match="no valid checkpoint"):
        check(make_config(), str(tmp_path / "step-7"), False)
    assert not Path(make_config().run_dir).exists()


def test_lines_of_steps_to_come_and_a_cut_off_line_are_dropped(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        append(file, {"step": step})
    with file.open("a") as out:
        out.write('{"step": 2, "lo')
    drop_after(file, 2)
    assert [json.loads(text)["step"] for text in file.read_text().splitlines()] == [1, 2]
    assert "cut off" in caplog.text
    drop_after(tmp_path / "absent.jsonl", 2)


def test_a_second_process_is_refused_and_told_who_has_the_directory(make_config):
    config = make_config()
    run_dir = Path(config.run_dir)
    with lock(run_dir):
        claim(config, None, 0, 1)
        before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
        with pytest.raises(ValueError, match=rf"(?s)in use by another process.*{os.getpid()}.*--run_dir"), lock(run_dir):
            pass
        assert {path: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before
    with lock(run_dir):
        assert (run_dir / "config.yaml").exists()
    assert not (run_dir / "owner.json").exists()


def test_a_lock_is_gone_with_the_process_that_held_it(make_config):
    run_dir = Path(make_config().run_dir)
    process = os.fork()
    if process == 0:
        with lock(run_dir):
            claim(make_config(), None, 0, 1)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert (run_dir / "owner.json").exists()
    assert start(make_config()) is None


def test_what_never_became_a_run_leaves_nothing_behind(tmp_path):
    with lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), lock(tmp_path / "a"):
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".config.yaml.unfinished"], ["owner.json"]])
def test_a_run_cut_off_in_its_first_moment_starts_again(make_config, left):
    Path(make_config().run_dir).mkdir()
    for name in left:
        (Path(make_config().run_dir) / name).write_text("")
    assert start(make_config()) is None


def test_what_ended_a_run_is_not_hidden_by_the_tidying_behind_it(tmp_path):
    with pytest.raises(OSError, match="No space left"), lock(tmp_path / "deep" / "run"):
        (tmp_path / "deep" / "run" / ".config.yaml.unfinished").write_text("half")
        (tmp_path / "deep" / "sibling").mkdir()
        raise OSError(28, "No space left on device")
    assert not (tmp_path / "deep" / "run").exists()


def test_tokens_in_the_run_directory_are_no_other_run(make_config, tmp_path):
    config = make_config(data__cache_dir=str(tmp_path / "run" / "cache"))
    (tmp_path / "run" / "cache").mkdir(parents=True)
    assert start(config) is None


def test_signs_of_ranks_that_are_no_more_go(make_config):
    config, signs = make_config(), Path(make_config().run_dir) / "ranks"
    start(config)
    for ranks, left in ((3, ["rank-0.json", "rank-1.json", "rank-2.json"]), (2, ["rank-0.json", "rank-1.json"]), (1, [])):
        signs.mkdir(exist_ok=True)
        for rank in range(4):
            (signs / f"rank-{rank}.json").write_text("{}")
        with lock(Path(config.run_dir)):
            claim(config, None, 0, ranks)
        assert sorted(p.name for p in signs.iterdir()) == left
