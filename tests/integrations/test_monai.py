"""The inferer in the place of MONAI's own."""

import pytest
import torch
from torch import nn

pytest.importorskip("monai")

from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from dynops.integrations.monai import TileInferer


def network():
    torch.manual_seed(0)
    return UNet(2, 3, 2, channels=(4, 8, 8), strides=(2, 2), norm="batch").eval()


def test_a_local_network_is_exact_under_a_mask():
    model, images = network(), torch.randn(2, 3, 256, 200)
    inferer = TileInferer(64, mask=lambda x: x[:, 0, ::8, ::8] > 0.5)
    for size in (256, 224):  # what was measured for one serves the other
        x = images[:, :, :size]
        mask = x[:, 0, ::8, ::8] > 0.5
        active = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(inferer(x, model), torch.where(active, expected, 0), rtol=1e-4, atol=1e-5)
    assert len(inferer._known[model]) == 2 and all(
        len(found) == 1 for found in inferer._known[model].values()
    )


def test_any_other_is_blended_as_a_sliding_window():
    class Global(nn.Module):
        def forward(self, x, factor=1.0):
            return x * x.mean((2, 3), keepdim=True).exp() * factor

    x = MetaTensor(torch.randn(1, 3, 160, 160), meta={"name": "here"})
    ours, theirs = TileInferer((64, 64), 2), SlidingWindowInferer((64, 64), 2, mode="gaussian")
    out, expected = ours(x, Global().eval(), factor=2.0), theirs(x, Global().eval(), factor=2.0)
    assert isinstance(out, MetaTensor) and out.meta["name"] == "here" and out.shape == expected.shape
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_volumes_are_refused():
    with pytest.raises(ValueError, match=r"inputs: expected \[N, C, H, W\]"):
        TileInferer(32)(torch.randn(1, 1, 8, 8, 8), nn.Identity())
