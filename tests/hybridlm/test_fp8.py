import copy
import logging
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from hybridlm import HybridLMForCausalLM, fp8
from hybridlm.cache import HybridCache
from hybridlm.fp8 import convert, linear_class, refusal, summary

# Layers 2 to 5 are one of each kind; all sizes divide by 16, in_proj has 2 x 32 + 2 x 2 x 8 + 16 rows.
FITS = {
    "hybrid_override_pattern": "M-M*-EM-", "mamba_num_heads": 16, "mamba_head_dim": 2, "ssm_state_size": 8,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
MIXERS = {
    2: ["in_proj", "out_proj"],
    3: ["q_proj", "k_proj", "v_proj", "o_proj"],
    4: ["up_proj", "down_proj"],
    5: [
        f"{expert}.{name}"
        for expert in ("shared_experts", *(f"experts.{i}" for i in range(6)))
        for name in ("up_proj", "down_proj")
    ],
}


@pytest.fixture
def fitting(tiny_model):
    return lambda **changes: tiny_model(**FITS | changes)


def converted(model):
    return {name for name, module in model.named_modules() if isinstance(module, linear_class())}


def test_every_linear_of_the_middle_layers_is_converted_and_nothing_else(fitting):
    model = fitting()
    convert(model, "cpu", emulate=True)
    expected = {f"backbone.layers.{i}.mixer.{name}" for i, names in MIXERS.items() for name in names}
    assert converted(model) == expected
    # In layers 0, 1, 6 and 7 there are two each; the head is the last one.
    assert summary(model) == "22 of 31 linear layers; in bf16: first and last two layers (8), head (1)"


def test_names_weights_and_a_saved_folder_are_as_without(fitting, draw_ids, tmp_path):
    model = fitting()
    before, ids = {name: tensor.clone() for name, tensor in model.state_dict().items()}, draw_ids(2, 9)
    logits = model(ids).logits
    parameters = [*model.parameters()]
    convert(model, "cpu", emulate=True)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert not torch.equal(model(ids).logits, logits)
    model.save_pretrained(tmp_path)
    plain = HybridLMForCausalLM.from_pretrained(tmp_path)
    assert converted(plain) == set() and plain.dtype == torch.float32
    assert torch.equal(plain(ids).logits, logits)


def test_a_model_without_memory_is_converted_too(tiny_config):
    with torch.device("meta"):
        model = HybridLMForCausalLM(tiny_config(**FITS))
    convert(model, "cpu", emulate=True)
    assert len(converted(model)) == 22 and {p.device.type for p in model.parameters()} == {"meta"}


def test_sizes_that_do_not_fit_stop_with_their_names(fitting):
    model = fitting(hybrid_override_pattern="M-M*MEM-", ssm_state_size=5, moe_intermediate_size=12)
    names = (
        r"backbone\.layers\.\{2,4\}\.mixer\.in_proj \(100 x 32\), "
        r"backbone\.layers\.5\.mixer\.experts\.\*\.up_proj \(12 x 32\), "
        r"backbone\.layers\.5\.mixer\.experts\.\*\.down_proj \(32 x 12\)\. "
    )
    with pytest.raises(ValueError, match=rf"sizes divide by 16; these \(out x in\) do not: {names}.*train.fp8_unfit=bf16"):
        convert(model, "cpu", emulate=True)
    assert converted(model) == set()


def test_or_stay_in_bf16(fitting):
    model = fitting(ssm_state_size=5)
    convert(model, "cpu", emulate=True, unfit="bf16")
    said = summary(model)
    assert said.endswith("sizes not divisible by 16 (1): backbone.layers.2.mixer.in_proj (100 x 32)")
    assert said.startswith("21 of 31 linear layers; in bf16: ")
    assert len(converted(model)) == 21 and "backbone.layers.2.mixer.in_proj" not in converted(model)


def test_a_model_of_four_layers_is_refused(fitting):
    with pytest.raises(ValueError, match=r"nothing to convert: 0 of 9 linear layers; .* at least 5 layers"):
        convert(fitting(hybrid_override_pattern="M-M-"), "cpu", emulate=True)


def test_where_fp8_cannot_run_it_says_why(fitting, monkeypatch):
    with pytest.raises(ValueError, match=r"needs a CUDA device, and this is cpu: use train.precision=bf16, or train.fp8_emulate"):
        convert(fitting(), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert refusal("cuda").startswith("needs a device of compute capability 8.9 or more, and A100 has 8.0: use train.precision")
    assert refusal("cuda", emulate=True) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert refusal("cuda") is None
    model = fitting()
    convert(model, "cuda")
    assert {m.config.emulate for m in model.modules() if isinstance(m, linear_class())} == {False}


@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize(
    ("module", "error", "told"),
    [
        ("torchao", ModuleNotFoundError("No module named 'torchao'", name="torchao"), ""),
        (
            "torchao.float8",
            ModuleNotFoundError("No module named 'dep'", name="dep"),
            " (it is installed, but cannot be imported: ModuleNotFoundError: No module named 'dep')",
        ),
        (
            "torchao.float8",
            ImportError("no symbol _ZN\nmore"),
            " (it is installed, but cannot be imported: ImportError: no symbol _ZN)",
        ),
    ],
)
def test_a_torchao_that_is_missing_or_broken_is_told(monkeypatch, module, error, told, emulate):
    class Finder:
        def find_spec(self, name, *args):
            if name == module:
                raise error

    linear_class.cache_clear()
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert refusal("cpu", emulate) == f"needs torchao{told}: pip install 'hybridlm[fp8]', or use train.precision=bf16."


def quantized(x, dtype):
    """float64, rounded to FP8 with the scale of its greatest value."""
    scale = (torch.finfo(dtype).max / x.abs().max().double()).float()
    return (x.float() * scale).to(dtype).double() / scale.double()


@pytest.mark.parametrize("tokens", [(2, 16), (3, 7), (5,)])
@pytest.mark.parametrize("autocast", [True, False])
def test_outputs_and_gradients_are_those_of_the_recipe(fitting, tokens, autocast):
    model = fitting(use_bias=True)
    convert(model, "cpu", emulate=True)
    layer = model.backbone.layers[2].mixer.in_proj
    torch.manual_seed(1)
    nn.init.normal_(layer.bias)
    wide = torch.bfloat16 if autocast else torch.float32
    x = torch.randn(*tokens, 32).mul(3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    grad = torch.randn(y.shape).to(wide)
    y.backward(grad)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    xq, wq, gq = quantized(x.detach().to(wide), e4m3), quantized(layer.weight.detach(), e4m3), quantized(grad, e5m2)
    expected = {
        "output": (y, linear(xq, wq) + layer.bias.double()),
        "input": (x.grad, gq @ wq),
        "weight": (layer.weight.grad, gq.flatten(0, -2).T @ xq.flatten(0, -2)),
        "bias": (layer.bias.grad, grad.double().flatten(0, -2).sum(0)),
    }
    assert y.dtype == wide and layer.weight.grad.dtype == torch.float32
    for name, (got, wanted) in expected.items():
        error = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error < (8e-3 if autocast else 2e-6), (name, error)


@pytest.mark.parametrize(("tokens", "rows"), [((2, 16), 32), ((3, 7), 32), ((1,), 16), ((0,), 16)])
def test_a_product_has_a_number_of_tokens_that_real_fp8_takes(fitting, monkeypatch, tokens, rows):
    model, seen = fitting(), []
    convert(model, "cpu", emulate=True)
    plain = linear_class().__base__
    real = plain.forward
    monkeypatch.setattr(plain, "forward", lambda self, x: seen.append(x.shape) or real(self, x))
    model.backbone.layers[2].mixer.in_proj(torch.randn(*tokens, 32))
    assert seen == [(rows, 32)]


def test_no_token_at_all_gives_gradients_of_zero(fitting):
    model = fitting()
    convert(model, "cpu", emulate=True)
    layer, x = model.backbone.layers[4].mixer.up_proj, torch.zeros(0, 32, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 48) and x.grad.shape == (0, 32)
    assert not layer.weight.grad.any() and layer.weight.grad.shape == (48, 32)


def test_a_whole_model_is_near_its_unconverted_self_forward_and_backward(fitting, draw_ids, relative):
    wide, narrow = fitting(initializer_range=0.1).train(), fitting(initializer_range=0.1).train()
    convert(narrow, "cpu", emulate=True)
    ids = draw_ids(2, 13)  # experts get any number of tokens, and some none
    losses = [model(ids, labels=ids).loss for model in (wide, narrow)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    assert losses[1] != losses[0]
    for (name, p), q in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        if p.grad.any():
            similarity = nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
            assert similarity > 0.9, (name, similarity)


def test_a_token_at_a_time_runs(fitting, draw_ids):
    model = fitting()
    convert(model, "cpu", emulate=True)
    ids, cache = draw_ids(1, 6), HybridCache(8)
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6)]
    assert torch.cat(steps, dim=1).isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_a_copy_is_converted_too(fitting, draw_ids):
    model = fitting()
    convert(model, "cpu", emulate=True)
    again, ids = copy.deepcopy(model), draw_ids(1, 5)
    assert converted(again) == converted(model)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("source", "message", "told"),
    [
        ("torchao", "Failed to load /x/_C_mxfp8.so: Could not load this library: /x/_C_mxfp8.so", False),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version.", True),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported", False),
        ("torch.utils._pytree", "<enum 'ScaleCalculationMode'> is an Enum subclass and is now natively supported", False),
        ("torch.utils._pytree", "<enum 'Mine'> is an Enum subclass and is now natively supported", True),
    ],
)
def test_of_what_torchao_says_when_it_is_imported_only_the_noise_is_dropped(source, message, told):
    record = logging.LogRecord(source, logging.WARNING, "", 0, message, (), None)
    assert bool(logging.getLogger(source).filter(record)) == told


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [(2, 64), (3, 7), (1,), (0,)])
def test_real_fp8_gives_the_emulated_numbers(fitting, tokens, relative):
    if fault := fp8.refusal("cuda" if torch.cuda.is_available() else "cpu"):
        pytest.skip(fault)
    layers, results = [], []
    for emulate in (True, False):
        model = fitting()
        convert(model, "cuda", emulate=emulate)
        layers.append(model.cuda().backbone.layers[2].mixer.in_proj)
    torch.manual_seed(1)
    data, grad = torch.randn(*tokens, 32, device="cuda"), torch.randn(*tokens, 112, device="cuda").bfloat16()
    for layer in layers:
        x = data.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.backward(grad)
        results.append((y, x.grad, layer.weight.grad))
    for emulated, real in zip(*results, strict=True):
        assert emulated.shape == real.shape
        assert not emulated.numel() or not emulated.any() or relative(real.float(), emulated.float()) < 1e-2
