"""Sequences of layers (dynops.stack.sequences) in models that look like others, or change between two calls."""

from __future__ import annotations

import copy

import norm_cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import dynops
from dynops import backends
from dynops.testing import MaskedPolicy

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="the binary runs them")

X, MASK = torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8) < 0.5


def net(inner, **parts) -> nn.Module:
    """Convolutions around what ``inner(self, x)`` makes of a map of 8 channels."""

    def forward(self, x):
        return self.last(self.third(inner(self, self.second(self.first(x)))))

    torch.manual_seed(0)
    made = type("Net", (nn.Module,), {"forward": forward})()
    made.first, made.second, made.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    made.last = nn.Conv2d(8, 4, 1)
    for name, part in parts.items():
        setattr(made, name, part)
    return made.eval()


def check(model: nn.Module, change=None, batch: int = 2) -> None:
    """Compares a model with the meaning of a mask, and once more after a change."""
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    for turn in (None, change):
        if turn is not None:
            turn(model)
            turn(dense)
        with torch.no_grad():
            with MaskedPolicy(MASK[:batch]):
                expected = dense(X[:batch])
            with dynops.use_mask(MASK[:batch]):
                made = model(X[:batch])
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_a_view_that_two_read_is_not_written_into():
    def inner(self, x):
        rows = x.permute(0, 2, 3, 1)
        return self.linear(rows).permute(0, 3, 1, 2) + F.relu(rows.permute(0, 3, 1, 2))

    check(net(inner, linear=nn.Linear(8, 8)))


def test_a_division_of_values_moves_no_channels():
    def inner(self, x):  # of one pixel and one sample: each number of an index map is that of a channel
        return x * self.gate(self.gate(F.adaptive_avg_pool2d(x, 1)) // 2)

    check(net(inner, gate=nn.Conv2d(8, 8, 1)), batch=1)


def test_two_paddings_of_one_size():
    def inner(self, x):
        return (
            self.wide(F.pad(self.wide(F.pad(x, (1, 1, 1, 1))), (2, 0, 1, 1)))[:, [2, 1, 0, 3, 4, 5, 6, 7]] + 1
        )

    check(net(inner, wide=nn.Conv2d(8, 8, 3)))


def test_a_padding_that_a_later_sequence_reads():
    def inner(self, x):
        x = self.wide(F.pad(x, (1, 1, 1, 1)))
        padded = F.pad(x, (2, 0, 1, 1))
        alone = torch.tanh(x)  # joins no sequence
        return self.wide(padded) + alone

    check(net(inner, wide=nn.Conv2d(8, 8, 3)))


def test_a_linear_that_was_pruned_before():
    def inner(self, x):
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = net(inner, linear=nn.Linear(8, 8))
    with torch.no_grad():
        prune.l1_unstructured(model.linear, "weight", 0.5)
        model.linear.weight = model.linear.weight.detach()
    check(model)


# ------------------------------------------------------------------- scales that change between calls


def _scale_becomes(value):
    def change(model):
        del model.scale
        model.scale = value

    return change


@pytest.mark.parametrize(
    "value",
    [2.0, nn.Parameter(torch.arange(8.0).view(1, 1, 8))],
    ids=["a number", "along the width"],
)
def test_a_scale_that_becomes(value):
    model = net(lambda self, x: x * self.scale, scale=nn.Parameter(torch.randn(8, 1, 1)))
    check(model, _scale_becomes(value))


def test_a_scale_of_a_wider_dtype():
    model = net(lambda self, x: (x * self.scale).float(), scale=nn.Parameter(torch.randn(8, 1, 1)))
    check(model, _scale_becomes(nn.Parameter(torch.randn(8, 1, 1, dtype=torch.float64))))


# ------------------------------------------------------------------- classes of the same names


class LayerNorm2d(norm_cases.LayerNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class GlobalResponseNorm(norm_cases.GlobalResponseNorm):
    """Without the sum with its input."""

    def forward(self, x):
        return super().forward(x) - x


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubled(BatchNormAct2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [LayerNorm2d, GlobalResponseNorm, Doubled])
def test_a_class_of_a_known_name_does_something_else(kind):
    check(net(lambda self, x: self.norm(x), norm=kind(8)))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(2, channels)
        self.drop, self.act = nn.Identity(), nn.GELU()

    def forward(self, x):
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


def test_a_setting_of_a_called_module_changes():
    model = net(lambda self, x: self.norm(x), norm=GroupNormAct(8))
    check(model, lambda model: setattr(model.norm, "num_groups", 4))


# ------------------------------------------------------------------- weights of other sizes: no memory is read past them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.third, "weight", nn.Parameter(torch.randn(8, 64, 1, 1))), "weight: expected"),
        (lambda m: setattr(m.third, "weight", nn.Parameter(torch.randn(8, 8, 5, 5))), "weight: expected"),
        (lambda m: setattr(m.third, "bias", nn.Parameter(torch.randn(4))), "bias: expected 8 values"),
        (lambda m: setattr(m.norm, "weight", nn.Parameter(torch.ones(1))), "normalized_shape"),
    ],
    ids=["channels", "kernel", "bias", "norm"],
)
def test_weights_of_other_sizes_are_refused(change, message):
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = net(lambda self, x: self.norm(x), norm=LayerNorm2d(8))
    dynops.convert_(model)
    with torch.no_grad(), dynops.use_mask(MASK):
        model(X)
        change(model)
        with pytest.raises((ValueError, RuntimeError), match=message):
            model(X)
