"""Which runs a sweep is made of, and what is no sweep."""

import re

import pytest
import yaml

from hybridlm import HybridLMConfig
from hybridlm.twin import count_parameters
from tests.train.conftest import SHAPE
from train.config import dump, parse
from train.sweep_config import SweepConfig, slug, table_of_runs, with_grid

BASE = {"run_dir": "out", "model": {"config": SHAPE}, "optim": {"lr": 1e-2}, "data": {"seq_len": 32}}


def make(base=BASE, **sweep):
    return parse(base | {"sweep": sweep}, SweepConfig)


def faults(config):
    with pytest.raises(ValueError) as raised:
        table_of_runs(config)
    return str(raised.value).splitlines()[1:]


def test_every_point_of_the_grid_is_a_row_with_every_seed():
    rows = table_of_runs(make(grid={"optim.lr": [1e-2, 3e-3], "train.steps": [5, 6], "optim.beta2": [0.9]}, seeds=[4, 2]))
    assert [row.name for row in rows] == [
        "beta2-0.9_steps-5", "beta2-0.9_steps-6", "beta2-0.9_lr-0.003_steps-5", "beta2-0.9_lr-0.003_steps-6",
    ]  # fmt: skip
    assert rows[2].settings == {"optim.lr": 3e-3, "train.steps": 5}  # what is the same in all is no column
    assert [run.run_dir for run in rows[3].runs] == [f"out/runs/beta2-0.9_lr-0.003_steps-6/seed-{seed}" for seed in (4, 2)]
    run = rows[3].runs[1]
    assert run == parse(
        BASE | {"run_dir": run.run_dir, "seed": 2, "optim": {"lr": 3e-3, "beta2": 0.9}, "train": {"steps": 6}}
    )  # an ordinary run


def test_variants_are_rows_by_name_at_every_point(tmp_path):
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump(SHAPE | {"hidden_size": 64}))
    variants = {
        "wide": {"model.config.intermediate_size": 64, "model.config": str(shape)},
        "as it is": {},
    }
    rows = table_of_runs(make(grid={"optim.lr": [1e-2, 1e-3]}, variants=variants, seeds=[0]))
    assert [row.settings["variant"] for row in rows] == ["wide", "wide", "as it is", "as it is"]
    assert [row.name for row in rows[:2]] == ["wide", "wide_lr-0.001"]
    assert rows[0].runs[0].model.config == SHAPE | {"hidden_size": 64, "intermediate_size": 64}
    assert rows[2].runs[0].model.config == SHAPE and rows[3].runs[0].optim.lr == 1e-3
    size = count_parameters(HybridLMConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 64}))
    assert rows[0].parameters == size > rows[2].parameters


def test_a_row_keeps_its_folder_when_the_grid_grows():
    few = table_of_runs(make(grid={"optim.lr": [1e-2, 3e-3]}))
    more = table_of_runs(make(grid={"train.steps": [1000, 5], "optim.lr": [1e-4, 3e-3, 1e-2]}, seeds=[0, 1, 2, 3]))
    of_name = {row.name: row for row in more}
    for row in few:
        assert of_name[row.name].runs[:3] == row.runs


def test_a_row_may_have_a_blend_where_the_sweep_says_nothing_of_the_source():
    blend = [{"source": "a.txt", "weight": [1.0]}]
    (row,) = table_of_runs(make(grid={"data.blend": [blend]}))
    assert row.runs[0].data.source is None and row.runs[0].data.blend[0].source == "a.txt"


def test_every_fault_of_every_row_is_told_at_once():
    variants = {"a": {"optim.lrr": 1}, "b": {"model.config.hiden_size": 3, "ops": {"backend": "eager"}, "seed": 3}}
    assert faults(make(variants=variants, grid={"run_dir": ["x"], "nothing": [1]})) == [
        "  run_dir cannot vary: each run has a folder of its own below the sweep's.",
        "  unknown setting nothing",
        "  unknown setting optim.lrr; did you mean optim.lr?",
        "  unknown setting model.config.hiden_size; did you mean model.config.hidden_size?",
        "  ops is a section; name a setting of it, such as ops.backend.",
        "  seed cannot vary: the seeds of every row are sweep.seeds.",
    ]
    found = "\n".join(faults(make(grid={"optim.lr": [-1.0, 1e-3], "model.config.hidden_size": [32, 0], "schedule.warmup": [2]})))
    assert "lr--1.0_warmup-2: optim.lr: input should be greater than 0; got -1.0." in found
    assert "hidden_size-0_lr-0.001_warmup-2: schedule.warmup" in found and "hidden_size-0_lr--1.0" in found


def test_a_fault_that_rows_share_is_told_once():
    (fault,) = faults(make(grid={"model.config": ["nowhere.yaml"], "train.steps": [3, 4]}))
    assert fault.endswith(": there is no file nowhere.yaml.") and "steps-3, " in fault and "steps-4:" in fault


ONE_FAULT = {
    "nothing to compare": ({}, "give values of a setting, such as --grid optim.lr=1e-3,3e-3"),
    "a seed twice": ({"seeds": [1, 1], "grid": {"optim.lr": [1.0]}}, "sweep.seeds: each may stand there once; got [1, 1]"),
    "said twice": ({"variants": {"a": {"optim.lr": 1.0}}, "grid": {"optim.lr": [2.0]}}, "a: optim.lr stands in sweep.grid too"),
    "a row twice": ({"variants": {"a": {"optim.lr": 1e-2}, "b": {}}}, "a and b are the same run"),
    "a value twice": ({"grid": {"optim.lr": [1.0, 1.0]}}, "lr-1.0 stands in the table twice"),
    "one folder": ({"variants": {"a": {}, "A": {"optim.lr": 1.0}}}, "two rows would have the folder A"),
    "no name": ({"variants": {"": {}}}, "a row has no name"),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_FAULT)
def test_what_is_no_sweep(case):
    sweep, words = ONE_FAULT[case]
    assert words in faults(make(**sweep))[0]


def test_a_shape_beside_starting_weights_is_a_fault():
    config = make(BASE | {"model": {"init_from": "some/model"}}, grid={"model.config.hidden_size": [32, 64]})
    assert "the shape is that of model.init_from" in faults(config)[0]


def test_rows_that_must_be_equal_in_size_and_are_not():
    grid = {"model.config.intermediate_size": [32, 33, 64]}
    (fault,) = faults(make(grid=grid, equal_parameters=True))
    sizes = [row.parameters for row in table_of_runs(make(grid=grid))]
    assert sizes[1] < 1.01 * sizes[0] < sizes[2]
    assert f"base {sizes[0]:,}, intermediate_size-33 {sizes[1]:,}, intermediate_size-64 {sizes[2]:,}." in fault
    table_of_runs(make(grid={"model.config.intermediate_size": [32, 33]}, equal_parameters=True))
    begun = make(BASE | {"model": {"init_from": "some/model"}}, grid={"optim.lr": [1.0]}, equal_parameters=True)
    assert "the size of these is not known before training: lr-1.0." in faults(begun)[0]


def test_the_grid_of_the_command_line_goes_before_the_files():
    config = make(grid={"optim.lr": [1.0], "train.steps": [3]})
    words = ["optim.lr=1e-3,3e-3", "data.phases=[0.6, 0.8],[]", "train.recompute=M*-,''", "seed=0,5", "data.revision=null,010"]
    sweep = with_grid(config, words).sweep
    assert sweep.grid == {
        "optim.lr": [1e-3, 3e-3], "train.steps": [3], "data.phases": [[0.6, 0.8], []], "train.recompute": ["M*-", ""],
        "data.revision": [None, "010"],
    }  # fmt: skip
    assert sweep.seeds == (0, 5)
    assert parse(yaml.safe_load(dump(config)), SweepConfig) == config == with_grid(config, [])


def test_words_that_are_no_grid_are_told_together():
    with pytest.raises(ValueError) as raised:
        with_grid(make(), ["optim.lr", "optim.lr=", "model.config.hybrid_override_pattern=*-*-"])
    assert str(raised.value).count("it must be KEY=VALUE,VALUE") == 2 and "in quotes" in str(raised.value)


@pytest.mark.parametrize("text", ["lr-0.001", "Muon+z"])
def test_a_text_that_can_name_a_folder_does(text):
    assert slug(text) == text


@pytest.mark.parametrize("text, begin", [("..", ""), ("a/b c", "a-b-c-"), ("é", ""), ("-x", "x-")])
def test_of_other_texts_what_can_be_and_a_hash(text, begin):
    assert re.fullmatch(re.escape(begin) + "[0-9a-f]{6}", slug(text))


def test_long_names_stay_apart():
    long = ["x" * 300, "x" * 299 + "y"]
    assert len({slug(text) for text in long}) == 2 and max(map(len, map(slug, long))) < 100


def test_the_name_of_a_row_of_many_long_values_is_one_of_a_folder(tmp_path):
    grid = {"log.sample_prompt": ["a" * 79, "b" * 79], "log.wandb_project": ["c" * 79], "data.cache_dir": ["d" * 79]}
    values = {"run_dir": str(tmp_path), "model": {"config": SHAPE}, "sweep": {"grid": grid}}
    names = [row.name for row in table_of_runs(parse(values, SweepConfig))]
    assert len(set(names)) == 2 and max(map(len, names)) < 100
