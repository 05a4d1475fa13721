import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from train import __main__ as cli
from train import status
from train.loop import train
from train.run import append


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run(kept, make_config, tmp_path, monkeypatch):
    """The folder of a run of 8 steps that is done, with checkpoints of steps 4 and 8: trained once, and copied for each test."""
    if not kept.exists():
        train(make_config(run_dir=str(kept)))
    folder = tmp_path / "a run"
    shutil.copytree(kept, folder, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return folder.relative_to(tmp_path)


def look(run):
    """What `look` says, after a check that it can be printed both ways."""
    content = status.look(run)
    json.dumps(content, allow_nan=False)
    assert all(len(line) <= 80 for line in status.page(content).splitlines())
    return content, " ".join(status.page(content).split())


def write_lines(file, *lines):
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def test_a_finished_run_is_done_and_its_report_comes_next(run):
    content, page = look(run)
    assert (content["state"], content["step"], content["steps"], content["tokens"]) == ("done", 8, 8, 8 * 4 * 32)
    assert content["checkpoint"]["step"] == 8 and not content["checkpoint"]["faults"] and not content["not_whole"]
    files = (run / "checkpoints" / "step-8").rglob("*")
    assert content["checkpoint"]["bytes"] == sum(p.stat().st_size for p in files if p.is_file())
    assert [one["step"] for one in content["validations"]] == [0, 4, 8]
    assert content["next"] == "python -m eval report --run 'a run'"
    assert "[########################] 100%, step 8 of 8, 1.02 K tokens" in page
    assert "left at that speed" not in page


def test_looking_changes_nothing_and_leaves_nothing_behind(run):
    def everything():
        return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in [run, *run.rglob("*")]}

    before = everything()
    look(run)
    assert everything() == before
    (run / ".lock").touch()
    before = everything()
    look(run)
    assert everything() == before


def test_who_holds_the_lock_is_running_and_keeps_it(run):
    shutil.rmtree(run / "checkpoints" / "step-8")
    lock = filelock.FileLock(run / ".lock")
    with lock:
        owner = json.dumps({"host": "node-3", "pid": 4711, "since": 1.0})
        (run / "owner.json").write_text(owner)
        content, page = look(run)
        assert content["state"] == "running" and content["next"] == "tail -f 'a run'/metrics.jsonl"
        assert "running, process 4711 on node-3; last line" in page
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(run / ".lock").acquire(timeout=0)
        (run / "owner.json").write_text("[")
        assert "state running; last line" in look(run)[1]
        (run / "owner.json").write_text(owner)  # and left there by a run that was killed
    content, page = look(run)
    assert content["state"] == "stopped" and content["owner"] is None
    with lock.acquire(timeout=0):
        pass


def test_another_look_at_the_same_moment_is_not_taken_for_a_run(run):
    (run / ".lock").touch()
    with (run / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert look(run)[0]["state"] == "done"


def test_a_process_that_was_killed_holds_no_lock(run):
    code = "import filelock, os, signal; filelock.FileLock('a run/.lock').acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (run / ".lock").exists() and look(run)[0]["state"] == "done"


def test_a_stopped_run_says_what_it_will_run_again_and_how_long_the_rest_takes(run):
    shutil.rmtree(run / "checkpoints" / "step-8")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", *[line for line in lines if line["step"] <= 6])
    append(run / "metrics.jsonl", {"step": 7, "tokens": 896, "loss": 3.25, "tokens_per_second": 0.5})
    content, page = look(run)
    assert (content["state"], content["step"], content["loss"]) == ("stopped", 7, 3.25)
    assert content["seconds_left"] == 1 * 4 * 32 / 0.5
    assert "0 tokens/s, 4 min left at that speed" in page
    assert "stopped; not saved: the last 3 steps, which will be run again" in page
    assert "87%, step 7 of 8" in page
    assert content["next"] == "python -m train --config 'a run'/config.yaml"


def test_a_run_stopped_before_its_first_checkpoint_will_run_all_of_it_again(run):
    shutil.rmtree(run / "checkpoints")
    content, page = look(run)
    assert (content["state"], content["checkpoint"]) == ("stopped", None)
    assert "not saved: the last 8 steps" in page


def test_a_run_stopped_after_saving_has_nothing_to_run_again(run):
    shutil.rmtree(run / "checkpoints" / "step-8")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", *[line for line in lines if line["step"] <= 4])
    content, page = look(run)
    assert content["state"] == "stopped" and "not saved" not in page


def test_a_run_that_never_started_has_no_figures(run):
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    content, page = look(run)
    assert (content["state"], content["step"], content["checkpoint"], content["loss"]) == ("never started", 0, None, None)
    assert "checkpoint none" in page and "0%, step 0 of 8" in page
    assert content["next"] == "python -m train --config 'a run'/config.yaml"


def test_the_newest_whole_checkpoint_counts_and_the_others_are_named_with_their_faults(run):
    (run / "checkpoints" / "step-8" / "state.json").write_text("{}")
    (run / "checkpoints" / ".step-8.unfinished").mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    content, page = look(run)
    assert content["state"] == "stopped" and content["checkpoint"]["step"] == 4
    assert [(one["step"], one["faults"]) for one in content["not_whole"]] == [(8, ["state.json has been altered"])]
    assert "step 8 is not whole: state.json has been altered" in page
    assert ".step-8.unfinished: a save that was cut off" in page


def test_a_run_without_a_whole_checkpoint_is_broken_and_has_no_next_command(run):
    for number in (4, 8):
        (run / "checkpoints" / f"step-{number}" / "optimizer.safetensors").unlink()
    content, page = look(run)
    assert (content["state"], content["next"]) == ("broken", None)
    assert "broken: no checkpoint is whole" in page and "checkpoint none that is whole" in page and "next" not in page


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train: [", "cannot be read"),
        ("- 1", "must hold `key: value` lines"),
        ("train: 3", "not the settings of a run"),
        ("train: {steps: 8}", "'global_batch'"),
        ("train: {steps: 0, global_batch: 4}\ndata: {seq_len: x}", "steps is 0, seq_len is 'x'"),
        (f"train: {{steps: 1{'0' * 400}, global_batch: 4}}\ndata: {{seq_len: 1}}", "steps is 1000"),
    ],
)
def test_a_run_whose_settings_cannot_be_read_is_broken_and_still_shown(run, text, fault):
    (run / "config.yaml").write_text(text)
    content = status.look(run)
    assert content["state"] == "broken" and fault in content["fault"]
    assert content["checkpoint"]["step"] == 8
    assert "step 8, 1.02 K tokens" in status.page(content)


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_left_out(run, monkeypatch):
    monkeypatch.setattr(status.checkpoint, "validate", lambda folder: shutil.rmtree(folder) or ["manifest.json is missing"])
    content, _ = look(run)
    assert content["checkpoint"] is None and content["not_whole"] == []


@pytest.mark.parametrize("before", ["_hash", "_state_faults"])
def test_a_checkpoint_that_is_pruned_while_it_is_checked_is_left_out(run, monkeypatch, before):
    check = getattr(status.checkpoint, before)

    def pruned(one):
        for folder in (run / "checkpoints").glob("step-*"):
            folder.rename(folder.with_name(f".{folder.name}.deleted"))
        return check(one)

    monkeypatch.setattr(status.checkpoint, before, pruned)
    content, _ = look(run)
    assert content["checkpoint"] is None and content["not_whole"] == []


GARBAGE = [
    "", "{", "null", "[1]", "7", '{"step"', '{"step": null}', '{"step": true}', '{"step": -1}', '{"step": "9"}', '{"step": 1e5}',
    '{"step": 9' + "9" * 400 + "}", "[" * 20_000, '{"rank": 0, "step": 9', "\x00\x1b[31m", "\udcff",
]  # fmt: skip
ODD = [
    {"step": 3, "kind": None, "first_layer": 7}, {"step": 3, "kind": [1], "first_layer": {}, "repeatable": "x"},
    '{"step": 3, "loss": NaN, "tokens": 1e999, "tokens_per_second": Infinity, "val_loss": -Infinity, "time": NaN, "rank": 0}',
    {"step": 3, "loss": "x", "tokens": [], "tokens_per_second": 0, "val_loss": None, "time": "now", "rank": 1},
    {"step": 3, "loss": 10**400, "tokens": 10**400, "tokens_per_second": 1e-320, "val_loss": True, "time": 10**400, "rank": 2},
]  # fmt: skip


def test_no_line_whatever_it_holds_stops_the_look(run):
    good = (run / "metrics.jsonl").read_text().splitlines()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 8", "steps: 80"))  # so that there is time left to compute
    (run / "ranks").mkdir()
    for i, line in enumerate([*GARBAGE, *ODD]):
        text = line if isinstance(line, str) else json.dumps(line)
        data = text.encode(errors="surrogateescape")
        for name in ("metrics.jsonl", "incidents.jsonl"):
            (run / name).write_bytes("\n".join(good).encode() + b"\n" + data + b"\n")
        for name in ("owner.json", f"ranks/rank-{i}.json"):
            (run / name).write_bytes(data)
        with filelock.FileLock(run / ".lock"):
            content, _ = look(run)
        assert content["unreadable_lines"] == (i < len(GARBAGE)), line
        assert content["step"] == 8 and content["loss"] == json.loads(good[-2])["loss"]
    assert [one["rank"] for one in content["ranks"]] == [0, 1, 2]


def test_a_line_cut_off_by_a_kill_is_counted_and_the_ones_before_it_stand(run):
    before = look(run)[0]
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 9, "tok')
    content, page = look(run)
    assert content["unreadable_lines"] == 1 and "1 line(s) of metrics.jsonl cannot be read" in page
    assert (content["step"], content["loss"]) == (8, before["loss"])


def test_the_trend_of_validation_is_told_with_the_best(run):
    lines = [{"step": step, "val_loss": loss} for step, loss in [(0, 5.0), (4, 3.0), (8, 3.5)]]
    write_lines(run / "metrics.jsonl", *lines)
    assert "3.5000 at step 8, +0.5000 since step 4; best 3.0000 at 4" in look(run)[1]
    write_lines(run / "metrics.jsonl", *lines[:2])
    assert "3.0000 at step 4, -2.0000 since step 0; the best so far" in look(run)[1]


def test_incidents_are_counted_by_kind_and_the_last_is_told(run):
    write_lines(
        run / "incidents.jsonl",
        {"step": 3, "kind": "spike"},
        {"step": 5, "kind": "spike"},
        {"step": 6, "kind": "not finite", "first_layer": {"layer": 0, "kind": "mamba"}, "repeatable": False},
    )
    content, page = look(run)
    assert content["incidents"] == {"spike": 2, "not finite": 1} and content["last_incident"]["step"] == 6
    assert "2 spike, 1 not finite" in page
    assert "last: not finite at step 6, first in mamba (layer 0), not repeatable: suspect the hardware" in page
    write_lines(run / "incidents.jsonl", {"step": 6, "kind": "not finite", "first_layer": {"layer": None, "kind": "head"}})
    assert "last: not finite at step 6, first in head disk" in look(run)[1]


def test_ranks_that_lag_or_are_silent_are_marked(run):
    (run / "ranks").mkdir()
    for rank, (step, silent, state) in enumerate([(8, 0, "running"), (5, 90, "running"), (8, 90, "failed: no memory")]):
        told = {"rank": rank, "host": "node", "pid": 7, "step": step, "time": time.time() - silent, "state": state}
        told |= {"memory_bytes": 3 * 10**9} if rank == 2 else {}  # an older one does not say it
        (run / "ranks" / f"rank-{rank}.json").write_text(json.dumps(told))
    with filelock.FileLock(run / ".lock"):
        content, page = look(run)
    assert [one["steps_behind"] for one in content["ranks"]] == [0, 3, 0]
    assert "5 ? 1 min ago 3 behind, silent 2 node failed: no memory 8 3.00 GB 1 min ago next" in page
    assert "silent" not in look(run)[1]  # nobody is expected to speak any more
    shutil.rmtree(run / "checkpoints" / "step-8")
    assert look(run)[0]["next"] == "accelerate launch -m train --config 'a run'/config.yaml"


def test_too_little_room_for_the_next_checkpoint_is_told(run, monkeypatch):
    assert "not enough" not in look(run)[1]
    monkeypatch.setattr(status.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "1.00 kB free: not enough for a checkpoint of" in look(run)[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.2, "59 s"), (59.9, "59 s"), (60, "1 min"), (7500, "2 h 05 min"), (273_600, "3 d 04 h")],
)
def test_durations_are_told_in_two_units_at_most(seconds, text):
    assert status._duration(seconds) == text


def test_the_command_prints_a_page_or_one_object_and_ends_with_0(run, run_main):
    code, out, _ = run_main(cli.main, "status", run)
    assert code == 0 and out.startswith("run         a run\nstate       done\n")
    code, out, _ = run_main(cli.main, "status", run, "--json")
    assert code == 0 and json.loads(out).keys() == status.look(run).keys()


@pytest.mark.parametrize("what", ["nothing", "file", "folder"])
def test_what_is_no_run_ends_with_2_and_says_so(what, tmp_path, run_main):
    place = tmp_path / what
    if what == "file":
        place.touch()
    if what == "folder":
        place.mkdir()
    code, out, err = run_main(cli.main, "status", place)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and ("is no run directory" if what == "folder" else "there is no folder") in err


@pytest.mark.parametrize("job, place", [("sweep", "runs/*/seed-*"), ("compress", "runs/*")])
def test_of_a_job_made_of_runs_it_says_where_they_are(tmp_path, run_main, job, place):
    (tmp_path / "config.yaml").write_text(f"{job}: {{}}\ntrain: {{steps: 3}}\n")
    code, out, err = run_main(cli.main, "status", tmp_path)
    assert code == 2 and out == "" and f"holds several runs; give one of {tmp_path}/{place}." in err


def test_a_classifiers_loss_is_of_documents_and_its_accuracy_is_told(make_labelled, tmp_path, monkeypatch):
    config = make_labelled("sum", train__steps=2)
    train(config)
    monkeypatch.chdir(tmp_path)
    content, page = look(Path(config.run_dir).relative_to(tmp_path))
    accuracy = content["validations"][-1]["val_accuracy"]
    assert f"loss {content['loss']:.4f} nats/document" in page and f", accuracy {accuracy:.4f}, at step 2" in page
    assert (content["state"], content["next"]) == ("done", None)
