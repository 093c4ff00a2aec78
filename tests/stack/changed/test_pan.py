"""A camera that pans: what moves with the image, and what cannot."""

import pytest
import torch
import torch.nn.functional as F
from edits import assert_dense, model_of
from torch import nn

import dynops
from dynops.stack.changed.frame import Frame

FORWARDS = {
    "positions": lambda m, x: m.d(m.c(x) + m.places),
    "tokens": lambda m, x: m.linear(m.c(x).flatten(2).transpose(1, 2)) * 2,
    "statistics": lambda m, x: m.d(F.silu(m.group(m.c(x)))) * F.adaptive_avg_pool2d(x, 1)[:, :1],
    "up and down": lambda m, x: F.interpolate(m.up(F.avg_pool2d(m.c(x), 2)), size=(25, 25), mode="bilinear"),
    "turned": lambda m, x: m.c(x.flip(3)) + torch.roll(m.c(x), 1, 2) + m.c(x).transpose(2, 3),
    "cropped": lambda m, x: F.pad(m.c(x)[:, :, 1:, 1:], (1, 0, 1, 0)),
    "shuffled": lambda m, x: (F.pixel_shuffle(m.c(x), 2), m.c(F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2))),
    "reflected": lambda m, x: m.c(F.pad(x, (2, 1, 1, 2), mode="reflect")),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("options", [{}, {"keep": []}, {"block": 4}], ids=["", "keep", "block"])
def test_a_pan_is_exact(name, options, monkeypatch):
    monkeypatch.setattr(Frame, "_dense_is_faster", lambda *_: False)
    layers = {
        "c": nn.Conv2d(3, 4, 3, padding=1),
        "d": nn.Conv2d(4, 4, 3, padding=1),
        "linear": nn.Linear(4, 4),
    }
    layers |= {"group": nn.GroupNorm(2, 4), "up": nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)}
    model = model_of(FORWARDS[name], **layers)
    model.register_buffer("places", torch.randn(1, 4, 20, 20))
    world, stream, left = torch.randn(2, 3, 20, 50), dynops.Stream(**options), 20
    for dx in (0, 4, 1, -3, 2):
        left -= dx
        x = world[..., left : left + 20].clone()
        with stream.aligned(dx, 0):
            y = model(x)
        assert_dense(y, model, x)


def test_two_maps_of_two_sizes_move_each_by_its_own():
    layers = {"c": nn.Conv2d(3, 4, 3, padding=1), "d": nn.Conv2d(3, 4, 3, padding=1)}
    model = model_of(lambda m, a, b: m.c(a) + F.interpolate(m.d(b), scale_factor=2), **layers)
    world, small, stream, left = torch.randn(1, 3, 20, 50), torch.randn(1, 3, 10, 25), dynops.Stream(), 20
    for dx in (0, 4, 2, 1, -3, 2):
        left -= dx
        half = left // 2
        maps = world[..., left : left + 20].clone(), small[..., half : half + 10].clone()
        with stream.aligned(dx, 0):
            y = model(*maps)
        assert_dense(y, model, *maps)
