from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm.tokenizer import byte_tokenizer
from train import checkpoint
from train.config import Optim
from train.optim import adamw
from train.setup import build_model


@pytest.fixture
def trained(make_config):
    """A model and its optimiser after a step."""
    torch.manual_seed(0)
    model = build_model(make_config())
    optimizer = adamw(model, Optim())
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    ids = torch.arange(12)[None]
    model(ids, targets=ids).loss.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(tmp_path, trained, step=1):
    return checkpoint.save(tmp_path, step, trained[0], byte_tokenizer(), trained[1], {"tokens": 12}, "# Card")


def snapshot(trained):
    model, optimizer = trained
    state = {f"{n}.{k}": v.clone() for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
    return {n: p.detach().clone() for n, p in model.named_parameters()} | state


def test_a_checkpoint_puts_everything_back(tmp_path, trained, make_config):
    folder = save(tmp_path, trained)
    before, rng = snapshot(trained), torch.get_rng_state()
    torch.manual_seed(99)
    fresh = build_model(make_config())
    optimizer = adamw(fresh, Optim())
    assert checkpoint.load(folder, fresh, optimizer) == {"step": 1, "tokens": 12}
    after = snapshot((fresh, optimizer))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_there_is_no_pickle_in_it(tmp_path, trained):
    names = {p.suffix for p in save(tmp_path, trained).rglob("*") if p.is_file()}
    assert names <= {".json", ".safetensors", ".jinja", ".md"}


FILES = [
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["delete", "flip", "truncate"])
def test_every_damage_to_every_file_is_found_and_an_older_whole_one_taken(tmp_path, trained, name, damage, caplog):
    older, newer = save(tmp_path, trained, 1), save(tmp_path, trained, 2)
    assert checkpoint.newest(tmp_path) == newer
    file = newer / name
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[:-3])
    assert checkpoint.newest(tmp_path) == older
    assert str(newer) in caplog.text
    with pytest.raises(ValueError, match="not a valid checkpoint"):
        checkpoint.load(newer, *trained)


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
    monkeypatch.setattr(checkpoint, "validate", lambda folder: [])
    step(*trained)
    before = snapshot(trained)
    with pytest.raises(ValueError) as error:
        checkpoint.load(folder, *trained)
    for part in (first, "extra", second, "float64"):
        assert part in str(error.value)
    after = snapshot(trained)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("failing", ["_sha256", "_sync", "_link", "save_file"])
def test_a_save_that_is_cut_off_leaves_a_run_that_goes_on(tmp_path, trained, monkeypatch, failing):
    older = save(tmp_path, trained, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, trained, 2)
    assert (tmp_path / "model").resolve() == older.resolve() / "model"
    found = checkpoint.newest(tmp_path)  # the new one where only the link was missing
    assert found == tmp_path / "checkpoints" / ("step-2" if failing == "_link" else "step-1")
    checkpoint.rewind(tmp_path, found)
    assert (tmp_path / "model").resolve() == found.resolve() / "model"
    newer = save(tmp_path, trained, 3)
    assert checkpoint.newest(tmp_path) == newer
    assert (tmp_path / "model").resolve() == newer.resolve() / "model"
    assert not list((tmp_path / "checkpoints").glob(".*"))


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


def test_the_model_link_is_relative_so_that_a_run_can_be_moved(tmp_path, trained):
    run = tmp_path / "run"
    run.mkdir()
    save(run, trained)
    run.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "model" / "config.json").is_file()
    assert not Path(tmp_path / "run").exists()
