"""A parent to cut out of: every tensor has values of its own, and epsilon is large enough for its handling to show."""

import pytest
import torch

from hybridlm.compress.surgery import Kept

SHAPE = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "hidden_size": 24,
    "use_bias": True,
    "mlp_bias": True,
    "layer_norm_epsilon": 1e-2,
}


@pytest.fixture
def parent_config(tiny_config):
    return lambda **changes: tiny_config(**SHAPE | changes)


@pytest.fixture
def parent(tiny_model):
    """Always with the same weights, in float64."""

    def build(**changes):
        model = tiny_model(**SHAPE | changes).double()
        with torch.no_grad():
            for name, t in model.named_parameters():
                if name.endswith(("bias", ".D")) or "norm" in name:
                    t += 0.3 * torch.randn_like(t)
        return model

    return build


@pytest.fixture
def zeroed():
    """Makes parts of a model do nothing, others in each layer, and tells what is left of it without them.

    Args of the result: the model; what goes: "layers", "channels", and of PARTS what is named.
    """

    @torch.no_grad()
    def zero(model, goes):
        c, rng = model.config, torch.Generator().manual_seed(1)

        def draw(size, count, first=0):
            return (first + torch.randperm(size, generator=rng)[:count]).tolist()

        def rest(gone, size):
            return [i for i in range(size) if i not in gone]

        channels = draw(c.hidden_size, 5) if "channels" in goes else []
        model.backbone.embeddings.weight[:, channels] = 0
        layers = [1, c.num_hidden_layers - 2] if "layers" in goes else []
        parts = {}
        for i, (symbol, block) in enumerate(zip(c.hybrid_override_pattern, model.backbone.layers)):
            m = block.mixer
            out = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[symbol]
            for t in getattr(m, out).parameters():
                t[channels] = 0
                t *= i not in layers
            if symbol == "M" and "mamba_num_heads" in goes:
                size = c.mamba_num_heads // c.n_groups
                gone = [head for group in range(c.n_groups) for head in draw(size, 1, group * size)]
                for t in m.in_proj.parameters():
                    t[: c.mamba_inner_size].unflatten(0, (-1, c.mamba_head_dim))[gone] = 0  # z, the gate
            elif symbol == "*" and "num_key_value_heads" in goes:
                gone = draw(c.num_key_value_heads, 1)
                for t in m.v_proj.parameters():
                    t.unflatten(0, (-1, c.head_dim))[gone] = 0
            elif symbol == "-" and "intermediate_size" in goes:
                gone = draw(c.intermediate_size, 3)
                for t in m.up_proj.parameters():
                    t[gone] = 0
            else:
                continue
            if i not in layers:
                parts[i] = rest(gone, {"M": c.mamba_num_heads, "*": c.num_key_value_heads, "-": c.intermediate_size}[symbol])
        return Kept(rest(layers, c.num_hidden_layers), parts, rest(channels, c.hidden_size) if channels else None)

    return zero
