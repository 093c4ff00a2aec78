"""The capacity form in CUDA graphs: captured with one mask, replayed with others; and nothing waits for the device.

On a CPU, which has no graphs, ``gpu.captured`` runs the function again; what can be known there is that it never asks
for a value: it runs on tensors without any.
"""

import contextlib
import copy
import types

import pytest
import torch
from capacity_cases import cases, maps, pixel_masks
from on_gpu import DEVICE, ON_GPU, assert_near, assert_same, captured, moved, no_synchronisation, products

import dynops
from dynops import backends
from dynops.ops.registry import Op

pytestmark = pytest.mark.gpu
CASES = cases()


@pytest.fixture
def case(request):
    """A case with its tensors and modules on the device; gradients are taken in the case's own function."""
    made = copy.copy(CASES[request.param])
    for module in made.modules:
        module.to(DEVICE)
    made.masks, made.tensors = moved(made.masks), moved(made.tensors)
    with torch.no_grad(), products("ieee"):
        yield made
    for module in made.modules:
        module.cpu()


of_every_case = pytest.mark.parametrize("case", CASES, indirect=True)


def check(replayed, expected, case) -> None:
    if case.library:
        assert_near(replayed, expected)
    else:
        assert_same(replayed, expected)


@of_every_case
def test_replays_with_changed_masks(case, poisoned):
    mask, tensors = case.masks[0].clone(), case.tensors
    replay = captured(case.function, mask, *tensors)
    for other in (*case.masks, case.masks[0]):
        mask.copy_(other)
        check(replay(), case.function(other.clone(), *tensors), case)


@of_every_case
def test_replays_with_changed_tensors(case):
    """Weights too: what a kernel packs of one belongs to the graph."""
    static = [t.clone() for t in case.tensors]
    replay = captured(case.function, case.masks[0], *static)
    for tensor in static:
        tensor.copy_(tensor.flip(0) * 0.5)
    check(replay(), case.function(case.masks[0], *[t.clone() for t in static]), case)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: on a CPU nothing waits")
@of_every_case
def test_nothing_waits_for_the_device(case):
    case.function(case.masks[0], *case.tensors)  # compiles and packs
    with no_synchronisation():
        case.function(case.masks[1], *case.tensors)


WITHOUT_VALUES = [(name, way) for name, made in CASES.items() for way in made.hostless]


def as_on_a_device(op, *arguments):
    """``Op.__call__`` without its way for meta tensors, which are those of a GPU here."""
    needs_grad = any(isinstance(value, torch.Tensor) and value.requires_grad for value in arguments)
    if needs_grad and op.function is not None and torch.is_grad_enabled():
        return op.function.apply(*arguments)
    return op.implementation(*arguments)


@pytest.mark.parametrize("name,way", WITHOUT_VALUES)
def test_no_value_is_asked_for(name, way, monkeypatch):
    """Runs on meta tensors, of which a value cannot be had: by the reference, or the launchers of the Triton kernels."""
    made = copy.copy(CASES[name])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # both raise for this device
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: contextlib.nullcontext())
    monkeypatch.setattr(Op, "__call__", as_on_a_device)
    launched = []
    if way == "triton":
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(backends, "choose", lambda *arguments: "triton")
        monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *a, **k: launched.append(a[0]))
    modules = [copy.deepcopy(module).to("meta") for module in made.modules]
    function = with_modules(made.function, dict(zip(made.modules, modules, strict=True)))
    with torch.no_grad():
        function(moved(made.masks[0], "meta"), *moved(made.tensors, "meta"))
    if way == "triton" and any(noun in name for noun in ("conv", "chain", "linear", "MLP", "MoE", "Sparse")):
        assert launched


def with_modules(function, others: dict):
    """The function with other modules in place of those that it closes over."""
    if not others:
        return function
    cells = tuple(
        types.CellType(others.get(cell.cell_contents, cell.cell_contents)) for cell in function.__closure__
    )
    return types.FunctionType(function.__code__, function.__globals__, closure=cells)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: graphed callables")
def test_a_training_step_in_a_graph():
    """make_graphed_callables: forward and backward graphs of a layer, parameters changed between replays."""
    from dynops import PixelPlan
    from dynops.nn import SparseConv2d

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = SparseConv2d(32, 32, 3, padding=1)

        def forward(self, x, mask):
            return self.conv(x, PixelPlan.from_mask(mask, 100)).relu()

    net = Net().to(DEVICE)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 32, 12, 10, device=DEVICE).to(memory_format=torch.channels_last)
    mask = torch.rand(2, 12, 10, device=DEVICE) < 0.3
    graphed = torch.cuda.make_graphed_callables(net, (x.clone(), mask.clone()))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, twin)]
    for density in (0.3, 0.0, 1.0, 0.1):
        mask = torch.rand(2, 12, 10, device=DEVICE) < density
        losses = [m(x, mask).square().mean() for m in (graphed, twin)]
        assert_same(losses[0].detach(), losses[1].detach())
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_same([p.detach() for p in net.parameters()], [p.detach() for p in twin.parameters()])


def converted() -> torch.nn.Module:
    layers = torch.nn.Conv2d(32, 48, 3, padding=1), torch.nn.BatchNorm2d(48), torch.nn.ReLU()
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(48, 32, 1)).to(DEVICE).eval()
    dynops.convert_(net)
    return net


@torch.no_grad()
def test_graphed_follows_masks_weights_and_shapes():
    """On a CPU it is the module itself."""
    net = converted()
    fast = dynops.graphed(net, expected=70)
    for size in (12, 10):
        for mask in pixel_masks():
            x = maps(h=size).to(DEVICE)
            mask = mask[:, :size].to(DEVICE)
            with products("ieee"), dynops.active(mask):
                assert_same(fast(x), net(x))
            net[0].weight.mul_(0.9)
            net.load_state_dict({name: value * 0.99 for name, value in net.state_dict().items()})


@torch.no_grad()
def test_graphed_takes_plans_and_gives_copies():
    layer = dynops.nn.SparseConv2d(32, 48, 3, padding=1).to(DEVICE).eval()
    fast, x = dynops.graphed(layer), maps().to(DEVICE)
    plans = [dynops.PixelPlan.from_mask(mask.to(DEVICE), 240, 70) for mask in pixel_masks()]
    with products("ieee"):
        results = [fast(x, plan) for plan in plans]
        for result, plan in zip(results, plans, strict=True):
            assert_same(result, layer(x, plan))


def test_graphed_refuses_what_does_not_fit():
    for what, error, options in (
        (3, "module: expected an nn.Module or a function, got int", {}),
        (len, "capacity: expected an int >= 0, got -1", {"capacity": -1}),
        (len, "max_graphs: expected an int >= 1, got 0", {"max_graphs": 0}),
        (len, "expected: expected an int >= 0 or None", {"expected": 0.5}),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            dynops.graphed(what, **options)
