"""FP8 in a run, and FP8 weights that FSDP2 shards."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.fp8 import convert, linear_class
from hybridlm.strict_yaml import load_yaml
from train import loop
from train.loop import train
from train.objective import next_token_loss
from train.setup import build_model
from train.sharding import scale_weights, shard
from train.tensor_files import local

# 64 + 32 + 16 rows of in_proj.
SHAPE = {
    "hybrid_override_pattern": "M-M*-M-", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 16, "mamba_head_dim": 2, "n_groups": 2, "ssm_state_size": 8,
    "chunk_size": 16,
}  # fmt: skip
DEMO = load_yaml("configs/demo.yaml")


@pytest.fixture
def fp8_config(make_config):
    return lambda **changes: make_config(**{
        "model__config": SHAPE, "train__precision": "fp8", "train__fp8_emulate": True, "train__val_every": 100,
        "log__sample_tokens": 2, **changes
    })  # fmt: skip


def lines(config, key="loss"):
    rows = [json.loads(text) for text in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def test_a_run_in_fp8_learns_like_one_in_bf16_and_leaves_a_plain_model(fp8_config, tmp_path, capsys):
    config = fp8_config(train__steps=24, optim__lr=3e-3)  # at 1e-2 rounding alone moves the losses by 5%
    train(config)
    assert (
        "\nfp8         emulated, 8 of 17 linear layers; in bf16: first and last two layers (8), head (1)\n"
        in capsys.readouterr().out
    )
    bf16 = fp8_config(train__steps=24, optim__lr=3e-3, train__precision="bf16", run_dir=str(tmp_path / "bf16"))
    train(bf16)
    assert "fp8  " not in capsys.readouterr().out
    ours, theirs = ([line["loss"] for line in lines(c)] for c in (config, bf16))
    assert ours[-1] < ours[0] - 1.5
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3) and ours[0] != theirs[0]
    assert sum(ours[-10:]) == pytest.approx(sum(theirs[-10:]), rel=0.01)
    assert {"grad_norm/mamba", "dt/mean", "memory/median"} <= set(lines(config)[0])
    model = HybridLMForCausalLM.from_pretrained(Path(config.run_dir) / "model")
    assert model.dtype == torch.float32 and not any(isinstance(m, linear_class()) for m in model.modules())


def test_an_odd_number_of_tokens_trains_too(fp8_config):
    config = fp8_config(data__seq_len=27, train__micro_batch=1, train__steps=4)
    train(config)
    assert lines(config)[-1]["loss"] < lines(config)[0]["loss"]


def test_a_run_in_fp8_that_was_cut_off_ends_as_if_nothing_had_happened(fp8_config, tmp_path):
    whole, cut = fp8_config(), fp8_config(run_dir=str(tmp_path / "cut"))
    train(whole)
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training
        if calls == 7:
            raise KeyboardInterrupt
        return next_token_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=loss)
    train(cut)
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        x, y = (load_file(Path(c.run_dir) / "checkpoints" / "step-8" / file) for c in (whole, cut))
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(cut)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__fp8_emulate": False}, r"train.precision=fp8 needs a CUDA device"),
        ({"model__config": SHAPE | {"mamba_num_heads": 4}}, r"backbone.layers.2.mixer.in_proj \(52 x 32\)"),
        ({"model__config": SHAPE | {"hybrid_override_pattern": "M-*-"}}, "nothing to convert"),
    ],
)
def test_a_run_that_cannot_be_in_fp8_does_not_begin(fp8_config, changes, message):
    config = fp8_config(**changes)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (Path(config.run_dir) / "config.yaml").exists()


def test_unfit_layers_are_left_in_bf16_where_that_is_wanted(fp8_config, capsys):
    train(fp8_config(model__config=SHAPE | {"mamba_num_heads": 4}, train__fp8_unfit="bf16", train__steps=1))
    said = "sizes not divisible by 16 (2): backbone.layers.2.mixer.in_proj (52 x 32), backbone.layers.2.mixer.out_proj (32 x 8)\n"
    assert said in capsys.readouterr().out


def build(device):
    torch.manual_seed(0)
    with torch.device(device):
        return HybridLMForCausalLM(HybridLMConfig(**SHAPE)).train()


def test_sharded_fp8_weights_train_as_whole_ones_do(run_ranks):
    """On two ranks, from the meta device; the weights are gathered in FP8."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    def work(rank):
        dist.init_process_group("gloo")
        mesh = dist.init_device_mesh("cpu", (2,))
        whole, sharded = build("cpu"), build("meta")
        start = whole.state_dict()
        convert(whole, "cpu", emulate=True)
        convert(sharded, "cpu", emulate=True, ranks=2)
        shard(sharded, mesh, torch.bfloat16)
        sharded.to_empty(device="cpu")
        parameters = dict(sharded.named_parameters())
        wrapped = [p for p in parameters.values() if isinstance(p._local_tensor, WeightWithDynamicFloat8CastTensor)]
        assert len(wrapped) == 8
        with torch.no_grad():
            for name, p in parameters.items():
                local(p).copy_(distribute_tensor(start[name], mesh, p.placements).to_local())
                assert type(local(p)) is torch.Tensor
        models = whole, sharded
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) for model in models]
        for step in range(4):
            ids = torch.randint(258, (4, 33), generator=torch.Generator().manual_seed(step))
            losses, norms = torch.zeros(2), []
            for i, (model, own) in enumerate(zip(models, ([slice(0, 2), slice(2, 4)], [slice(2 * rank, 2 * rank + 2)]))):
                with torch.autocast("cpu", torch.bfloat16):
                    for rows in own:
                        loss = model(ids[rows, :-1], targets=ids[rows, 1:]).loss.sum() / 128
                        (loss * 2 / len(own)).backward()
                        losses[i] += loss.item() / (2 if i == 0 else 1)
                norm = get_total_norm([p.grad for p in model.parameters()])
                norms.append(norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item())
                clip_grads_with_norm_(model.parameters(), 1.0, norm)
            dist.all_reduce(losses)
            assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6), step
            assert norms[1] == pytest.approx(norms[0], rel=1e-5)
            if step == 0:
                for (name, p), q in zip(parameters.items(), whole.parameters(), strict=True):
                    mine = distribute_tensor(q.grad, mesh, p.placements).to_local()
                    torch.testing.assert_close(local(p.grad), mine, rtol=1e-4, atol=1e-6, msg=name)
            before = [local(p).clone() for p in wrapped]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert not any(torch.equal(local(p), old) for p, old in zip(wrapped, before, strict=True))
            precompute_float8_dynamic_scale_for_fsdp(sharded)
        assert all(p._local_tensor._precomputed_scale is not None for p in wrapped)
        dist.destroy_process_group()

    assert [(rank.status, rank.err) for rank in run_ranks(2, work, limit=60) if rank.status] == []


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.scale) for ranks in (2, 5))])
def test_weights_whose_rows_do_not_divide_by_the_ranks_are_gathered_in_bf16(fp8_config, run_ranks, ranks):
    """in_proj has 112 rows, k_proj 16: on three ranks both are uneven, on five the last one has nothing of k_proj."""

    def work(rank):
        dist.init_process_group("gloo")
        mesh = dist.init_device_mesh("cpu", (ranks,))
        model, whole = build_model(fp8_config(), mesh=mesh), build_model(fp8_config())
        assert sum(isinstance(module, linear_class()) for module in model.modules()) == 8
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        ids = torch.randint(258, (1, 17), generator=torch.Generator().manual_seed(0))
        for step in range(2):
            scale_weights(model)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids[:, :-1], targets=ids[:, 1:]).loss.sum()
                if step == 0:
                    assert loss.item() == pytest.approx(whole(ids[:, :-1], targets=ids[:, 1:]).loss.sum().item(), rel=1e-3)
            loss.backward()
            assert get_total_norm([p.grad for p in model.parameters()]).full_tensor().isfinite()
            optimizer.step()
            optimizer.zero_grad()
        dist.destroy_process_group()

    assert [(rank.status, rank.err) for rank in run_ranks(ranks, work, limit=60) if rank.status] == []


@pytest.mark.scale
def test_scales_that_are_gathered_follow_every_update(fp8_config, run_ranks, monkeypatch):
    config = fp8_config(train__sharding="fsdp2", train__steps=3, log__sample_tokens=0)

    def work(rank):
        taken = []
        real = loop.scale_weights
        monkeypatch.setattr(loop, "scale_weights", lambda model: taken.append(real(model)))
        train(config)
        assert len(taken) == 4  # before the first step and after each

    assert [(rank.status, rank.err) for rank in run_ranks(2, work, limit=60) if rank.status] == []


@pytest.mark.scale
def test_fp8_learns_as_bf16_does_on_the_demo(make_config, tmp_path, record_property):
    """The demo, its Mamba heads smaller and more so that in_proj has 592 rows, which 16 divides, not 580."""
    shape = load_yaml("configs/model/demo.yaml") | {"mamba_num_heads": 16, "mamba_head_dim": 16}
    means = {}
    for precision in ("bf16", "fp8"):
        config = make_config(
            run_dir=str(tmp_path / precision), model__config=shape, train__precision=precision, train__fp8_emulate=True,
            **{f"data__{k}": v for k, v in DEMO["data"].items()}, **{f"optim__{k}": v for k, v in DEMO["optim"].items()},
            **{f"schedule__{k}": v for k, v in DEMO["schedule"].items()}, train__steps=200, train__checkpoint_every=200,
            train__val_every=200, log__sample_tokens=0,
        )  # fmt: skip
        train(config)
        means[precision] = sum(line["loss"] for line in lines(config)[-20:]) / 20
    ratio = means["fp8"] / means["bf16"]
    record_property("loss of fp8 / bf16, demo, 200 steps", f"{ratio:.5f}")
    assert abs(ratio - 1) < 0.005, means
