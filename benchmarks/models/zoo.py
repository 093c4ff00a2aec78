"""Models of real libraries, at random weights: how each is made, and what it is called with."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

SIZE, CELLS, ACTIVE = 224, 7, 12  # 12 of 7x7 cells: a theory of 4.08 where every layer follows the mask


class Entry(NamedTuple):
    """A model of a library.

    Attributes:
        name: ``library.model``.
        make: the model, in eval mode.
        inputs: its arguments for a batch.
        cells: of the mask, along a side.
        padded: False where maps have sizes that are no multiples of the mask's: what moves masks is then taken from dynops.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    cells: int = CELLS
    padded: bool = True

    @property
    def library(self) -> str:
        return self.name.partition(".")[0]


def _image(batch: int, size: int = SIZE, channels: int = 3) -> tuple[Tensor]:
    return (torch.randn(batch, channels, size, size),)


def _torchvision(name: str, room: str = "") -> Entry:
    def make() -> nn.Module:
        models = importlib.import_module(f"torchvision.models{room}")
        options = {"weights_backbone": None} if room else {}
        return getattr(models, name)(weights=None, **options)

    return Entry(f"torchvision.{name}", make, _image)


def _timm(name: str) -> Entry:
    return Entry(f"timm.{name}", lambda: importlib.import_module("timm").create_model(name), _image)


def _smp(name: str) -> Entry:
    def make() -> nn.Module:
        library = importlib.import_module("segmentation_models_pytorch")
        return getattr(library, name)("resnet18", encoder_weights=None)

    return Entry(f"segmentation_models_pytorch.{name}", make, _image)


class _Unet(nn.Module):
    """The sample of a diffusers UNet at one step."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x, 10).sample


def _unet() -> nn.Module:
    diffusers = importlib.import_module("diffusers")
    options = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    return _Unet(diffusers.UNet2DModel(64, block_out_channels=(64, 128, 256), add_attention=False, **options))


class _Decoder(nn.Module):
    """The decoder of a diffusers AutoencoderKL."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.decode(x).sample


def _decoder() -> nn.Module:
    diffusers = importlib.import_module("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(64, 128, 128), latent_channels=4, mid_block_add_attention=False, **blocks
    )
    return _Decoder(vae)


_SHORT = (
    *map(_torchvision, ("resnet18", "resnet50", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")),
    *map(_torchvision, ("regnet_y_400mf", "convnext_tiny", "vgg16_bn", "googlenet", "shufflenet_v2_x1_0")),
    _torchvision("fcn_resnet50", ".segmentation"),
    _torchvision("deeplabv3_resnet50", ".segmentation"),
    *map(_timm, ("seresnet50", "res2net50_26w_4s", "convnextv2_atto", "efficientnetv2_rw_s", "mobilenetv4_conv_small")),
    *map(_timm, ("repvgg_a0", "nfnet_l0", "resnetv2_50x1_bit", "skresnet18")),
    _smp("Unet"),
    Entry("diffusers.UNet2DModel", _unet, lambda batch: _image(batch, 64), 8),
    Entry("diffusers.AutoencoderKL.decode", _decoder, lambda batch: _image(batch, 32, 4), 8),
)  # fmt: skip
_LONG = (
    *map(_torchvision, ("resnext50_32x4d", "wide_resnet50_2", "mnasnet1_0")),
    *(_torchvision(name)._replace(padded=False) for name in ("squeezenet1_1", "inception_v3")),
    _torchvision("lraspp_mobilenet_v3_large", ".segmentation"),
    *map(
        _timm,
        ("resnet50d", "ecaresnet26t", "tf_efficientnetv2_s", "cspdarknet53", "ese_vovnet39b", "xception41"),
    ),
    *map(_smp, ("DeepLabV3Plus", "FPN", "MAnet", "PSPNet", "Linknet", "UnetPlusPlus")),
)


def entries(everything: bool) -> list[Entry]:
    """The fixed list of 25, or the long one."""
    return [*_SHORT, *(_LONG if everything else ())]


def is_installed(entry: Entry) -> bool:
    return importlib.util.find_spec(entry.library) is not None
