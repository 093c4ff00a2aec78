"""``use_mask``: masks that reach layers by the layers' geometry, ragged batches, and what it warns of."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from dynops.geometry import conv_geometry, conv_transpose_geometry


def after(size, mask=(), **layer):
    """The active outputs of one row of pixels, of which those of ``mask`` are active."""
    row = torch.zeros(1, 1, size)
    row[..., list(mask)] = 1
    kernel, stride, padding, dilation = (layer.get(k, d) for k, d in zip("kspd", (1, 1, 0, 1), strict=True))
    make = conv_transpose_geometry if layer.get("up") else conv_geometry
    last = (0, 0) if layer.get("up") else None
    arguments = [(1, kernel), (1, stride), (0, padding), (1, dilation), 1, *([last] if last else [])]
    geometry = make((1, 1, size), *arguments)
    plan = dynops.use_mask(row, ragged=layer.get("ragged", False)).after(geometry, row.device)
    return plan.mask()[0, 0].nonzero().flatten().tolist()


def test_cells():
    assert after(12, [5], k=3) == [4]  # unpadded: the centre of output 4
    assert after(12, [5], k=5) == [3]
    assert after(12, [5], k=3, p=1) == [5]
    assert after(12, [5], k=3, p=2, d=2) == [5]
    assert after(12, [5], k=3, s=2, p=1) == after(13, [5], k=3, s=2, p=1) == [2]
    assert after(12, [5], k=2, s=2) == after(13, [5], k=2, s=2) == [2]
    assert after(13, [12], k=2, s=2) == []  # no window reads the last pixel
    assert after(13, [12], k=3, s=2, p=1) == [6]
    assert after(13, [2, 7], k=4, s=4) == [0, 1]
    assert after(6, [2], k=2, s=2, up=True) == [4, 5]
    assert after(6, [2], k=4, s=2, p=1, up=True) == [4, 5]
    assert after(6, [2], k=3, s=2, p=1, up=True) == [4, 5]
    for size in range(5, 12):  # a full mask stays full
        for kernel, stride, padding in ((1, 1, 1), (3, 1, 2), (3, 3, 1), (2, 3, 0), (5, 2, 0)):
            out = (size + 2 * padding - kernel) // stride + 1
            assert after(size, range(size), k=kernel, s=stride, p=padding) == list(range(out))


def test_unpadded_layers_move_the_mask():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(8)]).eval()
    mask = torch.zeros(1, 64, 64)
    mask[:, 10:14, 20:22] = 1
    dynops.convert_(model)
    with torch.no_grad(), dynops.use_mask(mask):
        live = model(torch.randn(1, 1, 64, 64))[0, 0] != 0
    assert live.nonzero()[:, 0].unique().tolist() == [2, 3, 4, 5]
    assert live.nonzero()[:, 1].unique().tolist() == [12, 13]


def test_blocks_of_unpadded_layers():
    chain = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(4)], nn.MaxPool2d(2)).eval()
    mask = torch.zeros(1, 32, 32)
    mask[:, 10:14, 20:22] = 1
    with torch.no_grad(), dynops.use_mask(mask):
        live = dynops.nn.SparseBlocks(chain, 1)(torch.randn(1, 1, 32, 32))[0, 0] != 0
    assert live.nonzero().tolist() == [[3, 8], [4, 8]]


def conv(kernel, stride=1, padding=0, **options):
    return nn.Conv2d(4, 4, kernel, stride, padding, **options)


def up(*arguments):
    return nn.ConvTranspose2d(4, 4, *arguments)


STACKS = {
    "stem": lambda: [conv(7, 2, 3), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1), conv(3, 1, 1), conv(1, 2)],
    "halves": lambda: [conv(3, 1, 1), nn.MaxPool2d(2), conv(3, 1, 1), nn.AvgPool2d(2), conv(3, 1, 1)],
    "unpadded": lambda: [conv(3), conv(5), nn.MaxPool2d(2), conv(3, 2), conv(2)],
    "ceil": lambda: [conv(3, 2), nn.MaxPool2d(3, 2, ceil_mode=True), conv(3, 1, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), conv(3, 1, 1)],
    "reflect": lambda: [conv(3, 1, 1), conv(5, 1, 2, padding_mode="reflect"), nn.ReLU(), conv(3, 2, 1, padding_mode="replicate")],
    "bilinear": lambda: [conv(3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear"), conv(3, 1, 1)],
    "pooled": lambda: [conv(3, 2, 1), nn.AdaptiveAvgPool2d(1)],
    "patches": lambda: [conv(4, 4), conv(3, 1, 1), conv(2, 2), conv(5, 3, 1), conv(3, 1, 2, dilation=2)],
    "up": lambda: [conv(3, 2, 1), up(2, 2), conv(3, 1, 1), up(4, 2, 1), up(3, 2, 1, 1), conv(3, 1, 1), up(3, 3), conv(3)],
}  # fmt: skip


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
def test_ragged_batches_give_what_each_image_gives_alone(layers, traced):
    torch.manual_seed(0)
    model = nn.Sequential(*layers()).eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    if not traced:
        model[0].register_forward_hook(lambda *_: None)
    for sizes in (((70, 85), (96, 71), (67, 67)), ((83, 64), (65, 66))):
        height, width = (max(size[i] for size in sizes) + i for i in (0, 1))
        x, mask = torch.zeros(len(sizes), 4, height, width), torch.zeros(len(sizes), height, width)
        for i, (h, w) in enumerate(sizes):
            x[i, :, :h, :w], mask[i, :h, :w] = torch.randn(4, h, w), 1
        with torch.no_grad(), dynops.use_mask(mask, ragged=True):
            out = model(x)
        for i, (h, w) in enumerate(sizes):
            alone = dense(x[i : i + 1, :, :h, :w])[0]
            padded = F.pad(alone, (0, out.shape[3] - alone.shape[2], 0, out.shape[2] - alone.shape[1]))
            torch.testing.assert_close(out[i], padded)


def test_a_mask_at_the_inputs_resolution_is_enough_for_a_resnets_stem():
    model = nn.Sequential(*STACKS["stem"]()[:1], nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(3, 1, 1)).eval()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    x, mask = torch.zeros(1, 4, 45, 50), torch.zeros(1, 45, 50)
    x[:, :, :37, :41], mask[:, :37, :41] = torch.randn(4, 37, 41), 1
    with torch.no_grad(), dynops.use_mask(mask):
        torch.testing.assert_close(model(x)[:, :, :10, :11], dense(x[:, :, :37, :41]))


def test_a_context_that_changes_nothing_warns():
    layer = nn.Conv2d(4, 4, 1)
    with pytest.warns(UserWarning, match="the mask changed nothing"), dynops.use_mask(torch.ones(1, 8, 8)):
        layer(torch.randn(1, 4, 8, 8))
    dynops.convert_(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dynops.active(torch.ones(1, 8, 8)) as context:
            layer(torch.randn(1, 4, 8, 8))
    assert isinstance(context, dynops.use_mask) and dynops.active is dynops.use_mask


class StdConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


def test_what_stays_dense_is_reported_and_warned_of_once():
    layers = nn.Conv2d(3, 8, 1), nn.LazyConv2d(8, 1), nn.Conv2d(8, 6, 1), nn.LayerNorm(8), nn.Conv1d(1, 1, 1)
    model = nn.Sequential(*layers[:4]).eval()
    report = dynops.convert_(nn.ModuleList([model, layers[4]]))
    assert set(report.skipped) == {"0.1", "1"} and report.sparse_share == pytest.approx(72 / 73)
    assert str(report).startswith("sparse: 99% of the convolutions' weights")
    x, mask = torch.randn(1, 3, 8, 8), torch.ones(1, 8, 8)
    with dynops.use_mask(mask):
        with pytest.warns(UserWarning, match=r"run dense inside use_mask.*: 0.1 \(LazyConv2d is not exactly"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)


def test_subclasses_are_masked():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), StdConv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    )
    dense = copy.deepcopy(model)
    report = dynops.convert_(model)
    assert report.replaced["1"] == "MaskedStdConv2d" and not report.skipped and report.sparse_share == 1
    x, mask = torch.randn(2, 3, 9, 8), torch.rand(2, 1, 9, 8) < 0.4
    with torch.no_grad(), warnings.catch_warnings(), dynops.use_mask(mask):
        warnings.simplefilter("error")
        torch.testing.assert_close(model(x), dense[2](dense[1](dense[0](x) * mask) * mask) * mask)
    dynops.revert_(model)
    assert type(model[1]) is StdConv2d


def test_frozen_norms_are_masked():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )
    dense = copy.deepcopy(model)
    report = dynops.convert_(model)
    assert report.replaced["1"] == "MaskedFrozenBatchNorm2d" and not report.skipped
    x, mask = torch.randn(2, 3, 9, 8), torch.rand(2, 1, 9, 8) < 0.4
    with torch.no_grad(), dynops.use_mask(mask):
        for twin in (model, copy.deepcopy(model)):
            torch.testing.assert_close(twin(x), dense[3](F.relu(dense[1](dense[0](x)) * mask)) * mask)
    dynops.revert_(model)
    assert type(model[1]) is FrozenBatchNorm2d and torch.equal(model(x), dense(x))
