import logging
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hybridlm.ops import (
    EVERY_TOKEN,
    backend,
    build_ops,
    conv1d,
    cross_entropy,
    distillation,
    gated_norm,
    kernels,
    recurrent,
    rms_norm,
    ssd,
)
from hybridlm.ops import selective_scan as scan
from hybridlm.ops.backend import can_fuse, lacking, pick, resolve
from hybridlm.ops.conv1d.fused import refusal as conv1d_refusal
from hybridlm.ops.ssd.fused import refusal as ssd_refusal

IMPLEMENTATIONS = {"eager": min, "fused": max, "naive": sum}  # any three functions
WITHOUT_FUSED = {name: IMPLEMENTATIONS[name] for name in ("eager", "naive")}
TABLES = {
    "ssd": ssd.IMPLEMENTATIONS, "ssd_step": ssd.STEP_IMPLEMENTATIONS,
    "selective_scan": scan.IMPLEMENTATIONS, "selective_scan_step": scan.STEP_IMPLEMENTATIONS,
    "conv1d": conv1d.IMPLEMENTATIONS,
    "gated_norm": gated_norm.IMPLEMENTATIONS, "rms_norm": rms_norm.IMPLEMENTATIONS,
    "cross_entropy": cross_entropy.IMPLEMENTATIONS, "distillation": distillation.IMPLEMENTATIONS,
    "recurrent": recurrent.IMPLEMENTATIONS,
}  # fmt: skip
ALL = tuple(TABLES)
PACKAGES = ("mamba_ssm", "causal_conv1d")


@pytest.fixture
def machine(monkeypatch):
    """Makes this one where the packages work, are missing (None) or raise, with a CUDA device or without."""

    def make(cuda=True, mamba_ssm=True, causal_conv1d=True):
        for question in (can_fuse, lacking):
            question.cache_clear()
        monkeypatch.setattr(backend, "_warned", set())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        functions = {
            "mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined",
            "mamba_ssm.ops.triton.selective_state_update": "selective_state_update",
            "causal_conv1d": "causal_conv1d_fn",
        }
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", *functions):
            state = mamba_ssm if name.startswith("mamba_ssm") else causal_conv1d
            module = Broken(name, state) if isinstance(state, Exception) else ModuleType(name)
            if state is True and name in functions:
                setattr(module, functions[name], None)
            if state is True and name == "causal_conv1d":
                module.causal_conv1d_update = None
            if state is None:
                monkeypatch.delitem(sys.modules, name, raising=False)
            else:
                monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "meta_path", [*([Absent] if None in (mamba_ssm, causal_conv1d) else []), *sys.meta_path])

    yield make
    for question in (can_fuse, lacking):
        question.cache_clear()


class Broken(ModuleType):
    """A module that raises when anything is taken from it."""

    def __init__(self, name, error):
        super().__init__(name)
        self.__dict__["_error"] = error

    def __getattr__(self, name):
        raise self.__dict__["_error"]


class Absent:
    """What finds no package of ours, whether or not it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def on(device):
    return SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize(("name", "meaning"), [("auto", "eager"), ("eager", "eager"), ("naive", "naive")])
def test_without_a_device_auto_is_eager_and_others_mean_themselves(name, meaning, machine):
    machine(cuda=False)
    assert resolve("ssd", IMPLEMENTATIONS, name) == meaning


def test_where_fused_can_run_auto_is_fused(machine):
    machine()
    assert resolve("ssd", IMPLEMENTATIONS, "auto") == resolve("ssd", IMPLEMENTATIONS, "fused") == "fused"
    assert resolve("gated_norm", WITHOUT_FUSED, "auto") == resolve("gated_norm", WITHOUT_FUSED, "fused") == "eager"
    assert resolve("ssd", IMPLEMENTATIONS, "naive") == "naive"


def test_an_unknown_backend_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of auto, eager, fused, naive; got 'triton'"):
        build_ops("triton")


@pytest.mark.parametrize(
    ("lacks", "named"),
    [
        ({"cuda": False}, "missing here: a CUDA device."),
        ({"mamba_ssm": None}, "missing here: mamba-ssm."),
        ({"cuda": False, "mamba_ssm": None, "causal_conv1d": None}, "missing here: mamba-ssm, causal-conv1d, a CUDA device."),
        (
            {"causal_conv1d": ImportError("undefined symbol: _ZN\nand more")},
            r"missing here: causal-conv1d \(it is installed, but cannot be imported: ImportError: undefined symbol: _ZN\)\.",
        ),
        (
            {"mamba_ssm": ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda")},
            r"mamba-ssm \(it is installed, but cannot be imported: ModuleNotFoundError: No module named 'selective_scan_cuda'\)",
        ),
    ],
)
def test_fused_where_it_cannot_run_is_an_error_that_names_what_is_missing(lacks, named, machine):
    machine(**lacks)
    with pytest.raises(ValueError, match=r"^ops\.backend=fused needs mamba-ssm, causal-conv1d .* and a CUDA device; .*" + named):
        build_ops("fused")
    assert set(build_ops("auto").backends.values()) == {"eager"}


def test_parts_of_a_package_that_does_not_import_do_not_pass_for_it(machine, monkeypatch):
    machine(mamba_ssm=None)
    for name, function in (("ssd_combined", "mamba_chunk_scan_combined"), ("selective_state_update", "selective_state_update")):
        monkeypatch.setitem(sys.modules, f"mamba_ssm.ops.triton.{name}", SimpleNamespace(**{function: None}))
    assert lacking() == {"mamba-ssm": ""}


def test_auto_tells_of_a_broken_package_once_and_not_of_a_missing_one(machine, caplog):
    machine(mamba_ssm=ImportError("undefined symbol: _ZN"), causal_conv1d=None)
    for _ in range(2):
        build_ops("auto")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "mamba-ssm (it is installed, but cannot be imported: ImportError: undefined symbol: _ZN)." in record.message
    assert "causal" not in record.message


def test_without_a_device_auto_does_not_ask_for_the_packages(machine, caplog):
    machine(cuda=False, mamba_ssm=ImportError("undefined symbol: _ZN"))
    assert set(build_ops("auto").backends.values()) == {"eager"}
    assert not caplog.records


def test_building_the_operators_logs_what_was_chosen(machine, caplog):
    machine()
    with caplog.at_level(logging.INFO, "hybridlm"):
        ops = build_ops("auto")
    assert ops.backends == dict.fromkeys(ALL[:5], "fused") | dict.fromkeys(ALL[5:], "eager")
    told = "operators: ssd=fused, ssd_step=fused, selective_scan=fused, selective_scan_step=fused, conv1d=fused, recurrent="
    assert told in caplog.text
    assert build_ops("naive").backends == dict.fromkeys(ALL, "naive")


@pytest.mark.parametrize("name", ["auto", "fused", "eager", "naive"])
def test_the_operators_are_called_with_the_backend(name, machine):
    machine()
    ops = build_ops(name)
    for op in ALL:
        bare = op in EVERY_TOKEN and ops.backends[op] != "fused"
        assert getattr(ops, op) is TABLES[op][ops.backends[op]] if bare else getattr(ops, op).keywords == {"backend": name}


def test_a_call_runs_where_its_tensors_are(machine, caplog):
    machine()
    assert pick("ssd", IMPLEMENTATIONS, "auto", on("cpu"), lambda: None) is IMPLEMENTATIONS["eager"]
    assert not caplog.records
    assert pick("ssd", IMPLEMENTATIONS, "auto", on("cuda"), lambda: None) is IMPLEMENTATIONS["fused"]
    assert pick("ssd", IMPLEMENTATIONS, "fused", on("cuda"), lambda: None) is IMPLEMENTATIONS["fused"]
    assert pick("ssd", IMPLEMENTATIONS, "naive", on("cuda"), lambda: None) is IMPLEMENTATIONS["naive"]
    with pytest.raises(ValueError, match=r"ssd: ops\.backend=fused runs on a CUDA device; got tensors on cpu"):
        pick("ssd", IMPLEMENTATIONS, "fused", on("cpu"), lambda: None)


def test_a_call_that_the_kernel_cannot_take_is_an_error_under_fused_and_eager_under_auto(machine, caplog):
    machine()
    with pytest.raises(ValueError, match=r"conv1d: ops\.backend=fused takes two; got three\. Or use ops\.backend=auto"):
        pick("conv1d", IMPLEMENTATIONS, "fused", on("cuda"), lambda: "takes two; got three")
    for op in ("conv1d", "conv1d", "ssd"):
        assert pick(op, IMPLEMENTATIONS, "auto", on("cuda"), lambda: "takes two; got three") is IMPLEMENTATIONS["eager"]
    assert [record.message[:6] for record in caplog.records] == ["conv1d", "ssd: o"]  # once each
    assert "takes two; got three" in caplog.text


def test_the_operators_ask_before_they_call_a_kernel(machine):
    """On a machine that has all, with tensors of the CPU."""
    machine()
    x, dt, B = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2), torch.zeros(1, 4, 1, 5)
    state = torch.zeros(1, 5, 3)
    calls = [
        partial(ssd.ssd, x, dt, dt[0, 0], B, B),
        partial(ssd.ssd_step, x[:, 0], dt[:, 0], dt[0, 0], B[:, 0], B[:, 0], torch.zeros(1, 2, 3, 5)),
        partial(scan.selective_scan, B[:, :, 0], B[:, :, 0], torch.zeros(5, 3), x[:, :, 0], x[:, :, 0]),
        partial(scan.selective_scan_step, B[:, 0, 0], B[:, 0, 0], torch.zeros(5, 3), x[:, 0, 0], x[:, 0, 0], state),
        partial(conv1d.conv1d, torch.zeros(1, 4, 8), torch.zeros(8, 4)),
    ]
    for call in calls:
        call(backend="auto")
        with pytest.raises(ValueError, match="got tensors on cpu"):
            call(backend="fused")
    gated_norm.gated_norm(x[0], x[0], x[0, 0, 0], backend="fused")
    cross_entropy.cross_entropy(x[0], x[0, 0], torch.zeros(4, 2, dtype=torch.long), backend="fused")


@pytest.mark.parametrize(
    ("call", "name", "fault"),
    [
        (lambda name: ssd.ssd(*small_ssd(), backend=name), "auto", "TF32"),
        (lambda name: ssd.ssd(*small_ssd(), backend=name), "fused", None),
        (lambda name: ssd.ssd(*small_ssd(torch.float64), backend=name), "fused", "got torch.float64"),
        (lambda name: ssd.ssd_step(*small_step(), backend=name), "auto", None),
        (lambda name: ssd.ssd_step(*small_step(state=torch.float64), backend=name), "fused", "got torch.float64"),
        (lambda name: ssd.ssd_step(*small_step(dt=torch.float64), backend=name), "fused", "got torch.float64"),
        (lambda name: conv1d.conv1d(torch.zeros(1, 4, 8), torch.zeros(8, 4), backend=name), "auto", None),
        (lambda name: conv1d.conv1d(torch.zeros(1, 4, 8), torch.zeros(8, 5), backend=name), "auto", "got 5"),
    ],
)
def test_each_operator_knows_what_its_kernel_cannot_take(call, name, fault, monkeypatch):
    told = []

    def spy(op, implementations, backend, x, refusal):
        told.append(refusal())
        return lambda *args, **kwargs: None

    for op in (ssd, conv1d):
        monkeypatch.setattr(op, "pick", spy)
    call(name)
    assert told == [None] if fault is None else fault in told[0]


def small_ssd(dtype=torch.float32):
    x, dt, B = (torch.zeros(shape, dtype=dtype) for shape in ((1, 4, 2, 3), (1, 4, 2), (1, 4, 1, 5)))
    return x, dt, dt[0, 0], B, B


def small_step(dt=torch.float32, state=torch.float32):
    x, _, A, B, C = small_ssd()
    return x[:, 0], torch.zeros(1, 2, dtype=dt), A, B[:, 0], C[:, 0], torch.zeros(1, 2, 3, 5, dtype=state)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def refused_ssd(b=2, t=100, h=8, p=64, g=2, n=128, dtype=torch.bfloat16, dt=torch.float32, chunk_size=128, backend="fused"):
    x, B = meta(b, t, h, p, dtype=dtype), meta(b, t, g, n, dtype=dtype)
    return ssd_refusal(x, meta(b, t, h, dtype=dt), B, B, chunk_size=chunk_size, backend=backend)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"dtype": torch.float32}, None),
        ({"backend": "auto"}, None),
        ({"backend": "auto", "dtype": torch.float32}, "TF32"),
        ({"dtype": torch.float64, "dt": torch.float64}, "got torch.float64"),
        ({"dt": torch.float64}, "got torch.float64"),
        ({"t": 2**21, "n": 1}, None),
        ({"t": 2**21 + 1, "n": 1}, "of shape (2, 2097153, 8, 64)"),  # x
        ({"t": 2**20, "h": 1, "n": 1032, "g": 1, "p": 1}, "2^31"),  # B and C
        ({"t": 2**20 + 1, "h": 4, "n": 256, "g": 1}, None),
        ({"t": 2**20 + 1, "h": 4, "n": 256, "g": 1, "chunk_size": 64}, "2^31"),  # the states
        ({"t": 2**20 + 1, "g": 4, "p": 1, "n": 1}, None),
        ({"t": 2**20 + 1, "g": 4, "p": 1, "n": 1, "chunk_size": 256}, "2^31"),  # the scores
    ],
)
def test_what_the_ssd_kernel_takes(call, fault):
    told = refused_ssd(**call)
    assert told is None if fault is None else fault in told


def test_offsets_reach_2_to_the_31_elements():
    assert kernels.refusal(meta(2**31)) is None
    assert kernels.refusal(meta(2**31), largest_inside=2**31) is None
    assert "(2147483649,)" in kernels.refusal(meta(2**31 + 1))
    assert "(2, 3)" in kernels.refusal(meta(2, 3), largest_inside=2**31 + 1)
    assert kernels.refusal(meta(2**31).expand(2**9, -1)) is None


@pytest.mark.parametrize(
    ("x", "weight", "fault"),
    [
        (meta(2, 9, 16), meta(16, 4), None),
        (meta(2, 9, 16), meta(16, 2, dtype=torch.float32), None),
        (meta(2, 9, 16), meta(16, 5), "windows of 2 to 4 positions; got 5"),
        (meta(2, 9, 16), meta(16, 1), "got 1"),
        (meta(2, 9, 12), meta(12, 4), "multiples of 8; got 12"),
        (meta(2, 9, 16, dtype=torch.float64), meta(16, 4), "got torch.float64"),
        (meta(2, 9, 16), meta(16, 4, dtype=torch.float64), "got torch.float64"),
        (meta(2, 2**15, 2**16)[..., :16], meta(16, 4), "2^31"),
    ],
)
def test_what_the_convolutions_kernel_takes(x, weight, fault):
    told = conv1d_refusal(x, weight)
    assert told is None if fault is None else fault in told


def test_documents_are_numbered_from_0():
    numbers = kernels.number_documents(torch.tensor([[7, 7, 9, 9, 10], [-2, -1, -1, -1, 2**40]]))
    assert numbers.dtype == torch.int32 and numbers.is_contiguous()
    assert numbers.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, 2]]
    assert kernels.number_documents(torch.tensor([[3]])).tolist() == [[0]]
