"""Images of different sizes in one batch give what each gives alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from masked_models import close, small_resnet
from torch import nn

import dynops

SIZES = (70, 85), (96, 71), (33, 67)


def images(dtype=torch.float64, channels=3):
    torch.manual_seed(0)
    return [torch.randn(channels, h, w, dtype=dtype) for h, w in SIZES]


@pytest.mark.parametrize("how", ["traced", "hooks"])
def test_a_resnet_with_its_classifier(how):
    model, batch = small_resnet(), images()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    if how == "hooks":
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    x, mask = dynops.ragged(batch, size_divisor=32)
    assert x.shape == (3, 3, 96, 96) and x.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), dynops.use_mask(mask, ragged=True):
        out = model(x)
        close(out, torch.cat([dense(image[None]) for image in batch]), 1e-10)


def conv(inputs=3, outputs=4, *sizes, **options):
    return nn.Conv2d(inputs, outputs, *(sizes or (3, 1, 1)), **options)


class Resized(nn.Module):
    """A map that is enlarged to the size of another, and stands first in their sum."""

    def __init__(self, down, mode):
        super().__init__()
        self.conv, self.down, self.inner, self.mode = conv(), down, conv(4), mode

    def forward(self, x):
        x = self.conv(x)
        return F.interpolate(self.inner(self.down(x)), size=x.shape[2:], mode=self.mode) + x


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x - 0.5) / 0.2)


class Padded(nn.Module):
    """Pads more after than before, in front of a stride, as TensorFlow does."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = conv(), nn.Conv2d(4, 4, 3, 2)

    def forward(self, x):
        return self.conv(F.pad(self.first(x), (0, 2, 1, 0)))


EDGES = {
    "bilinear to a size": lambda: Resized(nn.MaxPool2d(3, 2, 1), "bilinear"),
    "nearest to a size": lambda: Resized(nn.MaxPool2d(2), "nearest"),
    "by a broken factor": lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=1.5, mode="bilinear"), conv(4)),
    "adaptive pool": lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 2)),
    "reflected, then pooled": lambda: nn.Sequential(
        conv(), nn.ReflectionPad2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ),
    "replicated, then normed": lambda: nn.Sequential(conv(), nn.ReplicationPad2d(1), nn.GroupNorm(2, 4), conv(4)),
    "mean pool of a last window": lambda: nn.Sequential(conv(), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "norm pool": lambda: nn.Sequential(conv(), nn.LPPool2d(2, 2, ceil_mode=True)),
    "scaled input": lambda: Scaled(conv()),
    "pooled padded input": lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.MaxPool2d(3, 2), conv()),
    "padding before a stride": Padded,
}  # fmt: skip


@pytest.mark.parametrize("how", ["traced", "hooks"])
@pytest.mark.parametrize("name", EDGES)
def test_each_edge_is_the_edge_of_an_image(name, how):
    torch.manual_seed(0)
    model, batch = EDGES[name]().double().eval(), images()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    if how == "hooks":
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    x, mask = dynops.ragged(batch, size_divisor=8)
    with torch.no_grad(), dynops.use_mask(mask, ragged=True):
        out = model(x)
    with torch.no_grad():
        for own, image in zip(out, batch, strict=True):
            alone = dense(image[None])[0]
            inside = tuple(slice(size) for size in alone.shape)
            close(own[inside], alone, 1e-10)
            own[inside] = 0
            assert own.count_nonzero() == 0


def test_the_batch():
    batch = images()
    x, mask = dynops.ragged(batch)
    assert x.shape == (3, 3, 96, 85) and mask.shape == (3, 96, 85) and mask.dtype == torch.bool
    for n, image in enumerate(batch):
        _, h, w = image.shape
        assert torch.equal(x[n, :, :h, :w], image) and mask[n].sum() == h * w and mask[n, :h, :w].all()
        assert not x[n][:, ~mask[n]].any()
    leaf = batch[0].requires_grad_()
    dynops.ragged([leaf, batch[1]])[0].sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    assert dynops.ragged(torch.ones(2, 1, 4, 5))[1].all()


def test_errors():
    one = torch.ones(3, 4, 4)
    with pytest.raises(ValueError, match="images: expected at least one"):
        dynops.ragged([])
    with pytest.raises(TypeError, match=r"images\[1\]: expected a tensor \[C, H, W\], got list"):
        dynops.ragged([one, [1]])
    with pytest.raises(ValueError, match=r"images\[0\]: expected \[C, H, W\], got shape \(1, 3, 4, 4\)"):
        dynops.ragged([one[None]])
    with pytest.raises(ValueError, match=r"images\[1\]: expected the channels of the first image, 3, got 1"):
        dynops.ragged([one, one[:1]])
    with pytest.raises(ValueError, match=r"images\[1\]: expected the dtype"):
        dynops.ragged([one, one.double()])
    with pytest.raises(ValueError, match="size_divisor: expected an int >= 1, got 0"):
        dynops.ragged([one], 0)
