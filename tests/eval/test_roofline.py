import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.output import rows_table
from eval.roofline import (
    GPUS,
    PAPER_COLUMNS,
    TRANSFORMERS,
    Assumptions,
    beside_the_paper,
    estimate,
    largest_batch,
    prefill_flops,
    published,
    read_bytes,
    step_bytes,
    step_flops,
)
from hybridlm.cache import HybridCache
from hybridlm.twin import count_parameters

ROOT = Path(__file__).parents[2]
H100 = Assumptions()
# Tiny, "M-M*-M-": d 32, FFN 48, 61 tokens, 4 query and 2 KV heads of 8, 6 Mamba heads of 8, 2 groups, state 5, convolution of 4.
MAMBA = 32 * (48 + 68 + 6) + 48 * 32
ATTENTION = 2 * 32 * 32 + 2 * 32 * 16
LINEAR = 3 * MAMBA + ATTENTION + 3 * 2 * 32 * 48
STATE, CONV, KEYS = 48 * 5 * 4, 3 * 68 * 2, 2 * 2 * 8 * 2  # bytes: fp32, bf16, and bf16 for each token


def test_flops_and_bytes_by_hand(tiny_config):
    config = tiny_config()
    conv, head = 3 * 68 * 4, 32 * 61
    ssd = 3 * (2 * 128 * 5 + 48 * 128 + 2 * 48 * 5)
    assert prefill_flops(config, 9) == 2 * (9 * (LINEAR + conv + ssd + 2 * 32 * 5) + head)  # 5 keys on average
    assert step_flops(config, 100) == 2 * (LINEAR + conv + head + 2 * 32 * 100 + 3 * 2 * 48 * 5)
    read = 2 * (count_parameters(config) - 61 * 32)
    assert read_bytes(config, 1, H100) == pytest.approx(read)
    written = 3 * (STATE + CONV)
    assert step_bytes(config, 100, 7, H100) == pytest.approx(read + 7 * (100 * KEYS + 2 * written))


def test_an_estimate_by_hand(tiny_config):
    config, batch = tiny_config(), 3
    assumed = Assumptions(gpus=2, arithmetic=0.25, bandwidth=0.5)
    found = estimate(config, 9, 4, batch, assumed)
    memory = 2 * 0.5 * 3.35e12
    assert found["prefill_seconds"] == pytest.approx(
        read_bytes(config, 27, assumed) / memory
    )  # so small: traffic, not arithmetic
    step = step_bytes(config, 11, batch, assumed) / memory
    assert (found["decode_seconds_per_token"], found["decode_bound"]) == (pytest.approx(step), "bandwidth")
    assert found["request_seconds"] == pytest.approx(found["prefill_seconds"] + 3 * step)
    assert found["total_tokens_per_second"] == pytest.approx(3 * 13 / found["request_seconds"])
    assert found["tokens_per_second_per_gpu"] == pytest.approx(3 * 4 / found["request_seconds"] / 2)
    assert found["cache_bytes"] == 13 * KEYS + 3 * (STATE + CONV)
    assert found["weight_bytes"] == 2 * count_parameters(config)
    long = estimate(config, 10**6, 4, 1, assumed)
    assert long["prefill_seconds"] == pytest.approx(prefill_flops(config, 10**6) / (2 * 0.25 * 989e12))
    many = estimate(config, 9, 4, 10**6, replace(assumed, arithmetic=1e-6))
    assert many["decode_bound"] == "arithmetic"
    assert many["decode_seconds_per_token"] == pytest.approx(10**6 * step_flops(config, 11) / (2 * 1e-6 * 989e12))


def test_the_cache_is_that_of_the_model(tiny_model, draw_ids):
    model = tiny_model()
    cache = HybridCache(model.config.num_hidden_layers)
    with torch.inference_mode():
        model(draw_ids(1, 13), past_key_values=cache)
    assert estimate(model.config, 9, 4, 1, replace(H100, cache_precision="fp32"))["cache_bytes"] == cache.nbytes()


def test_the_largest_batch(tiny_config):
    config = published("Nemotron-H-8B")
    most = largest_batch(config, 66_560, H100)
    room = 80 * 2**30 * 0.9 - 2 * count_parameters(config)
    one = estimate(config, 65_536, 1024, 1, H100)["cache_bytes"]
    assert most * one <= room < (most + 1) * one
    assert estimate(config, 65_536, 1024, None, H100)["batch"] == most
    assert not estimate(config, 65_536, 1024, most + 1, H100)["fits"]
    assert largest_batch(config, 131_072, H100) < most  # more to keep of each
    assert largest_batch(config, 66_560, replace(H100, free=0.3)) < most
    assert largest_batch(config, 66_560, replace(H100, gpu="H200")) > most
    assert largest_batch(config, 66_560, replace(H100, precision="fp8")) > most
    assert largest_batch(config, 66_560, replace(H100, gpus=2)) > 2 * most  # the weights are there once
    more_attention = published("Nemotron-H-8B")
    more_attention.hybrid_override_pattern = config.hybrid_override_pattern.replace("M", "*")
    assert largest_batch(more_attention, 66_560, H100) < most


def test_what_has_no_room_has_no_speed():
    found = estimate(published("Nemotron-H-56B"), 65_536, 1024, None, H100)
    assert (found["batch"], found["fits"], found["request_seconds"], found["tokens_per_second_per_gpu"]) == (0, False, None, None)


def test_a_better_gpu_is_faster_and_a_longer_prompt_slower():
    config = published("Nemotron-H-8B")
    seconds = lambda prompt=4096, **changes: estimate(config, prompt, 64, 8, replace(H100, **changes))["request_seconds"]  # noqa: E731
    assert seconds(gpu="B200") < seconds(gpu="H200") < seconds() < seconds(gpu="A100")
    assert seconds(8192) > seconds()
    assert seconds(arithmetic=1.0) < seconds() < seconds(bandwidth=0.5)


def test_experts_that_no_token_goes_to_are_not_read(tiny_config):
    config = tiny_config(hybrid_override_pattern="MEM*-ME")
    expert = 2 * 32 * 12
    all_of_them = 2 * (count_parameters(config) - 61 * 32)
    assert read_bytes(config, 1, H100) == pytest.approx(all_of_them - 2 * 2 * 4 * expert)  # two layers, four of six idle
    assert read_bytes(config, 2, H100) == pytest.approx(all_of_them - 2 * 2 * 6 * (4 / 6) ** 2 * expert)
    assert read_bytes(config, 1000, H100) == pytest.approx(all_of_them)
    every = tiny_config(hybrid_override_pattern="ME", num_experts_per_tok=6)
    assert read_bytes(every, 1, H100) == pytest.approx(2 * (count_parameters(every) - 61 * 32))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"gpu": "H1000"}, "Did you mean H100"),
        ({"gpu": "A100", "precision": "fp8"}, "no precision of A100 'fp8'"),
        ({"cache_precision": "int4"}, "int4"),
        ({"gpus": 0}, "gpus must be at least 1"),
        ({"arithmetic": 1.5}, "arithmetic and bandwidth"),
    ],
)
def test_assumptions_that_are_none(faults, message):
    with pytest.raises(ValueError, match=message):
        Assumptions(**faults)


def test_every_gpu_is_told_with_what_is_assumed():
    assert all(gpu in str(Assumptions(gpu=gpu)) for gpu in GPUS)
    assert str(H100) == ("1 x H100: 50% of 989 TFLOP/s, 100% of 3.35 TB/s, 10% of 80 GiB left free; weights bf16, cache bf16")


def test_the_transformers_have_the_parameters_that_were_published():
    """In billions, from their model cards; our patterns leave out the biases of Qwen's attention."""
    cards = {"Qwen-2.5-7B": 7.61, "Qwen-2.5-72B": 72.7, "Llama-3.1-70B": 70.6}
    assert {name: float(f"{count_parameters(published(name)) / 1e9:.3g}") for name in TRANSFORMERS} == pytest.approx(
        cards, rel=2e-3
    )


def test_the_table_of_the_docs_is_the_commands(command):
    status, out, _ = command("roofline")
    text = (ROOT / "docs/throughput.md").read_text(encoding="utf-8")
    assert status == 0
    assert out == rows_table(beside_the_paper(), PAPER_COLUMNS) + "\n"
    assert f"```\n{out}```\n" in text
    assert str(H100).split(": ")[1] in text
    for row in beside_the_paper():
        assert abs(row["half"] / row["paper"] - 1) < 0.12
    # What the page says of each miss.
    of = {name: prefill_flops(published(name), 65_536) for name in ("Nemotron-H-56B", "Nemotron-H-47B")}
    ratio = of["Nemotron-H-56B"] / of["Nemotron-H-47B"]
    assert re.search(rf"{ratio:.2f} times the arithmetic", text)


def test_a_model_without_a_cache_has_no_largest_batch(tiny_config):
    with pytest.raises(ValueError, match="---- keeps nothing between tokens"):
        largest_batch(tiny_config(hybrid_override_pattern="----"), 10, H100)
