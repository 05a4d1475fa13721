import json

import pytest

from eval.throughput import beside_twin, summary

FIELDS = {
    "model", "prompt", "new", "batch", "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_s",
    "request_seconds", "peak_memory_bytes", "cache_bytes", "device", "dtype",
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
    turns = [{"first": f, "total": f + 4.0, "cache_bytes": 5, "device": "cpu", "dtype": "float32"} for f in (1.0, 2.0, 9.0)]
    row = {"model": "a"} | summary(turns, prompt=10, new=9, batch=3, peak=2_000_000)
    assert (row["time_to_first_token_s"], row["request_seconds"]) == (2, 6)
    assert (row["prefill_tokens_per_second"], row["decode_tokens_per_second"]) == (15, 6)
    twin = row | {"model": "a (Transformer twin)", "decode_tokens_per_second": 3, "peak_memory_bytes": 8_000_000}
    shown = beside_twin([row, twin])
    assert shown[0]["decode"] == "6 (2.00x)"
    assert shown[0]["peak"] == "2.0 (0.25x)"
    assert shown[1]["peak"] == "8.0"


def test_a_folder_without_a_model(command, tmp_path):
    status, out, err = command("throughput", "--model", tmp_path, "--json", "-")
    assert (status, out) == (2, "")
    assert "is no checkpoint folder" in err


def test_a_model_too_small_for_a_twin(command, tiny_model, tmp_path):
    tiny_model(num_attention_heads=64, hybrid_override_pattern="M---").save_pretrained(tmp_path)
    status, _, err = command("throughput", "--model", tmp_path, "--prompt", "4", "--new", "1")
    assert status == 2
    assert "--no-twin" in err
