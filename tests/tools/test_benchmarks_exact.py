"""The benchmarks of masks that cost no accuracy: what is compared is the same computation."""

import pytest
import torch
from benchmark_cases import SETTING

from benchmarks.exact import pillars, pretraining, ragged
from benchmarks.resnet import resnet18


def test_pretraining_is_compared_with_its_masked_form(monkeypatch):
    monkeypatch.setattr(pretraining, "resnet50", resnet18)
    monkeypatch.setattr(pretraining, "SIZE", 64)
    monkeypatch.setattr(pretraining, "BATCH", 2)
    mask = pretraining.visible_patches(2)
    assert mask.flatten(1).sum(1).eq(2).all()  # of 4: 60 % of them are 2.4
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = x * pretraining.at_size(mask, x)
    model = pretraining.build("ResNet-50").double().train()
    (call, own), dense = pretraining.ours_of(model, mask, x), pretraining.masked_dense(model, mask)
    out = dense(x)
    torch.testing.assert_close(call(), out)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), p) for y, p in ((call(), own), (out, [*dense.parameters()]))
    )
    grads = zip(ours, theirs, strict=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in grads) < 1e-6
    (row,) = pretraining.measure("ResNet-50", SETTING)
    assert row.theory == 2 and row.mode == "forward+backward" and row.ours_ms > 0


def test_pillars(monkeypatch):
    where = pillars.pillars(64, 0.05)
    assert where.shape == (205, 3) and len(where.unique(dim=0)) == 205 and where.max() < 64
    assert not torch.equal(where, where.unique(dim=0))  # they come in no order
    (row,) = pillars.measure(32, SETTING)
    assert 1 < row.theory < 20 and row.mode == "forward" and row.ours_ms > 0


def test_images_of_different_sizes(monkeypatch):
    sizes = torch.tensor([image.shape[1:] for image in ragged.images()])
    assert tuple(sizes.amax(0).tolist()) == ragged.LARGEST
    assert (sizes.double().mean(0) - torch.tensor(ragged.MEAN)).abs().max() < 1
    small = ragged.images(3, (40, 50), (64, 70))
    monkeypatch.setattr(ragged, "resnet50", resnet18)
    monkeypatch.setattr(ragged, "images", lambda count: small)
    monkeypatch.setattr(ragged, "IMAGES", 3)
    ours, loop = ragged.measure(ragged.RESNET, SETTING)
    share = sum(image[0].numel() for image in small) / (3 * 64 * 70)
    assert ours.theory == loop.theory == pytest.approx(1 / share) and (ours.variant, loop.variant) == (
        "plain",
        "loop",
    )
    assert ours.failed["nested"].startswith("RuntimeError")
