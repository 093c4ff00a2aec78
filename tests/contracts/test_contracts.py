"""What holds for every op: opcheck, torch.compile, torch.export, honest errors, named backends."""

import pytest
import torch
from contract_cases import NAMES, samples_on

from dynops import PixelPlan, backends, ops
from dynops.geometry import ConvGeometry
from dynops.testing import (
    assert_within_budget,
    available_backends,
    dense_masked_conv2d,
    random_mask,
    random_tensor,
)

BACKENDS = available_backends()
D = torch.ops.dynops


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)) if torch.cuda.is_available() else ("cpu",)
of_every_op = pytest.mark.parametrize("name", NAMES)
on_every_device = pytest.mark.parametrize("device", DEVICES)


def test_every_op_has_a_sample():
    """But cpu_* and cuda_*: kernels that write into memory which the ops around them own."""
    every = {
        n.split("::")[1].split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("dynops::")
    }
    public = {name for name in every if not name.startswith(("cpu_", "cuda_"))}
    assert public == set(NAMES)


@on_every_device
@of_every_op
def test_opcheck(name, device):
    for arguments in samples_on(device)[name]:
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(getattr(D, name).default, arguments, test_utils=tests)


@on_every_device
@of_every_op
def test_opcheck_of_aot_dispatch(name, device):
    every = samples_on(device)[name]
    for arguments in every[:: max(len(every) // 2, 1)]:  # slow: two or three of each
        torch.library.opcheck(getattr(D, name).default, arguments, test_utils="test_aot_dispatch_dynamic")


@on_every_device
@of_every_op
def test_fakes_have_the_strides_of_the_real_ones(name, device):
    """opcheck compares them only through views, torch.compile relies on them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if name in ("mask_to_index", "block_pixels"):
        pytest.skip("the size of its output is not known to a fake")
    for arguments in samples_on(device)[name]:
        real = getattr(D, name)(*arguments)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = getattr(D, name)(*fakes)
        for r, f in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), arguments


@on_every_device
@of_every_op
def test_an_op_does_not_alter_its_inputs(name, device):
    for arguments in samples_on(device)[name]:
        before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(D, name)(*arguments)
        for a, b in zip(arguments, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_the_fused_epilogue_refuses_to_be_differentiated():
    plan = PixelPlan.full((1, 3, 3))
    g = list(ConvGeometry(1, 3, 3, 3, 3, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0))
    x, weight = random_tensor(1, 2, 3, 3).requires_grad_(), random_tensor(2, 2, 1, 1)
    for epilogue in (("relu", None, None), ("", random_tensor(2), None), ("", None, random_tensor(2))):
        with pytest.raises(RuntimeError, match=r"epilogue|no gradient"):
            D.pixel_conv(
                x,
                weight,
                None,
                plan.index,
                None,
                None,
                g,
                *epilogue,
                None,
                None,
                None,
                False,
                None,
                True,
                False,
                "",
            )


X, W, B = random_tensor(2, 6, 9, 8), random_tensor(4, 6, 3, 3), random_tensor(4)
MASK = random_mask((2, 7, 6))
PLAN = PixelPlan.from_mask(MASK)
META = torch.device("meta")


def refused(error, match, x=X, weight=W, bias=B, plan=PLAN, **rest):
    """A case for :func:`test_errors`."""
    return pytest.param(error, match, (x, weight, bias, plan), rest, id=f"{match}-{len(rest)}")


@pytest.mark.parametrize("error, match, arguments, rest", [
    refused(TypeError, r"x: expected a tensor .*list", x=[1.0]),
    refused(TypeError, r"x: expected a floating dtype, got torch.int64", x=X.long()),
    refused(ValueError, r"x: .*\(6, 9, 8\)", x=X[0]),
    refused(ValueError, r"x: expected 6 channels.*\(2, 5, 9, 8\)", x=X[:, :5]),
    refused(ValueError, r"x: .*larg.*\(2, 2\)", x=X[:, :, :2, :2]),
    refused(TypeError, r"weight: expected x's dtype torch.float32, got torch.bfloat16", weight=W.bfloat16()),
    refused(TypeError, r"weight: expected a tensor.*NoneType", weight=None),
    refused(ValueError, r"weight: .*\(4, 6, 3\)", weight=W[..., 0]),
    refused(ValueError, r"weight: .*device cpu, got meta", weight=W.to(META)),
    refused(ValueError, r"weight: .*kernel", weight=W[:, :, :0]),
    refused(TypeError, r"bias: .*float32.*float64", bias=B.double()),
    refused(TypeError, r"bias: expected a tensor.*bool", bias=True),
    refused(ValueError, r"bias: expected shape \(4,\), got \(3,\)", bias=B[:3]),
    refused(ValueError, r"bias: .*\(1, 4\)", bias=B[None]),
    refused(ValueError, r"bias: .*meta", bias=B.to(META)),
    refused(TypeError, r"plan: expected a PixelPlan.*Tensor", plan=MASK),
    refused(ValueError, r"plan: .*\(2, 7, 6\).*\(2, 9, 8\)", plan=PixelPlan.full((2, 9, 8))),
    refused(ValueError, r"plan: .*\(1, 7, 6\)", plan=PixelPlan.from_mask(MASK[:1])),
    refused(ValueError, r"plan: .*cpu, got meta", plan=PLAN.to(META)),
    refused(ValueError, r"stride: .*0", stride=0),
    refused(ValueError, r"stride: .*\(1, 2, 3\)", stride=(1, 2, 3)),
    refused(ValueError, r"stride: .*1\.5", stride=1.5),
    refused(ValueError, r"padding: .*-1", padding=-1),
    refused(ValueError, r"padding: .*0\.5", padding=(0.5, 0)),
    refused(ValueError, r"padding: .*'valid'.*'full'", padding="full"),
    refused(ValueError, r"padding: .*stride", padding="same", stride=2),
    refused(ValueError, r"padding_mode: .*'mirror'", padding_mode="mirror"),
    refused(ValueError, r"padding: .*reflect.*\(9, 9\)", padding=9, padding_mode="reflect"),
    refused(ValueError, r"dilation: .*0", dilation=(1, 0)),
    refused(ValueError, r"groups: .*3", groups=3),
    refused(ValueError, r"groups: .*0", groups=0),
    refused(ValueError, r"groups: .*2\.0", groups=2.0),
    refused(ValueError, r"x: expected 12 channels", groups=2),
    refused(ValueError, r"activation: .*'tanh'", activation="tanh"),
    refused(ValueError, r"activation: .*relu", activation=torch.relu),
    refused(ValueError, r"scale: expected shape \(4,\), got \(5,\)", scale=torch.ones(5)),
    refused(ValueError, r"scale: .*\(4, 1, 1\)", scale=torch.ones(4, 1, 1)),
    refused(TypeError, r"scale: .*float", scale=2.0),
    refused(ValueError, r"scale: .*meta", scale=torch.ones(4, device=META)),
    refused(ValueError, r"shift: expected shape \(4,\), got \(1,\)", shift=torch.ones(1)),
    refused(ValueError, r"shift: .*meta", shift=torch.ones(4, device=META)),
    refused(TypeError, r"gate: .*float", gate=0.5),
    refused(ValueError, r"gate: .*\(2, 6, 7\)", gate=torch.ones(2, 6, 7)),
    refused(ValueError, r"gate: .*\(2, 4, 7, 6\)", gate=torch.ones(2, 4, 7, 6)),
    refused(ValueError, r"gate: .*\(3,\)", gate=torch.ones(3)),
    refused(ValueError, r"gate: .*meta", gate=torch.ones(len(PLAN), device=META)),
    refused(ValueError, r"gate: .*meta", gate=torch.ones(2, 7, 6, device=META)),
    refused(ValueError, r"residual: .*\(2, 4, 9, 8\)", residual=torch.ones(2, 4, 9, 8)),
    refused(ValueError, r"residual: .*\(3, 4\)", residual=torch.ones(3, 4)),
    refused(TypeError, r"residual: .*int", residual=3),
    refused(ValueError, r"residual: .*meta", residual=torch.ones(len(PLAN), 4, device=META)),
    refused(ValueError, r"base: .*\(2, 5, 7, 6\)", base=torch.ones(2, 5, 7, 6)),
    refused(TypeError, r"base: .*float64", base=torch.ones(2, 4, 7, 6, dtype=torch.float64)),
    refused(TypeError, r"base: .*int", base=0),
    refused(ValueError, r"base: .*meta", base=torch.ones(2, 4, 7, 6, device=META)),
    refused(ValueError, r"backend: .*'cuda'", backend="cuda"),
])  # fmt: skip
def test_errors(error, match, arguments, rest):
    with pytest.raises(error, match=match):
        ops.sparse_conv2d(*arguments, **rest)


def test_the_errors_above_are_not_about_something_else():
    exact = dense_masked_conv2d(X.double(), W.double(), B.double(), MASK)
    assert_within_budget(ops.sparse_conv2d(X, W, B, PLAN), exact, dense_masked_conv2d(X, W, B, MASK))


@pytest.mark.parametrize("error, match, rest", [
    (ValueError, r"output_padding: .*\(2, 2\)", {"stride": 2, "output_padding": 2}),
    (ValueError, r"output_padding: .*-1", {"output_padding": -1}),
    (ValueError, r"padding: .*same", {"padding": "same"}),
    (ValueError, r"groups: .*4", {"groups": 4}),
    (ValueError, r"stride: .*0", {"stride": 0}),
    (ValueError, r"plan: .*\(2, 7, 6\)", {"stride": 2}),
])  # fmt: skip
def test_errors_of_the_transposed(error, match, rest):
    x, weight = random_tensor(2, 6, 5, 4), random_tensor(6, 4, 3, 3)
    assert ops.sparse_conv_transpose2d(x, weight, None, PLAN).shape == (2, 4, 7, 6)
    with pytest.raises(error, match=match):
        ops.sparse_conv_transpose2d(x, weight, None, PLAN, **rest)


def test_errors_of_packed_rows():
    in_plan = PixelPlan.from_mask(random_mask((2, 9, 8), 0.5))
    rows = random_tensor(len(in_plan), 6)
    ops.packed_conv2d(rows, W, B, in_plan, PLAN)
    for match, x, source in (
        (r"x: .*\(2, 6, 9, 8\)", X, in_plan),
        (r"x: expected packed rows", rows[1:], in_plan),
        (r"x: expected 6 channels", rows[:, 1:], in_plan),
        (r"x: expected \[N, C, H, W\]", rows, None),
        (r"plan: ", random_tensor(len(PLAN), 6), PLAN),
        (r"device meta, got cpu", rows.to(META), in_plan),
    ):
        with pytest.raises(ValueError, match=match):
            ops.packed_conv2d(x, W, B, source, PLAN)
    with pytest.raises(TypeError, match=r"in_plan: expected a PixelPlan.*Tensor"):
        ops.packed_conv2d(rows, W, B, in_plan.mask(), PLAN)


def test_errors_of_gather_and_scatter():
    rows, x = random_tensor(len(PLAN), 3), random_tensor(2, 3, 7, 6)
    for error, match, call in (
        (TypeError, r"x: .*list", lambda: ops.gather_pixels([1], PLAN)),
        (ValueError, r"x: .*\(2, 3, 6, 7\)", lambda: ops.gather_pixels(x.mT, PLAN)),
        (ValueError, r"x: .*meta", lambda: ops.gather_pixels(x.to(META), PLAN)),
        (TypeError, r"plan: .*Tensor", lambda: ops.gather_pixels(x, MASK)),
        (TypeError, r"rows: .*int", lambda: ops.scatter_pixels(3, PLAN)),
        (ValueError, r"rows: .*packed", lambda: ops.scatter_pixels(rows[1:], PLAN)),
        (ValueError, r"rows: .*meta", lambda: ops.scatter_pixels(rows.to(META), PLAN)),
        (TypeError, r"plan: .*Tensor", lambda: ops.scatter_pixels(rows, MASK)),
        (ValueError, r"base: .*\(2, 2, 7, 6\)", lambda: ops.scatter_pixels(rows, PLAN, x[:, :2])),
        (TypeError, r"base: .*float64", lambda: ops.scatter_pixels(rows, PLAN, x.double())),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_past_the_map_reaches_no_kernel(backend):
    """It would read or write outside memory."""
    index = torch.tensor([0, 2 * 7 * 6 + 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"index: expected positions in \[0, 84\), got 89"):
        PixelPlan(index, (2, 7, 6))
    plan = PixelPlan._made(index, (2, 7, 6))  # on a GPU no value is looked at
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        ops.gather_pixels(random_tensor(2, 3, 7, 6), plan)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        ops.scatter_pixels(random_tensor(2, 3), plan)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        plan.inverse()
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        ops.sparse_conv2d(X, W, B, plan, backend=backend)


def test_a_named_backend_that_is_not_built_raises(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_C_ERROR", ImportError("no binary"), raising=False)
    with pytest.raises(RuntimeError, match=r"backend='cpp'.*not built.*no binary"):
        ops.sparse_conv2d(X, W, B, PLAN, backend="cpp")
    with pytest.raises(RuntimeError, match="not built"):
        backends.build_info()
    full = PixelPlan.full(PLAN.shape)  # nor does a full plan fall back to the dense layer
    with pytest.raises(RuntimeError, match=r"backend='cpp'"):
        ops.sparse_conv2d(X, W, B, full, backend="cpp")


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_triton_interprets", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton'.*(CUDA|not installed)"):
        ops.sparse_conv2d(X, W, B, PLAN, backend="triton")
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton'.*not installed"):
        ops.sparse_conv2d(X, W, B, PLAN, backend="triton")


def test_named_backends_refuse_float64():
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"backend='{backend}'"):
            ops.sparse_conv2d(X.double(), W.double(), None, PLAN, backend=backend)


def test_the_choice():
    cpu = torch.device("cpu")
    best = "cpp" if "cpp" in BACKENDS else "reference"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.choose(None, cpu, dtype) == best
    assert backends.choose(None, cpu, torch.float64) == "reference"
    assert backends.choose("reference", cpu, torch.float32) == "reference"


def test_the_named_backend_is_the_one_that_runs(monkeypatch):
    from dynops.ops.pixels import conv as pixels

    calls = []
    monkeypatch.setattr(
        pixels, "dense_conv", lambda x, *rest: calls.append("reference") or x.new_zeros(2, 4, 7, 6)
    )
    ops.sparse_conv2d(X, W, B, PLAN, backend="reference")
    assert calls == ["reference"]
    if "cpp" in BACKENDS:
        from dynops.kernels.cpu import pixels as cpp

        monkeypatch.setattr(cpp, "conv", lambda x, *rest: calls.append("cpp") or x.new_zeros(2, 4, 7, 6))
        for backend in ("cpp", None):
            ops.sparse_conv2d(X, W, B, PLAN, backend=backend)
        assert calls == ["reference", "cpp", "cpp"]
