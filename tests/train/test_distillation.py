import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from hybridlm import HybridLMConfig, HybridLMForSequenceClassification
from hybridlm.tokenizer import byte_tokenizer
from tests.train.conftest import SHAPE, WIDER, save_model
from train import distillation, loop
from train.distillation import Kept, apart, open_teacher, read_kept
from train.loop import train
from train.setup import build_model


def lines(config, key="loss"):
    rows = [json.loads(text) for text in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def losses(config):
    return [line["loss"] for line in lines(config)]


def assert_same_end(a, b):
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        x, y = (load_file(Path(c.run_dir) / "checkpoints" / "step-8" / file) for c in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert losses(a) == losses(b)


def interrupted(calls):
    """The objective of the loop, which a Ctrl-C ends in its `calls`-th call."""
    real = loop.objective

    def objective(*arguments):
        loss, count = real(*arguments), 0

        def counting(model, batch):
            nonlocal count
            count += 1
            if count == calls:
                raise KeyboardInterrupt
            return loss(model, batch)

        return counting

    return objective


def train_on_two(config, run_ranks):
    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)  # of a run in the process that this one was forked from
        train(config)

    ended = run_ranks(2, work, limit=60)
    assert [one.status for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    assert "ranks/slowest" in lines(config)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_that_begins_as_its_teacher_has_nothing_to_learn(quiet_config, twin, precision):
    """In bf16 too: a teacher predicts bit for bit what it would in training."""
    config = quiet_config(
        model={"init_from": twin}, distill__teacher=twin, distill__hidden_weight=1.0, train__steps=1, train__precision=precision
    )
    train(config)
    (line,) = lines(config)
    assert (line["loss"], line["grad_norm"]) == (0, 0)


def test_a_run_learns_from_its_teacher_and_says_so(quiet_config, teacher, capsys):
    config = quiet_config(train__steps=20, train__checkpoint_every=20, distill__teacher=teacher, distill__temperature=2.0)
    train(config)
    found = losses(config)
    assert 0 < found[-1] < 0.8 * found[0]
    assert lines(config, "val_loss")[-1]["val_loss"] > lines(config, "val_loss")[0]["val_loss"]  # of the text it learned nothing
    assert f"loss        forward KL from {teacher}, temperature 2\n" in capsys.readouterr().out
    assert f"Trained with hybridlm, distilled from `{teacher}`, for" in (Path(config.run_dir) / "model/README.md").read_text()


def test_what_is_saved_is_the_student_alone(quiet_config, teacher):
    config = quiet_config(train__steps=1, distill__teacher=teacher)
    train(config)
    saved = load_file(Path(config.run_dir) / "model/model.safetensors")
    assert saved.keys() == dict(build_model(config).named_parameters()).keys()


def test_a_share_of_the_loss_may_be_that_of_the_text(quiet_config, teacher, tmp_path):
    shares = {"distill__teacher": teacher, "train__steps": 1}
    runs = [quiet_config(run_dir=str(tmp_path / f"{share}"), distill__label_weight=share, **shares) for share in (0.0, 0.25, 1.0)]
    plain = quiet_config(run_dir=str(tmp_path / "plain"), train__steps=1)
    for config in (*runs, plain):
        train(config)
    ((distance,), (mixed,), (whole,)), (nats,) = map(losses, runs), losses(plain)
    assert whole == pytest.approx(nats, rel=1e-6) and distance != pytest.approx(nats, rel=0.01)
    assert mixed == pytest.approx(0.75 * distance + 0.25 * nats, rel=1e-6)


def test_a_run_that_was_cut_off_ends_as_if_nothing_had_happened(quiet_config, teacher, tmp_path, monkeypatch):
    changes = {"distill__teacher": teacher, "distill__label_weight": 0.5}
    whole, cut = (quiet_config(run_dir=str(tmp_path / name), **changes) for name in ("whole", "cut"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "objective", interrupted(7))
        train(cut)
    train(cut)
    assert_same_end(whole, cut)


def shared_teacher(*arguments):
    opened = open_teacher(*arguments)
    assert all(isinstance(p, DTensor) for p in opened.model.parameters()) and opened.weight.shape == (258, 32)
    return opened


def test_ranks_and_micro_batches_have_the_losses_of_one(quiet_config, twin, tmp_path, run_ranks, monkeypatch):
    settings = {"distill__teacher": twin, "distill__hidden_weight": 0.5, "train__steps": 4}
    one, parts, two, shared = (
        quiet_config(run_dir=str(tmp_path / name), **settings, **changes)
        for name, changes in {
            "one": {}, "parts": {"train__micro_batch": 1}, "two": {}, "shared": {"train__sharding": "fsdp2"},
        }.items()
    )  # fmt: skip
    train(one)
    train(parts)
    train_on_two(two, run_ranks)
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "open_teacher", shared_teacher)
        train_on_two(shared, run_ranks)
    for config in (parts, two, shared):
        assert losses(config) == pytest.approx(losses(one), abs=2e-5)


@pytest.mark.scale
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_ranks_share_a_narrow_student_and_its_teacher(quiet_config, tmp_path, run_ranks, precision):
    fit = WIDER | {"hybrid_override_pattern": "M-M*-M-", "mamba_num_heads": 16, "mamba_head_dim": 2}
    one, two = (
        quiet_config(
            run_dir=str(tmp_path / name), model={"config": fit}, distill__teacher=save_model(tmp_path / "teacher", fit),
            distill__hidden_weight=0.5, train__precision=precision, train__fp8_emulate=True, train__steps=3,
            train__sharding=sharding,
        )
        for name, sharding in {"one": "none", "two": "fsdp2"}.items()
    )  # fmt: skip
    train(one)
    train_on_two(two, run_ranks)
    tolerance = {"bf16": 2e-3, "fp8": 2e-2}[precision]  # in FP8 the tokens of a rank have a scale of their own
    assert losses(two) == pytest.approx(losses(one), rel=tolerance)


def test_an_fp8_student_learns_from_a_bf16_teacher(quiet_config, tmp_path):
    fit = WIDER | {"hybrid_override_pattern": "M-M*-M-", "mamba_num_heads": 16, "mamba_head_dim": 2}
    teacher, found = save_model(tmp_path / "teacher", fit), {}
    for precision in ("fp8", "bf16"):
        config = quiet_config(
            run_dir=str(tmp_path / precision), model={"config": fit}, distill__teacher=teacher, train__precision=precision,
            train__fp8_emulate=True, train__steps=2,
        )  # fmt: skip
        train(config)
        found[precision] = losses(config)
    assert found["fp8"] == pytest.approx(found["bf16"], rel=0.02) and found["fp8"] != found["bf16"]


def test_only_what_products_are_made_of_is_narrow_in_a_teacher(quiet_config, teacher):
    opened = open_teacher(
        quiet_config(distill__teacher=teacher, train__precision="bf16"), 258, byte_tokenizer(), torch.device("cpu")
    )
    narrow = {name for name, p in opened.model.named_parameters() if p.dtype == torch.bfloat16}
    assert narrow == {name for name, _ in opened.model.named_parameters() if name.endswith("_proj.weight")}
    assert opened.weight.dtype == torch.bfloat16 and not opened.weight.requires_grad
    assert not any(p.requires_grad for p in opened.model.parameters()) and not opened.model.training


def other_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zzz"])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocabulary", "distill.teacher .*: it has a vocabulary of 300 and the student one of 258"),
        (
            "tokenizer",
            r"distill.teacher .*: its tokenizer differs .* in 1 token\(s\): id 258 is 'zzz' there and None here",
        ),
        ("classifier", "distill.teacher .*: it is a classifier and predicts no next token"),
        ("bidirectional", "distill.teacher .*: it is bidirectional and predicts no next token"),
        ("nothing", "distill.teacher .*nowhere: there is no checkpoint folder"),
        ("weights", "distill.teacher .*: the weights of .* do not fit this model: weights missing"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told_before_the_run_begins(quiet_config, tmp_path, change, message):
    folder = tmp_path / "teacher"
    if change == "vocabulary":
        save_model(folder, SHAPE, vocab_size=300)
    elif change == "tokenizer":
        save_model(folder, SHAPE, tokenizer=False)
        other_tokens().save_pretrained(folder)
    elif change in ("classifier", "bidirectional"):
        save_model(folder, SHAPE, HybridLMForSequenceClassification, bidirectional="sum" if change == "bidirectional" else None)
    elif change == "weights":
        save_model(folder, SHAPE)
        shape = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shape | {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4}))
    else:
        folder = tmp_path / "nowhere"
    config = quiet_config(distill__teacher=str(folder))
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not Path(config.run_dir).exists()


def test_a_teacher_without_a_tokenizer_is_taken_at_its_vocabulary(quiet_config, tmp_path):
    train(quiet_config(distill__teacher=save_model(tmp_path / "teacher", SHAPE, tokenizer=False), train__steps=1))


# Hidden states


def test_states_are_apart_by_direction_not_by_size():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    torch.testing.assert_close(apart(3 * a, 0.1 * b), 2 * (1 - cosine))
    assert apart(torch.zeros(1, 1, 4), b[:1, :1, :4]).isfinite().all()


def test_layers_and_channels_that_were_kept_are_compared_with_the_teachers_own():
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 6) for _ in range(5)]  # of four layers, and after the last norm
    kept = Kept([0, 3], [5, 1, 2])
    student = [states[i][..., [5, 1, 2]] * 7 for i in (0, 3, 4)]
    assert kept.distance(tuple(student), tuple(states)).abs().max() < 1e-12
    off = [student[0], torch.randn(1, 2, 3), student[2]]
    torch.testing.assert_close(kept.distance(tuple(off), tuple(states)), apart(off[1], student[1]) / 2)
    last = [*student[:2], off[1]]
    torch.testing.assert_close(kept.distance(tuple(last), tuple(states)), apart(off[1], student[2]))


def cut_out(folder, layers, channels, says=None):
    """A student's folder of those layers and channels of WIDER; its pruning.json `says` something else."""
    pattern = "".join(WIDER["hybrid_override_pattern"][i] for i in layers)
    width = WIDER["hidden_size"] if channels is None else len(channels)
    save_model(folder, WIDER, hybrid_override_pattern=pattern, hidden_size=width)
    (folder / "pruning.json").write_text(json.dumps({"layers": layers, "channels": channels, "parent": "x"} | (says or {})))
    return str(folder)


def test_a_student_that_was_cut_out_learns_its_teachers_states(quiet_config, teacher, tmp_path):
    folder = cut_out(tmp_path / "cut", [0, 1, 3], [*range(0, 48, 3)])
    settings = {"model": {"init_from": folder}, "distill__teacher": teacher, "train__steps": 10, "train__checkpoint_every": 10}
    found = {}
    for weight in (0.0, 3.0):
        config = quiet_config(run_dir=str(tmp_path / str(weight)), distill__hidden_weight=weight, **settings)
        train(config)
        found[weight] = losses(config)
    assert found[3.0][0] > found[0.0][0] + 3  # states of another model are at right angles: 2 for the layers, 2 for the norm
    assert found[3.0][-1] < found[3.0][0] - 1


@pytest.mark.parametrize(
    ("layers", "channels", "message"),
    [
        ([0, 1], None, "layers: must be 3 different numbers, one for each of the student's; got .0, 1."),
        ([0, 1, 1], None, "layers: must be 3 different numbers"),
        ([0, 1, 5], None, "layers: must be a list of numbers below the teacher's 5"),
        (["0", 1, 3], None, "layers: must be a list of numbers"),
        ([0, 1, 2], None, "layers: 2 of the student is '\\*', 2 of the teacher 'M'"),
        ([0, 1, 3], [0, 1], "channels: must be 48 different numbers, .* got .0, 1."),
        ([0, 1, 3], [48], "channels: must be a list of numbers below the teacher's 48"),
    ],
)
def test_a_pruning_json_that_does_not_fit_is_told(quiet_config, teacher, tmp_path, layers, channels, message):
    folder = cut_out(tmp_path / "cut", [0, 1, 3], None, {"layers": layers, "channels": channels})
    config = quiet_config(model={"init_from": folder}, distill__teacher=teacher, distill__hidden_weight=1.0)
    with pytest.raises(ValueError, match=f"distill.hidden_weight: .*pruning.json does not fit: {message}"):
        train(config)


def test_a_pruning_json_that_is_missing_or_broken_is_told(quiet_config, teacher, tmp_path):
    student, parent = HybridLMConfig(**SHAPE), HybridLMConfig(**WIDER)
    with pytest.raises(ValueError, match=r"3 layers of width 32 and the teacher 5 of 48, .* no model.init_from that says"):
        read_kept(quiet_config(distill__teacher=teacher), student, parent)
    config = quiet_config(model={"init_from": teacher}, distill__teacher=teacher)
    with pytest.raises(ValueError, match=r"and there is no .*pruning.json that says which"):
        read_kept(config, student, parent)
    narrow = HybridLMConfig(**WIDER | {"hidden_size": 32})
    begun = quiet_config(model={"init_from": cut_out(tmp_path / "cut", [0, 1, 2, 3, 4], None)}, distill__teacher=teacher)
    with pytest.raises(ValueError, match="channels: null means all, and the student has 32, the teacher 48"):
        read_kept(begun, narrow, parent)
    for content in ("{", "[]", '{"layers": [0]}'):
        (tmp_path / "cut" / "pruning.json").write_text(content)
        with pytest.raises(ValueError, match=r"distill.hidden_weight: .*pruning.json cannot be read"):
            read_kept(begun, student, parent)


def test_hidden_states_count_where_there_is_a_target(quiet_config, twin):
    config = quiet_config(distill__teacher=twin, distill__hidden_weight=1.0)
    teacher = open_teacher(config, 258, byte_tokenizer(), torch.device("cpu"))
    model = build_model(config)
    loss = distillation.from_teacher(config, teacher, model.config)
    ids = torch.randint(3, 250, (1, 6), generator=torch.Generator().manual_seed(0))
    found = loss(model, {"input_ids": ids, "targets": torch.tensor([[5, -100, 7, -100, 9, 3]]), "seq_idx": torch.zeros_like(ids)})
    assert (found[0, [1, 3]] == 0).all() and (found[0, [0, 2, 4, 5]] > 1).all()
