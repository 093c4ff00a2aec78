"""Threads, forks, stale caches, leaks, poison, instruction sets, and which module may import which."""

import ast
import os
import pathlib
import resource
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from masked_conv import assert_near, expected, inputs
from pixel_cases import ACTIVATIONS, BACKENDS
from processes import ROOT, in_threads, run_script

import dynops
from dynops import PixelPlan, ops
from dynops.kept import kept
from dynops.testing import in_layout, random_mask, random_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_share_a_layer(dtype):
    """One layer, one plan, a cold weight cache: every thread gets its own right answer."""
    layer = dynops.nn.SparseConv2d(16, 24, 3, padding=1).to(dtype)
    x, _, _, mask = inputs(dtype=dtype)
    xs = [x * (i + 1) for i in range(6)]
    with torch.no_grad():
        exact = [expected(v.double(), layer.weight.double(), layer.bias.double(), mask) for v in xs]
    for round_ in range(5):
        plan = PixelPlan.from_mask(mask)
        kept.clear()

        def work(i, plan=plan, round_=round_):
            with torch.set_grad_enabled(bool(round_ % 2)):
                for _ in range(5):
                    assert_near(layer(xs[i], plan).detach(), exact[i])

        in_threads(6, work)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_run_backward_at_once(backend):
    x, weight, bias, mask = inputs()
    dy = random_tensor(2, 24, 14, 14)
    plan = PixelPlan.from_mask(mask)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = torch.autograd.grad(expected(*leaves, mask), leaves, dy.double())

    def work(_):
        for _ in range(5):
            mine = [t.detach().requires_grad_() for t in (x, weight, bias)]
            out = ops.sparse_conv2d(*mine, plan, padding=1, backend=backend)
            for grad, right in zip(torch.autograd.grad(out, mine, dy), exact, strict=True):
                assert_near(grad, right)

    in_threads(4, work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_after_use(backend):
    """A child that is forked after its parent used the threads computes the right answer."""
    out = run_script(f"""
        import os, sys, torch, torch.nn.functional as F
        from dynops import PixelPlan, backends, ops
        torch.set_num_threads(2)
        x = torch.rand(4, 32, 28, 28).contiguous(memory_format=torch.channels_last)
        weight, mask = torch.rand(32, 32, 3, 3), torch.rand(4, 28, 28) < 0.5
        exact = F.conv2d(x.double(), weight.double(), padding=1) * mask[:, None]
        def check():
            plan = PixelPlan.from_mask(mask)
            out = ops.sparse_conv2d(x, weight, None, plan, padding=1, backend={backend!r})
            rows = ops.gather_pixels(x, plan)
            assert (out - exact).norm() < 1e-6 * exact.norm()
            assert torch.equal(ops.scatter_pixels(rows, plan), x * mask[:, None])
        check()
        child = os.fork()
        if child == 0:
            # torch's own operators hang in a forked child until it has one thread (OpenMP does not
            # survive a fork); DataLoader workers do the same
            torch.set_num_threads(1)
            check()
            print("child", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        check()
        print("parent")
    """)
    assert out.split() == ["child", "parent"]


def test_a_graph_that_was_used_frees_its_tensors():
    x, weight, bias, mask = inputs()
    plan = PixelPlan.from_mask(mask)
    weight.requires_grad_()
    hidden = x * 1
    out = ops.sparse_conv2d(hidden, weight, bias, plan, padding=1, gate=mask.float())
    out.sum().backward()
    refs = [weakref.ref(t) for t in (hidden, out, plan)]
    del hidden, out, plan
    assert all(ref() is None for ref in refs)  # by reference counts, without a collection


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow(backend):
    def resident_mib() -> float:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    weight = random_tensor(64, 64, 3, 3)

    def step():
        x, mask = torch.rand(2, 64, 28, 28), random_mask((2, 28, 28))
        plan = PixelPlan.from_mask(mask)
        leaves = [x.requires_grad_(), weight.clone().requires_grad_()]
        ops.sparse_conv2d(
            *leaves, None, plan, padding=1, gate=torch.rand(2, 28, 28), backend=backend
        ).sum().backward()

    for _ in range(40):  # the allocator's own arenas grow by 8 MiB under torch 2.14, and then no more
        step()
    before = resident_mib()
    for _ in range(60):  # rows that are not freed would be 0.2 MiB a step, a map 0.4
        step()
    assert resident_mib() - before < 8


def poison_freed_memory(*sizes: int) -> None:
    """Leaves freed blocks of these sizes (in floats) full of NaN for the allocator to hand out."""
    for _ in range(2):
        blocks = [torch.full((size,), float("nan")) for size in sizes for _ in range(4)]
        del blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_written_whole(dtype, backend):
    for step in range(24):
        x, weight, bias, mask = inputs(size=5 + step // 2, density=(0, 0.05, 0.5, 1)[step % 4], dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        size, per_float = mask[0].numel(), 4 // dtype.itemsize
        sizes = [2 * c * size // per_float for c in (16, 24)] + [
            2 * 16 * size,
            2 * 24 * size,
            weight.numel(),
            24,
        ]
        poison_freed_memory(*sizes)
        plan = PixelPlan.from_mask(mask, None if step % 2 else mask.numel() // 2)
        out = ops.sparse_conv2d(*leaves, plan, padding=1, backend=backend)
        poison_freed_memory(*sizes)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        poison_freed_memory(*sizes)
        rows = ops.packed_conv2d(*(t.detach() for t in leaves), None, plan, padding=1, backend=backend)
        poison_freed_memory(*sizes)
        gathered = ops.gather_pixels(x.detach(), plan)
        poison_freed_memory(*sizes)
        scattered = ops.scatter_pixels(gathered, plan)
        for result in (out, *grads, rows, gathered, scattered):
            assert result.isfinite().all()
        assert not out[~plan.mask()[:, None].expand_as(out)].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 16])
def test_values_that_no_output_reads_do_not_leak(groups, backend, bad):
    x, weight, bias, mask = inputs(o=16, size=16, density=0.08)
    weight = weight[:, : 16 // groups]
    plan = PixelPlan.from_mask(mask)
    unread = ~plan.needed(3, padding=1).mask()
    assert 20 < int(unread.sum()) < 450
    arguments = {"padding": 1, "groups": groups, "backend": backend}
    for layout in ("channels_last", "nchw"):  # a sum of one format is not bit for bit that of the other
        x = in_layout(x, layout)
        dirty = x.clone().masked_fill_(unread[:, None], bad)
        clean = ops.sparse_conv2d(x, weight, bias, plan, **arguments)
        assert torch.equal(ops.sparse_conv2d(dirty, weight, bias, plan, **arguments), clean)
        rows, clean_rows = (ops.packed_conv2d(t, weight, bias, None, plan, **arguments) for t in (dirty, x))
        assert torch.equal(rows, clean_rows)
        if layout == "channels_last":
            assert torch.equal(ops.scatter_pixels(rows, plan), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_skipped_outputs_do_not_leak(backend):
    x, weight, bias, mask = inputs()
    plan, dy = PixelPlan.from_mask(mask), random_tensor(2, 24, 14, 14)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = ops.sparse_conv2d(*leaves, plan, padding=1, backend=backend)
    clean = torch.autograd.grad(out, leaves, dy, retain_graph=True)
    dirty = torch.autograd.grad(out, leaves, dy.masked_fill(~mask[:, None], float("nan")))
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_exactly_the_outputs_that_read_it(backend):
    x, weight, bias, _ = inputs(n=1, size=12)
    plan = PixelPlan.full((1, 12, 12))
    x[0, 5, 6, 7] = float("nan")
    out = ops.sparse_conv2d(x, weight, bias, plan, padding=1, backend=backend)
    reached = torch.zeros(12, 12, dtype=torch.bool)
    reached[5:8, 6:9] = True
    assert torch.equal(out.isnan(), reached.expand(1, 24, 12, 12))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_take_nan_and_extremes_as_torch_does(activation, backend):
    values = torch.tensor([float("nan"), 1e30, -1e30, 90.0, -90.0, -3.0, 3.0, 0.0, -0.0])
    x, weight = values.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1)
    plan = PixelPlan.full((1, 1, len(values)))
    out = ops.sparse_conv2d(x, weight, None, plan, activation=activation, backend=backend).flatten()
    act = {None: lambda y: y, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
    act["relu2"] = lambda y: F.relu(y).square()
    right = act.get(activation, getattr(F, activation or "", None))(values)
    torch.testing.assert_close(out, right, rtol=1e-6, atol=1e-6, equal_nan=True)


# What a floor may import from dynops, by the first part of the name (docs/architecture.md: imports run one way).
FLOORS = {
    "geometry": set(),
    "ragged": {"geometry"},
    "tiling": {"geometry", "context", "tiling"},
    "modes": {"scripting"},
    "backends": {"_C", "modes"},
    "kept": {"modes", "backends"},
    "scope": set(),
    "scripting": set(),
    "recompute": {"scope"},
    "plans": {"geometry", "modes", "kept", "plans"},
    "kernels": {"geometry", "modes", "backends", "kept", "kernels"},
    "ops": {"geometry", "modes", "scripting", "backends", "kept", "plans", "kernels", "scope", "ops"},
    "context": {"geometry", "modes", "kept", "plans", "ops", "scope", "recompute"},
    "graphs": {"geometry", "plans", "context"},
    "stack": {"geometry", "modes", "backends", "kept", "plans", "kernels", "ops", "context", "stack"},
    "packed": {"ops", "plans", "stack"},
    "incremental": {"kept", "plans", "ops", "context", "scope", "stack", "incremental"},
    "nn": {"geometry", "modes", "scripting", "backends", "kept", "plans", "ops", "context", "stack", "nn"},
    "integrations": {"backends", "plans", "ops", "context", "stack", "convert", "tiling", "integrations"},
    "gates": {"gates"},
    "budget": {"geometry", "plans", "ops", "nn", "stack", "context", "budget"},
}
TOP = {"__init__", "convert", "masked_policy", "testing", "tune"}  # may import any floor


def floor_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_floors(path: pathlib.Path) -> set[str]:
    """The floors of dynops that a file imports, anywhere in it."""
    package = ("dynops", *path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            names |= {(*base, alias.name) for alias in node.names}
    return {name[1] for name in names if name[0] == "dynops" and len(name) > 1}


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    floor = floor_of(path)
    found = imported_floors(path)
    assert "testing" not in found, "testing serves tests alone"
    if floor in FLOORS:
        assert found <= FLOORS[floor], f"{floor} imports {sorted(found - FLOORS[floor])}"
    else:
        assert floor in TOP, f"{floor}: a new floor; say in FLOORS what it may import"


def test_the_import_check_sees_what_it_should():
    assert "geometry" in imported_floors(ROOT / "plans" / "pixels.py")
    assert {"modes", "plans", "kernels"} <= imported_floors(ROOT / "ops" / "pixels" / "conv.py")


def test_importing_dynops_imports_no_heavy_package():
    """Triton and the rest load when a kernel needs them."""
    out = run_script("""
        import sys
        import torch
        before = set(sys.modules)
        import dynops
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """)
    assert not {"triton", "numpy", "torchvision", "matplotlib", "transformers"} & set(out.split()), out


def test_a_source_tree_that_was_not_built_warns_once(tmp_path):
    shutil.copytree(ROOT, tmp_path / "dynops", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    script = """
        import sys, warnings
        sys.path.remove("")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import dynops, dynops.ops, torch
            assert dynops.nn.SparseConv2d(2, 3, 1)(torch.ones(1, 2, 2, 2), torch.zeros(2, 2)).count_nonzero() == 0
        print(*[w.message for w in caught if "dynops" in str(w.message)], sep="\\n")
    """
    (text,) = run_script(script, PYTHONPATH=str(tmp_path)).splitlines()
    assert "the reference in plain PyTorch runs" in text
    assert f"`make build` in {tmp_path} makes it" in text
