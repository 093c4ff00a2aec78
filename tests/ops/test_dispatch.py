"""Every kernel that an op names exists in each module of its kernels, and is what a CPU's and a GPU's tensors take."""

import functools
import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

import contract_cases
import pytest
import torch
from on_gpu import moved

import dynops.ops
from dynops import backends
from dynops.geometry import conv_geometry
from dynops.ops import what_runs
from dynops.ops.channels import outputs
from dynops.ops.dispatch import Kernels
from dynops.ops.registry import OPS, Op

ROOT = Path(__file__).parents[2]


def named_kernels() -> list[tuple[str, Kernels]]:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(dynops.ops.__path__, "dynops.ops.")
    ]
    ops = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Op)}
    closures = [inspect.getclosurevars(op.implementation).nonlocals for op in ops.values()]
    return [(c["name"], c["self"]) for c in closures if isinstance(c.get("self"), Kernels)]


def test_every_named_kernel_exists():
    found = named_kernels()
    assert len(found) >= 15
    for name, kernels in found:
        assert hasattr(kernels.cpu, name), (kernels.cpu.__name__, name)


def test_every_named_kernel_exists_in_triton():
    pytest.importorskip("triton")
    for name, kernels in named_kernels():
        if kernels.triton:
            module = importlib.import_module(f"dynops.kernels.triton.{kernels.triton}")
            assert hasattr(module, name), (module.__name__, name)


# ------------------------------------------------------------------------------ on a pretended GPU

# Plain PyTorch on a GPU where the binary has no CUDA, as the documentation says.
PLANS = ("mask_to_index", "mask_to_index_capacity", "inverse_index", "needed_mask", "block_mask", "block_cover", "block_pixels", "expert_index", "channel_mask")  # fmt: skip
# cuDNN and a mask, but where few pixels have an output: a layer of many MACs.
DENSE_AS_A_RULE = {"masked_output_conv"}


@pytest.fixture
def launched(monkeypatch):
    """The Triton kernels that are launched; nothing runs, and every tensor is taken for a GPU's."""
    triton = pytest.importorskip("triton")
    names, choose, cuda = [], backends.choose, torch.device("cuda")
    monkeypatch.setattr(backends, "choose", lambda backend, device, dtype: choose(backend, cuda, dtype))
    run = triton.runtime.jit.JITFunction
    monkeypatch.setattr(run, "run", lambda kernel, *a, **k: names.append(kernel.__name__))
    return names


@functools.cache
def unnamed_samples() -> dict[str, list]:
    """The arguments of every op, without a named backend."""
    every: dict[str, list] = {}
    for name, arguments in contract_cases.samples(("",)):
        every.setdefault(name, []).append(arguments)
    return every


def on_cuda(name: str, arguments):
    """The op's implementation, below autograd, on tensors without values: asking for one raises."""
    with torch.no_grad():
        return OPS[name].implementation(*moved(arguments, "meta"))


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_cuda_tensor_takes_the_kernel_that_is_documented(name, launched, monkeypatch):
    """It fails for an op that would silently run its reference on a GPU, and for one without a sample."""
    expected = what_runs.kernel_of(OPS[name], "cuda")
    if expected == "cuda":
        pytest.skip("the binary has the CUDA kernel, which the dispatcher takes")
    if name in PLANS:
        assert expected == "reference"
        return
    assert expected == "triton"
    assert unnamed_samples()[name]
    for arguments in unnamed_samples()[name]:
        launched.clear()
        on_cuda(name, arguments)
        assert bool(launched) == (name not in DENSE_AS_A_RULE), arguments
    if name in DENSE_AS_A_RULE:
        monkeypatch.setattr(outputs, "_few_pixels", lambda *a: True)
        on_cuda(name, arguments)
        assert any("conv_kernel" in kernel for kernel in launched)


def test_the_public_ops_and_the_documentation_say_the_same():
    """One truth: the registered ops. ``what_runs`` sums them up, and the page of backends has its rows."""
    says = what_runs.what_runs()
    assert dynops.build_info()["ops"] == says if backends.has_binary() else says
    functions = {name for name in dynops.ops.__all__ if name[0].islower()} - {"quantize_experts"}
    assert functions <= set(says)
    used = {part for parts in what_runs.PARTS.values() for part in parts}
    assert used == set(OPS)
    assert {name for name in OPS if what_runs.kernel_of(OPS[name], "cpu") == "reference"} <= {"nearest_pixel"}
    words = {"C++": {"cpp"}, "Triton": {"triton"}, "PyTorch": {"reference"}}
    words["CUDA C++ where it was built, else Triton"] = {"cuda", "triton", "cuda + triton"}
    words["CUDA C++ where it was built, else PyTorch"] = {"cuda", "reference", "cuda + reference"}
    words["Triton and PyTorch"] = {"triton + reference"}
    documented = set()
    page = (ROOT / "docs" / "backends.md").read_text()
    for line in page.partition("## What runs where")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", cells[0]) if line.startswith("| `") else []:
            documented.add(name)
            for device, cell in zip(("cpu", "cuda"), cells[1:], strict=True):
                assert says[name][device] in words[cell], (name, device, cell)
    assert documented == set(says)


@pytest.mark.parametrize("pixels,few", [(0, True), (1, True), (30, True), (79, False), (100, False)])
def test_few_pixels_are_counted(pixels, few, monkeypatch):
    """Of 100: at most half of 1 - 150 bytes * MACs a byte / MACs."""
    weight, mask = torch.empty(8, 16, 3, 3), torch.zeros(1, 8, 10, 10)
    mask[0, 3].view(-1)[:pixels] = 1
    g = conv_geometry((1, 10, 10), (3, 3), before=(1, 1))
    x = types.SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, element_size=lambda: 0
    )
    monkeypatch.setattr(outputs, "break_even", lambda *a: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not outputs._few_pixels(x, weight, mask.bool(), g)  # a small layer is not counted
    monkeypatch.setattr(outputs, "_COUNTED_MACS", 0)
    monkeypatch.setattr(outputs, "_BYTE_MACS", 10)
    assert outputs._few_pixels(x, weight, mask.bool(), g) is few
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not outputs._few_pixels(x, weight, mask.bool(), g)
