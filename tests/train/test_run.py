import json
from pathlib import Path

import pytest
import yaml

from train.run import append, claim, drop_after


def test_a_run_of_other_settings_is_refused_with_the_difference(make_config):
    claim(make_config(), "auto", False)
    with pytest.raises(ValueError, match=r"(?s)optim\.lr: 0\.01 -> 0\.02.*--allow-config-change"):
        claim(make_config(optim__lr=0.02), "auto", False)
    assert yaml.safe_load((Path(make_config().run_dir) / "config.yaml").read_text())["optim"]["lr"] == 0.01


def test_a_change_that_was_asked_for_keeps_the_old_settings_beside_the_new(make_config):
    claim(make_config(), "auto", False)
    claim(make_config(optim__lr=0.02), "auto", True)
    run = Path(make_config().run_dir)
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 0.02
    assert yaml.safe_load((run / "config-before-change-1.yaml").read_text())["optim"]["lr"] == 0.01


def test_never_refuses_a_run_and_a_folder_of_something_else_is_left_alone(make_config):
    config = make_config()
    assert claim(config, "never", False) is None
    with pytest.raises(ValueError, match="already holds a run"):
        claim(config, "never", False)
    other = make_config(run_dir=config.run_dir + "-other")
    Path(other.run_dir).mkdir()
    (Path(other.run_dir) / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no run directory"):
        claim(other, "auto", False)
    assert [p.name for p in Path(other.run_dir).iterdir()] == ["thesis.txt"]


def test_auto_on_an_empty_or_absent_directory_starts_fresh(make_config):
    assert claim(make_config(), "auto", False) is None
    empty = make_config(run_dir=make_config().run_dir + "-empty")
    Path(empty.run_dir).mkdir()
    assert claim(empty, "auto", False) is None


def test_an_explicit_path_never_falls_back(make_config, tmp_path):
    with pytest.raises(ValueError, match="no valid checkpoint"):
        claim(make_config(), str(tmp_path / "step-7"), False)
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
