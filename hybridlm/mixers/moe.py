"""`E`: a mixture of experts with a sigmoid router that a bias balances (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), and a
shared expert; where configured, the experts work in a smaller latent space. As in Nemotron 3."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hybridlm.cache import State
from hybridlm.configuration import HybridLMConfig
from hybridlm.mixers.context import Context
from hybridlm.mixers.ffn import MLP
from hybridlm.mixers.parts import IntoResidual, KeepsWide, Linear
from hybridlm.ops import Ops
from hybridlm.ops.precision import without_autocast


class MoE(nn.Module):
    """shared(x) + sum over the token's experts of weight * expert(x); no token is dropped, whatever the load."""

    hands_on = True

    def __init__(self, config: HybridLMConfig, ops: Ops):
        super().__init__()
        c, latent = config, config.moe_latent_size
        size, down = (c.hidden_size, IntoResidual) if latent is None else (latent, Linear)
        self.gate = Router(c)
        self.experts = nn.ModuleList(MLP(size, c.moe_intermediate_size, False, down) for _ in range(c.n_routed_experts))
        self.shared_experts = MLP(c.hidden_size, c.moe_shared_expert_intermediate_size, c.mlp_bias)
        has_latent = latent is not None
        self.fc1_latent_proj = Linear(c.hidden_size, size, bias=c.mlp_bias) if has_latent else nn.Identity()
        self.fc2_latent_proj = IntoResidual(size, c.hidden_size, bias=c.mlp_bias) if has_latent else nn.Identity()

    def forward(self, x: Tensor, context: Context, state: State | None) -> tuple[Tensor, None]:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        latent = self.fc1_latent_proj(tokens)
        # Tokens in the order of their experts, so that each expert has one matrix product.
        expert_of, order = chosen.flatten().sort(stable=True)
        token_of = order // chosen.shape[1]
        loads = torch.bincount(expert_of, minlength=len(self.experts)).tolist()
        # In training an expert without tokens runs too: optimisers and DDP expect a gradient of every parameter.
        idle = torch.is_grad_enabled()
        parts = [expert(part) for expert, part in zip(self.experts, latent[token_of].split(loads)) if len(part) or idle]
        routed = torch.cat(parts) * weights.flatten()[order, None]
        # Summed in fp32: bf16 would round once for each expert.
        summed = torch.zeros(latent.shape, dtype=weights.dtype, device=x.device).index_add(0, token_of, routed.to(weights.dtype))
        y = self.fc2_latent_proj(summed.to(x.dtype)) + self.shared_experts(tokens)
        return y.view_as(x), None


class Router(KeepsWide, nn.Module):
    """Which experts a token goes to, and with what weight.

    The experts of the highest score + bias are chosen; the weights are the scores alone, so the bias, which no gradient
    reaches, moves load without moving the function. In training it moves after each step.
    """

    WIDE = ("e_score_correction_bias",)
    e_score_correction_bias: Tensor

    def __init__(self, config: HybridLMConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (tokens d) -> weights (tokens k), fp32, and experts (tokens k)."""
        c, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            scores = linear(x.to(wide), self.weight.to(wide)).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if c.topk_group < c.n_group:  # only the groups whose two best experts are best take part
            groups = choice.unflatten(-1, (c.n_group, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            outside = torch.ones(groups.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, False)
            choice = groups.masked_fill(outside[..., None], -torch.inf).flatten(1)
        chosen = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, chosen
