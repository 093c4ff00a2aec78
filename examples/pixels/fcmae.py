"""FCMAE: masked pretraining of a convolutional network, which computes visible patches only (Woo et al., CVPR 2023).

    python -m examples.pixels.fcmae              pretrain on digits, print the loss of patches that were masked
    python -m examples.pixels.fcmae --seconds 5

60 % of the patches are masked. A ConvNeXt V2 encoder runs on the others under ``dynops.use_mask``: its convolutions, norms and
linear layers compute those pixels, forward and backward. A small decoder, which is dense, fills in the rest.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynops

from ..common import Digits, Length, fit

SIZE, PATCH, MASKED = 64, 16, 0.6
STRIDE, STEPS = 8, 200
WIDTHS, DEPTHS = (32, 64), (2, 2)


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation of ``[N, H, W, C]``: its norms are over the visible pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(1, 2), keepdim=True)
        return x + torch.addcmul(self.bias, self.weight, x * (size / (size.mean(-1, keepdim=True) + 1e-6)))


class Block(nn.Module):
    """ConvNeXt V2's: 7x7 depthwise, LayerNorm, a linear layer up, GELU, GRN, a linear layer down, and the shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.grn = nn.LayerNorm(channels), GRN(4 * channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(self.grn(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class FCMAE(nn.Module):
    def __init__(self):
        super().__init__()
        narrow, wide = WIDTHS
        self.encoder = nn.Sequential(
            nn.Conv2d(1, narrow, 4, stride=4), Norm(narrow), *[Block(narrow) for _ in range(DEPTHS[0])],
            Norm(narrow), nn.Conv2d(narrow, wide, 2, stride=2), *[Block(wide) for _ in range(DEPTHS[1])], Norm(wide),
        )  # fmt: skip
        self.token = nn.Parameter(torch.zeros(wide, 1, 1))
        self.decoder = nn.Sequential(Block(wide), nn.Conv2d(wide, STRIDE**2, 1), nn.PixelShuffle(STRIDE))
        dynops.convert_(self.encoder)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """``[N, C, SIZE / STRIDE, SIZE / STRIDE]`` of ``images`` whose patches ``visible`` ``[N, h, w]`` are seen, zero elsewhere."""
        with dynops.use_mask(visible):
            return self.encoder(images * at_size(visible, images))

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:  # [N, 1, SIZE, SIZE] -> []
        """The mean squared error of the patches that were masked."""
        features = self.encode(images, visible)
        filled = torch.where(at_size(visible, features), features, self.token)
        masked = ~at_size(visible, images)
        return ((self.decoder(filled) - images).square() * masked).sum() / masked.sum()


def at_size(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of patches ``[N, h, w]`` as one of pixels, ``[N, 1, H, W]`` for ``x`` ``[N, C, H, W]``."""
    return F.interpolate(mask[:, None].float(), x.shape[2:]) > 0


def random_patches(n: int) -> Tensor:
    """Bool ``[N, h, w]``: as many visible patches in each image."""
    side = SIZE // PATCH
    order = torch.rand(n, side * side).argsort(1).argsort(1)
    return (order >= round(MASKED * side * side)).view(n, side, side)


def train(model: nn.Module, data: Digits, length: Length) -> list[float]:
    """Trains; returns the loss of each step."""
    losses = []

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        found = model(x, random_patches(len(x)))
        losses.append(found.item())
        if len(losses) % 50 == 1:
            print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
        return found

    fit(model, data.train, loss, length)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.pixels.fcmae", description=__doc__)
    parser.add_argument("--seconds", type=float, help="train for so long instead of a fixed number of steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = FCMAE().to(memory_format=torch.channels_last)
    data = Digits.load(SIZE)
    train(model, data, Length(STEPS, options.seconds))
    images = data.test[0]
    with torch.inference_mode():
        print(
            f"test loss {float(model(images, random_patches(len(images)))):.4f}, variance {images.var():.4f}"
        )


if __name__ == "__main__":
    main()
