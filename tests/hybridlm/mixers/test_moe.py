import pytest
import torch

from hybridlm.mixers.context import Context
from hybridlm.mixers.moe import MoE
from hybridlm.ops import build_ops

KINDS = {
    "plain": {},
    "one expert a token": {"num_experts_per_tok": 1},
    "every expert": {"num_experts_per_tok": 6},
    "weights as they are": {"norm_topk_prob": False},
    "best of groups": {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3},
    "one group of three": {"n_group": 3, "topk_group": 1},
    "latent": {"moe_latent_size": 12, "mlp_bias": True},
}


@pytest.fixture
def mixer(tiny_config):
    def build(**changes):
        torch.manual_seed(0)
        made = MoE(tiny_config(**changes), build_ops())
        torch.nn.init.normal_(made.gate.weight)
        torch.nn.init.normal_(made.gate.e_score_correction_bias, std=0.5)
        return made.double()

    return build


def mlp(m, x):
    return m.down_proj(torch.clamp(m.up_proj(x), min=0) ** 2)


def plainly(m, x, c):
    """One token and one expert after the other."""
    outputs = []
    for token in x:
        score = torch.sigmoid(m.gate.weight @ token)
        choice = (score + m.gate.e_score_correction_bias).tolist()
        size = c.n_routed_experts // c.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        best = sorted(groups, key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))[: c.topk_group]
        chosen = sorted((e for group in best for e in group), key=lambda e: -choice[e])[: c.num_experts_per_tok]
        total = sum(score[e] for e in chosen) if c.norm_topk_prob else 1
        latent = m.fc1_latent_proj(token)
        routed = sum(score[e] / total * c.routed_scaling_factor * mlp(m.experts[e], latent) for e in chosen)
        outputs.append(m.fc2_latent_proj(routed) + mlp(m.shared_experts, token))
    return torch.stack(outputs)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_equals_the_layer_written_plainly_with_every_gradient(changes, mixer, tiny_config):
    m, x = mixer(**changes), torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    y, state = m(x, Context(), None)
    expected = plainly(m, x.flatten(0, 1), tiny_config(**changes)).view_as(x)
    assert state is None
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    cotangent, inputs = torch.randn_like(y), [x, *m.parameters()]
    ours = torch.autograd.grad(y, inputs, cotangent)
    theirs = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for p, a, b in zip(inputs, ours, theirs):
        torch.testing.assert_close(a, torch.zeros_like(p) if b is None else b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
def test_no_token_is_dropped_whatever_the_load(grad, mixer, tiny_config):
    m, x = mixer(), torch.randn(3, 40, 32, dtype=torch.float64)
    m.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 10, 0, 0, 10, 0]))
    with torch.set_grad_enabled(grad):
        y, _ = m(x, Context(), None)
    assert m.gate(x.flatten(0, 1))[1].sort(-1).values.unique(dim=0).tolist() == [[1, 4]]  # all went the same way
    torch.testing.assert_close(y, plainly(m, x.flatten(0, 1), tiny_config()).view_as(x), rtol=1e-9, atol=1e-9)


def test_experts_without_a_token_still_get_a_gradient(mixer):
    m = mixer(num_experts_per_tok=1)
    m.gate.e_score_correction_bias.copy_(torch.tensor([10.0, 0, 0, 0, 0, 0]))
    y, _ = m(torch.randn(1, 5, 32, dtype=torch.float64), Context(), None)
    y.sum().backward()
    assert m.experts[0].up_proj.weight.grad.any()
    assert all(p.grad is not None and not p.grad.any() for expert in m.experts[1:] for p in expert.parameters())


def test_the_bias_moves_the_choice_and_not_the_weights(mixer):
    m, x = mixer(num_experts_per_tok=6), torch.randn(5, 32, dtype=torch.float64)
    weights, chosen = m.gate(x)
    m.gate.e_score_correction_bias.add_(torch.randn(6))
    after, others = m.gate(x)
    assert not torch.equal(chosen, others)
    torch.testing.assert_close(after.gather(1, others.argsort(1)), weights.gather(1, chosen.argsort(1)))


def test_only_experts_with_tokens_run_without_gradients(mixer, monkeypatch):
    m, ran = mixer(), []
    for i, expert in enumerate(m.experts):
        expert.register_forward_hook(lambda module, args, y, i=i: ran.append(i))
    with torch.no_grad():
        _, chosen = m.gate(x := torch.randn(1, 32, dtype=torch.float64))
        m(x[None], Context(), None)
    assert ran == sorted(chosen.flatten().tolist())


@pytest.mark.parametrize("autocast", [True, False])
def test_the_router_works_in_fp32_under_bf16(autocast, tiny_config):
    torch.manual_seed(0)
    m, x = MoE(tiny_config(), build_ops()).requires_grad_(False), torch.randn(9, 32)
    torch.nn.init.normal_(m.gate.weight)
    m, x = (m, x) if autocast else (m.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights, chosen = m.gate(x)
        y, _ = m(x[None], Context(), None)
    scores = torch.sigmoid(x.float() @ m.gate.weight.float().T)
    best = scores.topk(2, dim=-1)
    assert weights.dtype == torch.float32 and m.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(chosen, best.indices)
    torch.testing.assert_close(weights, best.values / best.values.sum(-1, keepdim=True) * 2.5, rtol=1e-5, atol=1e-5)
    assert y.dtype == x.dtype
