import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHForCausalLM

from hybridlm import HybridLMForCausalLM
from hybridlm.data.blend import Blend
from hybridlm.flops import training_flops
from tests.train.conftest import SHAPE
from train import checkpoint
from train.config import dump
from train.loop import train
from train.objective import next_token_loss
from train.optim import learning_rate
from train.setup import build_model

LOSS = {"val_loss": 1.0, "val_bits_per_byte": 1.0}


def lines(config, key="loss"):
    rows = [json.loads(text) for text in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def weights(config):
    return load_file(Path(config.run_dir) / "model" / "model.safetensors")


def assert_same_end(a, b):
    """Weights, optimiser state and random numbers are equal bit for bit."""
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        x, y = (load_file(Path(c.run_dir) / "checkpoints" / "step-8" / file) for c in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


def after(calls, action):
    """A loss that does `action` in its `calls`-th call."""
    count = 0

    def loss(model, batch):
        nonlocal count
        count += model.training
        if count == calls:
            count += 1
            action()
        return next_token_loss(model, batch)

    return loss


def test_batch_and_rows_grow_each_sample_is_read_once_and_a_run_cut_off_meanwhile_goes_on_the_same(make_config, tmp_path):
    warming = {
        "optim__name": "muon", "optim__z_loss": 1e-3, "schedule__batch_start": 1, "schedule__batch_warmup": 0.75,
        "schedule__length_start": 8, "schedule__length_warmup": 0.5, "train__checkpoint_every": 2, "train__val_every": 8,
    }  # fmt: skip
    whole, cut = make_config(**warming), make_config(run_dir=str(tmp_path / "cut"), **warming)
    shapes = []

    def loss(model, batch):
        if model.training:
            shapes.append(tuple(batch["targets"].shape))
        if len(shapes) == 8 + 4:
            raise KeyboardInterrupt
        return next_token_loss(model, batch, z_loss=1e-3)

    train(whole, loss=loss)
    assert shapes == [(4, 8), (4, 8), (2, 16), (4, 16), (2, 32), (2, 32), (4, 32), (4, 32)]
    assert [line["tokens"] // 32 for line in lines(whole)] == [1, 2, 3, 5, 7, 9, 13, 17]
    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=loss)
    train(cut)
    assert_same_end(whole, cut)


def test_a_run_learns_and_leaves_what_the_contract_names(make_config):
    config = make_config(train__steps=40, schedule__decay=0.5)
    train(config)
    run = Path(config.run_dir)
    assert yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(dump(config))
    fields = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"}
    fields |= {"tokens_per_second_per_rank"}
    steps, validations = lines(config), lines(config, "val_loss")
    assert all(fields < set(line) for line in steps)
    assert {"grad_norm/mamba", "grad_norm/attention", "dt/mean", "memory/median"} <= set(steps[0])
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert steps[-1]["tokens"] == 40 * 4 * 32
    assert steps[0]["mfu"] is None
    assert all(set(line) == {"step", "tokens", "val_loss", "val_bits_per_byte"} for line in validations)
    assert [line["step"] for line in validations] == [0, *range(4, 41, 4)]
    assert validations[0]["val_loss"] == pytest.approx(math.log(258), abs=0.3)
    assert validations[-1]["val_loss"] < validations[0]["val_loss"] - 2
    assert validations[-1]["val_bits_per_byte"] == pytest.approx(validations[-1]["val_loss"] / math.log(2))
    samples = [json.loads(text) for text in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [line["step"] for line in validations]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-36", "step-40"]
    assert os.readlink(run / "model") == "checkpoints/step-40/model"


def test_the_model_folder_opens_in_stock_transformers_with_our_logits(make_config):
    config = make_config()
    train(config)
    folder = Path(config.run_dir) / "model"
    stock, ours = AutoModelForCausalLM.from_pretrained(folder), HybridLMForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == "NemotronHForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat saw an owl on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = ours(ids).logits, stock(ids).logits
    assert (a - b).abs().max() / b.abs().max() < 1e-4
    assert stock.generation_config.eos_token_id == tokenizer.eos_token_id == 256


def test_a_run_cut_off_between_checkpoints_ends_as_if_nothing_had_happened(make_config, tmp_path):
    whole, cut = make_config(), make_config(run_dir=str(tmp_path / "cut"))
    train(whole)

    def crash():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=after(7, crash))
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").glob("step-*")] == ["step-4"]
    train(cut)
    assert_same_end(whole, cut)
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(cut)]
    assert lines(whole, "val_loss") == lines(cut, "val_loss")


def test_dropout_goes_on_with_the_masks_that_it_had_whatever_else_draws_random_numbers(make_config, tmp_path):
    shape = SHAPE | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    common = {"model__config": shape, "train__micro_batch": 2, "train__recompute": "M", "log__sample_tokens": 0}
    common |= {"train__steps": 3, "train__checkpoint_every": 2}
    whole, cut = make_config(**common), make_config(**common, run_dir=str(tmp_path / "cut"))

    def drawing(model, batch):
        nats = next_token_loss(model, batch)
        torch.rand(1)
        return nats

    def crash():
        raise KeyboardInterrupt

    train(whole, loss=drawing)
    with pytest.raises(KeyboardInterrupt):
        train(cut, loss=after(5, crash))
    train(cut)
    assert all(torch.equal(tensor, weights(cut)[name]) for name, tensor in weights(whole).items())
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(cut)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_at_hand_and_the_same_command_goes_on(make_config, tmp_path, number):
    whole, cut = make_config(), make_config(run_dir=str(tmp_path / "cut"))
    train(whole)
    before = signal.getsignal(number)
    train(cut, loss=after(6, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert os.readlink(tmp_path / "cut" / "model") == "checkpoints/step-6/model"
    train(cut)
    assert_same_end(whole, cut)


def test_a_finished_run_started_again_changes_nothing_but_its_log(make_config):
    config = make_config()
    found = []
    for _ in range(2):
        train(config)
        found.append({p: p.read_bytes() for p in Path(config.run_dir).rglob("*") if p.is_file() and p.suffix != ".log"})
    assert found[0] == found[1] and len(found[0]) > 10


def test_the_schedule_and_the_clipping_reach_the_optimiser(make_config, tmp_path):
    free, clipped = make_config(), make_config(run_dir=str(tmp_path / "clipped"), optim__clip=1e-9, optim__eps=1.0)
    for config in (free, clipped):
        train(config)
    rate = learning_rate(free.optim, free.schedule, 8)
    assert [line["lr"] for line in lines(free)] == [rate(step) for step in range(1, 9)]
    # With eps = 1 Adam's step is about lr x gradient: nothing is left of a gradient of 1e-9 but for the weight decay.
    clipped_head, first = weights(clipped)["lm_head.weight"], clipped.optim.weight_decay
    torch.manual_seed(clipped.seed)
    start = build_model(clipped).lm_head.weight.detach()
    shrunk = math.prod(1 - rate(step) * first for step in range(1, 9))
    torch.testing.assert_close(clipped_head, start * shrunk, atol=1e-7, rtol=1e-4)


def test_accumulation_does_not_change_the_losses(make_config, tmp_path):
    whole, parts = make_config(), make_config(run_dir=str(tmp_path / "parts"), train__micro_batch=1)
    train(whole)
    train(parts)
    for a, b in zip(lines(whole), lines(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_loss_is_the_mean_over_the_targets_of_the_whole_batch(make_config):
    config = make_config(train__steps=1, train__micro_batch=1)
    sums, counts = [], []

    def loss(model, batch):
        nll = next_token_loss(model, batch)
        sums.append(nll.sum().item())
        counts.append((batch["targets"] != -100).sum().item())
        return nll

    train(config, loss=loss)
    assert len(set(counts)) > 1  # some windows cross a document's end
    assert lines(config)[0]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


@pytest.mark.parametrize("writer", ["ours", "stock", "published"])
@pytest.mark.parametrize("pattern", ["M*-", "ME*-"])
def test_training_goes_on_from_any_folder_with_the_loss_where_it_was(writer, pattern, make_config, tmp_path):
    shape = make_config().model.config | {"hybrid_override_pattern": pattern}
    shape |= {"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    first = make_config(model__config=shape)
    train(first)
    folder = Path(first.run_dir) / "model"
    if writer != "ours":
        theirs, tokenizer = NemotronHForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        folder = tmp_path / "theirs"
        theirs.save_pretrained(folder, max_shard_size="20KB" if writer == "published" else "5GB")
        tokenizer.save_pretrained(folder)
    if writer == "published":
        config = json.loads((folder / "config.json").read_text())
        del config["layers_block_type"], config["head_dim"], config["time_step_init_min"]
        spellings = {"hybrid_override_pattern": pattern, "attention_head_dim": 16, "time_step_limit": [0.0, math.inf]}
        (folder / "config.json").write_text(json.dumps(config | spellings | {"num_logits_to_keep": 1}))
    second = {"run_dir": str(tmp_path / "second"), "model__init_from": str(folder)}
    train(make_config(**second, train__steps=2, train__checkpoint_every=1))
    losses = lines(make_config(**second), "val_loss")
    assert losses[0]["val_loss"] == pytest.approx(lines(first, "val_loss")[-1]["val_loss"], abs=1e-6)
    before, after = weights(first), weights(make_config(**second))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_touches_the_weights(make_config, bad):
    config = make_config()
    train(make_config(train__steps=4, schedule__decay=0.0), allow_config_change=True)
    before = weights(config)

    def loss(model, batch):
        return next_token_loss(model, batch) * bad

    with pytest.raises(FloatingPointError, match="step 5"):
        train(make_config(schedule__decay=0.0), allow_config_change=True, loss=loss)
    assert all(torch.equal(a, before[name]) for name, a in weights(config).items())


def test_the_seed_decides_everything(make_config, tmp_path):
    configs = [make_config(run_dir=str(tmp_path / str(i)), seed=seed, train__steps=2) for i, seed in enumerate([1, 1, 2])]
    for config in configs:
        train(config)
    a, b, c = ([line["loss"] for line in lines(config)] for config in configs)
    assert a == b
    assert a != c


def test_a_changed_batch_goes_on_in_the_data_where_the_run_was(make_config, monkeypatch):
    taken = []
    batch = Blend.batch
    monkeypatch.setattr(Blend, "batch", lambda self, start, stop: taken.extend(range(start, stop)) or batch(self, start, stop))
    train(make_config(train__steps=4))
    train(make_config(train__steps=6, train__global_batch=2), allow_config_change=True)
    assert taken == list(range(4 * 4 + 2 * 2))


def test_bf16_trains_with_the_weights_in_fp32(make_config):
    config = make_config(train__precision="bf16")
    train(config)
    assert all(tensor.dtype == torch.float32 for tensor in weights(config).values())
    assert lines(config)[-1]["loss"] < lines(config)[0]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__config": "small"}, "ids up to 257 and the model only vocab_size=100"),
        ({"train__micro_batch": 3}, r"micro_batch \(3\) must divide"),
        ({"data__source": "./nothing"}, "does not exist"),
        ({"model__init_from": "./nothing"}, "no checkpoint folder"),
    ],
)
def test_bad_input_is_named(make_config, change, message):
    if change.get("model__config") == "small":
        change = {"model__config": make_config().model.config | {"vocab_size": 100}}
    config = make_config(**change)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not Path(config.run_dir).exists()  # the corrected command must not find another run in its way


@pytest.mark.parametrize("change", [{"data__source": "other"}, {"data__seq_len": 16}, {"seed": 1}])
def test_what_gives_the_place_in_the_data_its_meaning_cannot_change(make_config, tmp_path, change):
    (tmp_path / "other.txt").write_text("a dog " * 500)
    train(make_config(train__steps=4))
    change = {"data__source": str(tmp_path / "other.txt")} if "data__source" in change else change
    with pytest.raises(ValueError, match=r"with other data.*\n  (data|seq_len|seed): "):
        train(make_config(**change), allow_config_change=True)
    assert yaml.safe_load((Path(make_config().run_dir) / "config.yaml").read_text())["train"]["steps"] == 4


def test_the_same_text_with_another_date_is_the_same_data(make_config, text_folder):
    train(make_config(train__steps=4))
    for file in text_folder.iterdir():
        os.utime(file)
    train(make_config(), allow_config_change=True)
    assert lines(make_config())[-1]["step"] == 8


def test_a_signal_before_the_first_step_leaves_a_run_that_starts(make_config, tmp_path):
    whole, cut = make_config(), make_config(run_dir=str(tmp_path / "cut"))
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.validation_loss", lambda *a: os.kill(os.getpid(), signal.SIGINT) or LOSS)
        train(cut)
    train(cut)
    assert_same_end(whole, cut)
    assert [line["step"] for line in lines(cut, "val_loss")] == [0, 4, 8]


def test_going_back_to_an_older_checkpoint_trains_another_future(make_config):
    config = make_config()
    train(config)
    before = weights(config)
    older = Path(config.run_dir) / "checkpoints" / "step-4"
    changed = make_config(optim__lr=0.05, train__keep_checkpoints=1)
    train(changed, resume=str(older), allow_config_change=True)
    assert any(not torch.equal(a, before[name]) for name, a in weights(config).items())
    aside = Path(config.run_dir) / "checkpoints" / "set-aside-1" / "step-8" / "model" / "model.safetensors"
    assert all(torch.equal(a, before[name]) for name, a in load_file(aside).items())


def test_a_resumed_run_does_not_need_what_it_was_initialised_from(make_config, tmp_path):
    first = make_config()
    train(first)
    (tmp_path / "moved").symlink_to(Path(first.run_dir).rename(tmp_path / "elsewhere"))
    second = {"run_dir": str(tmp_path / "second"), "model__init_from": str(tmp_path / "moved" / "model")}
    train(make_config(**second, train__steps=4))
    (tmp_path / "moved").unlink()
    train(make_config(**second), allow_config_change=True)
    assert lines(make_config(**second))[-1]["step"] == 8


def test_two_processes_train_as_one_does(make_config, tmp_path, run_ranks):
    one, two = make_config(), make_config(run_dir=str(tmp_path / "two"))
    for ended in run_ranks(2, lambda rank: train(two)):
        assert ended.status == 0, ended.err
    train(one)
    for key in ("loss", "val_loss"):
        a, b = lines(one, key), lines(two, key)
        assert [x["step"] for x in a] == [x["step"] for x in b]
        assert [x[key] for x in a] == pytest.approx([x[key] for x in b], abs=1e-5)


def test_wandb_without_a_key_is_offline_and_asks_nothing(make_config, tmp_path, run_ranks):
    config = make_config(log__wandb=True, train__steps=2)

    def work(rank):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            del os.environ[name]
        os.environ |= {"HOME": str(tmp_path), "NETRC": str(tmp_path)}
        train(config)

    (ended,) = run_ranks(1, work)
    assert ended.status == 0, ended.err
    assert "offline" in ended.out
    assert list(Path(config.run_dir).glob("wandb/offline-run-*"))


def test_mfu_is_the_models_flops_over_the_peak(make_config, monkeypatch):
    monkeypatch.setattr("train.loop.peak_flops", lambda name, precision: 1e12)
    config = make_config(train__steps=2)
    train(config)
    per_token = training_flops(build_model(config).config, config.data.seq_len)
    for line in lines(config):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * per_token / 1e12)


def test_validation_and_saving_do_not_count_as_time_of_training(make_config, monkeypatch):
    """On a clock that a batch moves by a second, a validation by a minute and a save by an hour."""
    now = 0.0

    def takes(seconds, function):
        def slow(*arguments):
            nonlocal now
            now += seconds
            return function(*arguments)

        return slow

    monkeypatch.setattr("train.loop.time.perf_counter", lambda: now)
    monkeypatch.setattr(Blend, "batch", takes(1, Blend.batch))
    monkeypatch.setattr("train.loop.validation_loss", takes(60, lambda *arguments: LOSS))
    monkeypatch.setattr("train.loop.checkpoint.write", takes(3600, checkpoint.write))
    waits = []
    monkeypatch.setattr(
        "train.loop.rank_figures", lambda accelerator, memory, waited: waits.append(waited) or {"ranks/x": memory}
    )
    train(make_config(log__sample_tokens=0, log__every=2, train__checkpoint_async=False))
    assert [line["tokens_per_second"] for line in lines(make_config())] == [4 * 32] * 4
    assert waits == [1.0] * 4 and [line["ranks/x"] for line in lines(make_config())] == [
        line["memory_bytes"] for line in lines(make_config())
    ]


def test_only_the_newest_checkpoints_stay(make_config):
    train(make_config(train__checkpoint_every=2, train__keep_checkpoints=3))
    assert sorted(p.name for p in (Path(make_config().run_dir) / "checkpoints").iterdir()) == ["step-4", "step-6", "step-8"]


def test_backward_runs_outside_of_autocast(make_config):
    """Within, the products that are fp32 on purpose would be narrowed, and on a CPU without bf16 units all would be slow."""
    seen = []

    def loss(model, batch):
        nats = next_token_loss(model, batch)
        seen.append(torch.is_autocast_enabled("cpu"))
        nats.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
        return nats

    train(make_config(train__precision="bf16", train__steps=2), loss=loss)
    assert seen == [True, False] * 2
