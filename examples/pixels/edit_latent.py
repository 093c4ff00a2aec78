"""Edit a part of a latent and decode it again: only what the edit changes is computed (SIGE, NeurIPS 2022).

    python -m examples.pixels.edit_latent            a square of 5 % of the latent
    python -m examples.pixels.edit_latent --share 0.2

The decoder has the layers of a latent diffusion model's: convolutions, group norms, SiLU, attention at the coarsest
resolution, nearest upsampling. Its weights are random. Three streams decode the same edit: the exact one, one with kept
statistics and keys, and one where a change spreads by two pixels at each resolution.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynops
from benchmarks.harness.compare import DENSE, compare
from benchmarks.harness.setting import Budget, Setting

SIZE, WIDTH, BUDGET = 32, 64, Budget(seconds=2.0)
STREAMS = {
    "exact": {},
    "kept statistics and keys": {"statistics": "kept", "attention": "kept"},
    "kept, spread 2": {"statistics": "kept", "attention": "kept", "spread": 2},
}


class Block(nn.Module):
    """x + two convolutions, each after a group norm and SiLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Each pixel attends to all pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.out = nn.GroupNorm(8, channels), nn.Linear(channels, channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, H * W, C]
        q, k, v = (layer(tokens)[:, None] for layer in (self.query, self.key, self.value))  # one head
        y = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(x.shape)


class Decoder(nn.Sequential):
    """Latents ``[N, 4, H, W]`` to images ``[N, 3, 4 * H, 4 * W]``."""

    def __init__(self, width: int = WIDTH):
        super().__init__(
            nn.Conv2d(4, 2 * width, 3, padding=1), Block(2 * width, 2 * width), Attention(2 * width),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, 2 * width, 3, padding=1), Block(2 * width, width),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), Block(width, width),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip


def edited(latent: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The latent with a square of new values in it, and the mask ``[1, H, W]`` of the square."""
    height, width = latent.shape[2:]
    side = max(1, round((share * height * width) ** 0.5))
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    top, left = (height - side) // 3, (width - side) // 2
    mask[:, top : top + side, left : left + side] = True
    return torch.where(mask[:, None], torch.randn_like(latent), latent), mask


def errors(image: Tensor, exact: Tensor) -> tuple[float, float]:
    """The relative error of an image, and its PSNR in dB; the peak is the range of the exact one."""
    off = image.double() - exact.double()
    peak = float(exact.max() - exact.min())
    return float(off.norm() / exact.norm()), float(10 * torch.log10(peak**2 / off.square().mean()))


@torch.inference_mode()
def measure(
    size: int = SIZE, width: int = WIDTH, share: float = 0.05, budget: Budget = BUDGET
) -> dict[str, dict]:
    """Decodes an edit densely, in both memory formats, and with each stream; the calls take turns.

    Returns:
        by the stream's name: relative error, psnr, theory, speedup and bytes.
    """
    torch.manual_seed(0)
    dense = Decoder(width).eval()
    model = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    latent = torch.randn(1, 4, size, size)
    edit, mask = edited(latent, share)
    exact, rows, calls = dense(edit), {}, {}
    dynops.incremental_(model)
    for name, options in STREAMS.items():
        stream = dynops.Stream(**options)
        with stream:
            model(latent)
        calls[name] = partial(decode, model, edit, stream, mask)
        error, psnr = errors(calls[name](), exact)
        rows[name] = {"error": error, "psnr": psnr, "theory": stream.report().theory, "bytes": stream.bytes}
    versions = {"NCHW": partial(dense, edit), "channels_last": partial(model, edit)}  # outside of a stream
    times = compare(versions, calls, Setting(edit.device, edit.dtype, budget=budget))
    for name, row in rows.items():
        row["speedup"] = min(times.medians(DENSE).values()) / min(times.medians(name).values())
    return rows


def decode(model: nn.Module, latent: Tensor, stream: dynops.Stream, mask: Tensor) -> Tensor:
    with stream.changed(mask):
        return model(latent)


def main() -> None:
    parser = argparse.ArgumentParser("examples.pixels.edit_latent", description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=0.05, help="of the latent that is edited")
    share = parser.parse_args().share
    if not 0 < share <= 1:
        parser.error(f"share: expected a number in (0, 1], got {share}")
    print(f"{'stream':26} {'error':>8} {'PSNR':>9} {'theory':>7} {'speed-up':>9} {'kept':>9}")
    for name, row in measure(share=share).items():
        print(
            f"{name:26} {row['error']:8.1e} {row['psnr']:6.1f} dB {row['theory']:6.1f}x {row['speedup']:8.1f}x {row['bytes'] / 1e6:6.1f} MB"
        )


if __name__ == "__main__":
    main()
