import pytest
import torch

from hybridlm.compress import latency
from hybridlm.compress.latency import Layer, Seconds, estimate, layers_of, measure, needed
from hybridlm.compress.search import LAYERS, shape_of
from hybridlm.compress.surgery import PARTS
from hybridlm.timing import generate

CPU = torch.device("cpu")
SMALLER = {"attention_layers": 0, "mamba_num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 11, "hidden_size": 18}


@pytest.fixture
def shapes(parent_config):
    whole = shape_of(parent_config())
    changes = [{}, {"mamba_layers": 0}, {"ffn_layers": 1}, {"mamba_num_heads": 6}, {"num_key_value_heads": 1}, SMALLER]
    return [whole | change for change in changes]


@pytest.fixture
def clock(monkeypatch):
    """Requests whose seconds are known by the shape of the model; one turn in three is as quick as that. Keeps what was asked."""
    asked = []

    def seconds(model, seed, prompt, new, batch):
        c = model.config
        asked.append((c.hybrid_override_pattern, prompt, new, batch, seed, model.training))
        each = [cost(symbol, getattr(c, PARTS[symbol]), c.hidden_size) for symbol in c.hybrid_override_pattern]
        assert c.num_attention_heads == 2 * c.num_key_value_heads
        slow = {"M": 1, "*": 2, "-": 0}[c.hybrid_override_pattern[0]] != (seed + len(each)) % 3
        return {"total": rest(c.hidden_size) + sum(each) + slow * (1 + seed)}

    monkeypatch.setattr(latency, "generate", seconds)
    return asked


def cost(symbol, size, width):
    return {"M": 0.5, "*": 0.25, "-": 2.0}[symbol] * size + width / 8


def rest(width):
    return 3.0 + width / 4


def test_every_layer_once(shapes):
    layers = needed(shapes)
    assert len(layers) == len(set(layers)) == 7
    assert layers == [
        Layer("M", 8, 24), Layer("*", 3, 24), Layer("-", 20, 24), Layer("M", 6, 24), Layer("*", 1, 24), Layer("M", 4, 18),
        Layer("-", 11, 18),
    ]  # fmt: skip
    assert layers_of(shapes[-1]) == {Layer("M", 4, 18): 3, Layer("-", 11, 18): 3}


def test_the_estimate_is_the_sum_of_what_there_is(shapes, clock, parent_config):
    config = parent_config()
    measured = {layer: measure(config, layer, 100, 7, 3, CPU) for layer in needed(shapes)}
    assert measured[Layer("*", 1, 24)] == Seconds(0.25 + 3, 3 + 6)
    for shape in shapes:
        width = shape["hidden_size"]
        layers = sum(shape[axis] * cost(symbol, shape[PARTS[symbol]], width) for symbol, axis in LAYERS.items())
        assert estimate(shape, measured) == pytest.approx(rest(width) + layers, rel=1e-12)
    assert config.to_dict() == parent_config().to_dict()


def test_two_models_take_turns(clock, parent_config):
    measure(parent_config(), Layer("-", 5, 24), 100, 7, 2, CPU)
    warm = [("-", 64, 4, 1, 0, False), ("--", 64, 4, 1, 0, False)]
    assert clock == [*warm, *((pattern, 100, 7, 1, turn, False) for turn in (0, 1) for pattern in ("-", "--"))]
    clock.clear()
    measure(parent_config(), Layer("-", 5, 24), 9, 2, 1, CPU)
    assert clock[0] == ("-", 9, 2, 1, 0, False)


def test_layers_that_differ_in_what_the_rest_takes(parent_config):
    """What is around the layers is taken from every kind that there is, not from how many there are of it."""
    shape = shape_of(parent_config())
    measured = {layer: Seconds(1.0, i) for i, layer in enumerate(needed([shape]))}
    assert estimate(shape, measured) == 7 + 1.0


def test_a_request_is_really_made(parent_config, monkeypatch):
    asked = []

    def watched(model, *request):
        asked.append(model.ops.backends["ssd"])
        return generate(model, *request)

    monkeypatch.setattr(latency, "generate", watched)
    found = measure(parent_config(), Layer("M", 4, 24), 5, 2, 1, CPU, "naive")
    assert 2 * found.layer + found.rest > 0 and asked == ["naive"] * 4
