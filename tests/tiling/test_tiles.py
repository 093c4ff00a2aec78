"""dynops.tiles against the model on the whole image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops

C = 4


def random_layer(draw):
    """A random layer of C channels that is local in a map of any size."""
    kernel, stride = int(draw(1, 6)), int(draw(1, 4))
    dilation = int(draw(1, 3))
    padding = int(draw(0, dilation * (kernel - 1) // 2 + 1))
    kind = int(draw(0, 9))
    if kind < 4:
        mode = ("zeros", "zeros", "reflect", "replicate", "circular")[
            int(draw(0, 4))
        ]  # circular is not local
        return nn.Conv2d(C, C, kernel, stride, padding, dilation, padding_mode=mode)
    if kind == 4:
        return nn.Sequential(nn.BatchNorm2d(C), nn.GELU())
    if kind == 5:
        return nn.MaxPool2d(3, 2, 1, ceil_mode=bool(draw(0, 2)))
    if kind == 6:
        return nn.AvgPool2d(2, 2, count_include_pad=False, ceil_mode=bool(draw(0, 2)))
    if kind == 7:
        return nn.ConvTranspose2d(C, C, 3, 2, 1, output_padding=int(draw(0, 2)))
    return (
        nn.Upsample(scale_factor=2, mode="nearest")
        if draw(0, 2)
        else nn.Upsample(scale_factor=2, mode="bilinear")
    )


def random_net(seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (), generator=generator)

    layers = [random_layer(draw) for _ in range(int(draw(1, 5)))]
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), *layers).eval().double(), draw


@pytest.mark.parametrize("seed", (0, 1, 3, 9, 13, 16, 125, 129, 137, 143))
def test_random_local_models_are_exact(seed):
    model, draw = random_net(seed)
    x = torch.randn(3, int(draw(130, 260)), int(draw(90, 260)), dtype=torch.float64)
    mask = torch.rand(5, 7) < 0.4
    with torch.no_grad():
        expected = model(x[None])[0]
    out = dynops.tiles(model, x, tile=int(draw(20, 80)), exact=True)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    masked = dynops.tiles(model, x, mask, tile=(int(draw(20, 80)), 64), batch_size=3)
    active = pixels_under(mask, expected.shape[1:])
    torch.testing.assert_close(masked, torch.where(active, expected, 0), rtol=1e-9, atol=1e-9)


def pixels_under(mask, size):
    """bool ``[*size]``: the pixels that an active pixel of the mask overlaps, written as loops."""
    out = torch.zeros(size, dtype=torch.bool)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * mask.shape[0] // size[0], math.ceil((i + 1) * mask.shape[0] / size[0]))
            columns = slice(j * mask.shape[1] // size[1], math.ceil((j + 1) * mask.shape[1] / size[1]))
            out[i, j] = bool((mask[rows, columns] != 0).any())
    return out


class Unet(nn.Module):
    """Several outputs of different scales, a residual of upsampled maps, and nothing that a trace knows."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, C, 3, stride=2, padding=1)
        self.inner, self.norm = nn.Conv2d(C, C, 3, padding=2, dilation=2), nn.BatchNorm2d(C)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.norm(self.inner(F.relu(self.down(self.down(x)))))
        up = F.interpolate(y, size=x.shape[2:], mode="bilinear")
        return {"out": x + up, "features": [y]}


def unet():
    torch.manual_seed(0)
    return Unet().eval()


def test_several_outputs_and_scales():
    model, x = unet(), torch.randn(2, 3, 256, 192)
    with torch.no_grad():
        expected = model(x)
    out = dynops.tiles(model, x, tile=64)
    torch.testing.assert_close(out["out"], expected["out"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["features"][0], expected["features"][0], rtol=1e-4, atol=1e-5)
    given = {"out": torch.full_like(expected["out"], 7), "features": [np.full((2, C, 64, 48), 7, np.float32)]}
    mask = torch.zeros(2, 1, 256, 192)
    mask[1, :, 100:130, 50:60] = 1
    assert dynops.tiles(model, x, mask, tile=64, out=given) is given
    active = mask[:, 0].bool()[:, None].expand_as(expected["out"])
    torch.testing.assert_close(given["out"], torch.where(active, expected["out"], 7), rtol=1e-4, atol=1e-5)
    small = F.max_pool2d(mask, 4).bool().expand(-1, C, -1, -1).numpy()
    wanted = np.where(small, expected["features"][0].numpy(), 7)
    np.testing.assert_allclose(given["features"][0], wanted, rtol=1e-4, atol=1e-5)


def test_sizes_at_which_resizing_has_another_ratio_are_blended():
    model = unet()
    x = torch.randn(3, 257, 190)
    with pytest.raises(ValueError, match=r"exact: expected .* got Unet: it makes something else of a part"):
        dynops.tiles(model, x, tile=64, exact=True)
    assert dynops.tiles(model, x, tile=64)["out"].shape == (C, 257, 190)


class Global(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Fixed(nn.Module):
    """Takes one size alone, and adds a position to its features, at 1/8."""

    def __init__(self):
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, C, 8, 8), nn.Parameter(torch.randn(1, C, 8, 8))

    def forward(self, x):
        assert x.shape[2:] == (64, 64)
        return self.patch(x) + self.position


@pytest.mark.parametrize(
    "model, reason", [(Global(), "pixels that are more than"), (Fixed(), "does not run on a strip")]
)
def test_models_that_are_not_local(model, reason):
    x = torch.randn(3, 300, 200)
    with pytest.raises(ValueError, match=f"exact: .*{type(model).__name__}.*{reason}"):
        dynops.tiles(model.eval(), x, exact=True, tile=64)
    out = dynops.tiles(model.eval(), x, tile=64)
    assert out.shape == ((3, 300, 200) if isinstance(model, Global) else (C, 38, 25)) and out.isfinite().all()


@pytest.mark.parametrize(
    "size, tile, overlap",
    [((100, 75), 32, 0.25), ((64, 40), (32, 20), 7), ((20, 90), 64, 0.9), ((50, 50), 24, 0)],
)
def test_weights_of_blended_windows_sum_to_one(size, tile, overlap):
    x = torch.randn(2, *size)
    torch.testing.assert_close(dynops.tiles(lambda y: y, x, tile=tile, overlap=overlap, exact=False), x)


def test_blended_windows_are_the_same_under_a_mask():
    torch.manual_seed(0)
    model, x, mask = Global().eval(), torch.randn(3, 150, 130), torch.rand(10, 9) < 0.2
    whole = dynops.tiles(model, x, tile=48)
    active = pixels_under(mask, (150, 130))
    torch.testing.assert_close(dynops.tiles(model, x, mask, tile=48), torch.where(active, whole, 0))
    weights = torch.linspace(0.5, 2, 48)[:, None].expand(48, 48)
    shaded = dynops.tiles(lambda y: y * 0 + weights, x, tile=48, exact=False, overlap=24)
    steps = shaded[0, :, 20].diff().abs().max()  # a seam would be a step of 1.5
    assert steps < 0.2


class Sliced:
    """An array that only gives slices, and remembers how large they were."""

    def __init__(self, array):
        self.array, self.shape, self.largest, self.read = array, array.shape, 0, 0

    def __getitem__(self, where):
        part = self.array[where]
        self.largest, self.read = max(self.largest, part.size), self.read + part.size
        return part

    def __setitem__(self, where, value):
        assert isinstance(value, np.ndarray)
        self.array[where] = value


@pytest.mark.parametrize("exact", [True, False])
def test_arrays_are_only_sliced(exact, tmp_path):
    torch.manual_seed(0)
    stored = np.memmap(tmp_path / "image", dtype=">u2", mode="w+", shape=(400, 300, 3))
    stored[:] = np.random.default_rng(0).integers(1, 60000, stored.shape)
    stored[:, 130:] = 0
    image, out = (
        Sliced(stored),
        Sliced(np.memmap(tmp_path / "out", dtype=np.float32, mode="w+", shape=(2, 400, 300))),
    )
    model, mask = nn.Conv2d(3, 2, 5, padding=2).eval(), np.zeros((8, 6), np.uint8)
    mask[3, :3] = 1
    dynops.tiles(
        model, image, mask, tile=64, exact=exact, overlap=16, channels_last=True, nodata=0, out=out,
        prepare=lambda part: part.float() / 60000 - 0.5,
    )  # fmt: skip
    assert image.largest <= 96 * 96 * 3 and image.read < stored.size / 2
    x = torch.from_numpy(stored.astype(np.float32)).permute(2, 0, 1) / 60000 - 0.5
    x[:, :, 130:] = 0
    with torch.no_grad():
        expected = model(x[None])[0]
    active = torch.zeros(400, 300, dtype=torch.bool)
    active[150:200, :130] = True
    written = torch.from_numpy(out.array)
    assert written[:, ~active].count_nonzero() == 0
    if exact:
        torch.testing.assert_close(written[:, active], expected[:, active], rtol=1e-4, atol=1e-5)
    else:
        assert written[:, active].ne(0).all()


def test_dtypes_batches_and_bars(capsys):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 3, padding=1).eval().bfloat16()
    x = torch.randint(0, 255, (2, 3, 100, 90), dtype=torch.uint8)
    pytest.importorskip("tqdm")
    out = dynops.tiles(model, x, tile=64, progress=True)
    assert out.dtype == torch.bfloat16 and "8/8" in capsys.readouterr().err
    with torch.no_grad():
        torch.testing.assert_close(out, model(x.bfloat16()), rtol=0.02, atol=1)
    state = torch.get_rng_state()
    empty = dynops.tiles(model, x, torch.zeros(4, 4), tile=64)
    assert empty.shape == out.shape and empty.count_nonzero() == 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": nn.Conv2d(3, 2, 1)}, r"model: .*eval"),
        ({"model": nn.Flatten().eval()}, r"model: expected floating maps.*\(1, .*Flatten"),
        ({"model": lambda x: x.argmax(1, True)}, r"model: expected floating maps.*int64"),
        ({"image": torch.ones(3, 4)}, r"image: expected \[C, H, W\].*\(3, 4\)"),
        ({"mask": torch.ones(2, 4, 4)}, r"mask: .*with N = 1, got"),
        ({"mask": torch.ones(4)}, r"mask: expected \[H, W\]"),
        ({"tile": 0}, r"tile: expected"),
        ({"tile": 10, "overlap": 10}, r"overlap: expected"),
        ({"overlap": 1.5}, r"overlap: expected"),
        ({"batch_size": 0}, r"batch_size: expected"),
        ({"out": torch.ones(3, 5, 5)}, r"out: expected shape \(3, 80, 80\), got \(3, 5, 5\)"),
        ({"prepare": lambda part: part[:, 1:]}, r"prepare: expected"),
        ({"model": lambda x: F.avg_pool2d(x, 7), "exact": False}, r"tile: expected a size"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(change, message):
    given = {"model": nn.ReLU().eval(), "image": torch.randn(3, 80, 80), "tile": 60} | change
    with pytest.raises(ValueError, match=message):
        dynops.tiles(given.pop("model"), given.pop("image"), **given)


def test_a_context_is_refused():
    with dynops.use_mask(torch.ones(1, 4, 4)) as active, pytest.raises(ValueError, match="mask="):
        active._used = True  # no warning
        dynops.tiles(nn.ReLU().eval(), torch.randn(3, 80, 80))


@pytest.mark.parametrize(
    "change, message", [({"image": [[1]]}, "image: "), ({"model": 3}, "model: "), ({"exact": 2}, "exact: ")]
)
def test_types_that_do_not_fit(change, message):
    given = {"model": nn.ReLU().eval(), "image": torch.randn(3, 80, 80)} | change
    with pytest.raises(TypeError, match=message):
        dynops.tiles(given.pop("model"), given.pop("image"), **given)
