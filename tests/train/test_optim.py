import pytest
import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from train.muon import Muon
from train.optim import (
    batch_size,
    build_optimizers,
    cut,
    learning_rate,
    mask_seed,
    micro_batches,
    parameter_groups,
    row_length,
    samples_by,
    stages,
)  # fmt: skip
from train.settings import Data, Optim, RunConfig, Schedule, Train

TINY = {
    "vocab_size": 10, "hidden_size": 16, "hybrid_override_pattern": "M*-Emr", "intermediate_size": 16, "ssm_state_size": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8,
}  # fmt: skip


def test_every_parameter_is_in_exactly_one_group_and_neither_vectors_nor_A_log_decay():
    config = HybridLMConfig(
        vocab_size=10, hidden_size=16, hybrid_override_pattern="M*-m", intermediate_size=16, ssm_state_size=4, mamba_num_heads=4,
        mamba_head_dim=8, n_groups=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, use_bias=True, mlp_bias=True,
        attention_bias=True,
    )  # fmt: skip
    model = HybridLMForCausalLM(config)
    decays, rests = parameter_groups(model, 0.1)
    assert (decays["weight_decay"], rests["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [id(p) for group in (decays, rests) for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    without = {names[id(p)] for p in rests["params"]}
    assert without == {n for n in names.values() if n.endswith(("A_log", ".D", "dt_bias", "bias")) or "norm" in n}


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
def test_the_rate_warms_up_stays_and_falls_to_its_least(decay_type):
    schedule = Schedule(warmup=0.1, decay=0.2, decay_type=decay_type, min_lr_ratio=0.01)
    rate = learning_rate(Optim(lr=2.0), schedule, 100)
    rates = [rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2, rel=0.1)
    assert rates[:10] == sorted(set(rates[:10]))
    assert rates[9:80] == pytest.approx([2.0] * 71)
    assert rates[79:] == sorted(set(rates[79:]), reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_1_sqrt_is_the_published_curve():
    rate = learning_rate(Optim(lr=1.0), Schedule(warmup=0.0, decay=0.5, decay_type="1-sqrt", min_lr_ratio=0.0), 100)
    assert rate(75) == pytest.approx(1 - (25 / 50) ** 0.5)


def test_a_decay_has_its_whole_number_of_steps():
    """0.29 of 100 are 28.999999999999996 in floating point."""
    rate = learning_rate(Optim(lr=1.0), Schedule(warmup=0.0, decay=0.29, decay_type="linear", min_lr_ratio=0.0), 100)
    assert [rate(step) for step in (70, 71, 72)] == pytest.approx([1, 1, 28 / 29])


@pytest.mark.parametrize(
    ("warmup", "decay", "steps", "want"),
    [
        (0.0, 0.0, 4, [1, 1, 1, 1]),
        (0.05, 0.9, 1, [1]),
        (0.5, 0.5, 3, [0.5, 1, 0.01]),
        (1.0, 0.0, 4, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_runs_of_few_steps_reach_the_peak(warmup, decay, steps, want):
    rate = learning_rate(Optim(lr=1.0), Schedule(warmup=warmup, decay=decay, decay_type="linear", min_lr_ratio=0.01), steps)
    assert [rate(step) for step in range(1, steps + 1)] == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_any_number_of_ranks_takes_each_sample_of_the_batch_once(ranks, micro):
    taken = [i for rank in range(ranks) for rows in micro_batches(12, micro, rank, ranks) for i in rows]
    assert sorted(taken) == list(range(12))
    assert taken == list(range(12))


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"global_batch \(12\) must be a multiple of the number of ranks \(5\)"):
        micro_batches(12, None, 0, 5)
    with pytest.raises(ValueError, match=r"micro_batch \(4\) must divide"):
        micro_batches(12, 4, 0, 2)


def test_adamw_is_torchs_own():
    (optimizer,) = build_optimizers(
        HybridLMForCausalLM(HybridLMConfig(**TINY)), Optim(name="adamw", beta1=0.8, beta2=0.9, eps=1e-6)
    )
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest():
    model = HybridLMForCausalLM(HybridLMConfig(**TINY))
    muon, adamw = build_optimizers(model, Optim(name="muon", lr=0.5, momentum=0.8, weight_decay=0.3))
    names = {p: name for name, p in model.named_parameters()}
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    hidden = {names[p] for group in muon.param_groups for p in group["params"]}
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert hidden == {n for n in names.values() if n.endswith("proj.weight")}
    assert sorted([*hidden, *rest]) == sorted(names.values())
    assert {"backbone.embeddings.weight", "lm_head.weight", "backbone.layers.3.mixer.gate.weight"} <= set(rest)
    (group,) = muon.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.8, 0.3)


def warming(**schedule):
    return RunConfig("run", train=Train(steps=20, global_batch=16), data=Data(seq_len=64), schedule=Schedule(**schedule))


def test_the_batch_doubles_in_even_stages_and_every_sample_is_in_one_step():
    config = warming(batch_start=4, batch_warmup=0.5)
    sizes = [batch_size(config, step) for step in range(1, 21)]
    assert sizes == [4] * 5 + [8] * 5 + [16] * 10
    for step in range(21):
        assert samples_by(config, step) == sum(sizes[:step])
        assert [size for size, count in stages(config, step) for _ in range(count)] == sizes[step:]


def test_rows_double_in_even_stages_too():
    config = warming(length_start=16, length_warmup=0.25)
    assert [row_length(config, step) for step in range(1, 8)] == [16, 16, 16, 32, 32, 64, 64]


def test_without_a_warm_up_every_step_is_whole():
    config = warming()
    assert [batch_size(config, 1), row_length(config, 1), samples_by(config, 7)] == [16, 64, 112]
    assert [*stages(config, 3)] == [(16, 17)]


def test_a_window_is_cut_into_rows_of_the_same_tokens_in_order():
    batch = {"targets": torch.arange(24).view(2, 12), "logits": torch.arange(72).view(2, 12, 3)}
    rows = cut(batch, 4)
    assert rows["targets"].tolist()[3] == [12, 13, 14, 15] and rows["logits"].shape == (6, 4, 3)
    assert torch.equal(rows["targets"].flatten(), torch.arange(24)) and rows["logits"][5, 3, 2] == 71


def test_masks_have_a_seed_of_their_own_for_each_seed_step_and_row():
    seeds = [mask_seed(seed, step, row) for seed in (0, 1) for step in (1, 2, 11) for row in (0, 1, 10)]
    assert len(set(seeds)) == len(seeds) and seeds[0] == mask_seed(0, 1, 0)
