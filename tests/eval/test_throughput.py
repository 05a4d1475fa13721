import json
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import pytest

from eval import throughput
from eval.compare import SECONDS, TURNS
from eval.output import rows_table
from eval.roofline import Assumptions, estimate
from eval.throughput import COLUMNS, TWIN, beside_twin, summary
from hybridlm.twin import transformer_twin

FIELDS = {
    "model", "prompt", "new", "batch", "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_s",
    "request_seconds", "peak_memory_bytes", "cache_bytes", "device", "dtype", "asked_batch", "tokens_asked", "tokens_used",
    "total_tokens_per_second", "time_to_first_token_s_each", "request_seconds_each", "seconds_per_token_p50",
    "seconds_per_token_p95", "weight_bytes", "fit_memory_bytes", "machine",
}  # fmt: skip
READY = {
    "batch": 3, "asked_batch": 3, "notes": [], "peak_memory_bytes": 2_000_000, "weight_bytes": 7, "device": "cpu", "dtype": "x",
}  # fmt: skip


@pytest.fixture
def measure(command, model_folder):
    folder = model_folder()

    def run(*arguments):
        status, out, err = command("throughput", "--model", folder, "--repeats", 1, "--json", "-", *arguments)
        assert status == 0, err
        return str(folder), json.loads(out)

    return run


def test_a_row_for_every_shape_and_its_twin(measure):
    name, rows = measure("--prompt", "3,9", "--new", "1", "--batch", "2")
    assert [(row["model"], row["prompt"]) for row in rows] == [
        (name, 3), (f"{name} (Transformer twin)", 3), (name, 9), (f"{name} (Transformer twin)", 9),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() == FIELDS
        assert all(f"{field}{TURNS}" in row for field in SECONDS)  # what `compare` pairs
        assert (row["new"], row["batch"], row["decode_tokens_per_second"]) == (1, 2, None)
        assert row["prefill_tokens_per_second"] == pytest.approx(2 * row["prompt"] / row["time_to_first_token_s"])
        assert row["peak_memory_bytes"] > 0


def test_the_cache_is_counted(measure):
    # Tiny: one attention layer with 2 KV heads of 8, and three Mamba-2 layers of 6 heads of 8 x 5 and 68 channels, fp32.
    _, (row,) = measure("--prompt", "9", "--new", "3", "--no-twin")
    attention = 2 * 2 * 8 * (9 + 2)  # what the last token gives is not cached
    mamba = 6 * 8 * 5 + 68 * 3
    assert row["cache_bytes"] == 4 * (attention + 3 * mamba)
    assert row["decode_tokens_per_second"] > 0
    assert row["request_seconds"] > row["time_to_first_token_s"]


def test_medians_and_the_table():
    turns = [{"first": f, "total": f + 4.0, "steps": [f] * 8, "cache_bytes": 5} for f in (1.0, 2.0, 9.0)]
    row = {"model": "a"} | summary(turns, prompt=10, new=9, ready=READY | {"asked_batch": 5})
    assert (row["time_to_first_token_s"], row["request_seconds"]) == (2, 6)
    assert (row["prefill_tokens_per_second"], row["decode_tokens_per_second"]) == (15, 6)
    assert row["total_tokens_per_second"] == 3 * 19 / 6
    assert (row["tokens_asked"], row["tokens_used"]) == (5 * 19, 3 * 19)
    assert (row["time_to_first_token_s_each"], row["request_seconds_each"]) == ([1, 2, 9], [5, 6, 13])
    assert (row["seconds_per_token_p50"], row["seconds_per_token_p95"]) == (2, 9)
    twin = row | {"model": "a" + TWIN, "decode_tokens_per_second": 3, "peak_memory_bytes": 8_000_000}
    other = row | {"model": "/a/long/path/to/the/model/of/a/run"}
    shown = beside_twin([row, twin, other])
    assert shown[0]["decode"] == "6 (2.00x)"
    assert shown[0]["peak"] == "2.0 (0.25x)"
    assert shown[0]["request"] == "6 ±67%"
    assert shown[0]["shown_batch"] == "3 of 5"
    assert shown[1]["peak"] == "8.0" and shown[1]["model"].strip() == "its twin"
    assert shown[2]["peak"] == "2.0" and shown[2]["model"] == "…/the/model/of/a/run"
    shown = beside_twin([row, twin | {"prompt": 11}, twin | {"model": "b" + TWIN}])  # each one's own twin was out of memory
    assert [line["peak"] for line in shown] == ["2.0", "8.0", "8.0"]
    fits = {"fit_memory_bytes": 1e9}
    assert beside_twin([row | fits, twin | fits | {"batch": 2}])[0]["peak"] == "2.0 (0.25x)"
    wide = row | {
        "prefill_tokens_per_second": 98765.4, "decode_tokens_per_second": 12345.6, "total_tokens_per_second": 98765.4,
        "peak_memory_bytes": 70e9, "cache_bytes": 9e9, "prompt": 65536, "new": 1024, "batch": 128, "asked_batch": 128,
        "request_seconds": 123.0,
    }  # fmt: skip
    lines = rows_table(beside_twin([wide, wide | {"model": "a" + TWIN}]), COLUMNS).splitlines()
    assert max(map(len, lines)) <= 130


class Pool:
    """In place of a process: a model of which memory, or the process, may come to an end."""

    asked: list[tuple] = []

    seeds: list[int] = []

    def submit(self, work, *arguments):
        self.work, self.arguments = work.__name__, arguments
        return self

    def shutdown(self):
        Pool.asked.append(("shutdown",))

    def result(self):
        if self.work == "prepare":
            folder, twin, prompt, *_, seed = self.arguments
            Pool.seeds.append(seed)
            self.name = folder.rpartition("/")[2] + "+twin" * (twin is not None)
            if self.name == "large" and prompt > 9:
                raise MemoryError("none is left")
            if self.name == "dies" and prompt > 9:
                raise BrokenProcessPool
        Pool.asked.append((self.work, self.name))
        if self.work == "prepare":
            return READY | {"notes": ["a batch of 9 ran out of memory; going on with 3"]}
        Pool.seeds.append(self.arguments[0])
        return {"first": 1.0, "total": 2.0, "steps": [0.5], "cache_bytes": 5}


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr(Pool, "asked", [])
    monkeypatch.setattr(Pool, "seeds", [])
    monkeypatch.setattr(throughput, "worker", contextmanager(lambda module: (yield Pool())))
    return Pool.asked


def test_all_models_take_turns(pools, command, tiny_model, tmp_path):
    for name in ("a", "b"):
        tiny_model(initializer_range=0.1).save_pretrained(tmp_path / name)
    status, out, _ = command("throughput", "--model", tmp_path / "a", tmp_path / "b", "--repeats", 2, "--json", "-")
    assert status == 0
    names = ["a", "a+twin", "b", "b+twin"]
    assert pools == [(work, name) for work in ("prepare", "request", "request") for name in names]
    assert [row["model"] for row in json.loads(out)] == [
        f"{tmp_path / 'a'}", f"{tmp_path / 'a'}{TWIN}", f"{tmp_path / 'b'}", f"{tmp_path / 'b'}{TWIN}",
    ]  # fmt: skip


def test_a_seed_draws_the_tokens(pools, command, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    arguments = ["throughput", "--model", tmp_path / "a", "--no-twin", "--repeats", 2, "--json", tmp_path / "rows.json"]
    assert command(*arguments, "--seed", 7, "--batch", "1")[0] == 0
    assert Pool.seeds == [7, 8, 9]  # every turn other ones
    status, _, err = command(*arguments, "--gpus", 2)
    assert (status, "--gpus is for the estimate of --gpu" in err) == (2, True)


def test_only_a_hybrid_has_a_twin(pools, command, tiny_model, tmp_path):
    tiny_model(hybrid_override_pattern="*-").save_pretrained(tmp_path / "transformer")
    tiny_model(num_attention_heads=64, hybrid_override_pattern="M---").save_pretrained(tmp_path / "small")
    status, _, err = command("throughput", "--model", tmp_path / "transformer", tmp_path / "small", "--repeats", 1)
    assert status == 0
    assert {name for _, name in pools} == {"transformer", "small"}
    assert "small is timed without a Transformer twin: a Transformer of 2 attention layers is larger" in err.replace("\n", "")


def test_out_of_memory_ends_with_what_the_others_gave(pools, command, tiny_model, tmp_path):
    for name in ("large", "a", "dies"):
        tiny_model().save_pretrained(tmp_path / name)
    out = tmp_path / "rows.json"
    arguments = ["throughput", "--no-twin", "--model", tmp_path / "large", tmp_path / "a", tmp_path / "dies", "--json", out]
    status, table, err = command(*arguments, "--prompt", "9,10", "--repeats", 1)
    assert status == 1
    assert "2 of 6 rows could not be measured" in err
    assert f"{tmp_path / 'large'}, 10 in, 128 out, batch 1: none is left" in err
    assert f"{tmp_path / 'dies'}, 10 in, 128 out, batch 1: its process died" in err
    rows = json.loads(out.read_text())
    assert [(row["model"].rpartition("/")[2], row["prompt"]) for row in rows] == [("large", 9), ("a", 9), ("dies", 9), ("a", 10)]
    assert len(table.splitlines()) == 5
    assert pools.count(("shutdown",)) == 2

    # What is left to do is done again, together; the rest is not.
    assert (tmp_path / "rows.json.partial.jsonl").exists()
    pools.clear()
    assert command(*arguments, "--prompt", "9,10", "--repeats", 1)[0] == 1
    assert pools == [("shutdown",), ("prepare", "a"), ("shutdown",), ("request", "a")]


def test_what_is_there_is_not_measured_again(pools, command, tiny_model, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "a")
    out = tmp_path / "rows.json"
    arguments = ["throughput", "--model", tmp_path / "a", "--no-twin", "--prompt", "3,4,5", "--repeats", 1, "--json", out]
    real = throughput.take_turns

    def interrupted(contenders, shape, *rest):
        if shape[0] == 5:
            raise KeyboardInterrupt
        return real(contenders, shape, *rest)

    monkeypatch.setattr(throughput, "take_turns", interrupted)
    assert command(*arguments)[0] == 130
    monkeypatch.setattr(throughput, "take_turns", real)
    pools.clear()
    status, _, _ = command(*arguments)
    assert status == 0
    assert pools == [("prepare", "a"), ("request", "a")]
    assert [row["prompt"] for row in json.loads(out.read_text())] == [3, 4, 5]
    assert not (tmp_path / "rows.json.partial.jsonl").exists()


def test_the_batch_that_fits_is_told(pools, command, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    arguments = ["throughput", "--model", tmp_path / "a", "--no-twin", "--batch", "fit"]
    status, out, err = command(*arguments, "--memory", "2GB", "--json", "-")
    assert status == 0
    assert "going on with 3" in err
    assert json.loads(out)[0]["fit_memory_bytes"] == 2e9
    status, _, err = command(*arguments)
    assert status == 2
    assert "--batch fit and --memory belong together" in err
    assert command(*arguments[:-1], "2", "--memory", "2GB")[0] == 2


def test_an_estimate_for_a_gpu_stands_beside(pools, command, tiny_model, tiny_config, tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    arguments = ["throughput", "--model", tmp_path / "a", "--gpu", "L40S", "--gpus", "2", "--prompt", "9", "--new", "4"]
    status, out, _ = command(*arguments, "--json", "-")
    rows = json.loads(out)
    assert status == 0
    assumed = Assumptions(gpu="L40S", gpus=2)
    assert rows[0]["roofline"] == estimate(tiny_config(), 9, 4, 3, assumed)
    assert rows[1]["model"].endswith(TWIN)
    assert rows[1]["roofline"] == estimate(transformer_twin(tiny_config()), 9, 4, 3, assumed)
    status, out, _ = command(*arguments)
    assert f"Estimated, not measured, for {assumed}" in out
    status, _, err = command(*arguments, "--gpu", "H10")
    assert (status, "Did you mean H100?" in err) == (2, True)


def test_a_folder_without_a_model(command, tmp_path):
    status, out, err = command("throughput", "--model", tmp_path, "--json", "-")
    assert (status, out) == (2, "")
    assert "is no checkpoint folder" in err
