import errno
import itertools
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from hybridlm import HybridLMForCausalLM
from hybridlm.tokenizer import byte_tokenizer
from train import checkpoint, files, tensor_files
from train.optim import build_optimizers
from train.settings import Optim
from train.setup import build_model
from train.weights import load_weights


@pytest.fixture
def trained(make_config):
    """A model and its optimisers after a step."""
    torch.manual_seed(0)
    model = build_model(make_config())
    optimizers = build_optimizers(model, Optim(name="muon"))
    step(model, optimizers)
    return model, optimizers


def step(model, optimizers):
    ids = torch.arange(12)[None]
    model(ids, targets=ids).loss.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def state_of(step):
    return {
        "step": step, "samples": 1, "tokens": 12, "identity": {"seed": 0}, "cursor": {}, "spikes": {"losses": [5.0, 4.5]},
        "validation": ["ab"],
    }  # fmt: skip


def snapshot_of(trained, step=1, copy=True):
    files = checkpoint.sidecars(trained[0], byte_tokenizer()) | {"README.md": b"# Card"}
    return checkpoint.snapshot(trained[0], trained[1], state_of(step), files, copy)


def save(tmp_path, trained, step=1):
    return checkpoint.write(tmp_path, snapshot_of(trained, step))


def seal(folder):
    """A manifest that agrees with the files as they are now."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    (folder / "manifest.json").write_text(checkpoint._manifest({name: files.sha256_of(folder / name) for name in names}))


def snapshot(trained):
    model, optimizers = trained
    state = {name: value.clone() for name, value in checkpoint._optimizer_tensors(checkpoint._states(model, optimizers)).items()}
    return {n: p.detach().clone() for n, p in model.named_parameters()} | state


def test_a_large_checkpoint_is_hashed_with_a_progress_bar_and_one_that_is_pruned_meanwhile_is_not_whole(
    tmp_path, trained, monkeypatch, capsys
):
    folder = save(tmp_path, trained)
    assert checkpoint.validate(folder) == []
    assert "checking the checkpoint" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "LARGE", 10_000)
    assert checkpoint.validate(folder) == []
    assert "checking the checkpoint: 100%" in capsys.readouterr().err
    opened = files.sha256_of

    def pruned(path, advance):
        (folder / "state.json").unlink(missing_ok=True)
        return opened(path, advance)

    monkeypatch.setattr(files, "sha256_of", pruned)
    assert checkpoint.validate(folder) == ["state.json has been altered"]


def test_a_checkpoint_puts_everything_back(tmp_path, trained, make_config):
    folder = save(tmp_path, trained)
    before, rng = snapshot(trained), torch.get_rng_state()
    torch.manual_seed(99)
    fresh = build_model(make_config())
    optimizers = build_optimizers(fresh, Optim(name="muon"))
    state = checkpoint.load(folder, fresh, optimizers)
    assert state == state_of(1) | {"fingerprint": state["fingerprint"]}
    after = snapshot((fresh, optimizers))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_random_state_of_a_device_that_is_not_here_is_passed_over(tmp_path, trained):
    shot = snapshot_of(trained)
    shot.optimizer["rng_cuda"] = tensor_files.part(torch.zeros(16, dtype=torch.uint8))
    checkpoint.load(checkpoint.write(tmp_path, shot), *trained)


def test_a_weight_in_a_wrapper_that_gathers_it_in_fp8_is_saved_as_it_is():
    utils = pytest.importorskip("torchao.float8.fsdp_utils")
    float8 = pytest.importorskip("torchao.float8")
    weight = torch.randn(16, 16)
    wrapped = utils.WeightWithDynamicFloat8CastTensor(weight, None, float8.Float8LinearConfig().cast_config_weight.target_dtype)
    assert tensor_files.local(torch.nn.Parameter(wrapped)).data_ptr() == weight.data_ptr()


def test_there_is_no_pickle_in_it(tmp_path, trained):
    names = {p.suffix for p in save(tmp_path, trained).rglob("*") if p.is_file()}
    assert names <= {".json", ".safetensors", ".jinja", ".md"}


def test_the_model_folder_is_what_save_pretrained_writes(tmp_path, trained):
    folder = save(tmp_path / "run", trained) / "model"
    trained[0].save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    names = sorted(p.name for p in (tmp_path / "theirs").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "README.md"])
    for name in names:
        ours, theirs = folder / name, tmp_path / "theirs" / name
        if name.endswith(".safetensors"):
            ours, theirs = (safe_open(str(file), "pt") for file in (ours, theirs))
            assert ours.metadata() == theirs.metadata()
            assert set(ours.keys()) == set(theirs.keys())
            assert all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in ours.keys())  # noqa: SIM118
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_large_weights_come_in_shards_that_open(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 20_000)
    folder = save(tmp_path, trained)
    assert len(list((folder / "model").glob("model-*.safetensors"))) > 2
    assert len(list(folder.glob("optimizer-*.safetensors"))) > 2
    assert not checkpoint.validate(folder)
    stock, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert type(stock) is NemotronHForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = trained[0].state_dict()
    assert all(torch.equal(own[name.replace("model.", "backbone.", 1)], tensor) for name, tensor in stock.state_dict().items())
    opened = HybridLMForCausalLM.from_pretrained(folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(opened.state_dict().values(), trained[0].state_dict().values(), strict=True))
    before = snapshot(trained)
    step(*trained)
    checkpoint.load(folder, *trained)
    assert all(torch.equal(before[name], value) for name, value in snapshot(trained).items())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
def test_tensors_of_every_kind_are_read_back_by_the_library(tmp_path, dtype):
    tensors = {
        "b.c": torch.arange(6).reshape(2, 3).t().to(dtype),
        "a": torch.ones((), dtype=dtype),
        "z": torch.ones(5),
        "0": torch.ones(0),
    }
    parts = {name: tensor_files.part(tensor) for name, tensor in tensors.items()}
    tensor_files.write(tmp_path, {"t.safetensors": parts}, None)
    back = load_file(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    data = (tmp_path / "t.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0  # each is aligned to its own width, for those who map the file
    assert not any(header[name]["data_offsets"][0] % tensor.element_size() for name, tensor in tensors.items())


def damage(file, how, rng):
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif how == "truncate":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(data + b"\n")


@pytest.mark.parametrize("how", ["delete", "flip", "truncate", "empty", "lengthen"])
def test_every_damage_to_every_file_is_found_and_named_and_an_older_checkpoint_taken(tmp_path, trained, how, caplog):
    older, newer = save(tmp_path, trained, 1), save(tmp_path, trained, 2)
    assert checkpoint.newest(tmp_path) == newer
    rng = random.Random(how)
    names = sorted(p.relative_to(newer) for p in newer.rglob("*") if p.is_file())
    assert len(names) == 9
    for name in names:
        for _ in range(10 if how == "flip" else 2):
            content = (newer / name).read_bytes()
            damage(newer / name, how, rng)
            (fault,) = checkpoint.validate(newer)
            assert fault.startswith(str(name))
            caplog.clear()
            assert checkpoint.newest(tmp_path) == older
            assert f"{newer}: {name}" in caplog.text
            if name.suffix != ".safetensors":  # `load` compares those with what was saved once they are in memory
                with pytest.raises(ValueError, match=f"not a valid checkpoint: {name}"):
                    checkpoint.load(newer, *trained)
            (newer / name).write_bytes(content)
    assert checkpoint.newest(tmp_path) == newer


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model/model.safetensors", "lm_head.weight"),
        ("optimizer.safetensors", "lm_head.weight.exp_avg"),
        ("optimizer.safetensors", "backbone.norm_f.weight.step"),
    ],
)
def test_a_bit_that_flips_after_the_files_were_hashed_is_found_in_memory(tmp_path, trained, file, tensor):
    path = save(tmp_path, trained) / file
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    data[8 + size + (first + end) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(ValueError, match="what is in memory is not what was saved"):
        checkpoint.load(tmp_path / "checkpoints/step-1", *trained)


def name_in(older, newer, file):
    return file.relative_to(newer if newer in file.parents else older).as_posix()


def test_files_that_changed_places_are_found_and_named(tmp_path, trained):
    older = save(tmp_path, trained, 1)
    step(*trained)
    newer = save(tmp_path, trained, 2)
    names = sorted(p.relative_to(newer).as_posix() for p in newer.rglob("*") if p.is_file() and p.name != "manifest.json")
    pairs = [(newer / a, newer / b) for a, b in itertools.combinations(names, 2)]
    for a, b in pairs + [(older / name, newer / name) for name in names]:
        left, right = a.read_bytes(), b.read_bytes()
        a.write_bytes(right), b.write_bytes(left)
        found = [*checkpoint.validate(older), *checkpoint.validate(newer)]
        assert len(found) == 2 * (left != right)
        if left != right:
            assert {fault.split(" ")[0] for fault in found} == {name_in(older, newer, file) for file in (a, b)}
        a.write_bytes(left), b.write_bytes(right)


def test_folders_that_changed_places_are_found(tmp_path, trained):
    older, newer = save(tmp_path, trained, 1), save(tmp_path, trained, 2)
    older.rename(tmp_path / "other"), newer.rename(older), (tmp_path / "other").rename(newer)
    for folder, own in ((older, 2), (newer, 1)):
        assert checkpoint.validate(folder) == [f"state.json is of step {own}: the folder has another's name"]


@pytest.mark.parametrize("key", checkpoint.STATE)
def test_nothing_that_a_resume_needs_may_be_missing(tmp_path, trained, key):
    folder = save(tmp_path, trained)
    state = json.loads((folder / "state.json").read_text())
    del state[key]
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    with pytest.raises(ValueError, match=rf"state\.json has no {key}"):
        checkpoint.load(folder, *trained)


def test_a_manifest_that_names_too_little_or_what_lies_outside_is_refused_before_it_is_opened(tmp_path, trained):
    folder = save(tmp_path, trained)
    secret = tmp_path / "secret"
    secret.write_text("s")
    for digests in ({}, {"state.json": "0" * 64}):
        (folder / "manifest.json").write_text(checkpoint._manifest(digests))
        assert any("optimizer.safetensors is missing in manifest.json" in fault for fault in checkpoint.validate(folder))
    for name in ("../../secret", str(secret), "link"):
        seal(folder)
        if name == "link":
            (folder / "link").symlink_to(secret)
        digests = json.loads((folder / "manifest.json").read_text())["files"] | {name: files.sha256_of(secret)}
        (folder / "manifest.json").write_text(checkpoint._manifest(digests))
        assert f"{name} leads outside the checkpoint" in checkpoint.validate(folder)


def test_a_pickle_in_the_place_of_any_file_or_beside_them_is_refused_and_never_run(tmp_path, trained):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sentinel",))

    folder = save(tmp_path, trained)
    for name in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()):
        content, manifest = (folder / name).read_bytes(), (folder / "manifest.json").read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match="not a valid checkpoint"):
            checkpoint.load(folder, *trained)
        if name.endswith((".safetensors", "state.json")):  # what is parsed, with a manifest made to fit
            seal(folder)
            with pytest.raises(ValueError, match="not a valid checkpoint"):
                checkpoint.load(folder, *trained)
        (folder / name).write_bytes(content), (folder / "manifest.json").write_bytes(manifest)
    for name in ("training_args.bin", "model/pytorch_model.bin", "optimizer.pt", "rng_state.pth", "model/model-2.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match=f"{name} is not in manifest.json: it does not belong here"):
            checkpoint.load(folder, *trained)
        (folder / name).unlink()
    checkpoint.load(folder, *trained)
    assert not (tmp_path / "sentinel").exists()


def test_a_safetensors_header_past_all_measure_is_refused(tmp_path, trained):
    folder = save(tmp_path, trained)
    (folder / "optimizer.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    seal(folder)
    with pytest.raises(ValueError, match="not a valid checkpoint"):
        checkpoint.load(folder, *trained)


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_weights_of_any_folder_fill_a_model_whatever_it_held(tmp_path, trained, size, make_config):
    theirs = build_model(make_config()).to(torch.bfloat16)  # A_log, D and dt_bias stay fp32
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (size == "20KB")
    file = tmp_path / ("mtp.safetensors" if index.exists() else "model.safetensors")
    save_file({"mtp.layers.0.weight": torch.ones(3)} | ({} if index.exists() else load_file(file)), file)
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"]["mtp.layers.0.weight"] = file.name
        index.write_text(json.dumps(content))
    for p in trained[0].parameters():
        p.data.fill_(torch.nan)
    load_weights(tmp_path, trained[0])
    opened = HybridLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in trained[0].state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, opened[name])


def test_weights_that_do_not_fit_are_all_named_and_nothing_is_changed_by_them(tmp_path, trained):
    folder = save(tmp_path, trained) / "model"
    tensors = load_file(folder / "model.safetensors")
    first, second, third, fourth = [name for name in sorted(tensors) if "mixer" in name][:4]
    tensors["extra"] = tensors.pop(first)
    tensors[second], tensors[third] = torch.zeros(3), tensors[third].to(torch.int32)
    tensors[fourth] = tensors[fourth].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    step(*trained)
    before = snapshot(trained)
    with pytest.raises(ValueError, match="do not fit this model") as error:
        load_weights(folder, trained[0])
    for part in (
        f"missing ['{first}']",
        "unknown ['extra']",
        f"{second}: wanted",
        f"{third}: wanted",
        "int32",
        f"{fourth}: wanted",
        "F8_E4M3",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(trained).items())


def test_a_folder_without_weights_or_with_an_index_that_leads_outside_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match=r"there is no checkpoint folder .* on this machine"):
        load_weights("nvidia/Nemotron-H-8B-Base-8K", trained[0])
    folder = save(tmp_path, trained) / "model"
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no weights: neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_weights(folder, trained[0])
    weight_map = dict.fromkeys(trained[0].state_dict(), "absent.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"absent\.safetensors cannot be read"):
        load_weights(folder, trained[0])
    weight_map = dict.fromkeys(trained[0].state_dict(), "../../../other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="names files outside its folder"):
        load_weights(folder, trained[0])
    (folder / "adapter_config.json").touch()  # of a download too, of which only its name was looked at before
    with pytest.raises(ValueError, match=r"adapter_config\.json, which could name other weights"):
        load_weights(folder, trained[0])


def test_weights_that_are_not_those_that_were_saved_are_found_after_the_load(tmp_path, trained):
    folder = save(tmp_path, trained)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"fingerprint": "0" * 64}))
    seal(folder)
    with pytest.raises(ValueError, match="what is in memory is not what was saved"):
        checkpoint.load(folder, *trained)


def test_a_snapshot_stays_as_it_was_while_training_goes_on(tmp_path, trained):
    before = snapshot(trained)
    shot = snapshot_of(trained)
    step(*trained)
    checkpoint.load(checkpoint.write(tmp_path, shot), *trained)
    assert all(torch.equal(before[name], value) for name, value in snapshot(trained).items())


def test_a_run_without_a_whole_checkpoint_is_an_error_and_not_a_new_run(tmp_path, trained):
    assert checkpoint.newest(tmp_path) is None
    for number in (1, 2):
        (save(tmp_path, trained, number) / "state.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)no checkpoint of this run is whole.*step-2.*state\.json is missing.*step-1"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("file", ["model/model.safetensors", "optimizer.safetensors"])
def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_changed(tmp_path, trained, file, monkeypatch):
    folder = save(tmp_path, trained)
    tensors = load_file(folder / file)
    first, second = [name for name in sorted(tensors) if "mixer" in name][:2]
    tensors["extra"] = tensors.pop(first)
    tensors[second] = torch.zeros(3, dtype=torch.float64)
    save_file(tensors, folder / file)
    monkeypatch.setattr(checkpoint, "validate", lambda folder, tensors: [])
    step(*trained)
    before = snapshot(trained)
    with pytest.raises(ValueError) as error:
        checkpoint.load(folder, *trained)
    for part in (first, "extra", second, "float64"):
        assert part in str(error.value)
    after = snapshot(trained)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Failing:
    """Lets `after` operations pass and fails every later one until it is told not to."""

    def __init__(self, after, error):
        self.left, self.error = after, error

    def __call__(self, operation, *arguments):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.error, os.strerror(self.error), str(arguments[0]))
        return operation(*arguments)


def count_operations(tmp_path, trained, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "perform", lambda operation, *a: calls.append(operation.__name__) or operation(*a))
        save(tmp_path / "counted", trained, 1)
        save(tmp_path / "counted", trained, 2)
        checkpoint.prune(tmp_path / "counted", 1)
    return len(calls)


def fail_at_every_operation(tmp_path, trained, monkeypatch, errors):
    """Each operation of two saves and a pruning fails, and all later ones, with each of the errors that `errors(i)` gives."""
    total = count_operations(tmp_path, trained, monkeypatch)
    assert total > 60
    for i, error in [(n, error) for n in range(total) for error in errors(n)]:
        run = tmp_path / f"{i}-{error}"
        with monkeypatch.context() as patch:
            patch.setattr(files, "perform", Failing(i, error))
            with pytest.raises(OSError) as caught:
                for number in (1, 2):
                    save(run, trained, number)
                checkpoint.prune(run, 1)
        assert caught.value.errno == error
        found = checkpoint.newest(run)
        checkpoint.rewind(run, found)  # as the next start does
        assert not list((run / "checkpoints").glob(".*"))
        if found:
            assert (run / "model").resolve() == found.resolve() / "model"
        newer = save(run, trained, 3)
        assert checkpoint.newest(run) == newer
        assert (run / "model").resolve() == newer.resolve() / "model"


ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


def test_a_disk_that_fails_at_any_operation_is_an_error_and_leaves_a_run_that_goes_on(tmp_path, trained, monkeypatch):
    fail_at_every_operation(tmp_path, trained, monkeypatch, lambda i: [ERRORS[i % 3]] if i % 4 == 0 else [])


@pytest.mark.faults
def test_a_disk_that_fails_in_any_way_at_any_operation(tmp_path, trained, monkeypatch):
    fail_at_every_operation(tmp_path, trained, monkeypatch, lambda i: ERRORS)


def test_a_save_that_fails_says_what_to_do_and_which_checkpoints_are_whole(tmp_path, trained, monkeypatch):
    save(tmp_path, trained, 1)
    monkeypatch.setattr(files, "perform", Failing(9, errno.ENOSPC))
    with pytest.raises(OSError, match=r"checkpoint of step 2 could not be written \(No space left.*\(step-1\) are as they were"):
        save(tmp_path, trained, 2)


@pytest.mark.parametrize("content", ["nothing", "", "garbage", "dangling"])
def test_a_resume_does_not_need_the_model_link_and_mends_it(tmp_path, trained, content):
    folder = save(tmp_path, trained)
    link = tmp_path / "model"
    link.unlink()
    if content == "dangling":
        link.symlink_to("checkpoints/step-99/model")
    elif content != "nothing":
        link.write_text(content)
    assert checkpoint.newest(tmp_path) == folder
    checkpoint.rewind(tmp_path, folder)
    assert link.resolve() == folder.resolve() / "model"


def test_what_a_save_that_was_cut_off_has_left_does_not_come_into_the_next_of_that_step(tmp_path, trained):
    left = tmp_path / "checkpoints" / ".step-1.unfinished" / "model"
    left.mkdir(parents=True)
    (left / "model-00001-of-00002.safetensors").touch()
    assert checkpoint.validate(save(tmp_path, trained)) == []


def test_going_back_sets_the_later_checkpoints_aside(tmp_path, trained):
    folders = [save(tmp_path, trained, number) for number in (1, 2, 10)]
    checkpoint.rewind(tmp_path, folders[1])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["set-aside-1", "step-1", "step-2"]
    assert [p.name for p in (tmp_path / "checkpoints" / "set-aside-1").iterdir()] == ["step-10"]
    assert (tmp_path / "model").resolve() == folders[1].resolve() / "model"
    checkpoint.rewind(tmp_path, None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["set-aside-1", "set-aside-2"]
    assert not (tmp_path / "model").is_symlink()


def test_pruning_keeps_the_newest_by_number(tmp_path, trained):
    for number in (9, 10, 100):
        save(tmp_path, trained, number)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-100"]


def test_pruning_leaves_those_of_every_so_many_steps(tmp_path, trained):
    for number in (2, 3, 4, 6, 7):
        save(tmp_path, trained, number)
    checkpoint.prune(tmp_path, 1, every=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-6", "step-7"]


def test_the_model_link_is_relative_so_that_a_run_can_be_moved(tmp_path, trained):
    run = tmp_path / "run"
    run.mkdir()
    save(run, trained)
    run.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "model" / "config.json").is_file()
    assert not Path(tmp_path / "run").exists()


def test_only_folders_with_a_step_in_their_name_are_checkpoints(tmp_path):
    for name in ("step-10", "step-9", "step-²", "step-", "step-1a", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [(step, folder.name) for step, folder in checkpoint.folders(tmp_path)] == [(9, "step-9"), (10, "step-10")]
