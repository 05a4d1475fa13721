import copy
import json
import math
import random

import pytest
import torch

from train.incidents import MOST_SKIPS, NAMED, Spikes, diagnose, merge, record

PATTERN = "ME*-M"
KINDS = ["mamba", "moe", "attention", "ffn", "mamba"]


@pytest.fixture
def step(tiny_model, draw_ids):
    """A model, its batch, and a function that runs forward and backward and gives the loss, as a step does."""
    model, ids = tiny_model(hybrid_override_pattern=PATTERN).train(), draw_ids(2, 9)

    def run():
        loss = model(ids, targets=ids).loss.mean()
        loss.backward()
        return loss.detach()

    return model, run


def norm(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


@torch.no_grad()
def spoil(model, layer, value=math.nan):
    [*model.backbone.layers[layer].mixer.parameters()][-1].view(-1)[0] = value


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_layer_whose_output_is_not_finite_is_named(step, layer, value):
    model, run = step
    spoil(model, layer, value)
    incident = diagnose(model, run().item(), norm(model), run)
    assert incident["first_layer"] == {"layer": layer, "kind": KINDS[layer]}
    spoiled = [name for name, _ in model.named_parameters() if name.startswith(f"backbone.layers.{layer}.mixer.")][-1]
    assert incident["weights"] == {"count": 1, "names": [spoiled]}
    assert incident["repeatable"] is True
    assert incident["loss"] == "nan"
    assert json.loads(json.dumps(incident, allow_nan=False)) == incident


@pytest.mark.parametrize(
    ("find", "kind"),
    [
        (lambda model: model.backbone.embeddings, "embedding"),
        (lambda model: model.backbone.norm_f, "norm"),
        (lambda model: model.lm_head, "head"),
    ],
)
def test_what_stands_outside_the_layers_is_named_by_its_kind(step, find, kind):
    model, run = step
    with torch.no_grad():
        find(model).weight.fill_(math.nan)
    incident = diagnose(model, run().item(), norm(model), run)
    assert incident["first_layer"] == {"layer": None, "kind": kind}


def test_a_gradient_alone_that_is_not_finite_is_named_where_backward_broke(step):
    """The loss is finite and so is every output: only the gradients tell, and the first of them is of the layer it began in."""
    model, run = step

    def run_with_a_broken_layer():
        def poison(module, inputs, output):
            output[0].register_hook(lambda grad: grad * math.nan)

        handle = model.backbone.layers[2].register_forward_hook(poison)
        loss = run()
        handle.remove()
        return loss

    loss = run_with_a_broken_layer().item()
    incident = diagnose(model, loss, norm(model), run_with_a_broken_layer)
    assert incident["loss"] == loss and incident["grad_norm"] == "nan"
    assert incident["first_layer"] is None and incident["repeatable"] is True
    assert incident["weights"] == {"count": 0, "names": []}
    assert incident["gradients"]["names"][0].startswith("backbone.layers.2.")
    assert incident["grad_norms"]["attention"] == incident["grad_norms"]["embedding"] == "nan"
    assert incident["grad_norms"]["ffn"] > 0 and incident["grad_norms"]["head"] > 0
    below = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("backbone.embed", *(f"backbone.layers.{i}." for i in range(3))))
    ]
    assert incident["gradients"]["count"] == len(below) > NAMED == len(incident["gradients"]["names"])
    assert set(incident["gradients"]["names"]) < set(below)


def test_a_loss_alone_that_is_not_finite_again_is_repeatable(step):
    model, run = step
    incident = diagnose(model, run().item() + math.inf, norm(model), lambda: run() + math.inf)
    assert incident["gradients"]["count"] == 0
    assert incident["repeatable"] is True and incident["first_layer"] == {"layer": None, "kind": "head"}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_wrong_result_that_does_not_come_again_is_not_repeatable(step, kind):
    model, run = step
    loss = run().item()
    if kind == "loss":
        loss = math.nan
    else:
        model.lm_head.weight.grad[0, 0] = math.inf
    incident = diagnose(model, loss, norm(model), run)
    assert incident["repeatable"] is False
    assert incident["first_layer"] is None
    assert incident["gradients"]["names"] == ([] if kind == "loss" else ["lm_head.weight"])


def test_a_spike_is_repeatable_where_the_rerun_gives_the_same_loss(step):
    model, run = step
    loss = run().item()
    assert diagnose(model, loss, norm(model), run)["repeatable"] is True
    assert diagnose(model, loss * 1.01, norm(model), run)["repeatable"] is False


def test_the_first_bad_pass_of_several_is_not_hidden_by_a_good_one(step, draw_ids):
    model, run = step
    calls = []

    def second_of_three(module, inputs, output):
        calls.append(1)
        return (output[0] * math.nan, *output[1:]) if len(calls) % 3 == 2 else output

    def three():
        return torch.stack([run() for _ in range(3)]).sum()

    model.backbone.layers[3].register_forward_hook(second_of_three)
    assert diagnose(model, three().item(), norm(model), three)["first_layer"] == {"layer": 3, "kind": "ffn"}


@pytest.mark.parametrize("fails", [False, True])
def test_looking_leaves_everything_as_it_was(step, fails):
    model, run = step
    loss = run().item()
    for p in model.parameters():
        p.grad *= 2  # not what a rerun gives
    before, weights = norm(model), copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    random_numbers = torch.get_rng_state()

    def rerun():
        torch.rand(3)
        loss = run()
        if fails:
            raise KeyboardInterrupt
        return loss

    if fails:
        with pytest.raises(KeyboardInterrupt):
            diagnose(model, loss, before, rerun)
    else:
        diagnose(model, loss, before, rerun)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_of_several_ranks_the_one_whose_batch_it_was_is_told():
    found = [(2.0, False, False), (2.0, False, True), (2.0, True, True), ("nan", False, False)]
    good, again, broke, bad = ({"loss": loss, "own": own, "repeatable": r} for loss, own, r in found)
    assert merge([good, again, broke, bad]) == {"rank": 3, "loss": "nan", "repeatable": False}
    assert merge([good, again, broke]) == {"rank": 2, "loss": 2.0, "repeatable": True}
    assert merge([good, again]) == {"rank": 1, "loss": 2.0, "repeatable": True}
    assert merge([good, good]) == {"rank": 0, "loss": 2.0, "repeatable": False}


def test_records_stand_one_a_line_with_their_time(tmp_path):
    file = tmp_path / "incidents.jsonl"
    for number in (3, 4):
        record(file, {"step": number, "kind": "spike"})
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(3, "spike"), (4, "spike")]
    assert lines[0]["time"].endswith("+00:00")
    with pytest.raises(ValueError, match="JSON"):
        record(file, {"loss": math.nan})
    assert len(file.read_text().splitlines()) == 2


def noisy_losses(count):
    draw = random.Random(0)
    return [3 - i / count + draw.gauss(0, 0.02) + (2.0 if i % 37 == 30 else 0.0) for i in range(count)]


def decide(spikes, losses):
    decisions = []
    for loss in losses:
        decisions.append(spikes.is_spike(loss))
        (spikes.skip if decisions[-1] else spikes.accept)(loss)
    return decisions


def test_a_spike_is_more_than_sigma_deviations_above_the_mean_of_the_window():
    spikes = Spikes(sigma=3.0, window=4)
    for loss in (9.0, 1.0, 2.0, 3.0, 4.0):  # the first has left the window
        spikes.accept(loss)
    limit = 2.5 + 3 * math.sqrt(1.25)
    assert spikes.is_spike(limit + 1e-9) and not spikes.is_spike(limit - 1e-9)
    assert not spikes.is_spike(-100.0) and not spikes.is_spike(math.nan)
    assert not Spikes(None, 4, spikes.losses).is_spike(1e9)


@pytest.mark.parametrize("window", [7, 8])
def test_spikes_are_found_from_when_the_window_is_half_full(window):
    spikes = Spikes(sigma=3.0, window=window)
    for loss in (1.0, 1.1, 0.9):
        assert not spikes.is_spike(100.0)
        spikes.accept(loss)
    assert not spikes.is_spike(100.0)
    spikes.accept(1.0)
    assert spikes.is_spike(100.0)


def test_constant_losses_have_no_spikes_by_rounding():
    spikes = Spikes(sigma=6.0, window=4, losses=[2.0] * 4)
    assert not spikes.is_spike(2.0) and not spikes.is_spike(2.001)
    assert spikes.is_spike(2.013)


def test_only_the_spikes_of_a_noisy_run_are_flagged():
    losses = noisy_losses(300)
    assert [i for i, spike in enumerate(decide(Spikes(6.0, 64), losses)) if spike] == [i for i in range(37, 300) if i % 37 == 30]


@pytest.mark.parametrize("cut", [1, 20, 67, 68, 200])
def test_a_resumed_run_decides_as_one_that_was_never_cut_off(cut):
    losses = noisy_losses(300)
    whole, first = Spikes(3.0, 32), Spikes(3.0, 32)
    decisions = decide(whole, losses)
    before = decide(first, losses[:cut])
    resumed = Spikes(3.0, 32, **json.loads(json.dumps(first.state())))
    assert before + decide(resumed, losses[cut:]) == decisions and any(decisions)
    assert resumed.state() == whole.state()


def test_a_smaller_window_takes_the_last_of_what_was_kept():
    spikes = Spikes(3.0, 4, losses=[50.0] * 20 + [1.0, 1.1, 0.9, 1.0])
    assert spikes.is_spike(2.0)
    spikes.accept(1.0)
    assert spikes.losses == [1.1, 0.9, 1.0, 1.0]


def test_twenty_in_a_row_are_a_new_level_across_a_resume_too():
    spikes = Spikes(3.0, 8, losses=[1.0] * 8)
    for _ in range(MOST_SKIPS - 1):
        spikes.skip(5.0)
    spikes.accept(1.0)  # begins the count again
    for _ in range(MOST_SKIPS - 1):
        spikes.skip(5.0)
    resumed = Spikes(3.0, 8, **json.loads(json.dumps(spikes.state())))
    with pytest.raises(FloatingPointError, match=r"20 steps in a row .*mean 1\.0000; now 5\.0000.*new level"):
        resumed.skip(5.0)
