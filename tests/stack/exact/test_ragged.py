"""Images of different sizes in one batch give what each gives alone."""

import copy

import pytest
import torch
from masked_models import close, small_resnet

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
