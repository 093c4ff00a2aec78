"""Max-pools from rows to rows: the bits of the dense pool, under a mask and of images of different sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from dynops import backends
from dynops.stack.layers import pool as pools
from dynops.testing import MaskedPolicy

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built")
C = 20  # no multiple of a vector
POOLS = {
    "resnet": {"kernel_size": 3, "stride": 2, "padding": 1},
    "halves": {"kernel_size": 2},
    "ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "dilated": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    "same": {"kernel_size": 5, "stride": 1, "padding": 2},
}


class Functional(nn.Module):
    """A pool that is a function, in a forward that no trace holds."""

    def __init__(self, conv, options):
        super().__init__()
        self.conv, self.options = conv, options

    def forward(self, x):
        y = self.conv(x)
        return F.max_pool2d(y if float(y.sum()) < 1e9 else -y, **self.options)


@pytest.fixture
def calls(monkeypatch):
    found, real = [], pools.max_rows
    monkeypatch.setattr(pools, "max_rows", lambda *given: found.append(given) or real(*given))
    return found


def model(how, options, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, C, 3, padding=1).to(dtype)
    nn.init.constant_(conv.bias, -2.0)  # many maxima are below zero
    if how == "function":
        return Functional(conv, options)
    return nn.Sequential(conv, nn.MaxPool2d(**options), nn.Identity())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["fused", "function"])
@pytest.mark.parametrize("name", POOLS)
def test_of_images_of_different_sizes(name, how, dtype, calls, poisoned):
    net, images = (
        model(how, POOLS[name], dtype),
        [torch.randn(3, *size, dtype=dtype) for size in ((9, 14), (12, 7), (5, 5))],
    )
    x, mask = dynops.ragged(images)
    dynops.convert_(net)
    with torch.no_grad():
        with dynops.use_mask(mask, ragged=True):
            out = net(x)
        assert len(calls) == 1
        for n, image in enumerate(images):
            inside, whole = dynops.ragged([image])
            with dynops.use_mask(whole, ragged=True):
                rows = net.conv(inside) if how == "function" else net[0](inside)
            alone = F.max_pool2d(rows, **POOLS[name])
            h, w = alone.shape[2:]
            assert torch.equal(out[n, :, :h, :w], alone[0])
            assert not out[n, :, h:].any() and not out[n, :, :, w:].any()


@pytest.mark.parametrize("how", ["fused", "function"])
@pytest.mark.parametrize("name", ["resnet", "halves"])
def test_under_a_mask(name, how, poisoned):
    net, x = model(how, POOLS[name], torch.float32), torch.randn(2, 3, 8, 12)
    mask = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    with MaskedPolicy(mask):
        expected = net(x)
    dynops.convert_(net)
    with torch.no_grad(), dynops.use_mask(mask):
        out = net(x)
    torch.testing.assert_close(out, expected)
    with dynops.use_mask(mask):  # what has gradients is the dense pool
        torch.testing.assert_close(net(x), expected)


def test_of_bfloat16_under_a_mask(calls, poisoned):
    net, x = model("fused", POOLS["resnet"], torch.bfloat16), torch.randn(2, 3, 8, 12, dtype=torch.bfloat16)
    mask = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    dynops.convert_(net)
    with torch.no_grad(), dynops.use_mask(mask):
        out, rows = net(x), net[0](x)
    assert len(calls) == 1
    assert torch.equal(out, torch.where(mask[:, None], F.max_pool2d(rows, 3, 2, 1), 0))


def test_not_a_number_and_empty_windows():
    """As torch: a NaN wins, and minus infinity is a value."""
    x = torch.tensor([[1.0, float("nan"), float("-inf")], [2.0, 0.0, float("-inf")]])
    index, source = torch.tensor([0], dtype=torch.int32), torch.tensor([[[0, 1]]], dtype=torch.int32)
    g = [1, 1, 2, 1, 1, 1, 2, 1, 2, 0, 0, 1, 1, 1, 0]
    out = pools.max_rows(x, index, source, g, True)[0]
    assert out[0] == 2 and out[1].isnan() and out[2] == float("-inf")
    source[0, 0, 1] = -1
    assert pools.max_rows(x - 3, index, source, g, True)[0, 0] == 0
    assert pools.max_rows(x - 3, index, source, g, False)[0, 0] == -2
    with pytest.raises(RuntimeError, match="x, source, out: expected rows"):
        pools.max_rows(x, index, source[..., :1].contiguous(), g, True)
