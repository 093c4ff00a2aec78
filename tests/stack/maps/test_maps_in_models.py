"""Models whose parts have masks of their own, and traced ones against their layers each alone."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from benchmarks.models.rows_read import RowsRead
from dynops.testing import MaskedPolicy

C, SIZE = 6, (8, 12)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def masks(seed):
    return torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(seed)) < 0.4


class Inner(nn.Module):
    """A model that no trace holds."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        return self.last(y + 1 if float(y.sum()) < 1e9 else y).sigmoid()


class Nested(nn.Module):
    """A model that no trace holds and that gives a part of itself another mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.stem, self.inner, self.last = (
            mask,
            nn.Conv2d(3, 3, 3, padding=1),
            Inner(),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x):
        x = self.stem(x) + float(x.sum() > 0)
        with dynops.use_mask(self.mask):
            y = self.inner(x)
        return self.last(y) + 1


def test_a_part_has_a_mask_of_its_own():
    model, x, outer = Nested(masks(0)).double().eval(), rand(2, 3, *SIZE), masks(1)
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    for mask in (outer, None):
        with dynops.use_mask(mask) if mask is not None else contextlib.nullcontext():
            out = model(x)
        with MaskedPolicy(mask) if mask is not None else contextlib.nullcontext():
            y = dense.stem(x) + float(x.sum() > 0)
        with MaskedPolicy(dense.mask):
            y = dense.inner(y.clone()).clone()
        with MaskedPolicy(mask) if mask is not None else contextlib.nullcontext():
            expected = dense.last(y) + 1
        close(out, expected)


class Traced(nn.Module):
    """A model that a trace holds, with a function between its convolutions."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 4, 1), function
        self.groups = nn.GroupNorm(2, C)
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.squeezed = nn.Conv2d(C, C, 1)
        self.act, self.drop, self.pool = nn.GELU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(4)

    def forward(self, x):
        return self.last(self.function(self, x))


TRACED = {
    "mlp": lambda m, x: m.down(m.act(m.up(m.norm(m.first(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2) + 1,
    "squeezed": lambda m, x: m.squeezed(m.first(x).mean((2, 3), keepdim=True)) + m.first(x) + 1,
    "pixels in one axis": lambda m, x: m.groups(m.first(x).flatten(2)).view(x.shape) + 1,
    "moved": lambda m, x: F.pad(m.first(x), (-1, 1, 2, -2)) + 1,
    "dropout": lambda m, x: m.down(m.drop(m.up(m.first(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2) + 1,
    "input": lambda m, x: m.pool(
        torch.cat([x[:, 2:] * 2, x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_gives_what_its_layers_give(name):
    torch.manual_seed(0)
    model, x, mask = Traced(TRACED[name]).double().eval(), rand(2, C, 8, 8), masks(0)[:, :, :4]
    alone = copy.deepcopy(model)
    assert "" in dynops.convert_(model).fused
    dynops.convert_(alone)
    for module in alone.modules():
        module.register_forward_hook(lambda *_: None)
    outs = []
    for one in (model, alone):
        torch.manual_seed(0)
        one.drop.train()
        with dynops.use_mask(mask), torch.no_grad():
            outs.append(one(x))
    close(*outs)
    inactive = ~mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert outs[0].shape[2] != 8 or not outs[0].permute(0, 2, 3, 1)[inactive].any()


BORDERED = {
    "zeros": (nn.ZeroPad2d((1, 2, 0, 1)),),
    "reflected": (nn.ReflectionPad2d(1),),
    "pooled": (nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)),
    "twice": (nn.ReflectionPad2d(1), nn.ZeroPad2d(1)),
}


@pytest.mark.parametrize("name", BORDERED)
def test_an_input_that_is_padded_first_is_read_whole(name):
    torch.manual_seed(0)
    convs = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 3, padding=1)
    model, x = nn.Sequential(*BORDERED[name], *convs).double().eval(), rand(2, C, *SIZE)
    dense = copy.deepcopy(model)
    assert "" in dynops.convert_(model).fused
    alone = copy.deepcopy(model)
    for module in alone.modules():
        module.register_forward_hook(lambda *_: None)
    outs = []
    for one in (model, alone):
        with dynops.use_mask(masks(0)) as active, torch.no_grad():
            outs.append(one(x))
    with MaskedPolicy(masks(0), active.masks()), torch.no_grad():
        expected = dense(x)
    close(outs[0], expected)
    close(outs[1], expected)


class Listed(nn.Module):
    """Takes a tensor or a list, and returns a list."""

    def __init__(self, second=False):
        super().__init__()
        self.conv, self.second = nn.Conv2d(C, C, 3, padding=1), second

    def forward(self, x):
        x = x if isinstance(x, list) else [x]
        return [self.conv(x[0]) + (x[1] if len(x) > 1 or self.second else 0), x[0]]


def test_parts_that_return_lists_and_a_layer_that_sees_the_whole_map():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.last = nn.Sequential(Listed(), Listed(True), Listed()), nn.Conv2d(C, 3, 8)

        def forward(self, x):
            return self.last(self.parts(x)[0])

    model, x, mask = Model().double().eval(), rand(2, C, 8, 8), torch.zeros(2, 8, 8)
    mask[:, 1, 2] = 1
    with MaskedPolicy(mask):
        expected = model(x)
    dynops.convert_(model)
    with dynops.use_mask(mask):
        close(model(x), expected)


def test_a_map_of_one_pixel():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(8), nn.AdaptiveAvgPool2d(7), nn.Conv2d(4, 2, 1)
    )
    model, x, mask = model.double().eval(), rand(1, 3, 8, 8), masks(0)[:1, :, :4]
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    model[1].register_forward_hook(lambda *_: None)
    with dynops.use_mask(torch.ones_like(mask)):
        close(model(x), dense(x))


class OwnNorm(nn.GroupNorm):
    """A norm of a library."""


class Patches(nn.Module):
    """A norm of what is no map any more, in a part that a trace holds, of a model that none holds."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(C, C, 1), nn.Sequential(OwnNorm(2, 4 * C), nn.Conv2d(4 * C, 2, 1))

    def forward(self, x):
        y = self.first(x)
        assert float(y.sum()) < 1e9
        return self.inner(F.unfold(y, 2, stride=2).unflatten(2, (4, 4)))


def test_a_layer_reads_what_is_no_map_as_an_input():
    model, x, mask = Patches().double().eval(), rand(2, C, 8, 8), masks(0)[:, :4, :4]
    with MaskedPolicy(mask):
        expected = model(x)
    dynops.convert_(model)
    for hooked in (False, True):
        if hooked:
            for module in model.modules():
                module.register_forward_hook(lambda *_: None)
        with dynops.use_mask(mask):
            close(model(x), expected)


class Blurred(nn.Module):
    """A blur behind a reflected border, and a sum with what a squeezed map gave."""

    def __init__(self):
        super().__init__()
        self.first, self.squeezed, self.last = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1), nn.Conv2d(C, 2, 1)
        self.register_buffer("filt", torch.rand(C, 1, 3, 3))

    def forward(self, x):
        y = F.conv2d(F.pad(self.first(x), (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=C)
        return self.last(y + self.squeezed(y.mean((2, 3), keepdim=True)))


def test_convolutions_behind_borders_and_squeezed_maps_read_rows():
    model, x, mask = Blurred().double().eval(), rand(2, C, 8, 8).requires_grad_(), masks(0)[:, :4, :4]
    with MaskedPolicy(mask):
        expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), (x, *model.parameters()))
    dynops.convert_(model)
    with dynops.use_mask(mask), RowsRead() as read:
        out = model(x)
    close(out, expected)
    assert (read.calls, read.from_rows) == (3, 2)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (x, *model.parameters())), gradients, strict=True
    ):
        close(ours, theirs)


class Waiting(nn.Module):
    """A model that no trace holds: ``function`` of a map, of a convolution that waits, and of its norm."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.last = (
            nn.Conv2d(3, C, 1),
            nn.Conv2d(C, C, 3, padding=1),
            nn.Conv2d(C, 2, 1),
        )
        self.norm, self.function = nn.BatchNorm2d(C), function
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.first(x) + float(x.sum() > 1e9)
        waits = self.second(y)
        normed = self.norm(waits)  # in use until the end
        return self.last(self.function(y, waits, normed))


WAITING = {
    "a sum of a norm, and it": lambda y, waits, normed: y + normed + normed,
    "an activation of a norm, and it": lambda y, waits, normed: F.relu(normed) + normed,
    "read before": lambda y, waits, normed: F.relu(y + normed) + float(waits.sum()),
    "written before": lambda y, waits, normed: [y + normed, normed.relu_()][0] * 1,
    "its source written": lambda y, waits, normed: [waits.mul_(2), normed * 1][1],
    "a view of its source written": lambda y, waits, normed: [waits.chunk(2, 1)[0].mul_(2), normed + waits][
        1
    ],
}


@pytest.mark.parametrize("function", WAITING.values(), ids=WAITING)
def test_what_a_waiting_convolution_grew_from_may_be_used_and_written(function):
    torch.manual_seed(0)
    model, x = Waiting(function).double().eval(), rand(2, 3, *SIZE)
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    with torch.no_grad(), MaskedPolicy(masks(0)):
        expected = dense(x)
    with torch.no_grad(), dynops.use_mask(masks(0)):
        close(model(x), expected)
