import pytest
import yaml

from hybridlm.strict_yaml import parse_yaml
from train.command_line import argument_parser, parse_command_line
from train.config import blend_weights, dump, leaves, parse


def test_a_blend_may_be_given_on_the_command_line():
    argv = ["--config", "configs/demo.yaml", "--data.source", "null", "--data.phases", "[0.5]"]
    config, _ = parse_command_line([*argv, "--data.blend", "[{source: a, weight: [1, 0]}, {source: b, weight: 1}]"])
    assert config.data.phases == (0.5,)
    assert blend_weights(config.data) == [[1, 1], [0, 1]]


def test_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: a\nmodel: {config: configs/model/tiny.yaml}\ntrain: {steps: 5}\n")
    argv = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--run_dir",
        "7",
        "--optim.lr",
        "3e-4",
        "--train.steps=9",
        "--log.wandb",
        "true",
    ]
    config, arguments = parse_command_line([*argv, "--data.val_source", "null", "--resume", "never"])
    assert (config.run_dir, config.optim.lr, config.train.steps, config.log.wandb) == ("7", 3e-4, 9, True)
    assert config.data.val_source is None
    assert arguments.resume == "never"


def test_an_unknown_flag_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"--optim.rl; did you mean optim.lr\?"):
        parse_command_line(["--config", "configs/demo.yaml", "--optim.rl", "3"])


def test_help_shows_every_setting_with_a_type_a_default_and_a_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        argument_parser().parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name, info in leaves():
        assert f"--{name}" in shown
        assert info.description
    assert "(int | null, default None)" in shown


@pytest.mark.parametrize("text", ["[", "class Foo:", "# x", "1e5", "no", "010", "a: b", "~", "{", "'", "import ", "é\n\t"])
def test_any_text_is_a_text(text):
    argv = ["--config", "configs/demo.yaml", "--log.sample_prompt", text]
    config, _ = parse_command_line(argv)
    assert config.log.sample_prompt == text
    assert parse(parse_yaml(dump(config))) == config
    assert yaml.safe_load(dump(config))["log"]["sample_prompt"] == text


def test_an_empty_section_is_as_if_absent_and_one_that_is_no_mapping_a_fault(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: a\nmodel: {config: configs/model/tiny.yaml}\ntrain:\noptim: 3\n")
    with pytest.raises(ValueError, match=r"optim"):
        parse_command_line(["--config", str(tmp_path / "c.yaml"), "--train.steps", "1"])
    with pytest.raises(ValueError, match=r"optim .* must hold"):
        parse_command_line(["--config", str(tmp_path / "c.yaml"), "--optim.lr", "1"])


def test_a_flag_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"--train\.steps: '\['"):
        parse_command_line(["--config", "configs/demo.yaml", "--train.steps", "["])


def test_a_shape_may_be_given_inline_on_the_command_line():
    config, _ = parse_command_line(
        ["--config", "configs/demo.yaml", "--model.config", "{hybrid_override_pattern: M-, n_groups: 2}"]
    )
    assert config.model.config == {"hybrid_override_pattern": "M-", "n_groups": 2}
