from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hybridlm.compress.importance import Importance
from hybridlm.compress.search import (
    AXES,
    LAYERS,
    Budget,
    Candidate,
    best_parts,
    candidates,
    check_axes,
    counted,
    damage,
    default_axis,
    grid,
    lost_share,
    most_important,
    shape_of,
    uniform_depth,
    uniform_width,
)
from hybridlm.compress.surgery import PARTS, Kept, smaller_config
from hybridlm.memory import inference_bytes
from hybridlm.twin import count_parameters

WHOLE = {
    "mamba_layers": 3, "attention_layers": 1, "ffn_layers": 3, "mamba_num_heads": 8, "num_key_value_heads": 3,
    "intermediate_size": 20, "hidden_size": 24,
}  # fmt: skip


def draw(config, seed=0):
    """Importance, drawn at random."""
    rng = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.rand(count, dtype=torch.float64, generator=rng)

    sizes = [getattr(config, PARTS[symbol]) for symbol in config.hybrid_override_pattern]
    return Importance(some(len(sizes)), [some(size) for size in sizes], some(config.hidden_size))


def axes_of(**changes):
    return {axis: [value] for axis, value in WHOLE.items()} | changes


def test_the_axes_of_the_grid(parent_config, tiny_config):
    assert shape_of(parent_config()) == WHOLE and tuple(WHOLE) == AXES
    wide = tiny_config(
        hybrid_override_pattern="M-M-M*-M-M-M-", mamba_num_heads=24, n_groups=3, intermediate_size=200, num_key_value_heads=4
    )
    found = {axis: default_axis(wide, axis) for axis in AXES}
    assert found == {
        "mamba_layers": [6, 5, 4], "attention_layers": [1], "ffn_layers": [6, 5, 4], "mamba_num_heads": [24, 21, 18, 15, 12],
        "num_key_value_heads": [4, 3, 2], "intermediate_size": [200, 160, 144, 112, 96], "hidden_size": [32],
    }  # fmt: skip
    check_axes(wide, found)
    assert default_axis(tiny_config(hybrid_override_pattern="M-", intermediate_size=20), "attention_layers") == [0]
    assert default_axis(tiny_config(intermediate_size=20), "intermediate_size") == [20, 16]
    assert default_axis(tiny_config(num_key_value_heads=1), "num_key_value_heads") == [1]
    assert default_axis(parent_config(), "mamba_num_heads") == [8, 6, 4]


def test_a_grid_that_does_not_fit(parent_config):
    with pytest.raises(ValueError) as error:
        check_axes(parent_config(), axes_of(mamba_layers=[3, 4], ffn_layers=[], mamba_num_heads=[0, 6, 3], hidden_size=[24, -1]))
    assert str(error.value).splitlines() == [
        "the grid does not fit the parent:",
        "  mamba_layers: give one or more of 0 to 3, which the parent has; got [3, 4].",
        "  ffn_layers: give one or more of 0 to 3, which the parent has; got [].",
        "  mamba_num_heads: give one or more of 1 to 8, which the parent has; got [0, 6, 3].",
        "  mamba_num_heads: each of the 2 groups keeps as many; got [0, 6, 3].",
        "  hidden_size: give one or more of 1 to 24, which the parent has; got [24, -1].",
    ]
    check_axes(parent_config(), axes_of(attention_layers=[0], mamba_num_heads=[2, 8]))


def test_every_combination_once(parent_config):
    axes = axes_of(attention_layers=[1, 0], num_key_value_heads=[3, 1], ffn_layers=[3, 2], hidden_size=[24, 24])
    shapes = list(grid(parent_config(), axes))
    assert [(s["attention_layers"], s["num_key_value_heads"], s["ffn_layers"]) for s in shapes] == [
        (1, 3, 3), (1, 1, 3), (1, 3, 2), (1, 1, 2), (0, 3, 3), (0, 3, 2)
    ]  # fmt: skip
    none = {axis: [0] for axis in LAYERS.values()}
    assert list(grid(parent_config(), axes_of(**none))) == []


def test_what_matters_most_stays(parent_config):
    config, importance = parent_config(), draw(parent_config())
    importance = replace(importance, layers=torch.tensor([3.0, 1, 2, 0, 5, 4, 6]))
    importance.parts[0][:] = torch.tensor([0.0, 9, 7, 8, 1, 4, 2, 3])  # four best overall are not two of each group
    importance.parts[5][:] = torch.tensor([4.0, 3, 2, 1, 1, 2, 3, 4])
    shape = WHOLE | {"mamba_layers": 2, "attention_layers": 0, "ffn_layers": 1, "mamba_num_heads": 4, "hidden_size": 3}
    importance.channels[:] = torch.tensor([float(i % 7) for i in range(24)])
    importance.channels[13] = 5.5
    kept = most_important(config, importance, shape)
    assert kept == Kept([0, 5, 6], {0: [1, 3, 5, 7], 5: [0, 1, 6, 7]}, [6, 13, 20])
    assert most_important(config, importance, WHOLE) == Kept(list(range(7)))
    assert best_parts(config, importance, 3, 2) == sorted(importance.parts[3].argsort()[1:].tolist())
    assert shape_of(smaller_config(config, kept)) == shape | {"num_key_value_heads": 3}


def lost_by(config, importance):
    return lambda layer, count: lost_share(config, importance, layer, count)


def test_damage_by_hand(parent_config):
    config = parent_config(hybrid_override_pattern="M-", intermediate_size=4, hidden_size=3)
    parts = [torch.tensor([1.0, 2, 3, 4, 1, 1, 2, 2]), torch.tensor([3.0, 1, 2, 0])]
    importance = Importance(torch.tensor([10.0, 100.0]), parts, torch.tensor([2.0, 1, 2]))
    lost = lost_by(config, importance)
    assert lost(0, 4) == pytest.approx((1 + 4 + 1 + 1) / 40)  # two of each group
    assert lost(1, 3) == 0 and lost(1, 2) == pytest.approx(1 / 14)
    assert lost(None, 2) == pytest.approx(1 / 9)
    both = {"mamba_layers": 1, "attention_layers": 0, "ffn_layers": 1, "num_key_value_heads": 3}
    shape = both | {"mamba_num_heads": 4, "intermediate_size": 1, "hidden_size": 2}
    assert damage(config, importance, shape, lost) == pytest.approx(10 * 7 / 40 + 100 * 5 / 14 + 110 / 9)
    gone = shape | {"ffn_layers": 0, "hidden_size": 3}
    assert damage(config, importance, gone, lost) == pytest.approx(10 * 7 / 40 + 100)


def test_who_keeps_more_has_no_more_damage(parent_config):
    config, importance = parent_config(), draw(parent_config())
    lost = lost_by(config, importance)
    assert damage(config, importance, WHOLE, lost) == 0
    axes = {axis: [value, value - 2 if axis == "mamba_num_heads" else value - 1] for axis, value in WHOLE.items()}
    shapes = list(grid(config, axes))
    found = {tuple(shape.values()): damage(config, importance, shape, lost) for shape in shapes}
    compared = 0
    for shape in shapes:
        for axis, (more, less) in axes.items():
            if shape[axis] == less and (key := tuple((shape | {axis: more}).values())) in found:
                assert found[key] <= found[tuple(shape.values())] + 1e-12
                compared += 1
    assert compared > 300 and all(value > 0 for key, value in found.items() if key != tuple(WHOLE.values()))


GRID = {"mamba_layers": [3, 2], "attention_layers": [1, 0], "intermediate_size": [20, 10], "hidden_size": [24, 20]}
LIMITS = {
    "none": Budget(),
    "parameters": Budget(parameters=16_000),
    "memory": Budget(memory=20_000, context=40, weight_bits=8, cache_bits=4),
    "seconds": Budget(seconds=2.0),
    "all": Budget(parameters=16_000, memory=41_000, seconds=2.0, context=500, weight_bits=8, cache_bits=16),
}


@pytest.mark.parametrize("budget", LIMITS.values(), ids=LIMITS.keys())
def test_candidates(budget, parent_config):
    config, importance, axes = parent_config(), draw(parent_config()), axes_of(**GRID)

    def seconds(shape):
        return shape["mamba_layers"] / 2 + shape["attention_layers"]

    def fits(shape):
        small = smaller_config(config, most_important(config, importance, shape))
        memory = inference_bytes(small, budget.context, budget.weight_bits, budget.cache_bits)
        limits = {"parameters": count_parameters(small), "memory": memory, "seconds": seconds(shape)}
        return all(getattr(budget, name) is None or value <= getattr(budget, name) for name, value in limits.items())

    shapes = [shape for shape in grid(config, axes) if shape != WHOLE]
    within = [shape for shape in shapes if fits(shape)]
    assert len(shapes) == 15 and (budget == Budget() or 0 < len(within) < 15)
    found, funnel = candidates(config, importance, axes, budget, 100, seconds)
    expected = [Candidate(shape, damage(config, importance, shape, lost_by(config, importance))) for shape in within]
    assert found == sorted(expected, key=lambda one: one.damage)
    assert funnel == {"grid": 15, "within_budget": len(within), "scored": len(within)}
    few, funnel = candidates(config, importance, axes, budget, 2, seconds)
    assert few == found[:2] and funnel == {"grid": 15, "within_budget": len(within), "scored": 2}


def test_a_limit_may_be_met_exactly(parent_config):
    config, importance, axes = parent_config(), draw(parent_config()), axes_of(mamba_layers=[2])
    (one,), _ = candidates(config, importance, axes, Budget(), 9)
    small = counted(config, one.shape)
    exact = Budget(count_parameters(small), inference_bytes(small, 8192), 1.0)
    assert candidates(config, importance, axes, exact, 9, lambda shape: 1.0)[0] == [one]
    for name, value in {"parameters": exact.parameters - 1, "memory": exact.memory - 1, "seconds": 0.999}.items():
        with pytest.raises(ValueError, match="no shape of the grid"):
            candidates(config, importance, axes, replace(exact, **{name: value}), 9, lambda shape: 1.0)
    assert one.name == "2M-1A-3F-h8-g3-n20-d24"


def test_counted_takes_what_is_left(parent_config):
    config, importance = parent_config(), draw(parent_config())
    axes = {axis: [value, max(2, value // 2)] for axis, value in WHOLE.items()} | {"attention_layers": [0, 1]}
    for shape in grid(config, axes):
        small, made = smaller_config(config, most_important(config, importance, shape)), counted(config, shape)
        assert count_parameters(made) == count_parameters(small)
        assert inference_bytes(made, 100) == inference_bytes(small, 100)
    assert shape_of(config) == WHOLE and config.hybrid_override_pattern == "M-M*-M-"


def test_out_of_reach(parent_config):
    config, importance, axes = parent_config(), draw(parent_config()), axes_of(**GRID)
    least = counted(config, WHOLE | {"mamba_layers": 2, "attention_layers": 0, "intermediate_size": 10, "hidden_size": 20})
    budget = Budget(1000, 2000, 0.5, context=1024)
    with pytest.raises(ValueError) as error:
        candidates(config, importance, axes, budget, 9, lambda shape: shape["mamba_layers"] / 3)
    assert str(error.value).splitlines() == [
        "no shape of the grid (15) is within the budget:",
        f"  at most 1,000 parameters; the smallest shape of the grid has {count_parameters(least):,}",
        "  at most 2.00 kB of weights and cache at 1,024 tokens; the smallest shape of the grid takes "
        f"{inference_bytes(least, 1024) / 1000:.1f} kB",
        "  at most 0.5 s for a request; the quickest shape of the grid takes about 0.667 s",
        f"Raise the budget, or let the grid go further down ({', '.join(f'compress.{axis}' for axis in AXES)}).",
    ]
    with pytest.raises(ValueError) as error:
        candidates(config, importance, axes, Budget(seconds=0.5), 9, lambda shape: 1.0)
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(ValueError, match=r"no shape but the parent's own; .* \(compress.mamba_layers, "):
        candidates(config, importance, axes_of(), Budget(parameters=10), 9)
    with pytest.raises(ValueError, match="the grid does not fit the parent"):
        candidates(config, importance, axes_of(ffn_layers=[4]), Budget(), 9)


def neuron(config):
    """Parameters of one neuron more in each FFN layer."""
    return config.hybrid_override_pattern.count("-") * (2 * config.hidden_size + config.mlp_bias)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("heads", [32, 4], ids=["many heads", "few heads"])
def test_uniform_cuts(heads, share, tiny_config):
    sizes = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": heads // 4, "num_key_value_heads": heads // 4}
    pattern = "M-M-M*-M-M-M*-M-M-M-"
    config = tiny_config(hybrid_override_pattern=pattern, mamba_num_heads=heads, mlp_bias=True, **sizes)
    importance, target = draw(config), int(share * count_parameters(config))
    deep, wide = (cut(config, importance, target) for cut in (uniform_depth, uniform_width))
    for kept in (deep, wide):
        small = smaller_config(config, kept)
        assert target - neuron(small) < count_parameters(small) <= target
        for i, part in kept.parts.items():
            assert part == best_parts(config, importance, i, len(part))
    gone = [i for i in range(20) if i not in deep.layers]
    steps = {b - a for a, b in pairwise(gone)}
    assert gone and deep.channels is None and (not steps or max(steps) - min(steps) <= 1)
    assert gone[0] + 1 - (20 - gone[-1]) in (-1, 0, 1)  # as far from both ends
    more = Kept([i for i in range(20) if i not in {int((j + 0.5) * 20 / (len(gone) + 1)) for j in range(len(gone) + 1)}])
    assert count_parameters(smaller_config(config, more)) < target  # one layer less would be too small
    small = smaller_config(config, wide)
    assert wide.layers == list(range(20)) and wide.channels == best_parts(config, importance, None, small.hidden_size)
    share = small.hidden_size / 64
    assert small.mamba_num_heads == 2 * round(heads / 2 * share)
    assert small.num_key_value_heads == max(1, round(heads / 4 * share))
    assert abs(small.intermediate_size / 224 - share) < 0.06


def test_a_uniform_cut_to_the_parents_size_is_the_parent(parent_config):
    config, importance = parent_config(), draw(parent_config())
    for cut in (uniform_depth, uniform_width):
        for asked in (count_parameters(config), 2 * count_parameters(config)):
            kept = cut(config, importance, asked)
            assert smaller_config(config, kept).to_dict() == config.to_dict()


def test_uniform_cuts_that_there_are_not(parent_config):
    config = parent_config()
    importance = draw(config)
    with pytest.raises(ValueError, match="no model of one width has 50 parameters or fewer"):
        uniform_width(config, importance, 50)
    without = parent_config(hybrid_override_pattern="M*M")
    for cut in (uniform_depth, uniform_width):
        with pytest.raises(ValueError, match=r"no FFN layer|an FFN among them"):
            cut(without, draw(without), count_parameters(without) // 2)
    heavy = parent_config(hybrid_override_pattern="M-", intermediate_size=2)
    with pytest.raises(ValueError, match="no layers at even distances, an FFN among them, have 300 parameters or fewer"):
        uniform_depth(heavy, draw(heavy), 300)
