import io
import json
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm import HybridLMForCausalLM, HybridLMModel
from hybridlm.checkpoint import check_shards, load_tokenizer
from hybridlm.tokenizer import byte_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model(hybrid_override_pattern="ME").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def damage(tensors):
    del tensors["backbone.layers.0.mixer.A_log"], tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"]
    wrong = {"extra": 1, "backbone.layers.7.norm.weight": 1, "backbone.norm_f.weight": 3}
    tensors.update({name: torch.zeros(size) for name, size in wrong.items()})


# Weights that do not fit


@pytest.mark.parametrize("model", [HybridLMForCausalLM, HybridLMModel])
def test_missing_unknown_and_misshapen_weights_are_all_listed(model, folder):
    edit(folder, damage)
    with pytest.raises(ValueError) as error:
        model.from_pretrained(folder)
    kinds = str(error.value).partition("config.json; ")[2].split("; ")
    assert [kind.partition(":")[0] for kind in kinds] == ["missing", "unknown", "of another shape"]
    for kind, names in zip(kinds, (["A_log", "experts.3.up_proj.weight"], ["extra", "layers.7.norm"], ["norm_f.weight"])):
        assert all(name in kind for name in names)


@pytest.mark.parametrize("name", ["backbone.layers.1.mixer.gate.e_score_correction_bias", "lm_head.weight"])
def test_a_single_missing_tensor_is_an_error(name, folder):
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"missing: {name}"):
        HybridLMForCausalLM.from_pretrained(folder)


def test_who_asks_for_the_report_gets_it_instead(folder):
    edit(folder, lambda tensors: damage(tensors) or tensors.pop("backbone.norm_f.weight"))
    _, info = HybridLMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert "backbone.norm_f.weight" in info["missing_keys"] and "extra" in info["unexpected_keys"]


def test_who_accepts_other_shapes_gets_fresh_weights_there(folder):
    edit(folder, lambda tensors: tensors.update({"backbone.norm_f.weight": torch.zeros(3)}))
    model = HybridLMForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert torch.equal(model.backbone.norm_f.weight, torch.ones(32))
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight\.$"):
        HybridLMForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_shard_that_is_not_there_is_an_error(sharded):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="no checkpoint"):
        HybridLMForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("length", [0, 5, 3000])
def test_a_file_that_was_cut_off_is_an_error(length, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="no checkpoint"):
        HybridLMForCausalLM.from_pretrained(folder)


# Nothing outside the folder, and no code


def escapes(sharded, outside):
    """Shard names that lead to a file outside."""
    (sharded / "link.safetensors").symlink_to(outside)
    (sharded / "up").symlink_to(outside.parent)
    return ["../outside.safetensors", str(outside), "link.safetensors", "up/outside.safetensors", "x/../../outside.safetensors"]


@pytest.mark.parametrize("which", range(5))
def test_an_index_that_leads_outside_is_refused_before_it_is_opened(which, sharded, monkeypatch):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(shard, outside)
    name = escapes(sharded, outside)[which]
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {key: name if file == shard.name else file for key, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *a, **k: pytest.fail("weights were opened"))
    with pytest.raises(ValueError, match="outside its folder") as error:
        HybridLMForCausalLM.from_pretrained(sharded)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}, "metadata": {}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none_is_an_error(content, sharded):
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match="no index of weights"):
        HybridLMForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("name", ["model.safetensors.index.fp16.json", "deeper/other.safetensors.index.json"])
def test_every_index_of_the_folder_is_checked(name, sharded):
    """A variant, or one that config.json names as transformers_weights."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../../outside.safetensors"
    (sharded / name).parent.mkdir(exist_ok=True)
    (sharded / name).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        HybridLMForCausalLM.from_pretrained(sharded)


def test_a_link_to_the_folder_itself_is_no_escape(sharded):
    """As RUN/model is one."""
    (sharded.parent / "run").symlink_to(sharded)
    HybridLMForCausalLM.from_pretrained(sharded.parent / "run")


@pytest.mark.parametrize("subfolder", ["", "deeper"])
def test_the_hubs_own_cache_opens(subfolder, sharded, tmp_path):
    """There every file is a link to a blob beside the snapshot."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234" / subfolder, tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sharded.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    HybridLMForCausalLM.from_pretrained(snapshot)
    index = json.loads((snapshot / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../../blobs/0"  # inside the cache, and still no name of a shard
    (snapshot / INDEX).unlink()
    (snapshot / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        check_shards(snapshot)


def test_a_name_on_the_hub_has_its_index_checked_first(sharded, monkeypatch):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../../../other.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    asked = []
    monkeypatch.setattr(
        "hybridlm.checkpoint.cached_file", lambda name, file, **kwargs: asked.append((name, file, kwargs)) or str(sharded / INDEX)
    )
    with pytest.raises(ValueError, match="outside its folder"):
        HybridLMForCausalLM.from_pretrained("someone/something", revision="abc", local_files_only=True)
    ((name, file, kwargs),) = asked
    assert (name, file, kwargs["revision"], kwargs["local_files_only"]) == ("someone/something", INDEX, "abc", True)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no checkpoint"),
        ({"use_safetensors": None}, "no checkpoint"),
        ({"use_safetensors": False}, "safetensors files alone"),
    ],
)
def test_a_pickle_is_never_opened(arguments, message, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=message):
        HybridLMForCausalLM.from_pretrained(folder, **arguments)


# Folders that are none, or lie deeper


def test_a_subfolder_opens(folder):
    HybridLMForCausalLM.from_pretrained(folder.parent, subfolder="model")
    with pytest.raises(ValueError, match=r"elsewhere is no checkpoint folder: it has no config\.json"):
        HybridLMForCausalLM.from_pretrained(folder.parent, subfolder="elsewhere")


def test_an_index_in_a_subfolder_is_checked(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        HybridLMForCausalLM.from_pretrained(sharded.parent, subfolder="sharded")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "runs/demo/model"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has been
    with pytest.raises(ValueError, match=f"no checkpoint folder {name}"):
        HybridLMForCausalLM.from_pretrained(name)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        HybridLMForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama'"):
        HybridLMForCausalLM.from_pretrained(tmp_path)


def test_a_missing_tokenizer_says_so(folder):
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_beside_a_tokenizer_never_runs(answer, folder, monkeypatch):
    byte_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | code))
    (folder / "evil.py").write_text(f"open({str(folder / 'sentinel')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with suppress(ValueError):
        load_tokenizer(folder)
    assert not (folder / "sentinel").exists()


def test_the_panic_of_a_tokenizer_is_an_error(folder, monkeypatch):
    class Panic(BaseException):
        pass

    def panics(*args, **kwargs):
        raise Panic("index out of bounds")

    monkeypatch.setattr("hybridlm.checkpoint.AutoTokenizer.from_pretrained", panics)
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_tokenizer(folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match="merge the adapter"):
        HybridLMForCausalLM.from_pretrained(folder)


def test_names_of_a_deeper_index_are_read_from_the_model_folder(sharded):
    """As transformers reads them where config.json names that index."""
    index = json.loads((sharded / INDEX).read_text())
    (sharded / "sub").mkdir()
    (sharded.parent / "outside.safetensors").write_bytes(b"")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    index["weight_map"]["lm_head.weight"] = "link.safetensors"
    (sharded / "sub" / INDEX).write_text(json.dumps(index))
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"transformers_weights": f"sub/{INDEX}"}))
    with pytest.raises(ValueError, match=r"outside its folder.*'link\.safetensors'"):
        HybridLMForCausalLM.from_pretrained(sharded)


def test_a_model_larger_than_any_memory_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}))
    with pytest.raises(ValueError, match="cannot be opened"):
        HybridLMForCausalLM.from_pretrained(folder)


def test_a_tokenizer_with_two_tokens_of_one_id_is_an_error(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    first, second, *_ = content["model"]["vocab"]
    content["model"]["vocab"][second] = content["model"]["vocab"][first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"gives several tokens one id \(such as 0\)"):
        load_tokenizer(tmp_path)
