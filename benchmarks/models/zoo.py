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


def _timm(name: str, size: int = SIZE) -> Entry:
    def make() -> nn.Module:
        return importlib.import_module("timm").create_model(name)

    return Entry(f"timm.{name}", make, lambda batch: _image(batch, size), size // 32)


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


class _Detector(nn.Module):
    """The convolutions of a torchvision detector: its backbone, and its head where that takes the maps alone."""

    def __init__(self, detector: nn.Module, head: bool):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head if head else None

    def forward(self, x: Tensor) -> list:
        maps = [*self.backbone(x).values()]
        return maps if self.head is None else [*maps, *self.head(maps).values()]


def _detector(name: str, size: int = SIZE, head: bool = False) -> Entry:
    def make() -> nn.Module:
        models = importlib.import_module("torchvision.models.detection")
        return _Detector(getattr(models, name)(weights=None, weights_backbone=None), head)

    part = "backbone+head" if head else "backbone"
    return Entry(f"torchvision.{name}.{part}", make, lambda batch: _image(batch, size), size // 32)


class _Flow(nn.Module):
    """A RAFT of one update."""

    def __init__(self, raft: nn.Module):
        super().__init__()
        self.raft = raft

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.raft(first, second, num_flow_updates=1)[-1]


def _flow() -> nn.Module:
    return _Flow(importlib.import_module("torchvision.models.optical_flow").raft_small(weights=None))


class _TextUnet(nn.Module):
    """The sample of a diffusers UNet with cross-attention at one step."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.unet(x, 10, text).sample


def _text_unet() -> nn.Module:
    diffusers = importlib.import_module("diffusers")
    return _TextUnet(
        diffusers.UNet2DConditionModel(
            64, block_out_channels=(64, 128), attention_head_dim=32, cross_attention_dim=64, layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip


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
# one of each of timm's convolutional families and of those with attention, in the order of its modules
_FAMILIES = """
gernet_s mobileone_s0 regnetz_b16 resnet32ts gcresnext26ts eca_resnext26ts repvgg_d2se lambda_resnet26t
convmixer_768_32 convnext_zepto_rms convnext_atto_ols csatv2 cs3darknet_s cs3darknet_focus_s cs3se_edgenet_x cspresnet50
cspresnext50 darknet17 darknetaa53 cspnext_tiny cpubone_nano densenet121 densenetblur121d dla34
dla46x_c dla60_res2net dpn48b dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
efficientnet_b0_gn efficientnet_b0_g16_evos efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 tf_efficientnet_b0 mixnet_s
tf_mixnet_s mnasnet_small spnasnet_100 fbnetc_100 tinynet_e efficientvim_m1 efficientvit_b0 efficientvit_m0
fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny
hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
levit_conv_128s lowformer_b0 mambaout_femto coatnet_nano_rw_224 poolformer_s12 poolformerv2_s12 convformer_s18 mobilenetv3_small_050
fbnetv3_b lcnet_035 tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium mobilenetv5_300m_enc mobilevit_xxs mobilevitv2_050
nasnetalarge pnasnet5large nextvit_small nf_resnet26 nf_regnet_b0 eca_nfnet_l0 pvt_v2_b0 rdnet_tiny
regnetx_002 regnety_002 regnetz_005 regnetv_040 repghostnet_050 repvit_m0_9 res2next50 resnest14d
resnet26t resnetaa50 resnetblur18 resnetrs50 seresnext26t_32x4d ecaresnet26t resnetv2_18 resnetv2_50d_evos
resnetv2_50d_frn resnetv2_50d_gn rexnet_100 rexnetr_100 selecsls42 legacy_seresnet18 legacy_senet154 shvit_s1
skresnext50_32x4d starnet_s050 swiftformer_xs tiny_vit_5m_224 tresnet_m vgg11 vgg11_bn visformer_tiny
ese_vovnet19b_dw eca_vovnet39b ese_vovnet39b_evos legacy_xception xception xception41p
"""
_UNPADDED = {
    *("alexnet", "squeezenet1_0", "squeezenet1_1", "inception_resnet_v2", "inception_v3", "inception_v4", "nasnetalarge"),
    *("pnasnet5large", "xception", "convmixer_768_32", "csatv2", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0"),
    *("ghostnetv2_100", "ghostnetv3_050", "levit_conv_128s", "lowformer_b0", "cpubone_nano", "coatnet_nano_rw_224"),
    *("ssdlite320_mobilenet_v3_large.backbone", "retinanet_resnet50_fpn.backbone+head"),
    *("mobilenetv5_300m_enc", "mobilevit_xxs", "mobilevitv2_050", "shvit_s1", "selecsls42", "legacy_xception"),
}  # fmt: skip
_LONG = (
    *map(_torchvision, ("resnext50_32x4d", "wide_resnet50_2", "mnasnet1_0", "efficientnet_v2_s", "regnet_x_400mf")),
    *map(_torchvision, ("mobilenet_v3_small", "alexnet", "squeezenet1_0", "squeezenet1_1", "inception_v3")),
    _torchvision("lraspp_mobilenet_v3_large", ".segmentation"),
    _torchvision("deeplabv3_mobilenet_v3_large", ".segmentation"),
    *map(_timm, ("resnet50d", "tf_efficientnetv2_s", "cspdarknet53", "ese_vovnet39b", "xception41")),
    *map(_timm, _FAMILIES.split()),
    *(_timm(name, 256) for name in ("bat_resnext26ts", "halonet26t", "botnet26t_256")),
    *map(_smp, ("DeepLabV3", "DeepLabV3Plus", "FPN", "MAnet", "PAN", "PSPNet", "Linknet", "UnetPlusPlus", "UPerNet")),
    _smp("Segformer"),
    _detector("ssdlite320_mobilenet_v3_large", 320),
    _detector("fasterrcnn_resnet50_fpn"),
    _detector("retinanet_resnet50_fpn", head=True),
    Entry("torchvision.raft_small", _flow, lambda batch: _image(batch, 256) * 2, 8),
    Entry("diffusers.UNet2DConditionModel", _text_unet, lambda batch: (*_image(batch, 64, 4), torch.randn(batch, 7, 64)), 8),
)  # fmt: skip


def entries(everything: bool) -> list[Entry]:
    """The fixed list of 25, or the long one."""
    found = [*_SHORT, *(_LONG if everything else ())]
    return [entry._replace(padded=entry.name.partition(".")[2] not in _UNPADDED) for entry in found]


def is_installed(entry: Entry) -> bool:
    return importlib.util.find_spec(entry.library) is not None
