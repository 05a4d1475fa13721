"""Shared by all tests: one thread, and a model small enough to take anywhere."""

from statistics import median

import pytest

# Every kind of layer, 1 < groups < heads, 1 < KV heads < query heads, odd sizes; a wide init makes every layer matter.
TINY = {
    "hybrid_override_pattern": "M-M*-M-",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.3,
}
WITH_EXPERTS = "MEM*-ME"


def pytest_collectstart():
    """Not when this file is read, which the process that hands out the tests does too: it would import torch for nothing."""
    import torch

    import hybridlm.cli.verify  # noqa: F401  imports stock transformers' model without GPU kernels, which it would call on the CPU too

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest first: with several processes none is left with it at the end while the others wait."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture
def tiny():
    """The fields of the tiny configuration, changed by keyword."""
    return lambda **changes: TINY | changes


@pytest.fixture
def tiny_config():
    from hybridlm import HybridLMConfig

    return lambda **changes: HybridLMConfig(**TINY | changes)


@pytest.fixture
def tiny_model(tiny_config):
    """Builds the tiny model, always with the same weights."""
    import torch

    from hybridlm import HybridLMForCausalLM

    def build(backend="auto", **changes):
        torch.manual_seed(0)
        return HybridLMForCausalLM(tiny_config(**changes), backend=backend).eval()

    return build


@pytest.fixture
def draw_ids():
    """Token ids (b t) without the special ones, the same for the same seed."""
    import torch

    return lambda b, t, seed=0: torch.randint(3, TINY["vocab_size"], (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def relative():
    """Greatest difference over greatest value: what "the same logits" is measured by."""
    return lambda a, b: ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def exact(tiny_model):
    """The tiny backbone in float64, where two ways to the same thing agree to 1e-9."""
    return lambda **changes: tiny_model(**changes).double().backbone.requires_grad_(False)


@pytest.fixture
def run_main(capsys):
    """Calls a command's `main` with arguments of any kind; gives its exit status, stdout and stderr."""

    def run(main, *arguments):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def pytest_terminal_summary(terminalreporter):
    """What tests gave to `record_property`: counts are summed, of seconds (float) the median is told, seeds (str) listed."""
    values = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "teardown":  # each phase of a test has the properties of those before it
            for name, value in report.user_properties:
                values.setdefault(name, []).append(value)
    if values:
        terminalreporter.section("faults")
    for name, found in sorted(values.items()):
        if isinstance(found[0], float):
            text = f"median {median(found):.2g}, max {max(found):.2g}, n {len(found)}"
        else:
            text = str(sum(found)) if isinstance(found[0], int) else " ".join(sorted(found))
        terminalreporter.line(f"{name}: {text}")
