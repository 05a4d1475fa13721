import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import softplus

from hybridlm import HybridLMForCausalLM

WIDE = ("A_log", "D", "dt_bias")

# Opening in another dtype


def check_bf16(model, ids, true, relative):
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.rsplit(".", 1)[-1] in WIDE else torch.bfloat16), name
    cache = model(ids, use_cache=True).past_key_values
    assert cache.states[0][1].dtype == torch.float32
    logits = model(ids).logits
    assert logits.dtype == torch.float32 and relative(logits, true) < 0.06


@torch.no_grad()
def test_bf16_keeps_the_parameters_of_the_decay_in_fp32(tiny_model, tmp_path, draw_ids, relative):
    model = tiny_model()
    true = model(draw_ids(2, 19)).logits
    wide = {name: p.clone() for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in WIDE}
    model.save_pretrained(tmp_path / "fp32")
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    back = HybridLMForCausalLM.from_pretrained(tmp_path / "bf16")
    for narrow in (loaded, model, back):
        check_bf16(narrow, draw_ids(2, 19), true, relative)
        assert all(torch.equal(p, wide[name]) for name, p in narrow.named_parameters() if name in wide)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32])
def test_a_folder_all_in_bf16_opens_with_the_decay_in_fp32(dtype, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: p.bfloat16() for name, p in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for name, p in loaded.named_parameters() if name.rsplit(".", 1)[-1] in WIDE} == {torch.float32}


# Initialisation


@pytest.fixture
def fresh(tiny_config):
    torch.manual_seed(0)
    wide = {"hidden_size": 128, "mamba_num_heads": 256, "intermediate_size": 256, "num_attention_heads": 16, "vocab_size": 512}
    return lambda **changes: HybridLMForCausalLM(tiny_config(initializer_range=0.02, **wide | changes))


def test_the_decay_starts_between_1_and_16_and_the_step_in_its_range(fresh):
    model = fresh()
    for i in (0, 2, 5):
        mixer = model.backbone.layers[i].mixer
        A, dt = torch.exp(mixer.A_log), softplus(mixer.dt_bias)
        assert A.min() >= 1 and A.max() <= 16 and A.mean().item() == pytest.approx(8.5, abs=1)
        assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
        assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.3)  # uniform in the logarithm
        assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
        assert mixer.conv1d.weight.abs().max() <= 0.5 and mixer.conv1d.weight.std().item() == pytest.approx(1 / 12**0.5, rel=0.1)
    first, other = (model.backbone.layers[i].mixer.A_log for i in (0, 2))
    assert not torch.equal(first, other)


def test_the_decay_begins_in_the_range_that_is_asked_for(fresh):
    A = torch.exp(fresh(A_init_min=2.0, A_init_max=3.0).backbone.layers[0].mixer.A_log)
    assert 2 <= A.min() < A.max() <= 3


def test_the_step_has_a_floor(fresh):
    mixer = fresh(time_step_min=1e-6, time_step_floor=1e-2).backbone.layers[0].mixer
    assert softplus(mixer.dt_bias).min().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("rescale", [True, False])
def test_projections_into_the_residual_stream_start_smaller(rescale, fresh):
    model = fresh(rescale_prenorm_residual=rescale)
    for name, p in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(7) if rescale else 0.02, rel=0.05), name
        elif name.endswith(("embeddings.weight", "lm_head.weight", "in_proj.weight", "q_proj.weight", "up_proj.weight")):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("latent", [None, 64])
def test_of_the_experts_what_enters_the_residual_stream_starts_smaller(latent, fresh):
    """The experts' own projections, or the one out of their latent space."""
    sizes = {"moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 128, "n_routed_experts": 4}
    mixer = fresh(hybrid_override_pattern="MEM*", moe_latent_size=latent, **sizes).backbone.layers[1].mixer
    small, full = 0.02 / math.sqrt(4), 0.02
    expected = {
        mixer.experts[0].down_proj: small if latent is None else full,
        mixer.experts[3].up_proj: full,
        mixer.shared_experts.down_proj: small,
        mixer.gate: full,
    } | ({} if latent is None else {mixer.fc1_latent_proj: full, mixer.fc2_latent_proj: small})
    for module, std in expected.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not mixer.gate.e_score_correction_bias.any()
