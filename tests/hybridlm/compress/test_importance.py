import pytest
import torch

from hybridlm.compress.importance import Importance, measure
from hybridlm.compress.surgery import Kept, prune

PATTERN = "M-M*-M-"


def rows(ids):
    return {"input_ids": ids}


@torch.no_grad()
def test_a_layer_is_worth_what_the_head_would_miss(parent, draw_ids):
    model, ids = parent(), draw_ids(3, 11)
    found = measure(model, [rows(ids)], [rows(ids)])
    whole = model.backbone(ids).last_hidden_state
    without = [prune(model, Kept([j for j in range(len(PATTERN)) if j != i])) for i in range(len(PATTERN))]
    errors = [(small.backbone(ids).last_hidden_state - whole).square().mean() for small in without]
    torch.testing.assert_close(found.layers, torch.stack(errors), rtol=1e-12, atol=0)
    assert found.layers.dtype == found.channels.dtype == found.parts[0].dtype == torch.float64


@torch.no_grad()
def test_a_layer_is_worth_the_same_however_the_text_comes(parent, draw_ids):
    model, ids = parent(), draw_ids(3, 11)
    others = draw_ids(2, 5, 1)
    once = measure(model, [rows(ids)], [rows(ids)]).layers
    torch.testing.assert_close(measure(model, map(rows, ids.split([1, 2])), [rows(ids)]).layers, once, rtol=1e-12, atol=0)
    # Of texts of other lengths every position counts alike.
    both = measure(model, [rows(ids), rows(others)], [rows(ids)]).layers
    alone = measure(model, [rows(others)], [rows(ids)]).layers
    torch.testing.assert_close(both, (33 * once + 10 * alone) / 43, rtol=1e-12, atol=0)


@torch.no_grad()
def test_documents_are_as_if_alone(parent, draw_ids):
    model, first, second = parent(), draw_ids(1, 7), draw_ids(1, 7, 1)
    packed = {"input_ids": torch.cat([first, second], 1), "seq_idx": torch.tensor([[0] * 7 + [1] * 7])}
    apart = [rows(first), rows(second)]
    together, alone = (measure(model, texts, texts) for texts in ([packed], apart))
    torch.testing.assert_close(together.layers, alone.layers, rtol=1e-10, atol=0)
    for some, others in zip([*together.parts, together.channels], [*alone.parts, alone.channels]):
        torch.testing.assert_close(some, others, rtol=1e-5, atol=0)


def activations(model, ids):
    """By hand, for each layer what its last product reads (b t parts channels), and what leaves every norm (b t d)."""
    c, backbone = model.config, model.backbone
    entered = backbone(ids, output_hidden_states=True).hidden_states
    read, normed = [], [entered[-1]]
    for x, block, symbol in zip(entered, backbone.layers, c.hybrid_override_pattern):
        m, h = block.mixer, x / (x.square().mean(-1, keepdim=True) + c.layer_norm_epsilon).sqrt() * block.norm.weight
        normed.append(h)
        if symbol == "-":
            read.append((h @ m.up_proj.weight.T + m.up_proj.bias).clamp(min=0)[..., None] ** 2)
        elif symbol == "*":
            q, k, v = ((h @ p.weight.T).unflatten(-1, (-1, c.head_dim)) for p in (m.q_proj, m.k_proj, m.v_proj))
            queries = c.num_attention_heads // c.num_key_value_heads
            scores = torch.einsum("btgqd,bsgd->bgqts", q.unflatten(2, (-1, queries)), k) / c.head_dim**0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            read.append(torch.einsum("bgqts,bsgd->btgqd", weights, v).flatten(-2))
        else:
            read.append(mamba(c, m, h))
    return read, normed


def mamba(c, m, h):
    """(b t heads channels) behind the gated norm, position after position."""
    inner, heads, groups = c.mamba_inner_size, c.mamba_num_heads, c.n_groups
    z, xBC, dt = (h @ m.in_proj.weight.T + m.in_proj.bias).split([inner, c.mamba_conv_size, heads], dim=-1)
    padded = torch.cat([torch.zeros_like(xBC[:, : c.conv_kernel - 1]), xBC], dim=1)
    windows = padded.unfold(1, c.conv_kernel, 1)  # (b t d k)
    xBC = torch.nn.functional.silu((windows * m.conv1d.weight[:, 0]).sum(-1) + m.conv1d.bias)
    x, B, C = xBC.split([inner, *[groups * c.ssm_state_size] * 2], dim=-1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    B, C = (some.repeat_interleave(heads // groups, dim=2) for some in (B, C))
    dt = torch.nn.functional.softplus(dt + m.dt_bias)
    state, y = 0.0, []
    for t in range(h.shape[1]):
        decay = (-dt[:, t] * m.A_log.exp()).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y.append((state * C[:, t, :, None]).sum(-1) + m.D[:, None] * x[:, t])
    gated = (torch.stack(y, 1).flatten(2) * torch.nn.functional.silu(z)).unflatten(-1, (groups, -1))
    scaled = gated / (gated.square().mean(-1, keepdim=True) + c.layer_norm_epsilon).sqrt()
    return (scaled.flatten(2) * m.norm.weight).unflatten(-1, (heads, -1))


@torch.no_grad()
def test_parts_are_worth_their_activations(parent, draw_ids):
    """The L2 norm of what a part adds to the residual stream, the mean over the rows of a batch, the L2 norm over the rest."""
    model, texts = parent(), [draw_ids(3, 11), draw_ids(2, 6, 1)]
    found = measure(model, [rows(texts[0])], map(rows, texts))
    read, normed = zip(*(activations(model, ids) for ids in texts))
    for i, part in enumerate(found.parts):
        mixer = model.backbone.layers[i].mixer
        into = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[model.config.hybrid_override_pattern[i]]
        columns = getattr(mixer, into).weight.unflatten(1, (len(part), -1))
        means = torch.cat([torch.einsum("btps,dps->btpd", one[i], columns).norm(dim=-1).mean(0) for one in read])  # (t parts)
        torch.testing.assert_close(part, means.square().sum(0).sqrt(), rtol=1e-5, atol=1e-7)
    means = torch.cat([h.abs().mean(0) for one in normed for h in one])
    torch.testing.assert_close(found.channels, means.square().sum(0).sqrt(), rtol=1e-5, atol=0)
    assert [len(part) for part in found.parts] == [8, 20, 8, 3, 20, 8, 20]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind(parent, draw_ids):
    model, good = parent(), rows(draw_ids(2, 5))
    before, whole = hooks(model), model(**good).logits
    found = measure(model, [good], [good])
    assert not any(t.requires_grad for t in [found.layers, found.channels, *found.parts])
    with pytest.raises(ValueError, match="token id 61 is outside"):
        measure(model, [good], [good, rows(torch.tensor([[61]]))])
    assert hooks(model) == before
    assert model(**good).logits.equal(whole) and all(p.grad is None for p in model.parameters())


def test_a_file_keeps_it(tmp_path):
    made = Importance(torch.rand(12).double(), [torch.rand(i + 1).double() for i in range(12)], torch.rand(5).double())
    made.save(tmp_path / "importance.safetensors")
    read = Importance.load(tmp_path / "importance.safetensors")
    assert read.layers.equal(made.layers) and read.channels.equal(made.channels)
    assert len(read.parts) == 12 and all(a.equal(b) for a, b in zip(read.parts, made.parts))


def test_what_cannot_be_cut_is_not_measured(tiny_model):
    with pytest.raises(ValueError, match="'E' mixture of experts"):
        measure(tiny_model(hybrid_override_pattern="ME"), [], [])
