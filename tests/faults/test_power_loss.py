"""A machine that loses its power at any file operation: what the disk may hold then, and that a run goes on from it.

A kill cannot show that a sync is missing, since the kernel keeps what a dead process wrote. So the operations of a run are
recorded, and every beginning of them is laid out as disks that have lost what was not synced (`disk`).
"""

import inspect
import random
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from hybridlm.strict_yaml import load_yaml
from tests.faults import disk, harness
from train import checkpoint, files
from train.config import parse
from train.loop import train
from train.optim import build_optimizers
from train.settings import Optim
from train.setup import build_model


def record(lab, name, monkeypatch, keep=2):
    """The run directory and the operations of a run, then of one that goes back to a checkpoint of the first.

    In between stands what was promised: ("saved", step, files), ("going back", step), ("gone back", step).
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    config = parse(load_yaml(str(harness.write_config(lab, name, keep_checkpoints=keep))))
    run_dir, log = Path(config.run_dir), []
    run_dir.mkdir()
    write, rewind = checkpoint.write, checkpoint.rewind

    def writing(*arguments):
        folder = write(*arguments)
        content = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        log.append(("saved", int(folder.name.removeprefix("step-")), content))
        return folder

    def rewinding(run_dir, start_from):
        step = int(start_from.name.removeprefix("step-")) if start_from else 0
        log.append(("going back", step))
        rewind(run_dir, start_from)
        log.append(("gone back", step))

    with monkeypatch.context() as patch:
        patch.setattr(files, "perform", disk.recorder(log))
        patch.setattr(checkpoint, "write", writing)
        patch.setattr(checkpoint, "rewind", rewinding)
        train(config)
        AcceleratorState._reset_state(reset_partial_state=True)
        if keep > 1:
            train(config, resume=str(run_dir / "checkpoints" / f"step-{harness.STEPS - 2}"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir, log


def check(run_dir, floor, ceiling, contents, model, optimizers):
    """A run directory after a loss of power: its newest checkpoint is of a step from `floor` (0: or none) to `ceiling`."""
    for folder in (run_dir / "checkpoints").glob("step-*"):
        assert not checkpoint.validate(folder)  # one rename makes it and one takes it away: it is whole or not there
    found = checkpoint.newest(run_dir)
    step = int(found.name.removeprefix("step-")) if found else 0
    assert floor <= step <= ceiling
    if found:
        assert {p.relative_to(found).as_posix(): p.read_bytes() for p in found.rglob("*") if p.is_file()} == contents[step]
        assert checkpoint.load(found, model, optimizers)["step"] == step
    if floor:
        assert (run_dir / "model").resolve().parent in (run_dir.resolve() / "checkpoints").glob("step-*")
    if floor or (run_dir / "config.yaml").exists():
        assert (run_dir / "config.yaml").read_text() == run_dir.with_suffix(".yaml").read_text()


def lose_power(run_dir, log, seed, every=1):
    """Lays out what may be left after each `every`-th operation of the log, and checks it. Returns how many states there were."""
    contents = {event[1]: event[2] for event in log if event[0] == "saved"}
    model = build_model(parse(load_yaml(str(run_dir.with_suffix(".yaml")))))
    optimizers = build_optimizers(model, Optim())
    machine, floor, ceiling = disk.Disk(run_dir), 0, 0
    ways = disk.ways(random.Random(seed))
    seen, place = set(), run_dir.with_name(f"{run_dir.name}-after")
    for number, event in enumerate(log):
        if event[0] in ("saved", "going back"):
            floor = event[1]
        elif event[0] == "gone back":
            ceiling = event[1]
        else:
            machine.apply(event)
            if event[0] == "replace" and event[2].parent == run_dir / "checkpoints" and event[2].name.startswith("step-"):
                ceiling = int(event[2].name.removeprefix("step-"))
        if number % every:
            continue
        for way, (names, content) in ways.items():
            state = list(disk.survivors(machine.top, names, content))
            key = sha256(repr((floor, ceiling, state)).encode()).digest()
            if key in seen:
                continue
            seen.add(key)
            disk.lay_out(state, place)
            place.with_suffix(".yaml").write_text(run_dir.with_suffix(".yaml").read_text())
            try:
                check(place, floor, ceiling, contents, model, optimizers)
            except (AssertionError, ValueError) as error:
                raise AssertionError(f"after operation {number} ({event[:2]}), {way}, seed {seed}: {error}") from error
            finally:
                shutil.rmtree(place)
    return len(seen)


def test_power_lost_at_some_operations_leaves_the_last_checkpoint(lab, monkeypatch):
    assert lose_power(*record(lab, "unplugged-sometimes", monkeypatch), seed=0, every=40) > 30


@pytest.mark.faults
def test_the_run_directory_itself_is_there_after_a_loss_of_power(lab, monkeypatch):
    log = []
    monkeypatch.setattr(files, "perform", disk.recorder(log))
    train(parse(load_yaml(str(harness.write_config(lab, "new")))))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert ("fsync", lab) in log


@pytest.mark.faults
@pytest.mark.parametrize("keep", [1, 2])
def test_power_lost_at_any_operation_leaves_the_last_checkpoint(lab, monkeypatch, keep, record_property):
    states = lose_power(*record(lab, f"unplugged-{keep}", monkeypatch, keep), seed=keep)
    record_property("power-loss states checked", states)
    assert states > 800


MANIFEST = "files.write_text(unfinished / MANIFEST, _manifest(digests))"
UNTIL_SAFE = {
    "files are not synced": (files.write, {"perform(os.fsync, descriptor)": "pass"}),
    "folders are not synced": (files.sync, {"perform(os.fsync, descriptor)": "pass"}),
    "renames are not synced": (files.rename, {"sync(": "str("}),
    "renames are synced on one side": (files.rename, {"(new.parent, old.parent)": "(new.parent,)"}),
    "the folder of the model is not synced": (checkpoint._finish, {'files.sync(unfinished / "model")': "pass"}),
    "the folder of the checkpoint is not synced": (checkpoint._finish, {"files.sync(unfinished)": "pass"}),
    "renamed before the manifest is written": (
        checkpoint._finish,
        {MANIFEST: "files.rename(unfinished, final); unfinished = final; " + MANIFEST},
    ),
    "written in its place": (checkpoint.write, {'f".step-{step}.unfinished"': 'f"step-{step}"'}),
    "the last one deleted before the next is there": (
        checkpoint.write,
        {"    try:\n        together": "    for _, old in folders(run_dir):\n        files.remove(old)\n"
        "    try:\n        together"},
    ),
    "deleted in its place": (checkpoint.prune, {"files.rename(folder, deleted)": "deleted = folder"}),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("mutant", UNTIL_SAFE)
def test_power_loss_finds_out_who_does_not_sync_or_not_in_order(lab, monkeypatch, mutant, record_property):
    function, changes = UNTIL_SAFE[mutant]
    source = inspect.getsource(function)
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} is no longer in {function.__name__}: change the mutant too"
        source = source.replace(old, new)
    changed = {}
    exec(source, vars(sys.modules[function.__module__]), changed)
    record_property("power-loss mutants made", 1)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[function.__module__], function.__name__, changed[function.__name__])
        recorded = record(lab, mutant.replace(" ", "-"), patch, keep=1 if "last one" in mutant else 2)
    with pytest.raises(AssertionError, match=r"after operation"):
        lose_power(*recorded, seed=0, every=3)
    record_property("power-loss mutants caught", 1)
