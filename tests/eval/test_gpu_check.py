import json

import pytest
import torch
from tqdm import tqdm

from eval import gpu_check
from eval.gpu_check import HYBRID, STOCK, TWIN, in_turns, measure, measure_fp8
from hybridlm import HybridLMConfig
from hybridlm.flops import training_flops
from hybridlm.pattern import evenly_dispersed
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import count_parameters, parameters_by_kind, transformer_twin

SIZES = {"batch": 2, "seq_len": 24, "prompt": 9, "new": 4, "repeats": 2}


@pytest.fixture
def small(tiny_config):
    # Weights so small that bf16 in another order changes nothing to speak of.
    return lambda **changes: tiny_config(vocab_size=258, initializer_range=0.02, **changes)


def test_a_row_for_each_contender_at_any_size(small):
    content = measure(small(), "cpu", "auto", **SIZES)
    assert content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    assert {key: content[key] for key in SIZES} == SIZES
    assert content["operators"]["cross_entropy"] == "eager"
    rows = {row["model"]: row for row in content["rows"]}
    assert list(rows) == [HYBRID, TWIN, STOCK]
    assert all(row.keys() == gpu_check.COLUMNS.keys() and row["mfu"] is None for row in rows.values())
    speeds = ("training_tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second")
    assert all(row[speed] > 0 for row in rows.values() for speed in speeds)
    assert rows[STOCK]["parameters"] == rows[HYBRID]["parameters"] == count_parameters(small())
    assert rows[STOCK]["loss"] == pytest.approx(rows[HYBRID]["loss"], rel=1e-3)  # the same weights, the same tokens
    assert rows[TWIN]["parameters"] == count_parameters(transformer_twin(small()))
    json.dumps(content, allow_nan=False)


def test_the_medians_and_the_utilisation(small, monkeypatch):
    seconds = {name: iter(values) for name, values in {HYBRID: [9, 9, 1, 2, 6], TWIN: [9, 9, 4, 4, 4], STOCK: [9] * 5}.items()}
    names = {}

    def train_step(model, batch, seq_len, turn):
        return next(seconds[names[model]]), 5.0 + turn

    def request(model, prompt, new, turn):
        assert model.dtype == torch.bfloat16 and not model.training
        return 2.0, 2.0 + 0.5 * turn

    def build(*arguments):
        models = original(*arguments)
        names.update({model: name for name, model in models.items()})
        return models

    original = gpu_check.build
    monkeypatch.setattr(gpu_check, "build", build)
    monkeypatch.setattr(gpu_check, "train_step", train_step)
    monkeypatch.setattr(gpu_check, "request", request)
    monkeypatch.setattr(gpu_check, "peak_flops", lambda name, precision: {"cpu bf16": 1e6}[f"{name} {precision}"])
    rows = measure(small(), "cpu", "auto", **SIZES | {"repeats": 3})["rows"]
    assert [row["training_tokens_per_second"] for row in rows] == [48 / 2, 48 / 4, 48 / 9]
    shapes = small(), transformer_twin(small()), small()
    expected = [row["training_tokens_per_second"] * training_flops(c, 24) / 1e6 for row, c in zip(rows, shapes, strict=True)]
    assert [row["mfu"] for row in rows] == expected
    assert {row["loss"] for row in rows} == {9.0}  # of the last turn
    assert {row["prefill_tokens_per_second"] for row in rows} == {9 / 2}
    assert {row["decode_tokens_per_second"] for row in rows} == {3 / 1.5}  # turns 2, 3, 4 take 1, 1.5, 2 seconds


def test_the_contenders_take_turns_after_a_warm_up():
    order = []

    def run(model, turn):
        order.append((model, turn))
        return model, turn

    with tqdm(disable=True) as bar:
        results = in_turns({"a": 1, "b": 2}, run, 2, bar)
    assert order == [(model, turn) for turn in range(4) for model in (1, 2)]
    assert results == {"a": [(1, 2), (1, 3)], "b": [(2, 2), (2, 3)]}


def test_training_runs_forward_and_backward_under_autocast_and_leaves_the_weights(small):
    models = gpu_check.build(small(), "cpu", "auto")
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    ran, dtypes = [], []
    for model in models.values():
        assert model.training
        head = model.lm_head
        head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        for p in model.parameters():
            p.register_hook(lambda grad: ran.append(grad.dtype))
    for name, model in models.items():
        seconds, loss = gpu_check.train_step(model, 2, 24, turn=0)
        assert seconds > 0 and loss == pytest.approx(torch.log(torch.tensor(258.0)).item(), rel=0.1)
        assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before[name], strict=True))
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]  # the losses of ours; the logits of stock
    draws = [gpu_check.random_tokens(model, 2, 24, turn) for turn in (0, 1, 1)]
    assert not torch.equal(*draws[:2]) and torch.equal(*draws[1:])
    assert len(ran) == sum(len(list(model.parameters())) for model in models.values())


@pytest.mark.parametrize("name", [HYBRID, TWIN, STOCK])
def test_a_request_goes_on_from_its_cache(name, small):
    model, steps = gpu_check.build(small(), "cpu", "auto")[name].eval(), []
    handle = model.register_forward_hook(lambda module, inputs, output: steps.append(output.logits[:, -1]))
    gpu_check.request(model, 9, 4, turn=0)
    handle.remove()
    ids = torch.cat([gpu_check.random_tokens(model, 1, 9, 0), *(logits.argmax(-1)[None] for logits in steps)], dim=1)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.stack(steps, dim=1), whole[:, 8:12], rtol=1e-4, atol=1e-4)


def test_the_yardstick_is_what_its_file_says():
    text, config = gpu_check.SHAPE.read_text(), HybridLMConfig.from_strict_dict(load_yaml(gpu_check.SHAPE))
    pattern, kinds = config.hybrid_override_pattern, parameters_by_kind(config)
    assert pattern == evenly_dispersed(28, 2) and "evenly_dispersed(28, 2)" in text
    for symbol, name in (("M", "Mamba-2"), ("-", "FFN"), ("*", "attention")):
        assert f"{pattern.count(symbol)} {name}" in text and f"x {kinds[symbol]:,}" in text
    assert f"x {kinds['embedding']:,}" in text
    assert f"= {count_parameters(config):,}\n" in text


@pytest.mark.parametrize("emulate", [True, False])
def test_the_command_writes_the_figures(command, monkeypatch, small, tmp_path, emulate):
    def check():
        fp8 = measure_fp8(
            small(mamba_num_heads=16, ssm_state_size=8), "cpu", "auto", batch=2, seq_len=24, steps=2, emulate=emulate
        )
        return measure(small(), "cpu", "auto", **SIZES) | {"fp8": fp8}

    monkeypatch.setattr(gpu_check, "check", check)
    status, out, err = command("gpu-check", "--json", tmp_path / "gpu.json")
    assert status == 0, err
    assert HYBRID in out and "training tok/s" in out
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert len(content["rows"]) == 3
    if emulate:
        assert "fp8: 8 of 17 linear layers" in out and "last loss" in out
        assert [row["precision"] for row in content["fp8"]["rows"]] == ["bf16", "fp8"]
    else:
        assert "\n\nfp8 needs a CUDA device, and this is cpu" in out
        assert content["fp8"].keys() == {"refused"}
        _, out, _ = command("gpu-check", "--json", "-")
        assert json.loads(out)["fp8"] == content["fp8"]


def test_fp8_is_trained_beside_bf16_from_the_same_weights_on_the_same_tokens(small, monkeypatch):
    monkeypatch.setattr(gpu_check, "peak_flops", lambda name, precision: {"cpu bf16": 1e6, "cpu fp8": 2e6}[f"{name} {precision}"])
    config = small(mamba_num_heads=16, ssm_state_size=8)
    content = measure_fp8(config, "cpu", "auto", batch=2, seq_len=24, steps=6, emulate=True)
    bf16, fp8 = content["rows"]
    assert content["layers"].startswith("8 of 17 linear layers")
    for row, peak in ((bf16, 1e6), (fp8, 2e6)):
        assert row["mfu"] == row["training_tokens_per_second"] * training_flops(config, 24) / peak
        assert len(row["losses"]) == 6 and [row["first_loss"], row["last_loss"]] == [row["losses"][0], row["losses"][-1]]
        assert row["last_loss"] < row["first_loss"] - 0.01  # the weights move
    assert fp8["losses"] != bf16["losses"]
    assert fp8["losses"] == pytest.approx(bf16["losses"], rel=2e-3)


def test_the_real_check_has_both_parts(monkeypatch):
    calls = {}
    monkeypatch.setattr(gpu_check, "measure", lambda config, *given, **sizes: calls.update(measure=given) or {"rows": []})
    monkeypatch.setattr(gpu_check, "measure_fp8", lambda config, *given, **sizes: calls.update(fp8=given) or {"refused": "no"})
    assert gpu_check.check() == {"rows": [], "fp8": {"refused": "no"}}
    assert calls == {"measure": ("cuda", "fused"), "fp8": ("cuda", "fused")}


def test_without_a_gpu_the_command_says_what_is_missing(command, monkeypatch):
    monkeypatch.setattr("hybridlm.ops.backend.lacking", lambda: {"mamba-ssm": "", "a CUDA device": ""})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = command("gpu-check", "--json", "-")
    assert (status, out) == (2, "")
    assert "missing here: mamba-ssm, a CUDA device." in err


def test_the_clock_waits_for_the_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    assert gpu_check.clock(torch.device("cpu")) < gpu_check.clock(torch.device("cuda"))
    assert waited == [True]
