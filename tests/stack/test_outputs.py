"""Forwards with several outputs, and modules that are traced only inside of another."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import dynops
from dynops.testing import MaskedPolicy


class Outputs(nn.Module):
    """What torchvision's feature getters, smp's encoders and segmentation networks return."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.attention, self.kind = nn.Sequential(nn.Identity()), kind

    def forward(self, x):
        a = self.attention(F.relu(self.first(x)))
        b = F.interpolate(self.second(a) + 1, size=x.shape[-2:], mode="bilinear")
        found = {"input": x, "a": a, "again": a, "b": b, "mean": b.mean((2, 3)), "none": None}
        if self.kind == "pair":
            return Pair(a, [b, (x, 2)])
        return OrderedDict(found) if self.kind == "ordered" else found


class Pair(NamedTuple):
    a: torch.Tensor
    rest: list


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["dict", "ordered", "pair"])
def test_several_outputs(kind, inner):
    torch.manual_seed(0)
    model = Outputs(kind).eval()
    dense = copy.deepcopy(model)
    model = Untraced(model) if inner else model
    report = dynops.convert_(model)
    assert list(report.fused) == (["inner"] if inner else [""])
    x, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 8, 8) < 0.4
    for copied in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with torch.no_grad(), dynops.use_mask(mask):
            made = copied(x)
        with torch.no_grad(), MaskedPolicy(mask):
            expected = dense(x)
        assert type(made) is type(expected)
        torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)
        same = (made["a"] is made["again"], made["input"] is x) if kind != "pair" else (made.rest[1][0] is x,)
        assert all(same)
        with torch.no_grad():
            torch.testing.assert_close(copied(x), dense(x))
    with dynops.use_mask(mask):
        sum(t.sum() for t in pytree.tree_leaves(model(x)) if isinstance(t, torch.Tensor)).backward()
    grads = [p.grad for p in model.parameters()]
    with MaskedPolicy(mask):
        sum(t.sum() for t in pytree.tree_leaves(dense(x)) if isinstance(t, torch.Tensor)).backward()
    torch.testing.assert_close(grads, [p.grad for p in dense.parameters()], rtol=1e-4, atol=1e-4)


class Untraced(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.dtype.is_floating_point else None


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])

    def forward(self, features):
        sizes = [feature.shape[2:] for feature in features]
        height, width = sizes[0]
        for conv in self.convs:
            features = [F.relu(conv(feature)) for feature in features]
        return [F.interpolate(feature, size=(height, width)) for feature in features]


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.decoder = nn.Conv2d(3, 8, 3, padding=1), Decoder()

    def forward(self, x):
        a = self.first(x)
        return self.decoder([a, F.max_pool2d(a, 2)])


def test_a_decoder_that_loops_over_its_input_is_traced_within_its_model():
    torch.manual_seed(0)
    model = Segmenter().eval()
    dense = copy.deepcopy(model)
    report = dynops.convert_(model)
    assert list(report.fused) == [""] and "cannot be iterated" in report.unfused["decoder"]
    x, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 8, 8) < 0.4
    with torch.no_grad(), dynops.use_mask(mask):
        made = model(x)
    with torch.no_grad(), MaskedPolicy(mask):
        torch.testing.assert_close(made, dense(x), rtol=2e-5, atol=2e-5)


class Resnet(nn.Module):
    """A block of a diffusion model: a map, and a vector of each sample."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.last, self.time = nn.Conv2d(channels, channels, 3, padding=1), nn.Linear(5, channels)

    def forward(self, x, temb, *args, scale=None, **kwargs):
        y = self.conv(F.silu(self.norm(x)))
        y = y + self.time(F.silu(temb))[:, :, None, None]
        return (x + self.last(F.relu(y))) / 1.5


class Merge(nn.Module):
    """A block of a decoder: a map, and another of twice its size."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.side, self.conv = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels + 4, channels, 3, padding=1)

    def forward(self, x, skip, again):
        return self.conv(torch.cat([F.interpolate(x, scale_factor=2.0), self.side(skip)], 1)) + again


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.a, self.b, self.merge = Resnet(), Resnet(), Merge()

    def forward(self, x, temb, flag: bool = True):
        y = self.a(self.first(x), temb)
        z = self.b(self.down(y), temb=temb)
        return self.merge(z, y, again=y) if flag and x.dtype.is_floating_point else z


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_several_inputs(layout):
    torch.manual_seed(0)
    model = Diffusion().eval()
    dense = copy.deepcopy(model)
    report = dynops.convert_(model)
    assert list(report.fused) == ["a", "b", "merge"]
    x, temb, mask = torch.randn(3, 3, 16, 16), torch.randn(3, 5), torch.rand(3, 8, 8) < 0.4
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    mask[1] = False
    for _ in range(2):
        with torch.no_grad(), dynops.use_mask(mask):
            made = model(x, temb)
        with torch.no_grad(), MaskedPolicy(mask):
            expected = dense(x, temb)
        torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)
        with torch.no_grad():  # to both
            model.a.last.weight.data.mul_(1.1), dense.a.last.weight.mul_(1.1)
    with dynops.use_mask(mask):
        model(x, temb).square().sum().backward()
    with MaskedPolicy(mask):
        dense(x, temb).square().sum().backward()
    grads, expected = ([p.grad for p in m.parameters()] for m in (model, dense))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_several_inputs_by_themselves():
    torch.manual_seed(0)
    block, merge = Resnet().eval(), Merge().eval()
    dense = copy.deepcopy(block), copy.deepcopy(merge)
    dynops.convert_(block), dynops.convert_(merge)
    x, big, temb = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 16, 16), torch.randn(1, 5)
    mask = torch.rand(2, 8, 8) < 0.4
    calls = [
        lambda block, merge: block(x, temb),
        lambda block, merge: block(x, temb=temb, scale=2),  # by its own Python
        lambda block, merge: block(temb=temb, x=x),
        lambda block, merge: merge(x, big, big),
        lambda block, merge: merge(again=0, x=x, skip=big),
    ]
    for call in calls:
        with torch.no_grad(), dynops.use_mask(mask):
            made = call(block, merge)
        with torch.no_grad(), MaskedPolicy(mask):
            torch.testing.assert_close(made, call(*dense), rtol=2e-5, atol=2e-5)
    with dynops.use_mask(mask), pytest.raises(TypeError, match="temb"):
        block(x)


@pytest.mark.parametrize("number", [0, 1e-40, 3, -2.5])
def test_a_division_by_a_number(number):
    class Divides(Resnet):
        def forward(self, x):
            return self.last(self.conv(x) / number * 0.5)

    torch.manual_seed(0)
    model = Divides().eval()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    x, mask = torch.randn(2, 8, 8, 8), torch.rand(2, 8, 8) < 0.4
    with torch.no_grad(), dynops.use_mask(mask):
        made = model(x)
    with torch.no_grad(), MaskedPolicy(mask):
        torch.testing.assert_close(made, dense(x), rtol=2e-5, atol=2e-5, equal_nan=True)


def test_an_input_that_is_returned_is_itself():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x, y, vector):
            return self.conv(x), y, vector, x

    model = Returns().eval()
    assert list(dynops.convert_(model).fused) == [""]
    x, y, vector = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    with torch.no_grad(), dynops.use_mask(torch.ones(2, 8, 8)):
        made = model(x, y, vector)
    assert type(made[0]) is torch.Tensor and made[1] is y and made[2] is vector and made[3] is x


def test_a_resizing_that_torch_refuses_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Upsample(scale_factor=2, align_corners=True)).eval()
    dynops.convert_(model)
    with (
        torch.no_grad(),
        dynops.use_mask(torch.ones(2, 8, 8)),
        pytest.raises(ValueError, match="align_corners"),
    ):
        model(torch.randn(2, 3, 8, 8))


def test_an_export_of_several_inputs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Resnet().eval()
            dynops.convert_(self.block)

        def forward(self, x, temb, mask):
            with dynops.use_mask(mask):
                return self.block(x, temb)

    torch.manual_seed(0)
    model, example = Masked(), (torch.randn(2, 8, 8, 8), torch.randn(2, 5), torch.rand(2, 8, 8) < 0.4)
    with torch.no_grad():
        program = torch.export.export(model, example)
        torch.testing.assert_close(program.module()(*example), model(*example), rtol=2e-5, atol=2e-5)


def test_an_input_that_is_written_into_is_left_to_python():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x, y):
            return self.conv(x) + y.add_(1)

    model = Writes().eval()
    assert dynops.convert_(model).unfused == {"": "add_ works in place"}
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    with torch.no_grad(), dynops.use_mask(torch.ones(2, 8, 8)):
        model(x, y)
    assert torch.equal(y, torch.ones_like(y))
