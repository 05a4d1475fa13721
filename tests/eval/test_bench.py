import json
import re
import shlex
import statistics
import subprocess
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from eval import bench, contenders
from eval.__main__ import build_parser
from eval.contenders import CONTENDERS, FULL, SMALL, Task

ENDS = {
    "flops_per_second": {"fp32": 1e9, "bf16": 1e6}, "read_bytes_per_second": {"fp32": 1e9, "bf16": 5e8},
    "copy_bytes_per_second": 2e9,
}  # fmt: skip
# Large enough for its memory to be seen.
SHAPES = replace(SMALL, hybrid=SMALL.hybrid | {"vocab_size": 2**16}, llama=SMALL.llama | {"vocab_size": 2**16})
TASKS = [
    Task("train-bf16", "train", "bf16", 2, 20, cap=1e9),
    Task("prefill-9", "prefill", "fp32", 1, 9, cap=0),  # no machine does it in no time
    Task("prefill-24", "prefill", "fp32", 1, 24, cap=1e9),
    Task("decode-fp32", "decode", "fp32", 1, 20, new=3, cap=1e9),
    Task("request-24", "request", "fp32", 1, 24, new=3, whole=9, cap=1e9),
]


@pytest.fixture(scope="module")
def content():
    """The whole of it, in its processes."""
    content = {}
    small = {"products": ((16, 16, 16),), "copied": 2**16, "read": 2**16}
    bench.run(content, TASKS, 2, shapes=SHAPES, ceiling_sizes=small, equality_tokens=((2, 16), Task("e", "decode", "bf16", 1, 8)))
    return content


def test_a_row_of_each_contender_for_everything_timed(content):
    names = ["train-bf16", "prefill-24", "decode-fp32", "prefill-24", "decode-24", "request-24"]
    assert [(row["row"], row["contender"]) for row in content["rows"]] == list(product(names, CONTENDERS))
    for row in content["rows"]:
        assert len(row["seconds_each"]) == (1 if row["row"].endswith("-24") and row in content["rows"][12:] else 2)
        assert row["seconds"] == statistics.median(row["seconds_each"]) > 0
        assert row["peak_memory_bytes"] > 2**16 * 16 * 4  # of the embedding; the head has as many
        assert row["extrapolated_tokens"] == (5 if row["kind"] == "request" else 0)
        assert ("attention_seconds" in row) == (row["kind"] == "prefill" and row["contender"] == "hybridlm")
        if row["kind"] == "request":
            assert (row["new"], row["tokens_per_second"], row["share_of_ceiling"]) == (9, None, None)
        else:
            tokens = 1 if row["kind"] == "decode" else row["batch"] * row["length"]
            assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
            assert row["share_of_ceiling"] > 0


def test_ratios(content):
    for row in content["rows"]:
        group = {other["contender"]: other for other in content["rows"] if other["row"] == row["row"]}
        if row["row"] == "prefill-24":
            continue  # twice, alone and in the request
        for other in ("nemotron_h", "llama"):
            assert row[f"speed_to_{other}"] == pytest.approx(group[other]["seconds"] / row["seconds"])
            assert row[f"memory_to_{other}"] == pytest.approx(row["peak_memory_bytes"] / group[other]["peak_memory_bytes"])


def test_the_rest_of_the_figures(content):
    assert content["finished"] and content["seconds"] > 0 and content["load_before"] >= 0
    assert content["machine"]["threads of torch"] == 1
    assert content["equality"]["same"]
    assert content["equality"]["bf16_tokens"] <= 8
    assert content["notes"] == ["prefill-9 is left out: one call would take more than 0 s on this machine."]
    assert content["ceiling"].keys() == ENDS.keys()
    assert json.loads(json.dumps(content, allow_nan=False)) == json.loads(json.dumps(content))


def test_the_page(content):
    page = bench.text(content)
    assert "the same logits" in page and "NOT" not in page and "Interrupted" not in page
    assert "prefill-9 is left out" in page
    assert "Extrapolated: " in page
    lines = page.splitlines()
    (line,) = [line for line in lines if line.startswith("train-bf16") and "hybridlm" in line]
    row = content["rows"][0]
    assert re.split(r"  +", line)[1:3] == ["2 x 20", "hybridlm"]
    assert f"{row['speed_to_nemotron_h']:.2f}" in line and f"{row['share_of_ceiling']:.0%}" in line
    assert [
        line for line in lines if line.startswith("request-24") and "1 x 24 + 9, 5 extrapolated" in line and "stock Llama" in line
    ]
    at = next(i for i, line in enumerate(lines) if line.startswith("hybridlm, prompt"))
    prefill = content["rows"][4]
    every, attention, rest = (float(cell.replace(",", "")) for cell in lines[at + 1].split()[1:])
    assert every == pytest.approx(1e6 * prefill["seconds"] / 24, rel=1e-2)
    assert every == pytest.approx(attention + rest, rel=1e-2)


def test_the_page_of_what_was_cut_off(content):
    worse = content["equality"] | {"same": False, "bf16_no_further": False}
    idle = content["machine"] | {"cores": 4}
    assert "busy" not in bench.text(content | {"machine": idle, "load_before": 1.9})
    assert "busy with something else (load 2.1)" in bench.text(content | {"machine": idle, "load_before": 2.1})
    page = bench.text(content | {"finished": False, "equality": worse, "rows": content["rows"][:4], "notes": []})
    assert "Interrupted" in page and "NOT the same logits" in page and "FURTHER" in page
    assert "xtrapolated" not in page and "µs a token" not in page


def turn(**values):
    return {"first": 2.0, "tokens": [1.0, 3.0, 8.0], "cache_bytes": 100, "weights_bytes": 900, "peak_memory_bytes": 7} | values


def test_what_the_first_turn_is_for():
    """Its memory is measured; its time counts where there is no other."""
    task = Task("train", "train", "fp32", 2, 5)
    turns = {"llama": [turn(first=9.0), turn(first=3.0, peak_memory_bytes=50), turn(first=9.5), turn(first=4.0)]}
    (row,) = bench.rows_of(task, turns, SMALL, ENDS)
    assert (row["seconds"], row["seconds_each"], row["peak_memory_bytes"]) == (4.0, [3.0, 9.5, 4.0], 7)
    assert row["tokens_per_second"] == 2.5
    assert row["share_of_ceiling"] == pytest.approx(contenders.model_flops("llama", SMALL, task) / 4 / 1e9)
    assert (row["speed_to_llama"], row["speed_to_nemotron_h"], row["memory_to_nemotron_h"]) == (1.0, None, None)


def test_decode_against_the_bandwidth():
    task = Task("decode", "decode", "bf16", 1, 5, new=3)
    (row,) = bench.rows_of(task, {"twin": [turn(), turn(tokens=[2.0, 2.0, 8.0])]}, SMALL, ENDS)
    assert (row["seconds"], row["tokens_per_second"]) == (2.0, 0.5)  # the median token
    assert row["share_of_ceiling"] == (900 + 100) / 2.0 / 1e9
    assert row["extrapolated_tokens"] == 0


@pytest.mark.parametrize(("fp32", "bf16", "expected"), [(1e9, 1e6, 1e9), (1e9, 4e9, 4e9)])
def test_bf16_is_held_against_the_faster_units(fp32, bf16, expected):
    both = {"fp32": fp32, "bf16": bf16}
    ends = ENDS | {"flops_per_second": both, "read_bytes_per_second": both}
    for kind, work in (("train", contenders.model_flops("llama", SMALL, Task("t", "train", "bf16", 1, 5))), ("decode", 1000)):
        for precision, rate in (("bf16", expected), ("fp32", fp32)):
            task = Task("t", kind, precision, 1, 5, new=3)
            (row,) = bench.rows_of(task, {"llama": [turn(first=2.0, tokens=[2.0])]}, SMALL, ends)
            assert row["share_of_ceiling"] == pytest.approx(work / 2.0 / rate)


def test_a_request_is_extrapolated():
    """The prompt gives the first of 9 tokens; the 8 others take 4 s each, as the 3 that were timed do on average."""
    task = Task("request-5", "request", "fp32", 1, 5, new=3, whole=9)
    rows = bench.rows_of(task, {"hybridlm": [turn(attention=0.5)], "llama": [turn(first=4.0)]}, SMALL, ENDS)
    assert [(row["row"], row["contender"], row["seconds"], row["new"]) for row in rows] == [
        ("prefill-5", "hybridlm", 2.0, 0), ("prefill-5", "llama", 4.0, 0), ("decode-5", "hybridlm", 3.0, 3),
        ("decode-5", "llama", 3.0, 3), ("request-5", "hybridlm", 2 + 8 * 4, 9), ("request-5", "llama", 4 + 8 * 4, 9),
    ]  # fmt: skip
    assert rows[0]["attention_seconds"] == 0.5 and "attention_seconds" not in rows[1]
    assert [row["extrapolated_tokens"] for row in rows] == [0] * 4 + [5] * 2
    whole = bench.rows_of(replace(task, whole=4), {"llama": [turn()]}, SMALL, ENDS)[-1]
    assert (whole["seconds"], whole["extrapolated_tokens"]) == (2 + 12, 0)


def test_caps():
    def seconds(task):
        return task.batch * task.length / 100

    train = Task("train", "train", "bf16", 4, 1000, cap=30)
    assert bench.fit(train, seconds) == replace(train, batch=2)
    assert bench.fit(replace(train, cap=40), seconds) == replace(train, cap=40)  # at the cap it fits
    assert bench.fit(replace(train, cap=3), seconds) == replace(train, cap=3, batch=1, length=250)
    assert bench.fit(replace(train, cap=0.1), seconds) is None
    prefill = Task("prefill", "prefill", "fp32", 1, 1000, cap=3)
    assert bench.fit(prefill, seconds) is None  # it is about its length
    assert bench.fit(replace(prefill, kind="request"), seconds) is None
    assert bench.fit(replace(prefill, kind="decode", new=9), seconds) == replace(prefill, kind="decode", new=9, length=250)

    contenders = {"fast": lambda task: seconds(task) / 9, "slow": seconds, "none": lambda task: 0}
    planned, notes = bench.plan([train, prefill, replace(train, cap=50)], contenders)
    assert planned == [replace(train, batch=2), replace(train, cap=50)]
    assert notes == [
        "train is 2 x 1,000 instead of 4 x 1,000: one call would take more than 30 s on this machine.",
        "prefill is left out: one call would take more than 3 s on this machine.",
    ]


def test_seconds_at_the_ceiling():
    task = Task("t", "train", "bf16", 1, 8)
    assert bench.seconds_at_ceiling("llama", SMALL, task, ENDS) == contenders.model_flops("llama", SMALL, task) / 1e6


def test_the_default_rows_fit_a_laptop():
    """At 100 GFLOP/s in fp32, whole; at 1 in bf16, smaller."""
    slow = ENDS | {"flops_per_second": {"fp32": 1e11, "bf16": 1e9}}

    seconds = {name: partial(bench.seconds_at_ceiling, name, FULL, ends=slow) for name in CONTENDERS}
    planned, notes = bench.plan([*bench.TASKS, *bench.LONG_TASKS], seconds)
    of = {task.name: task for task in (*bench.TASKS, *bench.LONG_TASKS)}
    assert [task.name for task in planned] == list(of)
    assert {task.name for task in planned if task != of[task.name]} == {"train-bf16", "decode-bf16"}
    assert [note.split()[0] for note in notes] == ["train-bf16", "decode-bf16"]


class Inline:
    """In place of a process: answers at once, and notes who was asked for what."""

    def __init__(self, name, log, error=None):
        self.name, self.log, self.error = name, log, error

    def submit(self, work, *args):
        self.log.append((self.name, work.__name__))
        future = Future()
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(0.25 if work is contenders.attention_seconds else {"args": args})
        return future


def test_turns():
    log, ticks = [], []
    pools = {name: Inline(name, log) for name in ("twin", "hybridlm")}
    task = Task("t", "train", "fp32", 1, 8)
    results, notes = bench.take_turns(pools, task, (SMALL, {}, 1), 3, ticks.append)
    assert log == [(name, work) for work in ("prepare", "call", "call") for name in pools]
    assert ticks == ["twin", "hybridlm"] * 3
    assert results["hybridlm"] == [{"args": ("hybridlm", task, SMALL, {}, 1)}, {"args": (task, 1)}, {"args": (task, 2)}]
    assert notes == []

    log.clear()
    results, _ = bench.take_turns(pools, replace(task, kind="prefill"), (SMALL, {}, 1), 2, ticks.append)
    assert [work for name, work in log if name == "hybridlm"] == ["prepare", "attention_seconds", "call", "attention_seconds"]
    assert [work for name, work in log if name == "twin"] == ["prepare", "call"]
    assert [result["attention"] for result in results["hybridlm"]] == [0.25, 0.25]


@pytest.mark.parametrize("error", [BrokenProcessPool("it died"), MemoryError(), RuntimeError("cannot allocate 5 bytes")])
def test_a_contender_without_enough_memory_is_left_out(error):
    pools = {"llama": Inline("llama", log := [], error), "twin": Inline("twin", log)}
    results, notes = bench.take_turns(pools, Task("t", "train", "fp32", 1, 8), (SMALL, {}, 1), 2, lambda name: None)
    assert results.keys() == {"twin"} and len(results["twin"]) == 2
    assert notes == [f"t is without stock Llama: it needs more memory than there is ({error})."]
    assert log == [("llama", "prepare"), ("twin", "prepare"), ("twin", "call")]


def test_another_error_is_one():
    pools = {"llama": Inline("llama", [], RuntimeError("shapes do not match"))}
    with pytest.raises(RuntimeError, match="shapes"):
        bench.take_turns(pools, Task("t", "train", "fp32", 1, 8), (SMALL, {}, 1), 1, lambda name: None)


@pytest.fixture
def fake_run(content, monkeypatch, tmp_path):
    """`python -m eval bench` that measures nothing and gives these figures; what it was asked for."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def set_up(error=None, **changes):
        def run(into, tasks, repeats):
            asked.append(([task.name for task in tasks], repeats))
            into.update(content | changes)
            if error is not None:
                raise error

        monkeypatch.setattr(bench, "run", run)
        return asked

    return set_up


def test_the_command(command, fake_run, tmp_path):
    asked = fake_run()
    status, out, _ = command("bench")
    assert status == 0 and "stock nemotron_h" in out
    (path,) = tmp_path.glob("runs/bench/bench-*.json")  # which git ignores
    assert json.loads(path.read_text())["rows"]
    assert str(path.relative_to(tmp_path)) in out
    status, out, _ = command("bench", "--long", "--repeats", 1, "--json", "-")
    assert status == 0 and json.loads(out)["finished"]
    status, out, _ = command("bench", "--only", "request-65536,train-fp32", "--json", tmp_path / "a.json")
    assert status == 0 and (tmp_path / "a.json").is_file()
    default = ["train-fp32", "train-bf16", "prefill-4096", "prefill-16384", "decode-fp32", "decode-bf16"]
    assert asked == [(default, 3), ([*default, "request-65536"], 1), (["train-fp32", "request-65536"], 3)]


def test_help_names_the_rows(command):
    _, out, _ = command("bench", "--help")
    assert all(task.name in out for task in (*bench.TASKS, *bench.LONG_TASKS))


def test_no_such_row(command, fake_run):
    asked = fake_run()
    status, out, err = command("bench", "--only", "train-fp32,train-fp16")
    assert (status, out, asked) == (2, "", [])
    assert "train-bf16" in err and "got train-fp16" in err


def test_ctrl_c_keeps_what_there_is(command, fake_run, tmp_path, content):
    fake_run(KeyboardInterrupt(), finished=False, rows=content["rows"][:4])
    status, out, err = command("bench")
    assert status == 130 and err.endswith("interrupted\n")
    assert "Interrupted" in out
    (path,) = tmp_path.glob("runs/bench/*.json")
    assert len(json.loads(path.read_text())["rows"]) == 4
    path.unlink()
    fake_run(KeyboardInterrupt(), equality={})
    assert command("bench")[:2] == (130, "")
    assert not list(tmp_path.glob("runs/bench/*.json"))


def test_different_models_are_an_error(command, fake_run, content):
    fake_run(equality=content["equality"] | {"same": False, "fp32": 0.5})
    status, out, err = command("bench")
    assert status == 1 and "NOT the same logits" in out
    assert "differ by 5.0e-01" in err and "hybridlm verify" in err


@pytest.mark.parametrize(("setting", "long"), [("LONG=", False), ("LONG=1", True)])
def test_make_bench(setting, long):
    root = Path(__file__).parents[2]
    done = subprocess.run(["make", "-n", "bench", setting], cwd=root, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "-m eval" in line]
    args = build_parser().parse_args(shlex.split(line)[3:])
    assert (args.long, args.only, args.json, args.repeats) == (long, None, None, 3)
