import os
from contextlib import suppress

import yaml

from train import __main__ as cli
from train.config import dump


def write(tmp_path, config):
    (tmp_path / "run.yaml").write_text(dump(config))
    return ["--config", str(tmp_path / "run.yaml")]


def test_a_run_from_the_command_line_ends_with_0_and_names_the_model(make_config, tmp_path, capsys):
    assert cli.main([*write(tmp_path, make_config()), "--train.steps", "1"]) == 0
    assert f"done: {make_config().run_dir}/model" in capsys.readouterr().out


def test_bad_input_ends_with_2_and_one_clear_error(make_config, tmp_path, capsys):
    assert cli.main([*write(tmp_path, make_config()), "--train.stepps", "1"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
    assert cli.main(["--config", "nothing.yaml"]) == 2
    assert capsys.readouterr().err.strip() == "error: there is no file nothing.yaml."


def test_a_failure_ends_with_1(make_config, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(cli, "train", fail)
    assert cli.main(write(tmp_path, make_config())) == 1
    assert "step 3: loss nan" in capsys.readouterr().err


def test_print_config_prints_what_would_run_and_runs_nothing(make_config, tmp_path, capsys):
    assert cli.main([*write(tmp_path, make_config()), "--optim.lr", "0.5", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 0.5
    assert not (tmp_path / "run").exists()


def test_the_first_rank_of_a_machine_says_what_is_wrong_and_the_others_should_it_not_end_the_launch(capsys, monkeypatch):
    for rank, local_rank, waits in (("8", "0", []), ("1", "1", [cli.LAST_WORD])):
        waited = []
        monkeypatch.setattr(cli, "sleep", waited.append)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert cli.main(["--config", "nothing.yaml"]) == 2
        assert waited == waits and capsys.readouterr().err == "error: there is no file nothing.yaml.\n"


def test_output_that_is_closed_costs_nothing():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        out = cli.Lasting(stream)
        os.close(read)
        print("x" * 100_000, file=out, flush=True)
        assert out.fileno() == write
        with suppress(BrokenPipeError):
            stream.close()
