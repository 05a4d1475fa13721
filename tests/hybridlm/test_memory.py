import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlm import HybridLMConfig, HybridLMModel
from hybridlm.cache import HybridCache
from hybridlm.memory import (
    GIB,
    MARGIN,
    Plan,
    activation_bytes,
    block_activations,
    block_work,
    cache_bytes,
    fits,
    group_bytes,
    inference_bytes,
    longest_context,
    moments,
    peak_bytes,
    remedies,
    state_bytes,
    weight_bytes,
)
from hybridlm.mixers.context import Context
from hybridlm.ops import blocks, precision
from hybridlm.ops.selective_scan import eager as selective_scan
from hybridlm.ops.ssd import eager
from hybridlm.strict_yaml import load_yaml
from hybridlm.twin import count_parameters
from train import sharding

WIDE = {
    "hybrid_override_pattern": "M*-Erlgm", "recurrent_size": 72, "hidden_size": 96, "intermediate_size": 256,
    "num_attention_heads": 6, "head_dim": 16,
    "mamba_num_heads": 12, "mamba_head_dim": 16, "n_groups": 3, "ssm_state_size": 24, "chunk_size": 32,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 80,
}  # fmt: skip
WORKING = WIDE | {
    "hybrid_override_pattern": "M*-Erlgm", "hidden_size": 128, "intermediate_size": 672, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 64,
    "chunk_size": 64, "vocab_size": 128, "moe_intermediate_size": 32,
}  # fmt: skip


def shape(size):
    return HybridLMConfig.from_strict_dict(load_yaml(f"configs/model/nemotron-h-{size}.yaml"))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Products in bf16, all of a sequence at once, what a CPU takes in pieces, and torch's own LSTM."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(eager, "CPU_CHUNK", 2**40)
    monkeypatch.setattr(eager, "CPU_BLOCK", 2**40)
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", 2**40)
    monkeypatch.setattr(selective_scan, "CPU_ELEMENTS", 2**40)
    monkeypatch.setattr(selective_scan, "CPU_STEP", 2**40)
    torch._C._set_mkldnn_enabled(False)  # the public way warns of GPUs
    yield
    torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize("pattern", ["M-M*-M-", "M", "**-", "-", "rl-g*", "mM-m"])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
@torch.no_grad()
def test_cache_bytes_are_those_of_a_real_cache(pattern, length, tiny_model, draw_ids):
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = tiny_model(hybrid_override_pattern=pattern).to(dtype)
        cache = HybridCache(len(pattern))
        model(draw_ids(1, length), past_key_values=cache)
        # A state may hold a view of a longer tensor: what counts is its own size.
        assert cache_bytes(model.config, length, size) == cache.nbytes()


def test_bits_of_weights_and_of_the_cache(tiny_config):
    """By hand; two of the layers of the pattern are Mamba-2, with a state in fp32 and three inputs of a convolution."""
    config = tiny_config(hybrid_override_pattern="M-M*")
    parameters, states, conv, keys = count_parameters(config), 2 * 6 * 8 * 5, 2 * 3 * (6 * 8 + 2 * 2 * 5), 2 * 2 * 8 * 100
    assert inference_bytes(config, 100) == 2 * parameters + 4 * states + 2 * (conv + keys)
    assert inference_bytes(config, 100, 32, 16) == 4 * parameters + 4 * states + 2 * (conv + keys)
    assert inference_bytes(config, 100, 4, 8) == parameters / 2 + 4 * states + conv + keys


def bytes_kept(block, x, context=Context()):  # noqa: B008
    """What autograd keeps of a block's forward pass; parameters and autocast's copies of them left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}
    copies = {tuple(s) for p in block.parameters() if p.ndim == 2 for s in (p.shape, p.T.shape)}

    def keep(t):
        copied = t.dtype == torch.bfloat16 and tuple(t.shape) in copies
        if not copied and t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, context)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("changes", [{}, {"chunk_size": 64, "mamba_num_heads": 6}, {"moe_latent_size": 40}])
@pytest.mark.parametrize("w", [4, 2])
def test_activations_are_what_autograd_keeps(changes, w, tiny_model, as_on_a_gpu):
    model = tiny_model("eager", **WIDE | changes)
    for symbol, block in zip(model.config.hybrid_override_pattern, model.backbone.layers):
        x = torch.randn(2, 250, 96, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=w == 2):
            kept = bytes_kept(block, x)
        assert block_activations(model.config, symbol, w, 250) * 500 == pytest.approx(kept, rel=0.04), symbol


@pytest.mark.parametrize("bidirectional", ["sum", "concat"])
@pytest.mark.parametrize("w", [4, 2])
def test_both_directions_keep_what_autograd_does(w, bidirectional, tiny_config, as_on_a_gpu):
    config = tiny_config(**WIDE, bidirectional=bidirectional)
    block = HybridLMModel(config, backend="eager").layers[0]
    x = torch.randn(2, 250, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=w == 2):
        kept = bytes_kept(block, x, Context(reverse=Context()))
    assert block_activations(config, "M", w, 250) * 500 == pytest.approx(kept, rel=0.04)
    assert cache_bytes(config, 1000) == 0


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`"
)  # its new name is younger than the oldest transformers of ours
def test_recomputing_keeps_the_input_alone(tiny_model, as_on_a_gpu):
    model = tiny_model("eager", **WIDE).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.backbone.layers:
        x = torch.randn(2, 250, 96, requires_grad=True)
        assert bytes_kept(block, x) == 4 * 96 * 500
    config, plan = model.config, Plan(seq_len=250, micro_batch=2)
    each = {symbol: 500 * block_activations(config, symbol, 2, 250) for symbol in "M*-Erlgm"}
    all_kept = activation_bytes(config, plan)
    for kinds in ("M", "M*", "M*-Erlgm"):
        saved = sum(each[symbol] - 4 * 96 * 500 for symbol in kinds)
        assert activation_bytes(config, replace(plan, recompute=kinds)) == pytest.approx(all_kept - saved)
    assert activation_bytes(config, replace(plan, micro_batch=4)) == 2 * all_kept


class Tail(torch.nn.Module):
    """What comes behind the layers."""

    def __init__(self, model, targets):
        super().__init__()
        self.norm, self.head, self.targets = model.backbone.norm_f, model.lm_head, targets

    def forward(self, x, context):
        return self.head(self.norm(x), self.targets)


@pytest.mark.parametrize(("name", "w"), [("fp32", 4), ("bf16", 2)])
def test_what_the_last_norm_and_the_loss_keep(name, w, tiny_model, draw_ids, as_on_a_gpu):
    model = tiny_model("eager", **WIDE)
    x = torch.randn(2, 250, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=w == 2):
        kept = bytes_kept(Tail(model, draw_ids(2, 250)), x)
    plan = Plan(precision=name, seq_len=250, micro_batch=2, recompute="M*-Erlgm")
    assert activation_bytes(model.config, plan) - 8 * 4 * 96 * 500 == pytest.approx(kept, rel=0.01)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operators have made and that are still there, and their most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {}

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, key)
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize("w", [4, 2])
def test_the_work_of_a_layers_backward_pass_is_covered(w, tiny_model, as_on_a_gpu):
    """Of experts that are not wider than the model; they work one after the other, and are counted as if all did at once."""
    model, t = tiny_model("eager", **WORKING), 256
    for symbol, block in zip(model.config.hybrid_override_pattern, model.backbone.layers):
        x = torch.randn(1, t, 128, requires_grad=True)
        with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=w == 2):
            y = block(x, Context())[0]
            kept, live.most = live.now, 0
            y.backward(torch.ones_like(y))
        gradients = 4 * sum(p.numel() for p in block.parameters())
        measured = (live.most - kept) / t
        counted = block_work(model.config, symbol, w, t)
        assert 0.9 * (measured - gradients / t) <= counted <= 1.5 * measured, symbol


@pytest.mark.parametrize(("name", "w"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize(("vocabulary", "t"), [(8192, 16), (8192, 600)])
def test_a_large_vocabulary_is_covered(vocabulary, t, name, w, tiny_model, as_on_a_gpu):
    """On one GPU, where head and embedding are all there is: the loss, with few or many logits at a time, and then the
    embedding's gradient."""
    changes = {"hybrid_override_pattern": "-", "vocab_size": vocabulary, "intermediate_size": 16}
    model = tiny_model("eager", **WORKING | changes).train()
    ids = torch.randint(vocabulary, (1, t))
    with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=w == 2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before, live.most = live.now, 0
        model(ids, targets=ids).loss.sum().backward()
    weights = sum(p.numel() * 4 for p in model.parameters())
    counted = sum(moments(model.config, Plan(precision=name, seq_len=t))["loss"].values())
    # The weights are counted too, when an operator first gives a view of them.
    assert 0.95 * (live.most - before - weights) <= counted <= 1.3 * (live.most - before)


@pytest.fixture
def eight_ranks():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module", "ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize(
    ("name", "recompute", "vocabulary", "t"),
    [
        ("fp32", "", 1024, 256),
        ("bf16", "M*-", 128, 256),
        pytest.param("bf16", "", 1024, 256, marks=pytest.mark.scale),
        pytest.param("bf16", "", 8192, 16, marks=pytest.mark.scale),
    ],
)
def test_the_peak_is_that_of_torchs_own_tracker(name, recompute, vocabulary, t, tiny_model, eight_ranks, as_on_a_gpu):
    """A real step on one of eight ranks, their messages left out; torch counts every tensor. We may count too much, as a GPU
    gathers ahead and this does not, but not too little."""
    model = tiny_model("eager", **WORKING | {"hybrid_override_pattern": "M-M*-", "vocab_size": vocabulary}).train()
    sharding.recompute(model, recompute)
    sharding.shard(model, eight_ranks, torch.bfloat16 if name == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = FSDPMemTracker(model, optimizer)
    ids = torch.randint(vocabulary, (1, t))
    with warnings.catch_warnings(), tracker, torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
        warnings.simplefilter("ignore")
        for _ in range(2):  # the first makes the gradients and the optimiser's state
            tracker.reset_mod_stats()
            model(ids, targets=ids).loss.sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    plan = Plan(gpus=8, sharding="fsdp2", precision=name, recompute=recompute, seq_len=t)
    assert 0.97 * measured <= peak_bytes(model.config, plan) <= 1.35 * measured


def test_the_state_is_shared_by_those_who_share():
    config, total = shape("8b"), 8_100_852_736
    one = state_bytes(config, Plan())
    assert sum(one.values()) - one["copy"] == 16 * total
    assert 0.999 * 2 * (total - 2 * 131072 * 4096) < one["copy"] < 2 * (total - 2 * 131072 * 4096)
    assert state_bytes(config, Plan(precision="fp32"))["copy"] == 0
    assert state_bytes(config, Plan(gpus=8)) == one | {"buckets": 4 * total}  # DDP
    sharded = state_bytes(config, Plan(gpus=8, sharding="fsdp2"))
    assert sharded == {"weights": total / 2, "gradients": total / 2, "moments": total, "copy": 0, "buckets": 0}
    muon = state_bytes(config, Plan(optimizer="muon"))
    assert muon == one | {"moments": pytest.approx(8 * total - 2 * one["copy"])}  # 4 bytes less of each matrix in bf16


@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "mlp_bias": True, "attention_bias": True, "moe_latent_size": 40}])
@pytest.mark.parametrize("w", [4, 2])
def test_a_group_is_its_matrices_in_the_width_of_products_and_the_rest_in_fp32(w, changes, tiny_model):
    model = tiny_model(**WIDE | changes)
    for symbol, block in zip(model.config.hybrid_override_pattern, model.backbone.layers, strict=True):
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        narrow = sum(p.numel() for linear in linears for p in linear.parameters())
        every = sum(p.numel() for p in block.parameters())
        assert group_bytes(model.config, w)[symbol] == w * narrow + 4 * (every - narrow), symbol


def test_weights_at_inference():
    config, total = shape("8b"), 8_100_852_736
    outside = 2 * 131072 * 4096 + 4096  # embedding, head and last norm
    assert weight_bytes(config) == {"fp32": 4 * total, "bf16": 2 * total, "fp8": (total - outside) + 2 * outside}


def test_only_shards_are_gathered():
    config = shape("8b")
    alone, sharded = (moments(config, Plan(gpus=8, sharding=sharding))["layers"] for sharding in ("none", "fsdp2"))
    assert alone["gathered"] == alone["whole_gradients"] == 0
    ffn = 2 * 4096 * 21504
    assert sharded["gathered"] == 2 * (2 * ffn + 4 * 4096)  # the matrices in bf16, the norm in fp32
    assert sharded["whole_gradients"] == 4 * (ffn + 4096)
    assert moments(config, Plan(gpus=64, sharding="fsdp2"))["layers"] == sharded  # what is gathered does not shrink


def test_recomputed_layers_are_there_once_again():
    config = shape("8b")
    kept, again = (moments(config, Plan(recompute=kinds, seq_len=4096))["layers"]["work"] for kinds in ("", "M"))
    assert again - kept == pytest.approx(4096 * (block_activations(config, "M", 2, 4096) - 4 * 4096))  # but for its input
    assert moments(config, Plan(recompute="E", seq_len=4096))["layers"]["work"] == kept  # a kind that the model has not


@pytest.mark.parametrize(("gpus", "memory"), [(8, 80), (64, 80), (64, 40), (8, 141), (1, 24)])
@pytest.mark.parametrize("batch", [None, 768])
def test_remedies_fit_and_are_the_nearest(gpus, memory, batch):
    config, memory = shape("56b" if gpus > 1 else "8b"), memory * GIB
    plan = Plan(gpus=gpus, sharding="fsdp2", micro_batch=2, global_batch=batch)
    assert not fits(config, plan, memory)
    for other in remedies(config, plan, memory):
        assert peak_bytes(config, other) <= (1 - MARGIN) * memory
        assert other.gpus >= gpus
        if other.gpus > gpus:
            fewer = [n for n in (2, 4, *range(8, other.gpus, 8)) if gpus < n < other.gpus]
            fewer = [n for n in fewer if batch is None or batch % (n * other.micro_batch) == 0]
            assert not any(fits(config, replace(other, gpus=n), memory) for n in fewer)
            assert batch is None or batch % (other.gpus * other.micro_batch) == 0


def test_which_remedies_there_are():
    small, large = shape("8b"), shape("56b")
    sharded = Plan(gpus=8, sharding="fsdp2", micro_batch=2)
    assert [(p.recompute, p.micro_batch, p.gpus) for p in remedies(small, sharded, 80 * GIB)] == [("M*-", 2, 8), ("", 1, 8)]
    (several,) = remedies(large, replace(sharded, global_batch=768), 80 * GIB)  # no change alone is enough
    assert (several.recompute, several.micro_batch, several.gpus) == ("M*-", 1, 32)
    (several,) = remedies(small, replace(sharded, micro_batch=8), 40 * GIB)  # the least that is enough, and not more GPUs besides
    assert (several.recompute, several.micro_batch, several.gpus) == ("M*-", 1, 8)
    assert [(p.sharding, p.gpus) for p in remedies(small, Plan(gpus=64), 80 * GIB)] == [("fsdp2", 64), ("fsdp2", 72)]
    (several,) = remedies(small, Plan(gpus=8, micro_batch=8), 80 * GIB)  # as many GPUs are enough if they share
    assert (several.sharding, several.recompute, several.micro_batch, several.gpus) == ("fsdp2", "M*-", 1, 8)
    room = peak_bytes(small, Plan(sharding="fsdp2")) / (1 - MARGIN)  # without autocast's copy it would fit
    assert [(p.sharding, p.recompute, p.gpus) for p in remedies(small, Plan(), room)] == [("none", "M*-", 1), ("fsdp2", "", 2)]
    assert remedies(large, sharded, 24 * GIB) == []  # the activations of one sequence alone are more
    assert remedies(large, replace(sharded, global_batch=16), 80 * GIB) == []  # as many GPUs as sequences are too few


def test_what_a_gpu_has_room_for_at_inference():
    config, memory = shape("8b"), 80 * GIB
    context = longest_context(config, memory)
    used = weight_bytes(config)["bf16"] + cache_bytes(config, context)
    assert used <= (1 - MARGIN) * memory < used + cache_bytes(config, 1)
    assert longest_context(shape("56b"), memory) == 0


def test_a_cache_that_does_not_grow_leaves_room_for_any_context(tiny_config):
    config = tiny_config(hybrid_override_pattern="M-")
    assert longest_context(config, GIB) is None and longest_context(config, 1000) == 0
