"""What the tests that also run on a GPU share: the device, its backends, comparison with float64, CUDA graphs.

``pytest -m gpu`` selects them. Without a GPU the same code runs on the CPU, on smaller tensors: what a test says is
then known to be right before it meets a GPU.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan
from dynops.testing import assert_within_budget, available_backends, in_both_formats, random_tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
BACKENDS = ("triton", "reference") if ON_GPU else available_backends()
FAST = BACKENDS[0] if ON_GPU else BACKENDS[-1]
# A product of float32 has two forms on a GPU: torch's own setting decides.
KINDS = ("ieee", "tf32", "bfloat16", "float16") if ON_GPU else ("ieee", "bfloat16", "float16")
DTYPES = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EPS = {"ieee": 2**-23, "tf32": 2**-10, "bfloat16": 2**-7, "float16": 2**-10}
_PLANS = (PixelPlan, BlockPlan, ChannelPlan, ExpertPlan, SamplePlan)


def sized(gpu, cpu):
    """What a test uses on a GPU, and the smaller one that it uses on a CPU."""
    return gpu if ON_GPU else cpu


def moved(tree, device: torch.device | str = DEVICE):
    """The tensors and plans of a tree on a device, with their strides; leaves that need a gradient stay leaves."""
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(moved(value, device) for value in tree)
    if isinstance(tree, dict):
        return {key: moved(value, device) for key, value in tree.items()}
    if isinstance(tree, _PLANS):
        return tree.to(device)
    if not isinstance(tree, Tensor):
        return tree
    flat = torch.empty(0, dtype=tree.dtype, device=tree.device).set_(tree.detach().untyped_storage())
    there = flat.to(device).as_strided(tree.shape, tree.stride(), tree.storage_offset())
    return there.requires_grad_(tree.requires_grad)


@contextlib.contextmanager
def products(kind: str):
    """Products of float32 as ``kind`` says, in convolutions, recurrent layers and matrix products alike."""
    settings = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if kind == "tf32" else "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def run(function: Callable, tensors: dict[str, Tensor], grads, dy: list[Tensor]) -> list[Tensor]:
    """The result of ``function(**tensors)`` and the gradients of ``grads`` under ``dy[0]``, made where it is missing."""
    leaves = {name: value.detach() for name, value in tensors.items()}
    for name in grads:
        leaves[name].requires_grad_()
    out = function(**leaves)
    if not grads:
        return [out.detach()]
    if not dy:
        dy.append(random_tensor(*out.shape, dtype=torch.bfloat16))  # exact in every dtype
    wanted = [leaves[name] for name in grads]
    upstream = dy[0].to(out.dtype).to(out.device).contiguous(memory_format=_format(out))
    found = torch.autograd.grad(out, wanted, upstream, materialize_grads=True)
    return [out.detach(), *found]


def compare(ours: Callable, oracle: Callable, tensors: dict[str, Tensor], grads=None, kind="ieee") -> Tensor:
    """Checks ``ours`` on :data:`DEVICE` and its gradients against ``oracle`` in float64 on the CPU.

    Args:
        ours, oracle: functions of the tensors, by name; ``oracle`` is the dense PyTorch ops and a mask.
        tensors: on the CPU; those that are not floating (masks, indices) stay as they are.
        grads: the names whose gradients are compared; None: of all floating ones.
        kind: one of :data:`KINDS`; floating tensors are of its dtype, or float32.

    Returns:
        What ``ours`` returned.
    """
    if grads is None:
        grads = [name for name, value in tensors.items() if value.is_floating_point()]
    double = {n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}
    dy: list[Tensor] = []
    exact = run(oracle, double, grads, dy)
    there = moved(tensors)
    with products(kind):
        both = [run(oracle, tensors, grads, dy) for tensors in in_both_formats(there)]
        dense = list(zip(*both, strict=True))
        actual = run(ours, there, grads, dy)
        if kind == "tf32":  # the yardstick, where cuDNN rounds operands or has no TF32 for a shape
            cut = run(oracle, {n: cut_to_tf32(v) for n, v in there.items()}, grads, dy)
            dense = [[_worse(e, d, c) for d in ds] for e, ds, c in zip(exact, dense, cut, strict=True)]
    for name, a, e, d in zip(("output", *grads), actual, exact, dense, strict=True):
        what = name if name == "output" else f"gradient of {name}"
        assert a.device == DEVICE, f"{what}: on {a.device}"
        assert_close(a.cpu(), e, [found.cpu() for found in d], what, kind)
    return actual[0]


def assert_close(
    actual: Tensor, exact: Tensor, dense: Sequence[Tensor], what: str = "output", kind: str = "ieee"
) -> None:
    """Within the error budget; a few numbers, whose dense error may be zero by luck, within four roundings."""
    size = exact.norm()
    few = exact.numel() < 500 and actual.shape == exact.shape
    if not few or (actual.double() - exact).norm() > max(1e-5, 4 * _EPS[kind]) * size:
        assert_within_budget(actual, exact, dense, what)
    assert actual.dtype == dense[0].dtype and actual.shape == dense[0].shape, what


def cut_to_tf32(x: Tensor) -> Tensor:
    """float32 without the bits that tensor cores do not read: 10 of mantissa stay; other dtypes as they are."""
    if x.dtype != torch.float32:
        return x
    bits = x.detach().contiguous(memory_format=_format(x)).view(torch.int32)
    return (bits & ~0x1FFF).view(torch.float32)


def _worse(exact: Tensor, *candidates: Tensor) -> Tensor:
    return max(candidates, key=lambda d: float((d.cpu().double() - exact).norm()))


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def assert_same(actual, expected, what: str = "result") -> None:
    """The same numbers, bit for bit, in every tensor of two trees."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for a, e in pairs:
        if isinstance(e, Tensor):
            assert a.dtype == e.dtype and a.shape == e.shape, (
                f"{what}: {a.dtype} {a.shape}, not {e.dtype} {e.shape}"
            )
            same = (a == e) | (a != a) & (e != e)
            assert bool(same.all()), f"{what}: {int((~same).sum())} of {e.numel()} values differ"


def assert_near(actual, expected, kind: str = "ieee", what: str = "result") -> None:
    """Two ways of computing the same in one dtype: within some roundings of it, in the Euclidean norm."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for a, e in ((a, e) for a, e in pairs if isinstance(e, Tensor)):
        assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(e.shape)}"
        a, e = a.detach().double().cpu(), e.detach().double().cpu()
        error, limit = (a - e).norm(), 8 * _EPS[kind] * e.norm() + 1e-12
        assert error <= limit, f"{what}: differs by {error:.3e}, over {limit:.3e}"


def captured(function: Callable, *static):
    """``function(*static)`` captured in a CUDA graph: a function that replays it on what ``static`` then holds.

    On a CPU, which has no graphs, it runs the function again.
    """
    if not ON_GPU:
        return lambda: function(*static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled, tuned or allocated once
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*static)

    def replay():
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor):  # what a replay forgets to write shows
                leaf.detach().fill_(float("nan") if leaf.is_floating_point() else True)
        graph.replay()
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), outputs)

    return replay


@contextlib.contextmanager
def no_synchronisation():
    """On a GPU whatever waits for the device is an error."""
    if not ON_GPU:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
