import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.mixers import MIXERS
from hybridlm.pattern import SYMBOLS, evenly_dispersed, unknown_symbols

PUBLISHED = {
    (52, 4): "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    (118, 10): "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
}


@pytest.mark.parametrize(("size", "pattern"), PUBLISHED.items())
def test_the_published_patterns_come_out(size, pattern):
    assert evenly_dispersed(*size) == pattern


@settings(deadline=None, max_examples=100)
@given(n=st.integers(0, 12), extra=st.integers(0, 60))
def test_every_possible_pattern_keeps_the_rules(n, extra):
    n_mamba = n + 1 + extra
    pattern = evenly_dispersed(2 * n_mamba + n, n)
    assert len(pattern) == 2 * n_mamba + n
    assert (pattern.count("M"), pattern.count("*"), pattern.count("-")) == (n_mamba, n, n_mamba)
    assert pattern[0] == "M" and pattern[-1] == "-"
    assert pattern.count("*-") == n
    assert pattern.count("M-") + pattern.count("M*") == n_mamba  # something else follows each Mamba
    stretches = [stretch.count("M") for stretch in pattern.split("*")]
    assert stretches == sorted(stretches) and stretches[-1] - stretches[0] <= 1


@pytest.mark.parametrize(("depth", "n"), [(53, 4), (52, 3), (4, 2), (52, -2), (0, 0), (-4, 0), (10, 10), (4, 4)])
def test_a_pattern_that_cannot_exist_is_an_error_that_says_what_to_change(depth, n):
    with pytest.raises(ValueError, match=f"got depth={depth}, n_attention={n}. Change the depth"):
        evenly_dispersed(depth, n)


def test_every_symbol_has_a_mixer_and_every_mixer_a_symbol():
    assert SYMBOLS.keys() == MIXERS.keys()


def test_unknown_symbols_come_once_each_and_in_order():
    assert unknown_symbols("MX-*YX") == "XY"
    assert unknown_symbols("M-*-") == ""
