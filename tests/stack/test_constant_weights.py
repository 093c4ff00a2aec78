"""Weights that a convolution computes of its parameters alone are kept; those that it makes of anything else are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from dynops.stack.maps import constant
from dynops.testing import MaskedPolicy

FACTORS = [1.0]


class Scaled(nn.Conv2d):
    """A convolution whose weight is standardised and multiplied by ``factor``, which may be anything."""

    factor = 1.0

    def forward(self, x):
        return F.conv2d(
            x, F.normalize(self.weight.flatten(1)).view_as(self.weight) * self.factor, self.bias, 1, 1
        )


class OfGlobals(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * FACTORS[0], self.bias, 1, 1)


class OfTheSize(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 1, 1 if x.shape[-1] > 5 else 0)


class OfTheBatch(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * len(x), self.bias, 1, 1)


class Counting(nn.Conv2d):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return F.conv2d(x, self.weight * self.calls, self.bias, 1, 1)


class Random(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * torch.rand_like(self.weight), self.bias, 1, 1)


class Listed(Scaled):
    def __init__(self, *args):
        super().__init__(*args)
        self.factors = [1.0]

    def forward(self, x):
        return F.conv2d(x, self.weight * self.factors[0], self.bias, 1, 1)


CHANGES = {
    "weight": lambda conv, i: conv.weight.mul_(1.5),
    "data": lambda conv, i: conv.weight.data.add_(0.1),
    "attribute": lambda conv, i: setattr(conv, "factor", 2.0 + i),
    "class": lambda conv, i: setattr(Scaled, "factor", 2.0 + i),
    "list": lambda conv, i: conv.__dict__.get("factors", FACTORS).__setitem__(0, 2.0 + i),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [Scaled, OfGlobals, OfTheSize, OfTheBatch, Counting, Random, Listed])
def test_no_weight_is_stale(kind, change, monkeypatch):
    monkeypatch.setattr(Scaled, "factor", 1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), kind(3, 3, 3)).double().eval()
    x, mask = torch.randn(2, 2, 8, 12, dtype=torch.float64), torch.rand(2, 4, 6) < 0.4
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    for i in range(3):
        outs = []
        for module, context in ((dense, MaskedPolicy(mask)), (model, dynops.use_mask(mask))):
            torch.manual_seed(i)
            with torch.no_grad(), context:
                outs.append(module(x))
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            CHANGES[change](dense[1], i)
            CHANGES[change](model[1], i)


def test_a_weight_is_computed_once(monkeypatch):
    calls, make = [], constant._weight_and_more
    monkeypatch.setattr(constant, "_weight_and_more", lambda *args: calls.append(1) or make(*args))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Scaled(3, 3, 3)).eval()
    dynops.convert_(model)
    for size in (8, 16):
        with torch.no_grad(), dynops.use_mask(torch.ones(1, 4, 4)):
            model(torch.randn(1, 2, size, size))
    assert calls == [1]
