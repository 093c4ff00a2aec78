"""Sequences of layers (dynops.stack.sequences) against the same layers run one by one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from norm_cases import GlobalResponseNorm, GroupNormAct, LayerNorm2d
from torch import nn

import dynops
from dynops import backends
from dynops.plans import resize_mask
from dynops.stack.sequences import Sequence
from dynops.testing import MaskedPolicy

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="the binary runs them")


@pytest.fixture
def count(monkeypatch):
    """How many sequences ran, and how many refused."""
    found, run = {True: 0, False: 0}, Sequence.run

    def counted(self, run_):
        ran = run(self, run_)
        found[ran] += 1
        return ran

    monkeypatch.setattr(Sequence, "run", counted)
    return found


def by_layers(model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), dynops.use_mask(mask):
        patch.setattr(Sequence, "run", lambda self, run: False)
        return model(x)


def check(model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), dynops.use_mask(mask):
        made = model(x)
    torch.testing.assert_close(made, by_layers(model, x, mask), rtol=2e-5, atol=2e-5)
    return made


class Excite(nn.Module):
    def __init__(self, channels: int, gate: nn.Module):
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), gate
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return self.gate(self.up(F.relu(self.down(self.pool(x))))) * x


class Shuffle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 1)

    def forward(self, x):
        a, b = self.first(x).chunk(2, dim=1)
        x = torch.cat([a, F.silu(b)], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return x[:, 1:-1]


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x


class Resized(Residual):
    def forward(self, x):
        y = F.relu(self.inner(x))
        return x + F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Dense(Residual):
    def forward(self, x):
        return torch.cat([x, self.inner(x)], 1)


class DropPath(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


class ConvNeXt(nn.Module):
    """A block of channels-last layers, with a layer scale."""

    def __init__(self, channels: int, scale: torch.Tensor):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.grow, self.act, self.back = (
            nn.Linear(channels, 3 * channels),
            nn.GELU(),
            nn.Linear(3 * channels, channels),
        )
        self.scale, self.drop, self.is_last = nn.Parameter(scale), DropPath(), scale.dim() == 1
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.back(self.act(self.grow(y)))
        if self.is_last:
            y = self.scale * y
        y = y.permute(0, 3, 1, 2)
        y = y if self.is_last else y * self.scale
        return self.drop(y) + x


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Half(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 0.5


def norm(channels: int) -> nn.Module:
    made = nn.BatchNorm2d(channels)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


def blocks(c: int) -> dict:
    return {
        "conv": lambda: (nn.Sequential(nn.Conv2d(c, 12, 3, padding=1), norm(12), nn.SiLU()), 12),
        "strided": lambda: (nn.Sequential(nn.Conv2d(c, 8, 3, stride=2, padding=1), nn.ReLU()), 8),
        "wide": lambda: (nn.Sequential(nn.Conv2d(c, 40, 1), nn.Conv2d(40, 40, 3, padding=1, bias=False)), 40),
        "depthwise": lambda: (nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c), norm(c)), c),
        "transposed": lambda: (nn.ConvTranspose2d(c, 6, 2, stride=2), 6),
        "norm": lambda: (nn.Sequential(nn.MaxPool2d(3, 1, 1), norm(c), nn.GELU()), c),
        "excite": lambda: (Excite(c, nn.Sigmoid()), c),
        "hard excite": lambda: (Excite(c, nn.Hardsigmoid()), c),
        "max pool": lambda: (nn.MaxPool2d(3, 2, 1), c),
        "ceil pool": lambda: (nn.MaxPool2d(2, 2, ceil_mode=True), c),
        "mean pool": lambda: (nn.AvgPool2d(2), c),
        "upsample": lambda: (nn.Upsample(scale_factor=2), c),
        "bilinear": lambda: (nn.Upsample(scale_factor=2, mode="bilinear"), c),
        "bilinear by 1.7": lambda: (nn.Upsample(scale_factor=1.7, mode="bilinear"), c),
        "corners": lambda: (nn.Upsample(size=(9, 21), mode="bilinear", align_corners=True), c),
        "resized back": lambda: (Resized(nn.Sequential(nn.Conv2d(c, 5, 3, 2, 1), nn.Conv2d(5, c, 1))), c),
        "residual": lambda: (Residual(nn.Sequential(nn.Conv2d(c, c, 1), norm(c), DropPath())), c),
        "cat": lambda: (Dense(nn.Conv2d(c, 5, 1)), c + 5),
        "channels last": lambda: (ConvNeXt(c, torch.randn(c, 1, 1)), c),
        "scaled last": lambda: (ConvNeXt(c, torch.randn(c)), c),
        "layer norm": lambda: (nn.Sequential(nn.Conv2d(c, 6, 1), LayerNorm2d(6), nn.Conv2d(6, 9, 1)), 9),
        "response norm": lambda: (
            nn.Sequential(nn.Conv2d(c, 6, 1), GlobalResponseNorm(6), nn.Conv2d(6, 9, 1)),
            9,
        ),
        "group norm": lambda: (nn.Sequential(nn.Conv2d(c, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 9, 1)), 9),
        "instance norm": lambda: (
            nn.Sequential(nn.Conv2d(c, 6, 1), nn.InstanceNorm2d(6), nn.Conv2d(6, 9, 1)),
            9,
        ),
        "group norm and act": lambda: (
            nn.Sequential(nn.Conv2d(c, 6, 1), GroupNormAct(6), nn.Conv2d(6, 9, 1)),
            9,
        ),
        "standardised": lambda: (nn.Sequential(Standardised(c, 6, 3, padding=1), nn.Conv2d(6, 9, 1)), 9),
        "half": lambda: (Half(nn.Conv2d(c, 5, 1)), 5),
        "padded mean pool": lambda: (nn.AvgPool2d(3, 2, 1), c),
        "inner mean pool": lambda: (nn.AvgPool2d(3, 2, 1, count_include_pad=False), c),
        "ceil mean pool": lambda: (nn.AvgPool2d(3, 2, ceil_mode=True), c),
        "shuffle": lambda: (Shuffle(c), 6),
    }


def network(seed: int, length: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    channels, layers = 8, [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(length):
        choices = blocks(channels)
        name = list(choices)[int(torch.randint(len(choices), ()))]
        layer, channels = choices[name]()
        layers.append(layer)
    return nn.Sequential(*layers, nn.Conv2d(channels, 4, 1)).eval()


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed, count):
    model = network(seed)
    dynops.convert_(model)
    for batch, share in ((1, 0.3), (3, 0.5), (2, 1.0)):
        x = torch.randn(batch, 3, 24, 20)
        mask = torch.rand(batch, 12, 10) < share
        mask[-1] &= batch == 2  # a sample without an active pixel
        check(model, x, mask)
    assert count[True] + count[False] >= 2


@pytest.mark.parametrize("name", blocks(8))
def test_every_kind_of_layer_joins(name, count):
    torch.manual_seed(0)
    layer, channels = blocks(8)[name]()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), layer, nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    x, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16) < 0.4
    made = check(model, x, mask)
    masks = {size: resize_mask(mask, size) for size in {(made.shape[2], made.shape[3]), (8, 8)}}
    with torch.no_grad(), MaskedPolicy(mask, masks):
        expected = dense(x)
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)
    assert count == {True: 1, False: 0}


class Subsampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU())
        self.after = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU())

    def forward(self, x):
        return self.after(self.before(x)[:, :, ::2, ::2])


def test_layers_around_one_that_cannot_join_run_together(count):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), Subsampled(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*convs).eval()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    x, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 8, 8) < 0.4
    made = check(model, x, mask)
    with torch.no_grad(), MaskedPolicy(mask):
        torch.testing.assert_close(made, dense(x), rtol=2e-5, atol=2e-5)
    assert count == {True: 3, False: 0}  # the whole, and what stands before and after the slice


def test_masks_that_take_winograd_and_masks_that_do_not(count):
    torch.manual_seed(0)
    layers = (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1))
    model = nn.Sequential(nn.Conv2d(3, 32, 1), *layers, nn.ReLU(), nn.Conv2d(48, 4, 1)).eval()
    dynops.convert_(model)
    x, scattered = torch.randn(1, 3, 32, 32), torch.rand(1, 32, 32) < 0.2
    block = torch.zeros(1, 32, 32)
    block[:, 4:28, 4:24] = 1
    for mask in (block, scattered, block, torch.ones(1, 32, 32), scattered):
        check(model, x, mask)
    assert count == {True: 5, False: 0}


def test_no_active_pixel():
    model = network(3)
    dynops.convert_(model)
    made = check(model, torch.randn(2, 3, 24, 20), torch.zeros(2, 24, 20))
    assert not made.any()


def small() -> nn.Module:
    torch.manual_seed(0)
    inner = Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8), DropPath()))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), inner, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    dynops.convert_(model)
    return model


X, MASK = torch.randn(2, 3, 12, 12), torch.rand(2, 12, 12) < 0.5


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dynops.use_mask(MASK):
        model(X).square().mean().backward()
    optimizer.step()


def _statistics(model: nn.Module) -> None:
    found = model[1].inner[1]
    F.batch_norm(torch.randn(4, 8, 3, 3), found.running_mean, found.running_var, None, None, True, 0.5)


CHANGES = {
    "in place": lambda model: model[1].inner[0].weight.data.mul_(2),
    "by .data": lambda model: setattr(model[2].weight, "data", torch.randn(8, 8, 1, 1)),
    "another parameter": lambda model: setattr(model[2], "bias", nn.Parameter(torch.randn(8))),
    "no bias": lambda model: setattr(model[2], "bias", None),
    "statistics": _statistics,
    "eps": lambda model: setattr(model[1].inner[1], "eps", 0.7),
    "a step": _step,
    "numpy": lambda model: model[1].inner[0].weight.detach().numpy().__imul__(3),
    "training": lambda model: model.train(),
    "a drop in training": lambda model: model[1].inner[2].train(),
    "another layer": lambda model: model.__setitem__(3, nn.SiLU()),
    "a hook": lambda model: model[2].register_forward_hook(lambda module, args, out: out * 2),
    "a state": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_calls_is_seen(change):
    model = small()
    before = check(model, X, MASK)
    change(model)
    fresh = copy.deepcopy(model)  # keeps nothing
    with torch.no_grad(), dynops.use_mask(MASK):
        expected, made = fresh(X), model(X)
    torch.testing.assert_close(made, expected)
    assert (made - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_by_layers(dtype, count):
    model = small().to(dtype)
    with torch.no_grad(), dynops.use_mask(MASK):
        assert model(X.to(dtype)).dtype == dtype
    assert count[True] == 0


def test_gradients_autocast_and_ragged_batches_run_by_layers(count):
    model = small()
    with dynops.use_mask(MASK):
        model(X).sum().backward()
    with torch.no_grad(), dynops.use_mask(MASK), torch.autocast("cpu", torch.bfloat16):
        model(X)
    image = torch.zeros(2, 12, 12)
    image[:, :7, :9] = 1
    with torch.no_grad(), dynops.use_mask(image, ragged=True):
        model(X * image[:, None])
    assert count[True] == 0


def test_a_pool_keeps_nan(count):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
    ).eval()
    dynops.convert_(model)
    x = torch.randn(1, 3, 8, 8)
    x[0, :, 3, 3] = float("nan")
    with torch.no_grad(), dynops.use_mask(torch.ones(1, 8, 8)):
        made = model(x)
    assert count[True] == 1
    assert made.isnan().any(1).nonzero().tolist() == [[0, 1, 1]]


def test_threads_share_a_sequence():
    model = small()
    masks = [torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(8)]
    expected = [by_layers(model, X, mask) for mask in masks]
    made: list = [None] * len(masks)

    def run(i: int) -> None:
        with torch.no_grad(), dynops.use_mask(masks[i]):
            for _ in range(5):
                made[i] = model(X)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(masks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, two in zip(made, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-5)
