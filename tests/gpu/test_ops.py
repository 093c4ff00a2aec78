"""Every op as ``contract_cases.py`` enumerates them: values, the same bits again, streams, and devices."""

import threading

import pytest
import torch
from contract_cases import NAMES, samples_on
from on_gpu import DEVICE, ON_GPU, assert_near, assert_same, moved, products
from torch.utils import _pytree as pytree

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
of_every_op = pytest.mark.parametrize("name", NAMES)
# Their result in another backend is another one within rounding; all others only move values, or count.
SUMS = ("conv", "linear", "mlp", "weight_grad", "activation", "merge", "pairs", "dots", "tiles")


@pytest.fixture(autouse=True)
def exact_products():
    with torch.no_grad(), products("ieee"):
        yield


def call(name: str, arguments):
    return getattr(torch.ops.dynops, name)(
        *pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    )


@of_every_op
def test_values_are_those_of_the_reference_on_a_cpu(name):
    takes_backend = torch.ops.dynops.__getattr__(name).default._schema.arguments[-1].name == "backend"
    for arguments in samples_on(DEVICE.type)[name]:
        there = moved(arguments, "cpu")
        expected = call(name, (*there[:-1], "reference") if takes_backend else there)
        actual = call(name, arguments)
        if any(part in name for part in SUMS):
            assert_near(actual, expected, what=name)
        else:
            assert_same(moved(tuple(pytree.tree_leaves(actual)), "cpu"), expected, name)
        formats = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
        assert all(a.stride() == e.stride() for a, e in formats if a.dim() == 4)


@of_every_op
def test_the_same_bits_again(name):
    for arguments in samples_on(DEVICE.type)[name]:
        assert_same(call(name, arguments), call(name, arguments), name)


def delayed(arguments):
    """The arguments, whose floating values arrive on the current stream after a while; before, they are NaN."""
    late = pytree.tree_map_only(torch.Tensor, lambda t: moved(t.detach(), DEVICE), arguments)
    leaves = [t for t in pytree.tree_leaves(late) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    values = [t.clone() for t in leaves]
    for leaf in leaves:
        leaf.fill_(float("nan"))

    def arrive():
        torch.cuda._sleep(5_000_000)  # a few milliseconds
        for leaf, value in zip(leaves, values, strict=True):
            leaf.copy_(value)

    return late, arrive


@of_every_op
def test_on_a_side_stream(name):
    """An op works on the current stream: it waits for what was put there before. On a CPU: in another thread."""
    for arguments in samples_on(DEVICE.type)[name]:
        expected = call(name, arguments)
        if not ON_GPU:
            results = []
            thread = threading.Thread(target=lambda a=arguments, to=results: to.append(call(name, a)))
            thread.start()
            thread.join()
            assert_same(results[0], expected, name)
            continue
        late, arrive = delayed(arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            arrive()
            actual = call(name, late)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same(actual, expected, name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@of_every_op
def test_on_another_device(name):
    """While the current device is the first one."""
    for arguments in samples_on(DEVICE.type)[name]:
        actual = call(name, moved(arguments, "cuda:1"))
        assert all(t.device.index == 1 for t in pytree.tree_leaves(actual))
        assert_same(moved(tuple(pytree.tree_leaves(actual)), DEVICE), call(name, arguments), name)
