"""The adapters to the GPU packages, held against the specification in float64: outputs and the gradient of every input.

They run on three kinds of machine: on a CPU with stand-ins for the packages, which assert what the packages' own code demands
and compute what it computes; on a CUDA device with the packages; and, where Triton and mamba-ssm are installed without one, on
mamba-ssm's kernels in Triton's interpreter.
"""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus

from hybridlm import HybridLMForCausalLM
from hybridlm.ops import conv1d as conv1d_op
from hybridlm.ops import selective_scan as scan_op
from hybridlm.ops import ssd as ssd_op
from hybridlm.ops.backend import lacking, told
from hybridlm.ops.conv1d import fused as conv1d_fused
from hybridlm.ops.conv1d import naive as conv1d_naive
from hybridlm.ops.selective_scan import fused as scan_fused
from hybridlm.ops.selective_scan import naive as scan_naive
from hybridlm.ops.ssd import fused as ssd_fused
from hybridlm.ops.ssd import naive as ssd_naive

# ---- the stand-ins ----------------------------------------------------------------------------------------------------------


def chunk_scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, return_final_states=False):
    """mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined, without the arguments that nobody gives it."""
    b, t, h, _ = x.shape
    assert chunk_size in (16, 32, 64, 128, 256) and t % chunk_size == 0
    assert B.stride(-1) == C.stride(-1) == 1 and (D is None or D.stride(-1) == 1)
    assert dt.shape == (b, t, h) and A.shape == (h,)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (b, t) and (seq_idx[:, 0] == 0).all()
        assert (seq_idx.diff() >= 0).all()
    y, state = ssd_naive.ssd(x, dt, A, B, C, D=D, initial_state=initial_states, seq_idx=seq_idx)
    return (y, state) if return_final_states else y


def state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """mamba_ssm.ops.triton.selective_state_update.selective_state_update. Of dt_bias and D it takes no None, whatever it says."""
    b, h, p, n = state.shape
    assert not any(m.requires_grad for m in (state, x, dt, A, B, C, D)) or not torch.is_grad_enabled()
    assert x.shape == dt.shape == (b, h, p) and A.shape == (h, p, n) and D.shape == dt_bias.shape == (h, p)
    assert B.shape == C.shape and not dt_softplus and z is None and state_batch_indices is None
    if h == 1:  # Mamba-1's: a step size for each channel, a decay for each element
        y, after = scan_naive.selective_scan_step(x[:, 0], (dt + dt_bias)[:, 0], A[0], B[:, 0], C[:, 0], state[:, 0], D=D[0])
        state.copy_(after[:, None])
        return y[:, None]
    assert A.stride(-1) == A.stride(-2) == dt.stride(-1) == dt_bias.stride(-1) == 0  # one of each a head: the fast way
    y, after = ssd_naive.ssd_step(x, dt[..., 0] + dt_bias[:, 0], A[:, 0, 0], B, C, state, D=D[:, 0])
    state.copy_(after)
    return y


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """mamba_ssm.ops.selective_scan_interface.selective_scan_fn: channels first, one dtype, no gradient of the last state."""
    b, d, t = u.shape
    assert delta.shape == u.shape and A.shape[0] == d and B.shape == C.shape == (b, A.shape[1], t) and A.shape[1] <= 256
    assert u.dtype == delta.dtype == B.dtype == C.dtype and all(m.stride(-1) == 1 for m in (u, delta, B, C))
    assert D is None or (D.shape == (d,) and D.is_contiguous())
    assert z is None and delta_bias is None and not delta_softplus
    y, state = scan_naive.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D=D)
    return (y.mT, state.detach()) if return_last_state else y.mT


def check_layout(m):
    """What causal_conv1d's channel-last kernels demand of x and of its gradient (b d t)."""
    assert m.shape[1] % 8 == 0 and m.stride(1) == 1 and m.stride(2) > 1
    assert m.stride(0) % 8 == m.stride(2) % 8 == m.storage_offset() % 8 == 0


class ChecksGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        check_layout(grad)
        return grad


def convolve(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None):
    """causal_conv1d.causal_conv1d_fn in version 1.4: documents, but no state beside them."""
    check_layout(x)
    assert 2 <= weight.shape[1] <= 4 and (bias is None or bias.dtype == weight.dtype) and activation == "silu"
    assert initial_states is None and not return_final_states
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and (seq_idx >= 0).all()
    return ChecksGradient.apply(conv1d_naive.conv1d(x.mT, weight, bias, seq_idx=seq_idx)[0].mT)


def conv_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """causal_conv1d.causal_conv1d_update."""
    assert not any(m is not None and m.requires_grad for m in (x, conv_state, weight, bias)) or not torch.is_grad_enabled()
    assert x.dim() == 2 and conv_state.shape == (*x.shape, weight.shape[1] - 1) and conv_state.dtype == x.dtype
    assert 2 <= weight.shape[1] <= 4 and (bias is None or bias.dtype == weight.dtype) and activation == "silu"
    y, after = conv1d_naive.conv1d(x[:, None], weight, bias, initial_state=conv_state.mT)
    conv_state.copy_(after.mT)
    return y[:, 0]


# ---- the machines -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch):
    scan = SimpleNamespace(mamba_chunk_scan_combined=chunk_scan)
    step = SimpleNamespace(selective_state_update=state_update)
    interface = SimpleNamespace(selective_scan_fn=selective_scan, selective_scan_cuda=SimpleNamespace(fwd=None))
    conv = SimpleNamespace(causal_conv1d_fn=convolve, causal_conv1d_update=conv_update)
    triton = "mamba_ssm.ops.triton"
    parents = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", triton)}
    parents["mamba_ssm.ops"].selective_scan_interface = interface
    modules = parents | {f"{triton}.ssd_combined": scan, f"{triton}.selective_state_update": step, "causal_conv1d": conv}
    modules["mamba_ssm.ops.selective_scan_interface"] = interface
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    scan_fused.fault.cache_clear()
    yield
    scan_fused.fault.cache_clear()


KERNELS = ("ssd", "ssd_step", "selective_scan", "selective_scan_step", "conv1d")
STAND_INS = SimpleNamespace(device="cpu", wide=torch.float64, narrow=torch.float64, tolerance=1e-9)
STAND_INS.shape = {"h": 6, "g": 2, "p": 3, "n": 5, "q": 16}
INTERPRETER = SimpleNamespace(device="cpu", wide=torch.float32, narrow=torch.float32, tolerance=1e-5)
INTERPRETER.shape = {"h": 4, "g": 2, "p": 8, "n": 5, "q": 16}
# One shape on a GPU: the kernels tune themselves to each, for minutes.
CUDA = {
    "fp32": SimpleNamespace(device="cuda", wide=torch.float32, narrow=torch.float32, tolerance=1e-4),
    "bf16": SimpleNamespace(device="cuda", wide=torch.float32, narrow=torch.bfloat16, tolerance=3e-2),
}
for cuda in CUDA.values():
    cuda.shape = {"h": 4, "g": 2, "p": 64, "n": 128, "q": 128}


@pytest.fixture(params=["stand-ins", *(pytest.param(name, marks=pytest.mark.gpu) for name in CUDA)])
def machine(request, monkeypatch):
    if request.param == "stand-ins":
        request.getfixturevalue("stand_ins")
        return STAND_INS
    if faults := lacking():
        pytest.skip(f"missing here: {told(faults)}")
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")  # not TF32
    return CUDA[request.param]


@pytest.fixture(scope="module")
def interpreter():
    """mamba-ssm's Triton kernels on the CPU, each in one of its configurations, since tuning needs a GPU.

    Float32 alone: the interpreter takes bf16 for integers.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("test_the_kernels_in_tritons_interpreter runs this in a process of its own")
    with pytest.MonkeyPatch.context() as patch:
        # Without the package's __init__, which imports its CUDA part.
        package = ModuleType("mamba_ssm")
        package.__path__ = importlib.util.find_spec("mamba_ssm").submodule_search_locations
        patch.setitem(sys.modules, "mamba_ssm", package)
        patch.setattr(torch.cuda, "device", lambda index: nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))
        ssd_fused.load()
        for module in [module for name, module in sys.modules.items() if name.startswith("mamba_ssm.ops.triton.")]:
            for kernel in vars(module).values():
                if hasattr(kernel, "configs"):
                    kernel.configs = kernel.configs[-1:]
        yield INTERPRETER


def test_the_kernels_in_tritons_interpreter():
    """In a process of its own: Triton must be told when it is imported, and torch imports it."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, on which the kernels themselves are tested")
    if not all(map(importlib.util.find_spec, ("triton", "mamba_ssm"))):
        pytest.skip("needs triton and mamba-ssm; without its CUDA part (MAMBA_SKIP_CUDA_BUILD=TRUE) will do")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "on_the_interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


# ---- what is compared -------------------------------------------------------------------------------------------------------


def draw(machine, t, b=2):
    """x, dt, A, B, C, D, initial_state on the machine."""
    h, g, p, n, _ = machine.shape.values()
    torch.manual_seed(0)
    x, B, C = torch.randn(b, t, h, p), torch.randn(b, t, g, n) / n**0.5, torch.randn(b, t, g, n) / n**0.5
    dt = softplus(torch.randn(b, t, h, dtype=torch.float64) - 1)
    A = -torch.empty(h, dtype=torch.float64).uniform_(0.1, 4)
    D, state = torch.randn(h, dtype=torch.float64), torch.randn(b, h, p, n, dtype=torch.float64)
    x, B, C = (m.to(machine.narrow) for m in (x, B, C))
    dt, A, D, state = (m.to(machine.wide) for m in (dt, A, D, state))
    return [m.to(machine.device) for m in (x, dt, A, B, C, D, state)]


def documents(t, b=2):
    """Rows that change document at other places each, at about every tenth token, and begin with other numbers."""
    generator = torch.Generator().manual_seed(t)
    starts = torch.rand(b, t, generator=generator) < 0.1
    return starts.cumsum(-1) + torch.tensor([[3], [-5]])[:b]


def in_float64(inputs):
    return [None if m is None else m.detach().double().cpu() for m in inputs]


def outputs_and_gradients(run, inputs):
    """`run(*inputs)`, and the gradients of all inputs that are not None, of a random linear loss in all outputs."""
    leaves = [None if m is None else m.detach().clone().requires_grad_() for m in inputs]
    outputs = run(*leaves)
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in outputs]
    loss = sum((m * w.to(m)).sum() for m, w in zip(outputs, weigh, strict=True))
    return *outputs, *torch.autograd.grad(loss, [m for m in leaves if m is not None])


def assert_near(these, those, tolerance):
    for i, (a, b) in enumerate(zip(these, those, strict=True)):
        scale = max(1, b.abs().max().item())
        error = (a.detach().double().cpu() - b).abs().max().item() / scale
        assert error < tolerance, f"number {i} of the results is {error} off"


def compare_ssd(machine, t, with_state=True, packed=True, with_D=True, chunk_size=None, b=2):
    inputs = draw(machine, t, b)
    if not with_D:
        inputs[5] = None
    if not with_state:
        inputs[6] = None
    seq_idx = documents(t, b) if packed else None

    def run(ssd, place):
        where = None if seq_idx is None else seq_idx.to(place)
        q = chunk_size or machine.shape["q"]
        return lambda x, dt, A, B, C, D, state: ssd(x, dt, A, B, C, D=D, initial_state=state, seq_idx=where, chunk_size=q)

    got = outputs_and_gradients(run(ssd_fused.ssd, machine.device), inputs)
    assert got[0].dtype == inputs[0].dtype and got[1].dtype == inputs[1].dtype
    assert all(m.isfinite().all() for m in got)
    assert_near(got, outputs_and_gradients(run(ssd_naive.ssd, "cpu"), in_float64(inputs)), machine.tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("chunks", "more"), [(0, 1), (1, -1), (1, 0), (1, 1), (2, 5)])
def test_ssd(chunks, more, with_state, packed, machine):
    compare_ssd(machine, chunks * machine.shape["q"] + more, with_state, packed)


@pytest.mark.parametrize(
    ("t", "with_state", "packed", "with_D"),
    [(37, True, True, True), (32, True, False, False), (21, False, True, True), (1, True, False, True)],
)
def test_ssd_on_the_interpreted_kernels(t, with_state, packed, with_D, interpreter):
    compare_ssd(interpreter, t, with_state, packed, with_D, b=1)


@pytest.mark.parametrize("chunk_size", [1, 5, 100, 300])
def test_any_chunk_size_is_taken(chunk_size, stand_ins):
    compare_ssd(STAND_INS, 19, with_D=False, chunk_size=chunk_size)


def test_the_chunk_is_the_next_power_of_two_that_the_kernel_takes():
    sizes = {1: 16, 16: 16, 17: 32, 100: 128, 128: 128, 129: 256, 1000: 256}
    assert {size: ssd_fused.kernel_chunk(size) for size in sizes} == sizes


def test_ssd_takes_tensors_of_any_layout(stand_ins):
    x, dt, A, B, C, D, state = draw(STAND_INS, 16)
    y, final = ssd_fused.ssd(x, dt, A, B, C, D=D, initial_state=state)

    def turned(m):
        return m.permute(*reversed(range(m.dim()))).contiguous().permute(*reversed(range(m.dim())))

    strided = torch.stack([D, D], 1)[:, 0]
    other = ssd_fused.ssd(turned(x), turned(dt), A, turned(B), turned(C), D=strided, initial_state=turned(state))
    assert_near(other, (y, final), 1e-12)


def one(inputs):
    """The first token of each: x, dt, A, B, C, state, D."""
    x, dt, A, B, C, D, state = inputs
    return x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D


def step(ssd_step):
    return lambda x, dt, A, B, C, state, D: ssd_step(x, dt, A, B, C, state, D=D)


def compare_step(machine, with_D):
    inputs = [*one(draw(machine, 3))]
    if not with_D:
        inputs[-1] = None
    before = inputs[5].clone()
    assert_near(step(ssd_fused.ssd_step)(*inputs), step(ssd_naive.ssd_step)(*in_float64(inputs)), machine.tolerance)
    assert torch.equal(inputs[5], before)


@pytest.mark.parametrize("with_D", [False, True])
def test_a_step_and_the_state_before_it_stays(with_D, machine):
    compare_step(machine, with_D)


def test_a_step_on_the_interpreted_kernel(interpreter):
    compare_step(interpreter, with_D=True)
    compare_step(interpreter, with_D=False)


def test_a_step_under_autograd_has_its_gradients(machine):
    inputs = one(draw(machine, 1))
    fused, naive = step(ssd_fused.ssd_step), step(ssd_naive.ssd_step)
    true = outputs_and_gradients(naive, in_float64(inputs))
    assert_near(outputs_and_gradients(fused, inputs), true, machine.tolerance)


@pytest.mark.parametrize("recording", [False, True])
def test_a_step_without_autograd_is_the_kernels(recording, stand_ins, monkeypatch):
    """Where nothing is recorded, and where nothing has a gradient to be recorded."""
    monkeypatch.setattr("hybridlm.ops.ssd.eager.ssd_step", None)
    monkeypatch.setattr(sys.modules["causal_conv1d"], "causal_conv1d_fn", None)
    of_ssd = [m.requires_grad_(not recording) for m in one(draw(STAND_INS, 1))]
    of_conv1d = [m.requires_grad_(not recording) for m in draw_conv(STAND_INS, 1, 4)]
    with torch.set_grad_enabled(recording):
        step(ssd_fused.ssd_step)(*of_ssd)
        conv1d_fused.conv1d(*of_conv1d[:3], initial_state=of_conv1d[3])


def draw_scan(machine, t, b=2):
    """x, dt, A, B, C, D, initial_state on the machine."""
    d, n = 12, machine.shape["n"] if machine is STAND_INS else 16
    generator = torch.Generator().manual_seed(t)
    x, dt, B, C, D, state, A = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((b, t, d), (b, t, d), (b, t, n), (b, t, n), (d,), (b, d, n), (d, n))
    )
    x, B, C = (m.to(machine.narrow) for m in (x, B / n**0.5, C / n**0.5))
    dt, A, D, state = (m.to(machine.wide) for m in (softplus(dt - 1), -4 * torch.sigmoid(A), D, state))
    return [m.to(machine.device) for m in (x, dt, A, B, C, D, state)]


def skip_without_extension():
    if why := scan_fused.fault():
        pytest.skip(f"mamba-ssm's CUDA extension selective_scan_cuda cannot be imported: {why}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("t", "with_D"), [(1, True), (2, False), (37, True)])
def test_selective_scan(t, with_D, with_state, packed, machine):
    skip_without_extension()
    inputs = draw_scan(machine, t)
    inputs[5:] = [m if given else None for m, given in zip(inputs[5:], (with_D, with_state), strict=True)]
    seq_idx = documents(t) if packed else None

    def run(scan, place):
        where = None if seq_idx is None else seq_idx.to(place)
        return lambda x, dt, A, B, C, D, state: scan(x, dt, A, B, C, D=D, initial_state=state, seq_idx=where)

    got = outputs_and_gradients(run(scan_fused.selective_scan, machine.device), inputs)
    assert got[0].dtype == inputs[0].dtype and got[1].dtype == inputs[1].dtype
    true = outputs_and_gradients(run(scan_naive.selective_scan, "cpu"), in_float64(inputs))
    assert_near(got, true, machine.tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA)
def test_selective_scan_over_several_of_the_kernels_chunks(name):
    if faults := lacking():
        pytest.skip(f"missing here: {told(faults)}")
    skip_without_extension()
    machine, t = CUDA[name], 2 * scan_fused.CHUNK + 9
    x, dt, A, B, C, D, state = draw_scan(machine, t)
    given = {"D": D, "initial_state": state, "seq_idx": (documents(t) // 40).to(machine.device)}
    y, final = scan_fused.selective_scan(x, dt, A, B, C, **given)
    wide = {key: m if key == "seq_idx" else m.double() for key, m in given.items()}
    true = scan_naive.selective_scan(*(m.double() for m in (x, dt, A, B, C)), **wide)
    assert_near((y, final), [m.cpu() for m in true], machine.tolerance)


@pytest.mark.parametrize("steep", [1e-6, 1e4])
def test_documents_of_any_decay_are_apart_and_the_initial_state_is_whole(steep, stand_ins):
    x, dt, A, B, C, D, state = draw_scan(STAND_INS, 23)
    seq_idx = torch.arange(23) // 8 * 7 + torch.tensor([[3], [-5]])
    A = A * steep
    got = scan_fused.selective_scan(x, dt, A, B, C, D=D, initial_state=state, seq_idx=seq_idx)
    assert_near(got, scan_naive.selective_scan(x, dt, A, B, C, D=D, initial_state=state, seq_idx=seq_idx), 1e-6)
    first = seq_idx == seq_idx[:, :1]
    changed = torch.where(first[..., None], x * 9 - 1, x)
    again, last = scan_fused.selective_scan(changed, dt, A, B, C, D=D, initial_state=-state, seq_idx=seq_idx)
    assert torch.equal(again[~first], got[0][~first]) and torch.equal(last, got[1])
    assert not torch.equal(again, got[0])


@pytest.mark.parametrize("with_D", [False, True])
def test_a_step_of_the_scan_and_the_state_before_it_stays(with_D, machine):
    inputs = [*one(draw_scan(machine, 3))]
    if not with_D:
        inputs[-1] = None
    before = inputs[5].clone()
    fused, naive = step(scan_fused.selective_scan_step), step(scan_naive.selective_scan_step)
    assert_near(fused(*inputs), naive(*in_float64(inputs)), machine.tolerance)
    assert torch.equal(inputs[5], before)
    _, after = scan_fused.selective_scan_step(*inputs[:6], D=inputs[6], overwrite=True)
    assert after is inputs[5] and not torch.equal(after, before)


def test_a_step_of_the_scan_under_autograd_has_its_gradients(machine):
    inputs = one(draw_scan(machine, 1))
    fused, naive = step(scan_fused.selective_scan_step), step(scan_naive.selective_scan_step)
    assert_near(outputs_and_gradients(fused, inputs), outputs_and_gradients(naive, in_float64(inputs)), machine.tolerance)


@pytest.mark.parametrize("absent", ["nothing", "no module", "a stub", "none"])
def test_without_the_cuda_extension_the_scan_says_so(absent, stand_ins, monkeypatch):
    interface = sys.modules["mamba_ssm.ops"].selective_scan_interface
    if absent == "no module":
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
        monkeypatch.delattr(sys.modules["mamba_ssm.ops"], "selective_scan_interface")
    elif absent != "nothing":
        monkeypatch.setattr(interface, "selective_scan_cuda", None if absent == "none" else ModuleType("selective_scan_cuda"))
    x, dt, _, B, *_ = (m.float() for m in draw_scan(STAND_INS, 3))
    told = scan_fused.refusal(x, dt, B)
    assert told is None if absent == "nothing" else "needs mamba-ssm with its CUDA extension selective_scan_cuda" in told


@pytest.mark.parametrize(
    ("b", "t", "d", "n", "fault"),
    [
        (2, 9, 65535, 256, None),
        (2, 9, 65536, 16, "up to 65,535 channels; got 16 and 65536"),
        (2, 9, 64, 257, "up to 256 rows"),
        (2, 2**20, 600, 16, "2^31"),
    ],
)
def test_what_the_scans_kernel_takes(b, t, d, n, fault, stand_ins):
    x, B = torch.empty(b, t, d, device="meta"), torch.empty(b, t, n, device="meta")
    told = scan_fused.refusal(x, x, B)
    assert told is None if fault is None else fault in told


def draw_conv(machine, t, k, b=2, d=16):
    torch.manual_seed(0)
    x, weight, bias, state = torch.randn(b, t, d), torch.randn(d, k), torch.randn(d), torch.randn(b, k - 1, d)
    x, state, weight, bias = (m.to(kind) for m, kind in zip((x, state, weight, bias), 2 * [machine.narrow] + 2 * [machine.wide]))
    return [m.to(machine.device) for m in (x, weight, bias, state)]


def compare_conv(machine, inputs, seq_idx, layout=lambda x: x):
    def run(conv1d, place):
        where = None if seq_idx is None else seq_idx.to(place)
        return lambda x, weight, bias, state: conv1d(layout(x), weight, bias, initial_state=state, seq_idx=where)

    fused, naive = run(conv1d_fused.conv1d, machine.device), run(conv1d_naive.conv1d, "cpu")
    got = outputs_and_gradients(fused, inputs)
    assert got[0].dtype == got[1].dtype == inputs[0].dtype
    assert_near(got, outputs_and_gradients(naive, in_float64(inputs)), machine.tolerance)
    with torch.no_grad():  # a single step has a kernel of its own
        before = None if inputs[3] is None else inputs[3].clone()
        assert_near(fused(*inputs), naive(*in_float64(inputs)), machine.tolerance)
        assert before is None or torch.equal(inputs[3], before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("t", "k"), [(1, 4), (1, 2), (2, 4), (3, 4), (70, 4), (33, 3), (9, 2)])
def test_conv1d(t, k, with_bias, with_state, packed, machine):
    x, weight, bias, state = draw_conv(machine, t, k)
    inputs = x, weight, bias if with_bias else None, state if with_state else None
    compare_conv(machine, inputs, documents(t) if packed else None)


def beside(before, after):
    """A layout: x as a slice of a wider tensor."""

    def layout(x):
        pads = [x.new_ones(*x.shape[:2], size) for size in (before, after)]
        return torch.cat([pads[0], x, pads[1]], dim=-1)[..., before : before + x.shape[2]]

    return layout


def with_gaps(x):
    """A layout: five elements between one sequence of the batch and the next. One of size 1 has that stride too."""
    gap = x.new_ones(len(x), 5)
    return torch.cat([x.flatten(1), gap], dim=1).as_strided(x.shape, (x[0].numel() + 5, x.shape[2], 1))


LAYOUTS = {
    "aligned": beside(8, 16),
    "first channel off": beside(5, 3),
    "rows off": beside(0, 5),
    "sequences off": with_gaps,
    "channels apart": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "time inside": lambda x: x.mT.contiguous().mT,
    "one token again and again": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv1d_takes_x_in_any_layout(layout, b, machine):
    x, weight, bias, _ = draw_conv(machine, 9, 4, b)
    compare_conv(machine, (x, weight, bias, None), None, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv1d_takes_the_gradient_in_any_layout(layout, machine):
    x, weight, bias, _ = draw_conv(machine, 9, 4)

    def gradient(conv1d, x, weight, bias):
        x = x.clone().requires_grad_()
        y, _ = conv1d(x, weight, bias)
        y.backward(LAYOUTS[layout](torch.arange(y.numel()).to(y).view_as(y) / y.numel()))
        return (x.grad,)

    true = gradient(conv1d_naive.conv1d, *in_float64((x, weight, bias)))
    assert_near(gradient(conv1d_fused.conv1d, x, weight, bias), true, machine.tolerance)


@pytest.mark.parametrize("t", [1, 3])
def test_a_state_from_a_wider_pass_is_taken_in_the_dtype_of_x(t, stand_ins):
    x, weight, bias, state = draw_conv(STAND_INS, t, 4)
    y, after = conv1d_fused.conv1d(x.float(), weight.float(), bias.float(), initial_state=state)
    assert y.dtype == after.dtype == torch.float32
    assert_near((y, after), conv1d_naive.conv1d(x, weight, bias, initial_state=state), 1e-6)


def test_a_layout_that_the_kernel_reads_is_not_copied():
    x = torch.randn(2, 5, 32)[..., 8:24]
    assert conv1d_fused.aligned(x) is x
    assert conv1d_fused.aligned(x[:, :0:2]) is not x


# ---- the model --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(machine, tiny_config, monkeypatch):
    """Builds a small hybrid of the machine's shape, always with the same weights."""
    if machine is STAND_INS:  # nothing to resolve on this machine
        for op in (ssd_op, scan_op, conv1d_op):
            monkeypatch.setattr(op, "pick", lambda op, implementations, backend, x, refusal: implementations[backend])
        monkeypatch.setattr("hybridlm.ops.backend.lacking", dict)
    h, g, p, n, q = machine.shape.values()
    # The convolution has a multiple of 8 channels, in_proj has not.
    shape = {"mamba_num_heads": h, "n_groups": g, "mamba_head_dim": p, "ssm_state_size": n + n % 2, "chunk_size": q}
    if machine is STAND_INS:
        shape |= {"mamba_head_dim": 4, "hybrid_override_pattern": "M-m*-M-"}

    def model(backend, device, dtype):
        torch.manual_seed(0)
        made = HybridLMForCausalLM(tiny_config(**shape), backend=backend)
        return made.to(dtype=machine.narrow).to(device, dtype)  # the same weights, rounded, for both

    return model


def test_a_model_trains_and_generates_as_by_the_specification(build, machine, draw_ids):
    t = machine.shape["q"] + 5
    ids = draw_ids(2, t)
    seq_idx = (documents(t) - documents(t)[:, :1]).long()
    results, generated = {}, {}
    for backend, device, dtype in (("fused", machine.device, machine.narrow), ("naive", "cpu", torch.float64)):
        model = build(backend, device, dtype)
        if backend == "fused":
            assert model.ops.backends == dict.fromkeys(KERNELS, "fused") | dict.fromkeys(
                ("recurrent", "gated_norm", "rms_norm", "cross_entropy", "distillation"), "eager"
            )
        loss = model(ids.to(device), targets=ids.roll(-1, 1).to(device), seq_idx=seq_idx.to(device)).loss
        loss.sum().backward()
        results[backend] = [loss, *(p.grad for p in model.parameters())]
        model.eval()
        with torch.no_grad():  # a prompt in two pieces, then a token at a time
            outputs = model(ids[:, : t - 9].to(device), use_cache=True)
            cache, logits = outputs.past_key_values, [outputs.logits]
            for piece in ids[:, t - 9 :].to(device).split([7, 1, 1], dim=1):
                logits.append(model(piece, past_key_values=cache).logits)
        generated[backend] = [torch.cat(logits, dim=1)]
    # A gradient through many layers in bf16 says little; there, the loss and the logits.
    count = 1 if machine.narrow == torch.bfloat16 else None
    assert_near(results["fused"][:count], [m.double() for m in results["naive"][:count]], 10 * machine.tolerance)
    assert_near(generated["fused"], [m.double() for m in generated["naive"]], 10 * machine.tolerance)
