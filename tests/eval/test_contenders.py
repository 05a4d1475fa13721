from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from eval import contenders
from eval.contenders import CONTENDERS, FULL, SMALL, Shapes, Task, llama_flops, model_flops
from hybridlm import HybridLMForCausalLM
from hybridlm.flops import forward_flops
from hybridlm.timing import cache_bytes
from hybridlm.twin import count_parameters

TRAIN = Task("train", "train", "fp32", 2, 12)


@pytest.fixture(autouse=True)
def freed_memory_goes_back(monkeypatch):
    """In the process of the tests, which others measure."""
    kept = []
    monkeypatch.setattr(contenders, "keep_freed_memory", lambda: kept.append(True))
    return kept


def test_only_ours_keep_freed_memory_as_our_commands_do(freed_memory_goes_back):
    for contender, keeps in {"llama": False, "nemotron_h": False, "hybridlm": True, "twin": True}.items():
        freed_memory_goes_back.clear()
        contenders.allocator(contender)
        assert bool(freed_memory_goes_back) == keeps


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_shapes_are_frozen():
    """Other shapes are another benchmark: its figures would not go with the earlier ones."""
    common = {"vocab_size": 4096, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    mamba = {"mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 128}
    assert asdict(FULL) == {
        "hybrid": common | mamba | {"hybrid_override_pattern": "M-M-M-M*-M-M-", "intermediate_size": 2048},
        "llama": common | {"intermediate_size": 1408, "num_hidden_layers": 8, "max_position_embeddings": 131072},
        "twin_width": 2112,
    }
    twin = FULL.twin_config
    assert (twin.hybrid_override_pattern, twin.intermediate_size, twin.rope_theta) == ("*-" * 8, 2112, 10000.0)


def test_parameters():
    with torch.device("meta"):
        assert count(HybridLMForCausalLM(FULL.hybrid_config)) == 27_757_344
        assert count(HybridLMForCausalLM(FULL.twin_config)) == 26_747_392
        assert count(LlamaForCausalLM(FULL.llama_config)) == 26_747_392
    for width in (2104, 2120):  # the multiple of 8 that is nearest to the Llama
        assert count_parameters(replace(FULL, twin_width=width).twin_config) != 26_747_392


@pytest.mark.parametrize("shapes", [FULL, SMALL])
def test_flops_of_llama(shapes):
    """Against the linear layers of a built model, and attention counted key by key."""
    config = shapes.llama_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    flops = llama_flops(config, 10)
    linear = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert flops["linear"] + flops["head"] == linear
    assert flops["head"] == 2 * model.lm_head.weight.numel()
    keys = sum(range(1, 11))  # position i sees i keys; one product for the scores, one for the values
    assert 10 * flops["attention"] == 2 * 2 * keys * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def test_the_two_transformers_have_the_same_work():
    for task in (Task("a", "train", "fp32", 4, 1024), Task("b", "prefill", "fp32", 1, 4096)):
        assert (
            model_flops("llama", FULL, task)
            == model_flops("twin", FULL, task)
            == pytest.approx(model_flops("hybridlm", FULL, task), rel=0.5)
        )
        assert model_flops("nemotron_h", FULL, task) == model_flops("hybridlm", FULL, task)


def test_flops_of_a_step_and_of_a_prompt():
    kinds = forward_flops(SMALL.hybrid_config, 12)
    assert model_flops("hybridlm", SMALL, TRAIN) == 3 * 2 * 12 * sum(kinds.values())
    body = sum(kinds.values()) - kinds["head"]
    assert model_flops("hybridlm", SMALL, replace(TRAIN, kind="prefill")) == pytest.approx(2 * (12 * body + kinds["head"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    contenders.save(SMALL, path)
    return path


@pytest.fixture
def load(folder, monkeypatch):
    """Puts a contender where the process that times it would have it."""

    def put(name, dtype=torch.float32):
        monkeypatch.setattr(contenders, "_behind", None)
        monkeypatch.setattr(contenders, "_model", contenders.build(name, SMALL, folder, dtype))
        return contenders._model

    return put


@pytest.mark.parametrize("name", CONTENDERS)
def test_each_task(load, name):
    for precision in ("fp32", "bf16"):
        model = load(name)
        result = contenders.call(replace(TRAIN, precision=precision), 0)
        assert result.keys() == {"first"} and result["first"] > 0
        assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
        load(name, torch.bfloat16 if precision == "bf16" else torch.float32)
        prompt = Task("t", "prefill", precision, 1, 9)
        read = contenders.call(prompt, 1)
        assert read.keys() == {"first", "cache_bytes"}
        decode = replace(prompt, kind="decode", new=3)
        first, second = contenders.call(decode, 0), contenders.call(decode, 1)
        assert first.keys() == {"first", "cache_bytes", "tokens"} and second.keys() == {"tokens"}
        assert len(first["tokens"]) == len(second["tokens"]) == 3
        assert first["cache_bytes"] == read["cache_bytes"] > 0
        assert contenders.call(replace(prompt, kind="request", new=4), 0).keys() == first.keys()


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_decode_goes_on_from_the_prompt_each_turn(load, name, monkeypatch):
    seen = []
    load(name)
    forward = type(contenders._model).forward

    def watch(self, ids, **kwargs):
        behind = kwargs.get("past_key_values")
        seen.append((ids.shape[1], behind.get_seq_length() if behind else 0))
        return forward(self, ids, **kwargs)

    monkeypatch.setattr(type(contenders._model), "forward", watch)
    task = Task("t", "decode", "fp32", 1, 9, new=2)
    for turn in range(2):
        contenders.call(task, turn)
    assert seen == [(9, 0), (1, 9), (1, 10), (1, 9), (1, 10)]


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_cache_in_bytes(load, name):
    load(name)
    ids = torch.zeros(1, 9, dtype=torch.long)
    _, _, kept = contenders.read(contenders._model, ids)
    attention = 2 * 1 * 8 * 9  # keys and values of one head of 8
    channels = 4 * 8 + 2 * 8
    window = {"hybridlm": 3, "nemotron_h": 4}.get(name, 0)  # inputs that the convolution keeps
    mamba = 4 * 8 * 8 + window * channels if window else 0
    assert cache_bytes(kept) == 4 * (attention + mamba)


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_loss_that_is_trained(load, name, monkeypatch):
    """The mean over the targets, of ours from `targets`, of stock from `labels`."""
    model = load(name)
    given, narrow = {}, []
    forward = type(model).forward

    def keep(self, ids, **kwargs):
        narrow.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        output = forward(self, ids, **kwargs)
        given.update(kwargs, ids=ids, loss=output.loss, logits=output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", keep)
    monkeypatch.setattr(model, "zero_grad", lambda set_to_none: None)
    ids = torch.randint(64, (2, 12))
    contenders.train(model, ids, "fp32")
    assert torch.equal(given["ids"], ids[:, :-1]) and model.training
    if name in ("hybridlm", "twin"):
        assert torch.equal(given["targets"], ids[:, 1:])
        mean = model(ids[:, :-1], targets=ids[:, 1:]).loss.mean()
    else:
        assert torch.equal(given["labels"], ids[:, :-1]) and given["use_cache"] is False
        mean = model(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
    weight = model.lm_head.weight
    (grad,) = torch.autograd.grad(mean, weight)
    assert torch.allclose(weight.grad, grad)
    contenders.train(model, ids, "bf16")
    assert narrow == [False, False, True]


def test_prepare_counts_the_memory_of_the_model_alone(folder, tmp_path, monkeypatch):
    big = replace(SMALL, hybrid=SMALL.hybrid | {"vocab_size": 2**20})  # 64 MB of embedding, as much of head
    contenders.save(big, tmp_path)
    monkeypatch.setattr(contenders, "_model", None)
    monkeypatch.setattr(contenders, "_behind", None)
    watched = []

    @contextmanager
    def peak_memory(interval):
        watched.append(interval)
        assert contenders._model.config.vocab_size == 2**20
        yield [123 + 2**40]
        watched.append(contenders._behind is not None)  # the request was run meanwhile

    monkeypatch.setattr(contenders, "peak_memory", peak_memory)
    monkeypatch.setattr(contenders, "resident", lambda: 2**40 + (contenders._model is not None))
    task = Task("t", "decode", "bf16", 1, 9, new=3)
    try:
        result = contenders.prepare("hybridlm", task, big, {"small": str(folder), "full": str(tmp_path)}, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert result["peak_memory_bytes"] == 123
    assert watched == [0.001, True]
    assert len(result["tokens"]) == 3
    model = contenders._model
    assert model.dtype == torch.bfloat16
    assert result["weights_bytes"] == sum(p.nbytes for p in model.parameters()) - 2**20 * 16 * 2


def test_prepare_for_each_kind(folder, monkeypatch):
    for name in ("_model", "_behind"):
        monkeypatch.setattr(contenders, name, None)
    monkeypatch.setattr(contenders, "peak_memory", lambda interval: nullcontext([interval]))
    monkeypatch.setattr(contenders, "resident", lambda: 0)
    folders = {"small": str(folder), "full": str(folder)}
    watched = contenders.prepare("twin", replace(TRAIN, precision="bf16"), SMALL, folders, 1)["peak_memory_bytes"]
    assert (watched, contenders._model.dtype) == (0.001, torch.float32)  # bf16 by autocast
    called, call = [], contenders.call
    monkeypatch.setattr(contenders, "call", lambda task, turn: called.append((task, turn)) or call(task, turn))
    request = Task("t", "request", "bf16", 2, 9, new=3, whole=5)
    watched = contenders.prepare("llama", request, SMALL, folders, 1)["peak_memory_bytes"]
    assert (watched, contenders._model.dtype) == (0.05, torch.bfloat16)  # seldom: it is timed meanwhile
    assert called == [(replace(request, batch=1, length=8, new=2), 0), (request, 0)]  # the first to warm up


def test_attention_alone(load):
    model, seen = load("hybridlm"), []
    for layer in model.backbone.layers:
        layer.mixer.register_forward_pre_hook(
            lambda mixer, args: seen.append((type(mixer).__name__, args[0].shape, args[1].mask, args[2]))
        )
    assert contenders.attention_seconds(Task("t", "prefill", "fp32", 1, 9)) > 0
    assert seen == [("Attention", (1, 9, 16), None, None)]


def test_equality(folder, monkeypatch):
    of = (SMALL, str(folder), (2, 16), 8, 1)
    exact, double = [], HybridLMForCausalLM.double
    monkeypatch.setattr(HybridLMForCausalLM, "double", lambda self: exact.append(self) or double(self))
    found = contenders.equality(*of)
    assert set(exact[0].ops.backends.values()) == {"naive"}
    assert exact[0].dtype == torch.float64
    assert found["same"] and 0 <= found["fp32"] < 1e-5
    assert 0 < found["bf16_hybridlm"] < 0.1 and 0 < found["bf16_nemotron_h"] < 0.1
    assert (found["tokens"], found["bf16_tokens"]) == ([2, 16], 8)

    build = contenders.build

    def perturbed(contender, shapes, folder, dtype):
        model = build(contender, shapes, folder, dtype)
        if contender == "nemotron_h" and dtype == torch.float32:
            with torch.no_grad():
                model.lm_head.weight[3] += 0.01
        if contender == "hybridlm" and dtype == torch.bfloat16:
            with torch.no_grad():
                model.lm_head.weight *= 1.5
        return model

    monkeypatch.setattr(contenders, "build", perturbed)
    found = contenders.equality(*of)
    assert not found["same"] and found["fp32"] > found["fp32_bound"]
    assert found["bf16_hybridlm"] == pytest.approx(0.5, abs=0.05)
    assert not found["bf16_no_further"]


def test_the_same_weights(folder):
    ours, stock = (contenders.build(name, SMALL, folder, torch.float32) for name in ("hybridlm", "nemotron_h"))
    assert type(stock).__module__.startswith("transformers.") and type(ours).__module__.startswith("hybridlm.")
    assert torch.equal(ours.lm_head.weight, stock.lm_head.weight)
    twin, again, llama = (contenders.build(name, SMALL, folder, torch.float32) for name in ("twin", "twin", "llama"))
    assert torch.equal(twin.lm_head.weight, again.lm_head.weight)
    assert twin.config.hybrid_override_pattern == "*-"
    assert type(llama) is LlamaForCausalLM
    assert isinstance(SMALL, Shapes)
