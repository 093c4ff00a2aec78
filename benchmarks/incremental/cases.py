"""The models, each with its first image and the edits that follow; weights are random."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..harness.contenders import calibrated
from ..resnet import resnet50

SQUARE, MOVING, NOTHING, EVERYTHING = "square", "moving square", "nothing", "everything"
EXACT = {"spread": "exact", "statistics": "exact", "attention": "exact"}
KEPT = {"spread": "exact", "statistics": "kept", "attention": "kept"}
NEAR = {"spread": 2, "statistics": "kept", "attention": "kept"}


class Variant(NamedTuple):
    """One row: what changes between two calls, the options of the stream, and whether it is told what changed."""

    edit: str
    share: float
    options: dict
    told: bool = False

    @property
    def label(self) -> str:
        """For ``--only``."""
        kept = "kept" if self.options["statistics"] == "kept" else "exact"
        told = " told" if self.told else ""
        return f"{self.edit} {self.share:.1%}{told}, spread {self.options['spread']}, {kept}"


class Case(NamedTuple):
    """A model.

    Attributes:
        name: for ``--only``.
        first: makes the first image ``[1, C, H, W]``.
        call: called with the model and an image, it returns the output.
        library: that has the model; "" where none is needed.
    """

    name: str
    title: str
    make: Callable[[], nn.Module]
    first: Callable[[], Tensor]
    variants: list[Variant]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    library: str = ""

    @property
    def is_installed(self) -> bool:
        return not self.library or importlib.util.find_spec(self.library) is not None


def all_cases(quick: bool = False) -> list[Case]:
    """Every case. ``quick``: without those that take longer than a dense call."""
    cases = [_decoder(), _text_unet(), _ddpm(), _resnet(), _fcn(), *map(_layer, (64, 128, 256, 512))]
    if not quick:
        return cases
    return [case._replace(variants=[v for v in case.variants if _is_quick(case, v)]) for case in cases]


def _is_quick(case: Case, variant: Variant) -> bool:
    whole = variant.edit == EVERYTHING or (case.name == "vae" and variant.options == EXACT)
    return not whole and (not case.name.startswith("layer") or variant.share == 0.05)


def _edits(edit: str, share: float, *options: dict) -> list[Variant]:
    """The edit with each set of options, and what nothing and everything cost with the last but the exact ones."""
    last = KEPT if KEPT in options else options[-1]
    found = [Variant(edit, share, own) for own in options]
    at = 1 + max(i for i, own in enumerate(options) if own == last)
    found[at:at] = [Variant(NOTHING, 0.0, last), Variant(EVERYTHING, 1.0, last)]
    return found


def _image(size: int, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, channels, size, size)


def _decoder() -> Case:
    """Stable Diffusion's decoder."""

    def make() -> nn.Module:
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        options = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
        return importlib.import_module("diffusers").AutoencoderKL(**blocks, **options)

    def decode(model: nn.Module, z: Tensor) -> Tensor:
        return model.decode(z, return_dict=False)[0]

    title = "AutoencoderKL, decode to 512x512"
    return Case(
        "vae", title, make, _image(64, 4), _edits(SQUARE, 0.05, NEAR, KEPT, EXACT), decode, "diffusers"
    )


def _text_unet() -> Case:
    """Stable Diffusion 1.5's UNet, 860 M parameters."""

    def make() -> nn.Module:
        options = {
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        }
        return importlib.import_module("diffusers").UNet2DConditionModel(64, **options)

    text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0))

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, 10, text, return_dict=False)[0]

    title = "UNet2DConditionModel (SD 1.5), one step at 64x64"
    return Case("sd-unet", title, make, _image(64, 4), _edits(SQUARE, 0.15, NEAR, KEPT), step, "diffusers")


def _ddpm() -> Case:
    """google/ddpm-church-256: SIGE's own case."""

    def make() -> nn.Module:
        down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
        down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
        options = {
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "attention_head_dim": None,
            "downsample_padding": 0,
        }
        blocks = {"down_block_types": tuple(down), "up_block_types": tuple(up)}
        rest = {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
        return importlib.import_module("diffusers").UNet2DModel(256, **options, **blocks, **rest)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, 10, return_dict=False)[0]

    title = "UNet2DModel (DDPM church), one step at 256x256"
    return Case("ddpm", title, make, _image(256), _edits(SQUARE, 0.012, NEAR, KEPT), step, "diffusers")


def _resnet() -> Case:
    first, edits = _image(512), _edits(MOVING, 0.05, EXACT)
    return Case("resnet50", "ResNet-50, 512x512", lambda: calibrated(resnet50(), first()), first, edits)


def fcn(images: Tensor) -> nn.Module:
    """torchvision's FCN of ResNet-50, its norms calibrated on ``images``.

    A residual branch adds a quarter of what it would: random blocks otherwise amplify a small change one after the other.
    """
    segmentation = importlib.import_module("torchvision.models.segmentation")
    model = segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    for name, module in model.named_modules():
        if name.endswith(".bn3"):
            nn.init.constant_(module.weight, 0.25)
    return calibrated(model, images)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Of FCN, ``[N, 21, H, W]``."""
    return model(x)["out"]


def _fcn() -> Case:
    first, edits = _image(512), _edits(MOVING, 0.05, EXACT)
    title = "FCN (ResNet-50), 512x512"
    return Case("fcn", title, lambda: fcn(torch.cat([first(), first()])), first, edits, logits, "torchvision")


def _layer(channels: int) -> Case:
    """A width of SIGE's kernels, at the same products. As there, the time has no comparison, but for one row."""
    size = 16384 // channels
    variants = [Variant(SQUARE, share, EXACT, told=True) for share in (0.01, 0.02, 0.05, 0.1, 0.2)]
    variants.append(Variant(SQUARE, 0.05, EXACT))
    title = f"Conv2d 3x3, {channels} channels, {size}x{size}"
    return Case(
        f"layer{channels}",
        title,
        lambda: nn.Conv2d(channels, channels, 3, padding=1),
        _image(size, channels),
        variants,
    )
