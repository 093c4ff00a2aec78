"""Every layer: values and gradients against float64 on a CPU, torch.compile, autocast, copies, no sample."""

import copy
import pickle

import pytest
import torch
from layer_cases import LAYERS, layer_of
from on_gpu import DEVICE, ON_GPU, assert_near, moved, products
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.gpu
of_every_layer = pytest.mark.parametrize("name", LAYERS)
COMPILER = "inductor" if ON_GPU else "aot_eager"
# Each takes seconds: these by the compiler itself, the others as far as its graph.
INDUCTOR = ("SparseConv2d", "SparseSequential", "ChannelConv2d", "MoE", "convert_")

# What they compute depends on a score that may fall on the other side of its threshold in half precision.
DECIDES = (
    "ChannelGatedConv2d",
    "EarlyExit",
    "GroupedDynamicConv2d",
    "Halting",
    "Halting, dense",
    "SkimRNN, dense",
    "SkipRNN",
    "SpatialHalting",
    "SpatialHalting, dense",
    "TokenExit",
)


@pytest.fixture(autouse=True)
def exact_products():
    with products("ieee"):
        yield


def floating(tree) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def trained(module, inputs):
    """The floating results of a call and the gradients of the inputs and parameters."""
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
    wanted = [t.requires_grad_() for t in floating(inputs)] + [
        p for p in module.parameters() if p.requires_grad
    ]
    out = floating(module(*inputs))
    live = [t for t in out if t.requires_grad]
    dy = [torch.linspace(-1, 1, t.numel(), device=t.device, dtype=t.dtype).view_as(t) for t in live]
    grads = torch.autograd.grad(live, wanted, dy, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in out], grads


@of_every_layer
def test_values_and_gradients(name, poisoned):
    module, inputs, _ = layer_of(name)
    double = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    expected = trained(copy.deepcopy(module).double(), double)
    actual = trained(copy.deepcopy(module).to(DEVICE), moved(inputs))
    assert all(t.device == DEVICE for t in floating(actual))
    for what, ours, exact in zip(("output", "gradient"), actual, expected, strict=True):
        sizes = [float(e.norm()) for e in exact]
        for i, (a, e) in enumerate(zip(ours, exact, strict=True)):
            error = (a.cpu().double() - e).norm()
            # a bias before a norm, for example, has a gradient of nothing but rounding
            assert error <= 1e-5 * max(float(e.norm()), 1e-3 * max(sizes)), f"{name}: {what} {i}: {error:.2e}"
    with torch.no_grad():
        assert_close_enough(copy.deepcopy(module).to(DEVICE)(*moved(inputs)), expected[0])


def assert_close_enough(actual, expected, tolerance: float = 1e-5) -> None:
    for a, e in zip(floating(actual), floating(expected), strict=True):
        error, size = (a.cpu().double() - e.cpu().double()).norm(), float(e.double().norm())
        assert a.shape == e.shape and error <= tolerance * max(size, 1e-6), f"{error:.2e} of {size:.2e}"


@of_every_layer
def test_compiles(name):
    """Without a graph break, those that say so."""
    torch._dynamo.reset()
    module, inputs, whole = layer_of(name)
    module, inputs = module.to(DEVICE), moved(inputs)
    compiler = COMPILER if name in INDUCTOR else "aot_eager"
    compiled = torch.compile(module, fullgraph=whole, backend=compiler)
    with torch.no_grad():
        assert_close_enough(compiled(*inputs), module(*inputs))
    if whole:  # training too
        (out, grads), expected = (trained(m, inputs) for m in (compiled, module))
        assert_close_enough(out, expected[0])
        assert_close_enough(grads, expected[1])


@of_every_layer
def test_copies(name):
    """What is pickled and loaded, copied, or given the state of another is the same layer."""
    module, inputs, _ = layer_of(name)
    module, inputs = module.to(DEVICE), moved(inputs)
    with torch.no_grad():
        expected, fresh = module(*inputs), LAYERS[name]().module.eval().to(DEVICE)
        fresh.load_state_dict(module.state_dict())
        for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_close_enough(other(*inputs), expected)


@of_every_layer
def test_no_sample(name):
    """Neither in training nor outside of it."""
    module, inputs, _ = layer_of(name)
    module, along = module.to(DEVICE), int(name in ("SkimRNN, dense", "SkipRNN"))  # where the batch lies
    none = [t.narrow(along, 0, 0) if isinstance(t, torch.Tensor) else t for t in moved(inputs)]
    none[0].requires_grad_()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            outs = floating(module(*none))
        assert outs and all(0 in t.shape or t.dim() == 0 for t in outs)
    if live := [t.sum() for t in outs if t.requires_grad]:
        torch.autograd.backward(live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if ON_GPU else [torch.bfloat16], ids=str)
@of_every_layer
def test_autocast(name, dtype):
    """As the layer that it replaces: computed in half precision, parameters and their gradients in float32."""
    module, inputs, _ = layer_of(name)
    module, inputs = module.to(DEVICE), moved(inputs)
    expected, exact_grads = trained(module, inputs)
    with torch.autocast(DEVICE.type, dtype):
        actual, grads = trained(module, inputs)
    assert [g.dtype for g in grads] == [g.dtype for g in exact_grads]
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and bool(a.isfinite().all())
        if name not in DECIDES:
            assert_near(a, e, str(dtype)[6:], name)
    assert all(bool(g.isfinite().all()) for g in grads)
    # an ordinary layer under autocast returns halves: so must these
    if name in (
        "SparseConv2d",
        "SparseSequential",
        "SparseBlocks",
        "ChannelConv2d",
        "CondConv2d",
        "convert_",
    ):
        assert actual[0].dtype == dtype
