"""Ranks that share a model have its weights, losses and gradients as one process has them."""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from train.optim import build_optimizers
from train.settings import Optim
from train.sharding import initialise, recompute, shard

# Every kind of layer; sizes that 2, 3 and 4 ranks do not divide: heads, vocabulary and channels.
SHAPE = {
    "hybrid_override_pattern": "M-M*-Erlgm", "recurrent_size": 7, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 47,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 5, "chunk_size": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20, "initializer_range": 0.3,
}  # fmt: skip

DROPOUT = {"attention_dropout": 0.3, "hidden_dropout": 0.2}


def build(ranks=1, compute=torch.float32, seed=0, **changes):
    """A model with its first weights; of several ranks, sharded. What is not initialised is NaN."""
    with torch.device("meta"):
        model = HybridLMForCausalLM(HybridLMConfig(**SHAPE | changes)).train()
    if ranks > 1:
        shard(model, init_device_mesh("cpu", (ranks,)), compute)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data.fill_(math.nan)
    initialise(model, seed)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch(rows, seed=0):
    ids = torch.randint(3, 61, (rows, 33), generator=torch.Generator().manual_seed(seed))
    seq_idx = (torch.arange(32) >= 13).long().expand(rows, -1)
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "seq_idx": seq_idx}


def started(work):
    """`work(rank)` in a process group."""

    def begin(rank):
        distributed.init_process_group("gloo")
        work(rank)
        distributed.destroy_process_group()

    return begin


def check(ended):
    assert [one.status for one in ended] == [0] * len(ended), "\n".join(one.err for one in ended)


def test_first_weights_depend_on_the_seed_and_nothing_else():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = build()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build(), build(seed=1)
    for (name, a), b, c in zip(model.state_dict().items(), again.state_dict().values(), other.state_dict().values()):
        assert a.isfinite().all() and torch.equal(a, b), name
        constant = (".D", "norm.weight", "norm_f.weight", "correction_bias", "bias_ih", "bias_hh", "layers.9.mixer.A_log")
        assert torch.equal(a, c) == name.endswith(constant), name


def test_first_weights_are_of_the_distribution_that_the_model_draws_from():
    drawn, usual = build(), HybridLMForCausalLM(HybridLMConfig(**SHAPE))
    for (name, a), b in zip(drawn.state_dict().items(), usual.state_dict().values()):
        if a.numel() > 500 and not name.endswith("A_log"):
            assert torch.allclose(a.std(), b.std(), rtol=0.15) and a.mean().abs() < 0.2 * a.std(), name
    a, b = (layers.state_dict()["backbone.layers.0.mixer.in_proj.weight"] for layers in (drawn, drawn))
    assert not torch.equal(a, drawn.state_dict()["backbone.layers.2.mixer.in_proj.weight"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_first_weights_are_bitwise_those_of_one_process(run_ranks, ranks):
    one = build()

    def work(rank):
        model = build(ranks)
        for (name, a), b in zip(model.state_dict().items(), one.state_dict().values()):
            assert a.dtype == torch.float32 and torch.equal(whole(a), b), name
            assert isinstance(a, DTensor) != name.endswith("correction_bias"), name
        assert sum(p.to_local().numel() for p in model.parameters()) < 1.2 * sum(p.numel() for p in one.parameters()) / ranks

    check(run_ranks(ranks, started(work)))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_loss_and_every_gradient_are_bitwise_those_of_the_whole_model(run_ranks, compute):
    def run(model):
        # Two passes, as of micro-batches; both ranks have the same, so the mean of their gradients is that of one.
        total = []
        for seed in (0, 1):
            context = nullcontext() if compute == torch.float32 else torch.autocast("cpu", compute)
            with context:
                total.append(model(**batch(2, seed)).loss)
            total[-1].sum().backward()
        return torch.cat(total)

    def work(rank):
        warnings.filterwarnings("error", message="FSDP2-wrapped")  # of views, for each step: `shard` has them ignored
        one, shared = build(), build(2, compute)
        seen = {}
        for name, module in shared.named_modules():
            own = dict(module.named_parameters(name, recurse=False))
            names = {name: name.rsplit(".", 1)[-1] for name in own}
            runs = shared.get_submodule(name.removesuffix(".cell"))  # which is never called, its mixer takes its weights
            runs.register_forward_pre_hook(
                lambda *_, m=module, names=names: seen.update({name: getattr(m, key).dtype for name, key in names.items()})
            )
        assert torch.equal(run(one), run(shared))
        narrow = [name for name, dtype in seen.items() if dtype != torch.float32]
        matrices = ("_proj.weight", "lm_head.weight")
        assert narrow == ([] if compute == torch.float32 else [name for name in seen if name.endswith(matrices)])
        assert seen.keys() == dict(one.named_parameters()).keys()
        for (name, a), b in zip(one.named_parameters(), shared.parameters()):
            assert b.dtype == b.grad.dtype == torch.float32
            if compute == torch.float32:
                assert torch.equal(a.grad, whole(b.grad)), name
            else:  # the two passes are summed in fp32 here, in bf16 there where a matrix is one
                assert torch.allclose(a.grad, whole(b.grad), rtol=0, atol=0.01 * a.grad.abs().max().item()), name

    check(run_ranks(2, started(work)))


def test_gradients_of_ranks_are_summed_in_fp32(run_ranks):
    """The mean of two bf16 gradients has more digits than bf16, which would show in no other test: there both are the same."""

    def work(rank):
        model = build(2, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(2, seed=rank)).loss.sum()
        loss.backward()
        for name, p in model.named_parameters():
            if name.endswith(("_proj.weight", "lm_head.weight")) and (grad := whole(p.grad)).any():
                assert not torch.equal(grad, grad.bfloat16().float()), name

    check(run_ranks(2, started(work)))


def test_ranks_may_choose_other_experts_and_still_have_the_weights_of_the_last_step(run_ranks):
    def work(rank):
        one, shared = build(), build(2)
        for model in (one, shared):
            with torch.no_grad():  # experts without tokens do not run here
                model.eval()(input_ids=batch(1, seed=rank)["input_ids"][:, :1])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.train()(**batch(2)).loss.sum().backward()
            optimizer.step()
        with torch.no_grad():
            a, b = (model.eval()(**batch(1, seed=rank + 2)).loss for model in (one, shared))
        assert torch.equal(a, b)

    check(run_ranks(2, started(work)))


def test_ranks_may_score_inputs_of_other_shapes(run_ranks, monkeypatch):
    """One would take its long input in pieces, the other not."""
    monkeypatch.setattr("hybridlm.modeling.CPU_PIECE", 32)

    def work(rank):
        one, shared = build().eval(), build(2).eval()
        inputs = {"input_ids": batch(1 + rank)["input_ids"]}
        with torch.no_grad():
            a, b = (model(**inputs).logits for model in (one, shared))
        torch.testing.assert_close(a, b)

    check(run_ranks(2, started(work)))


@pytest.mark.parametrize(("kinds", "changes"), [("M", {}), ("*", {}), ("-", {}), ("E", {}), ("M*-E", {}), ("M*-E", DROPOUT)])
def test_what_is_computed_again_in_backward_changes_no_gradient_and_keeps_less(kinds, changes):
    def run(kinds):
        model = build(**changes)
        torch.manual_seed(0)
        recompute(model, kinds)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = model(**batch(2)).loss.sum()
        loss.backward()
        return loss, [p.grad for p in model.parameters()], sum(kept)

    (loss, gradients, kept), (again, same, fewer) = run(""), run(kinds)
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, same))
    assert fewer < kept


def test_what_is_computed_again_works_on_a_shared_model(run_ranks):
    def work(rank):
        gradients = []
        for kinds in ("", "M*-E"):
            model = build(2)
            recompute(model, kinds)
            model(**batch(2, seed=rank)).loss.sum().backward()
            gradients.append([whole(p.grad) for p in model.parameters()])
        assert all(map(torch.equal, *gradients))

    check(run_ranks(2, started(work)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_muon_steps_as_in_one_process(run_ranks, ranks):
    def work(rank):
        one, shared = build(), build(ranks)
        for model in (one, shared):
            optimizers = build_optimizers(model, Optim(name="muon", lr=0.05))
            for step in range(2):
                model(**batch(6, seed=step)).loss.mean().backward()
                for optimizer in optimizers:
                    optimizer.step()
                model.zero_grad()
        for (name, p), q in zip(one.named_parameters(), shared.parameters()):
            assert torch.allclose(p, whole(q), atol=2e-3), name

    check(run_ranks(ranks, started(work)))
