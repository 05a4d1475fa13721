import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from hybridlm.data.packing import BestFit
from hybridlm.data.streaming import Streamed
from hybridlm.tokenizer import byte_tokenizer
from train.setup import build_model, build_tokenizer, fetch, open_data


def test_the_model_takes_its_special_tokens_from_the_tokenizer(make_config):
    model = build_model(make_config())
    build_tokenizer(make_config(), model)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 256, 257)


def test_the_generation_settings_of_the_weights_come_along(make_config, tmp_path):
    model = build_model(make_config())
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(tmp_path / "begun")
    assert build_model(make_config(model__init_from=str(tmp_path / "begun"))).generation_config.repetition_penalty == 1.25


def test_of_a_name_on_the_hub_weights_and_settings_are_fetched_and_no_code(make_config, tmp_path, monkeypatch):
    model = build_model(make_config(seed=5))
    model.save_pretrained(tmp_path / "hub", max_shard_size="20kB")
    (tmp_path / "hub/modeling_them.py").touch()

    def fetch(name, allow_patterns):
        assert name == "they/theirs"
        files = [file for file in (tmp_path / "hub").iterdir() if any(fnmatch(file.name, p) for p in allow_patterns)]
        (tmp_path / "here").mkdir()
        for file in files:
            shutil.copy(file, tmp_path / "here")
        return str(tmp_path / "here")

    monkeypatch.setattr("train.setup.snapshot_download", fetch)
    begun = build_model(make_config(model__init_from="they/theirs"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), begun.state_dict().values(), strict=True))
    assert not (tmp_path / "here/modeling_them.py").exists()


def test_weights_and_teachers_may_be_in_the_home_folder(make_config, tmp_path, monkeypatch):
    build_model(make_config()).save_pretrained(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/mine") == str(tmp_path / "mine")
    assert build_model(make_config(model={"init_from": "~/mine"})).config.hybrid_override_pattern == "M*-"


def test_bytes_can_be_asked_for_where_the_weights_come_without_a_tokenizer(make_config, tmp_path):
    build_model(make_config()).save_pretrained(tmp_path / "bare")
    config = make_config(model__init_from=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no tokenizer"):
        build_tokenizer(config, build_model(config))
    config = make_config(model__init_from=str(tmp_path / "bare"), data__tokenizer="bytes")
    assert len(build_tokenizer(config, build_model(config))) == 258


def test_a_token_past_the_vocabulary_is_an_error_before_the_run(make_config):
    with pytest.raises(ValueError, match=r"token id 256, past the vocabulary of the model \(vocab_size=200\)"):
        open_data(make_config(), byte_tokenizer(), 200, quiet=True)


def test_validation_documents_of_one_token_are_an_error_before_the_run(make_config, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    config = make_config(data__val_source=str(tmp_path / "one.txt"))
    with pytest.raises(ValueError, match="nothing to predict"):
        open_data(config, byte_tokenizer(), 258, quiet=True)


@pytest.fixture
def tables(tmp_path):
    """Two files of ten short documents each."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i} " * 9}) + "\n" for i in range(10)))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def two_phases(tables):
    return [{"source": tables[0], "weight": [1, 0]}, {"source": tables[1], "weight": 1}]


def test_a_blend_changes_its_weights_at_a_share_of_the_steps(make_config, tables):
    config = make_config(data__source=None, data__blend=two_phases(tables), data__phases=[0.6], train__steps=9)
    stream, validation = open_data(config, byte_tokenizer(), 258, quiet=True)
    assert stream.borders == [5 * 4]  # 0.6 of 9 steps, 4 samples each
    assert stream.counts(9 * 4) == [10, 26]
    assert stream.names == [shards.meta["source"] for shards in validation] == tables


def test_one_validation_source_for_a_whole_blend_is_scored_once(make_config, tables, text_folder):
    config = make_config(data__source=None, data__blend=two_phases(tables), data__phases=[0.6], data__val_source=str(text_folder))
    assert len(open_data(config, byte_tokenizer(), 258, quiet=True)[1]) == 1


def test_best_fit_packing_is_asked_for_by_its_name(make_config):
    stream, _ = open_data(make_config(data__packing="best-fit"), byte_tokenizer(), 258, quiet=True)
    assert all(isinstance(sampler, BestFit) for sampler in stream.samplers)


def test_a_streamed_source_keeps_a_global_batch_and_needs_its_validation_from_elsewhere(make_config, tables):
    settings = {"data__source": tables[0], "data__streaming": True}
    with pytest.raises(ValueError, match=r"holds nothing out of .*a\.jsonl; set data.val_source"):
        open_data(make_config(**settings), byte_tokenizer(), 258, quiet=True)
    stream, validation = open_data(make_config(**settings, data__val_source=tables[1]), byte_tokenizer(), 258, quiet=True)
    assert isinstance(stream, Streamed) and stream.keep == 4
    assert [shards.meta["source"] for shards in validation] == [tables[1]]


def test_a_tokenizer_with_few_tokens_and_large_ids_does_not_fit(make_config, tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 300, "</s>": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "sparse")
    config = make_config(data__tokenizer=str(tmp_path / "sparse"))
    with pytest.raises(ValueError, match="token ids up to 300 and the model only vocab_size=258; set vocab_size to at least 301"):
        build_tokenizer(config, build_model(config))


@pytest.mark.parametrize(("precision", "compute"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_that_ranks_share_are_gathered_in_the_precision_of_the_run(make_config, monkeypatch, precision, compute):
    given = []
    monkeypatch.setattr("train.sharding.shard", lambda model, mesh, compute: given.append((mesh, compute)))
    build_model(make_config(train__precision=precision), mesh="all")
    assert given == [("all", compute)]


def test_ranks_that_share_a_model_begin_with_the_weights_of_another(make_config, run_ranks, tmp_path):
    build_model(make_config(seed=5)).save_pretrained(tmp_path / "begun")
    config = make_config(model={"init_from": str(tmp_path / "begun")})
    whole = build_model(config)

    def work(rank):
        distributed.init_process_group("gloo")
        shared = build_model(config, mesh=init_device_mesh("cpu", (2,)), group=distributed.group.WORLD)
        for (name, a), b in zip(whole.state_dict().items(), shared.state_dict().values(), strict=True):
            assert torch.equal(a, b.full_tensor() if isinstance(b, DTensor) else b), name
        distributed.destroy_process_group()

    ended = run_ranks(2, work)
    assert [one.status for one in ended] == [0, 0], ended
