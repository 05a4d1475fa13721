import math
import re
from pathlib import Path

import pytest
import yaml

from hybridlm.strict_yaml import parse_yaml
from train.config import blend_weights, differences, dump, parse

TINY = {"run_dir": "r", "model": {"config": "configs/model/tiny.yaml"}}


def test_all_faults_come_in_one_message_with_the_nearest_key():
    values = TINY | {"optim": {"lr": "fast", "wieght_decay": 1}, "trian": {}, "train": {"steps": "010", "val_every": 0}}
    with pytest.raises(ValueError) as error:
        parse(values)
    parts = ["5 fault(s)", "optim.lr: ", "'fast'", "optim.wieght_decay; did you mean optim.weight_decay?"]
    parts += ["trian; did you mean train?", "train.steps: ", "'010'", "train.val_every: ", "got 0"]
    for part in parts:
        assert part in str(error.value)


def test_faults_of_the_model_shape_are_told_too():
    with pytest.raises(ValueError, match=r"unknown model config key.*hiden_size \(did you mean hidden_size\?\)"):
        parse({"run_dir": "r", "model": {"config": {"hiden_size": 3}}})
    shape = yaml.safe_load(Path("configs/model/tiny.yaml").read_text())
    with pytest.raises(ValueError, match="4 heads and 3 groups"):
        parse({"run_dir": "r", "model": {"config": shape | {"n_groups": 3}}})
    with pytest.raises(ValueError, match="unknown symbol"):
        parse({"run_dir": "r", "model": {"config": shape | {"hybrid_override_pattern": "M-X"}}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run_dir": "r"}, "model.config"),
        ({"model": {"config": "configs/model/tiny.yaml"}}, "run_dir is missing"),
        (TINY | {"schedule": {"warmup": 0.6, "decay": 0.6}}, "together at most 1"),
        (TINY | {"train": {"precision": "fp4"}}, "fp8"),
        (TINY | {"train": {"fp8_unfit": "skip"}}, "train.fp8_unfit: .*'stop' or 'bf16'.*'skip'"),
        (TINY | {"model": {"config": "nothing.yaml"}}, "no file nothing.yaml"),
        (TINY | {"optim": {"lr": -1.0}}, "greater than 0"),
        (TINY | {"log": {"wandb": "no"}}, "valid boolean"),
        (TINY | {"log": {"sample_tokens": 10**9}}, "log.sample_tokens: .* less than or equal to 10000"),
        (TINY | {"log": {"sample_prompt": "x" * 10_000_000}}, r"log.sample_prompt: .* at most 10000 characters; got 'x{199}…\.$"),
        (TINY | {"train": {"timeout": float("nan")}}, "train.timeout: "),
    ],
)
def test_a_bad_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        parse(values)


TWO = [{"source": "a", "weight": 1}, {"source": "b", "weight": 2.5}]


def data(**values):
    return TINY | {"data": values}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (data(source="c", blend=TWO), r"set data.source \(one source\) or data.blend \(several\), not both"),
        (data(source=None), r"set data.source \(one source\) or data.blend \(several\)\.$"),
        (data(blend=[]), "data.blend: .*at least 1"),
        (data(blend=TWO, text_column="body", license="x"), "data.text_column, data.license: .* each of its sources"),
        (data(phases=[0.5]), "data.phases: .* there is none"),
        (data(blend=TWO, phases=[0.8, 0.6]), r"data.phases: each must be later .* got \[0.8, 0.6\]"),
        (data(blend=TWO, phases=[0.6, 0.6]), "data.phases: each must be later"),
        (data(blend=TWO, phases=[0.6, 1.0]), r"data.phases.1: .*less than 1"),
        (data(blend=[TWO[0] | {"weight": [1, 2]}]), r"a needs one weight, or 1, .* got \[1.0, 2.0\]"),
        (data(blend=[TWO[0] | {"weight": [1, 2]}], phases=[0.1, 0.2]), "a needs one weight, or 3"),
        (data(blend=[TWO[0] | {"weight": -1}]), r"data.blend.0.weight.0: .*greater than or equal to 0; got -1"),
        (data(blend=[TWO[0] | {"weight": "much"}]), r"data.blend.0.weight.0: .*valid number; got 'much'"),
        (data(blend=[e | {"weight": [1, 0]} for e in TWO], phases=[0.5]), "all weights of phase 2 are 0"),
        (data(blend=[{"source": "a"}]), "data.blend.0.weight is missing"),
        (data(blend=[TWO[0] | {"wieght": 1}]), r"data.blend.0.wieght; did you mean data.blend.weight\?"),
        (data(carry_state=True, blend=TWO), "data.carry_state: it reads on in one source; got a data.blend of 2"),
        (data(carry_state=True, packing="best-fit"), "data.carry_state: best-fit packing takes windows out of their order"),
        (data(carry_state=True, streaming=True), "data.carry_state: rows read at places far apart, and data.streaming at one"),
        (data(streaming=True, blend=TWO), "data.streaming: it reads one source"),
        (data(streaming=True, packing="best-fit"), "data.streaming: best-fit packing must know"),
        (data(streaming=True, workers=2), "data.streaming: .* set data.workers: 0, not 2"),
        (data(workers=-1), "data.workers: .*greater than or equal to 0"),
        (data(bad_documents="ignore"), "data.bad_documents: .*'stop' or 'skip'"),
    ],
)
def test_a_fault_of_the_data_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        parse(values)


def distil(*, of=None, **values):
    return TINY | {"distill": values} | ({"data": of} if of else {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (distil(teacher="a", logits="b"), r"set distill.teacher \(a model in memory\) or distill.logits .*, not both"),
        (distil(logits="b", hidden_weight=1.0), "distill.hidden_weight: hidden states need the teacher itself"),
        (distil(temperature=2.0, hidden_weight=1.0), "distill.temperature, distill.hidden_weight: nothing to learn from"),
        (distil(teacher="a", temperature=0), "distill.temperature: .*greater than 0"),
        (distil(teacher="a", label_weight=1.5), "distill.label_weight: .*less than or equal to 1"),
        (distil(teacher="a", hidden_weight=-1), "distill.hidden_weight: .*greater than or equal to 0"),
        (distil(teacher="a", top_k=0), "distill.top_k: .*greater than 0"),
        (distil(teacher="a", of={"label_column": "x", "source": "a"}), "data.label_column: a classifier has no logits to distil"),
        (distil(teacher="a", of={"carry_state": True}), "data.carry_state: a teacher's states are not carried on"),
        (distil(logits="a", of={"streaming": True}), "distill.logits: they are found by sample number"),
    ],
)
def test_a_fault_of_distillation_is_named(values, message):
    with pytest.raises(ValueError, match=rf"1 fault\(s\):\n  .*{message}"):
        parse(values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": {"batch_start": 4}}, "set both batch_start and batch_warmup, or neither; got 4 and 0.0"),
        (
            {"schedule": {"batch_start": 5, "batch_warmup": 0.1}},
            r"it must become train.global_batch \(16\) by doubling",
        ),
        (
            {"schedule": {"length_start": 48, "length_warmup": 0.1}},
            r"it must become data.seq_len \(512\) by doubling",
        ),
        (
            {"schedule": {"length_start": 64, "length_warmup": 0.1}, "data": {"carry_state": True}},
            "length_start: rows change with it, which data.carry_state does not allow",
        ),
        ({"optim": {"z_loss": 1e-4}, "distill": {"teacher": "t"}}, "optim.z_loss: it is for the next-token loss"),
    ],
)
def test_a_fault_of_a_warm_up_or_of_z_loss_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        parse(TINY | given)


def test_all_faults_of_distillation_come_in_one_message():
    with pytest.raises(ValueError, match=r"2 fault\(s\)"):
        parse(distil(teacher="a", logits="b", of={"carry_state": True}))


def test_all_faults_of_the_data_come_in_one_message():
    with pytest.raises(ValueError, match=r"5 fault\(s\)") as error:
        parse(data(source="c", blend=[TWO[0] | {"weight": [1, 2]}], phases=[0.5, 0.3], workers=1, streaming=True))
    assert str(error.value).count("\n") == 5


@pytest.mark.parametrize("given", [{"streaming": True}, {"carry_state": True}, {"packing": "best-fit"}, {"blend": TWO}])
def test_labels_are_of_whole_documents_of_one_source(given):
    (name,) = given
    with pytest.raises(ValueError, match=rf"1 fault\(s\):\n  data\.{name}: documents with labels \(data\.label_column\)"):
        parse(data(label_column="x", **given))
    assert parse(data(label_column="x", source="a")).data.label_column == "x"


def test_a_blend_has_a_weight_for_each_source_in_each_phase_and_its_dump_reads_back():
    blend = [TWO[0] | {"weight": [0.7, 0.5, 0.2]}, TWO[1] | {"text_column": "body", "revision": "main"}]
    config = parse(data(blend=blend, phases=[0.6, 0.8]))
    assert blend_weights(config.data) == [[0.7, 2.5], [0.5, 2.5], [0.2, 2.5]]
    assert config.data.source is None
    assert [(e.source, e.text_column, e.revision) for e in config.data.blend] == [("a", "text", None), ("b", "body", "main")]
    assert parse(parse_yaml(dump(config))) == config
    assert list(differences(parse_yaml(dump(config)), parse_yaml(dump(parse(parse_yaml(dump(config))))))) == []


def test_the_source_is_the_standard_library_unless_there_is_a_blend():
    assert parse(TINY).data.source == "stdlib"
    assert parse(data(blend=TWO)).data.source is None


def test_init_from_stands_in_the_place_of_the_shape():
    config = parse(TINY | {"model": {"config": "configs/model/tiny.yaml", "init_from": "somewhere"}})
    assert (config.model.config, config.model.init_from) == (None, "somewhere")


def test_differences_name_the_leaf():
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})) == ["a.c: 2 -> 3", "d: None -> 4"]


def test_a_home_directory_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse(TINY | {"run_dir": "~/r"}).run_dir == "/somewhere/r"


def test_the_blend_of_the_documentation_is_a_configuration():
    (block,) = re.findall(r"```yaml\n(data:.*?)```", Path("docs/training.md").read_text(), flags=re.S)
    config = parse(TINY | parse_yaml(block))
    assert config.data.phases == (0.6, 0.8)
    assert blend_weights(config.data) == [[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]]


@pytest.mark.parametrize(("key", "value"), [("train.timeout", 1e15), ("seed", 2**32), ("optim.eps", math.inf)])
def test_numbers_that_torch_cannot_take_are_named(key, value):
    values = {"run_dir": "r", "model": {"config": {}}, "data": {"source": "stdlib"}}
    *section, name = key.split(".")
    (values.setdefault(section[0], {}) if section else values)[name] = value
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        parse(values)


def test_beside_a_blend_columns_are_those_of_the_validation_source():
    data = {"blend": [{"source": "a.jsonl", "weight": 1}], "text_column": "body"}
    with pytest.raises(ValueError, match=r"data\.text_column: with data\.blend"):
        parse(TINY | {"data": data})
    assert parse(TINY | {"data": data | {"val_source": "b.jsonl"}}).data.text_column == "body"
