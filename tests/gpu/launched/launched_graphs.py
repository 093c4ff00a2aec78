"""``dynops.graphed`` on the stand-in: captures that hold, replays in order, and what is refused before a capture."""

import pytest
import torch
from driver.order import Race
from driver.watch import watch
from torch import nn

import dynops
from dynops import PixelPlan, SamplePlan
from dynops.graphs import Graphed
from dynops.nn import Skip, SparseConv2d

LAST = {"memory_format": torch.channels_last}


def maps(n: int = 2, size: int = 16) -> torch.Tensor:
    return torch.zeros(n, 64, size, size, dtype=torch.bfloat16, device="cuda").to(**LAST)


def masks(n: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(n, size, size).lt(0.3).to("cuda")


def model() -> nn.Module:
    layers = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    net = nn.Sequential(*layers).to("cuda", torch.bfloat16, **LAST).eval()
    dynops.convert_(net)
    return net


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad(), watch.fresh():
        yield


def calls(fast: Graphed, *inputs, mask=None) -> tuple[int, int]:
    """The replays of a call, and the kernels that it launches by itself."""
    before = watch.counts.copy()
    if mask is None:
        fast(*inputs)
    else:
        with dynops.active(mask):
            fast(*inputs)
    return watch.counts["replays"] - before["replays"], watch.counts["conv_kernel"] - before["conv_kernel"]


def test_a_signature_is_captured_once_and_replayed():
    fast = dynops.graphed(model(), expected=150)
    replays, kernels = calls(fast, maps(), mask=masks())
    assert replays == 1 and kernels > 0
    assert calls(fast, maps(), mask=masks()) == (1, 0)
    assert calls(fast, maps(size=8), mask=masks())[1] == kernels  # another shape
    assert calls(fast, maps().contiguous(), mask=masks())[1] == kernels  # another format
    assert calls(fast, maps(), mask=masks()) == (1, 0)


def test_graphs_are_bounded():
    fast = dynops.graphed(model(), max_graphs=2)
    for size in (8, 16, 32, 16):
        calls(fast, maps(size=size), mask=masks())
    assert len(fast._graphs) == 2
    assert calls(fast, maps(size=16), mask=masks()) == (1, 0)  # used last
    assert calls(fast, maps(size=8), mask=masks())[1] > 0


def test_the_mask_and_inputs_are_copied_before_a_replay():
    fast = dynops.graphed(model())
    x, mask = maps(), masks()
    calls(fast, x, mask=mask)
    (graph,) = fast._graphs.values()
    x.fill_(3)
    calls(fast, x, mask=~mask)
    assert torch.equal(graph.static[0].buffers[0], x) and torch.equal(graph.static[1].buffers[0], ~mask)


def test_plans_are_inputs():
    layer = SparseConv2d(64, 64, 3, padding=1).to("cuda", torch.bfloat16, **LAST).eval()
    fast = dynops.graphed(layer)
    first, other = (PixelPlan.from_mask(masks(), 200, 150) for _ in range(2))
    calls(fast, maps(), first)
    assert calls(fast, maps(), other) == (1, 0)
    (graph,) = fast._graphs.values()
    assert torch.equal(graph.static[1].buffers[0], other.index)
    with pytest.raises(TypeError, match="capacity form, got a compact one"):
        fast(maps(), PixelPlan.from_mask(masks()))
    skip = dynops.graphed(Skip(nn.Conv2d(64, 64, 3, padding=1)).to("cuda", torch.bfloat16, **LAST).eval())
    assert calls(skip, maps(4), SamplePlan.from_mask(torch.ones(4, device="cuda"), 3))[0] == 1


def test_what_is_replaced_is_captured_anew_and_what_is_written_is_not():
    net = model()
    fast = dynops.graphed(net)
    calls(fast, maps(), mask=masks())
    net.load_state_dict(net.state_dict())
    net[0].weight.mul_(2)
    assert calls(fast, maps(), mask=masks()) == (1, 0)
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    assert calls(fast, maps(), mask=masks())[1] > 0
    net[2] = nn.SiLU().eval()
    assert calls(fast, maps(), mask=masks())[1] > 0
    net[0].weight.data = net[0].weight.data.clone(**LAST)
    assert calls(fast, maps(), mask=masks())[1] > 0
    assert calls(fast, maps(), mask=masks()) == (1, 0)


def test_a_packed_weight_is_part_of_the_graph():
    """Of an NCHW weight, which a replay must see as it is then."""
    layer = SparseConv2d(64, 64, 3, padding=1).to("cuda", torch.bfloat16).eval()
    fast = dynops.graphed(layer, maps(), PixelPlan.from_mask(masks(), 200))
    (graph,) = fast._graphs.values()
    memory = watch.memory_of(layer.weight)
    assert any(read is memory for _, _, reads, _, _ in graph.graph._operations for read, _ in reads)


class Reads(nn.Module):
    def forward(self, x):
        return x * float(x.sum())


def test_what_waits_for_the_device_is_named_and_nothing_is_captured():
    net = nn.Sequential(nn.ReLU(), nn.Sequential(Reads())).eval()
    fast = dynops.graphed(net)
    with pytest.raises(RuntimeError, match=r"1\.0 \(Reads\), .*launched_graphs\.py:\d+ waits for the device"):
        fast(maps())
    assert not fast._graphs and not watch.captured and not watch.forbids_waits
    net[1][0] = nn.ReLU().eval()
    assert calls(fast, maps())[0] == 1


def test_a_mask_without_a_capacity_is_named():
    layer = SparseConv2d(64, 64, 3, padding=1).to("cuda", torch.bfloat16, **LAST).eval()
    with pytest.raises(
        RuntimeError, match=r"the module \(SparseConv2d\).*PixelPlan.from_mask\(mask, capacity=n\)"
    ):
        dynops.graphed(layer)(maps(), masks())


def test_training_is_refused():
    net = model()
    fast = dynops.graphed(net)
    with pytest.raises(RuntimeError, match="without gradients"), torch.enable_grad():
        fast(maps())
    net[1].train()
    with pytest.raises(RuntimeError, match="an inner one in training mode"):
        fast(maps())
    net.train()
    with pytest.raises(RuntimeError, match="got training mode"):
        fast(maps())


def test_inputs_that_a_graph_cannot_have():
    fast = dynops.graphed(lambda x, *rest: x * 2)
    with pytest.raises(ValueError, match="input 1 on cpu"):
        fast(maps(), torch.zeros(3))
    with pytest.raises(TypeError, match="hashable values, got set"):
        fast(maps(), {1})
    with pytest.raises(TypeError, match="the tensors that a ChannelPlan is made of"):
        fast(maps(), dynops.ChannelPlan.from_mask(torch.ones(2, 64, device="cuda")))


def test_calls_on_other_streams_take_turns():
    fast, side = dynops.graphed(model()), torch.cuda.Stream()
    x, mask = maps(), masks()
    calls(fast, x, mask=mask)
    side.wait_stream(torch.cuda.current_stream())
    calls(fast, x, mask=mask)  # after the event: the side stream must wait for it
    with torch.cuda.stream(side):
        calls(fast, x, mask=mask)
    (graph,) = fast._graphs.values()
    graph.stream = torch.cuda.Stream()  # as if the last call had been on this one
    graph.done = torch.cuda.Event()
    with pytest.raises(Race):
        calls(fast, x, mask=mask)
    torch.cuda.synchronize()


def test_static_outputs():
    fast, x = dynops.graphed(nn.ReLU().eval(), copy_outputs=False), maps()
    assert fast(x) is fast(x)
    assert (copied := dynops.graphed(nn.ReLU().eval()))(x) is not copied(x)
