"""The cache of what is made of weights: entries, memory, threads, fingerprints."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from masked_conv import Net, unseen
from torch import nn

from dynops import kept as kept_module
from dynops.kept import Kept, kept
from dynops.testing import available_backends

needs_binary = pytest.mark.skipif(
    "cpp" not in available_backends(), reason="without a binary nothing is kept"
)


@needs_binary
def test_make_is_called_once_for_a_content():
    cache, calls, weight = Kept(), [], nn.Parameter(torch.rand(3))

    def get(key="a", weight=weight):
        return cache.get(key, lambda: calls.append(0) or weight.detach().clone(), weight)

    assert get() is get() and len(calls) == 1
    assert get("b") is not get() and len(calls) == 2
    assert get(weight=weight.detach()) is get() and len(calls) == 2  # a view is the same weight
    with torch.no_grad():
        weight.mul_(3)
    assert torch.equal(get(), weight) and len(calls) == 3
    cache.clear()
    get()
    assert len(calls) == 4


@needs_binary
def test_every_tensor_counts():
    cache, tensors = Kept(), [torch.rand(5) for _ in range(3)]

    def get():
        return cache.get("sum", lambda: sum(tensors), tensors[0], None, *tensors[1:])

    for tensor in tensors:
        assert get() is get()
        tensor.numpy()[2] += 1
        assert torch.equal(get(), sum(tensors))


def test_an_address_that_is_reused_is_noticed():
    """As in ``module.half().float()``: version, address and shape are those of the freed memory."""
    cache, weight = Kept(), nn.Parameter(torch.zeros(1000))
    memory = torch.zeros(1000)  # two storages over one piece of memory stand for a reused address
    for value in (1.0, 2.0):
        memory.fill_(value)
        weight.data = torch.from_numpy(memory.numpy())
        assert cache.get("key", lambda: weight.detach().clone(), weight)[0] == value


@needs_binary
def test_views_of_one_memory_are_told_apart():
    cache, flat = Kept(), torch.arange(64.0)
    views = (flat.view(8, 8), flat.view(8, 8).t(), flat[1:], flat.view(4, 16), flat.view(torch.int32))
    for view in views:
        assert torch.equal(cache.get("copy", view.clone, view), view)
    assert len(cache) == len(views)


@needs_binary
def test_nothing_grows():
    """Neither with calls, nor with new views, nor with memory that died."""
    gc.collect()
    kept.clear()
    nets = [Net() for _ in range(3)]
    for net in nets:
        net.check()
    refs, size = [weakref.ref(net.weight) for net in nets], len(kept)
    assert size > 0
    for _ in range(20):
        nets[0].check()
    assert len(kept) == size
    del nets, net
    gc.collect()
    assert all(ref() is None for ref in refs)
    assert len(kept) == 0
    cache, flat = Kept(), torch.rand(20_000)
    for i in range(10_000):
        cache.get("copy", flat[:3].clone, flat[i : i + 3])
    assert len(cache) <= kept_module._MOST_ENTRIES


@needs_binary
def test_a_view_does_not_keep_its_own_memory_alive():
    cache, weight = Kept(), torch.rand(4, 4)
    assert cache.get("t", weight.t, weight).data_ptr() == weight.data_ptr()
    assert cache.get("pair", lambda: (torch.rand(3), weight[0]), weight)[1].data_ptr() == weight.data_ptr()
    assert len(cache) == 0


@needs_binary
def test_a_step_of_another_thread_while_something_is_made():
    """What was read before the step is not kept after it."""
    cache, weight = Kept(), torch.rand(100_000)

    def make():
        made = weight.clone()
        weight.data[50_001] += 1  # seen by no fingerprint
        cache.clear()
        return made

    cache.get("key", make, weight)
    assert torch.equal(cache.get("key", weight.clone, weight), weight)


class FakeStream:
    """Of a GPU: what waits for what."""

    device = torch.device("cuda", 0)

    def __init__(self):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event)


def test_another_stream_waits_for_what_this_one_made(monkeypatch):
    class Made:
        is_cuda, device, used = True, FakeStream.device, []

        def record_stream(self, stream):
            self.used.append(stream)

    class Event:
        def record(self, stream):
            self.stream = stream

    first, second = FakeStream(), FakeStream()
    monkeypatch.setattr(kept_module, "_tensors", lambda made: (made,))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    entry = kept_module._Entry(None, Made())
    assert entry.event.stream is first
    assert entry.on_this_stream() is entry.made and first.waited == []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: second)
    entry.on_this_stream()
    assert second.waited == [entry.event] and Made.used == [second]


@needs_binary
def test_the_debug_switch_compares_all(monkeypatch):
    cache, weight = Kept(), torch.rand(200, 300)
    at = unseen(weight)
    monkeypatch.setattr(kept_module, "_compare_whole", True)
    cache.get("copy", weight.clone, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get("copy", weight.clone, weight)
    weight.data.view(-1)[at] += 1
    with pytest.warns(UserWarning, match=r"a tensor of shape \[200, 300\] was written in a way"):
        assert torch.equal(cache.get("copy", weight.clone, weight), weight)


@needs_binary
def test_the_fingerprint_reads_small_tensors_whole_and_the_ends_of_large_ones():
    for size in (1, 7, 63, 64, 65, 4096, 100_003):
        memory = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        seen = kept_module.fingerprint(memory.ctypes.data, size, 64)
        assert seen == kept_module.fingerprint(memory.copy().ctypes.data, size, 64)
        for place in range(size) if size <= 4096 else (0, 63, size - 64, size - 1):
            memory[place] ^= 1
            assert kept_module.fingerprint(memory.ctypes.data, size, 64) != seen, (size, place)
            memory[place] ^= 1
    with pytest.raises(TypeError, match="address, bytes, lines"):
        kept_module.fingerprint(1, 2)
