import logging

import pytest

from hybridlm.ops import build_ops
from hybridlm.ops.backend import resolve

IMPLEMENTATIONS = {"eager": lambda: "eager", "naive": lambda: "naive"}


@pytest.mark.parametrize(("backend", "name"), [("auto", "eager"), ("eager", "eager"), ("naive", "naive")])
def test_a_name_means_itself_and_auto_the_fastest(backend, name):
    assert resolve("ssd", IMPLEMENTATIONS, backend) == name


def test_auto_prefers_fused_where_it_exists():
    assert resolve("ssd", IMPLEMENTATIONS | {"fused": None}, "auto") == "fused"


def test_an_unknown_backend_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of auto, eager, fused, naive; got 'triton'"):
        build_ops("triton")


def test_fused_where_there_is_none_is_an_error_not_a_fallback():
    with pytest.raises(ValueError, match="ssd has no fused implementation"):
        build_ops("fused")


def test_building_the_operators_logs_what_was_chosen(caplog):
    with caplog.at_level(logging.INFO, "hybridlm"):
        ops = build_ops("naive")
    assert ops.ssd.keywords == {"backend": "naive"}
    for op in ("ssd", "ssd_step", "conv1d", "gated_norm", "cross_entropy"):
        assert f"{op}=naive" in caplog.text
