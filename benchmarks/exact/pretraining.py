"""A step of masked pretraining, forward and backward, against the dense masked form: SparK's ResNet-50, FCMAE's ConvNeXt V2."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynops

from ..harness.compare import compare
from ..harness.contenders import FORMATS, with_backward
from ..harness.rows import Row
from ..harness.setting import Setting
from ..models.macs import CountedPolicy
from ..resnet import ResNet, resnet50
from . import uncached

SIZE, PATCH, MASKED, BATCH = 224, 32, 0.6, 8
MODELS = ("ResNet-50", "convnextv2_atto", "convnextv2_tiny")


def all_cases(quick: bool = False) -> list[str]:
    has_timm = importlib.util.find_spec("timm") is not None
    return list(MODELS[: None if has_timm else 1])[: 2 if quick else None]


def measure(case: str, setting: Setting) -> list[Row]:
    """A row of one model."""
    setting = replace(setting, backward=True, compiled=False)
    mask = visible_patches(BATCH).to(setting.device)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(**setting.options)
    x = x * at_size(mask, x)
    model = build(case).to(**setting.options).train()
    with torch.no_grad(), CountedPolicy(mask) as counted:
        copy.deepcopy(model).eval()(x)
    dense = {}
    for name, memory_format in FORMATS.items():
        own = masked_dense(model, mask).to(memory_format=memory_format)
        dense[name] = with_backward(partial(own, x.contiguous(memory_format=memory_format)), own.parameters())
    ours = ours_of(model, mask, x)
    times = compare(dense, {"ours": with_backward(*ours)}, setting, flush=uncached)
    return [
        times.row(
            "ours",
            suite="exact",
            group="masked pretraining",
            case=f"{case}, {SIZE}x{SIZE}, batch {BATCH}",
            mask=f"{PATCH}x{PATCH} patches",
            density=float(mask.float().mean()),
            gmacs=counted.dense / 1e9,
            computed_gmacs=counted.computed / 1e9,
        )
    ]


class _ResNetMaps(nn.Module):
    """The last map of a ResNet without its classifier."""

    def __init__(self, m: ResNet):
        super().__init__()
        self.layers = nn.Sequential(m.conv1, m.bn1, m.relu, m.maxpool, m.layer1, m.layer2, m.layer3, m.layer4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def build(case: str) -> nn.Module:
    """A model that returns its last map."""
    torch.manual_seed(0)
    if case == MODELS[0]:
        return _ResNetMaps(resnet50())
    import timm

    return timm.create_model(case, num_classes=0, global_pool="")


def visible_patches(n: int) -> Tensor:
    """Bool ``[n, h, w]``: as many visible patches in each image."""
    side = SIZE // PATCH
    order = torch.rand(n, side * side, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    return (order >= round(MASKED * side * side)).view(n, side, side)


def at_size(mask: Tensor, x: Tensor) -> Tensor:
    """``[N, 1, H, W]`` in the dtype of ``x`` ``[N, C, H, W]``."""
    return F.interpolate(mask[:, None].to(x.dtype), x.shape[2:])


def ours_of(model: nn.Module, mask: Tensor, x: Tensor) -> tuple[Callable, list[Tensor]]:
    """A forward pass of the converted model, and its parameters."""
    own = copy.deepcopy(model).to(memory_format=torch.channels_last)
    dynops.convert_(own)
    x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        with dynops.use_mask(mask):
            return own(x)

    return call, list(own.parameters())


# ------------------------------------------------------------------------------- the dense masked form


def masked_dense(model: nn.Module, mask: Tensor) -> nn.Module:
    """A copy whose convolutions, pools, blocks and norms are masked as in SparK's code, in plain PyTorch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, nn.BatchNorm2d):
            module.forward = partial(_normed, module, mask)
        elif isinstance(module, (nn.Conv2d, nn.MaxPool2d)) or name == "ConvNeXtBlock":
            module.register_forward_hook(lambda _, args, out: out * at_size(mask, out))
        elif name == "GlobalResponseNorm":  # of [N, H, W, C]
            module.register_forward_pre_hook(
                lambda _, args: (args[0] * at_size(mask, args[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1),)
            )
    return model


def _normed(norm: nn.BatchNorm2d, mask: Tensor, x: Tensor) -> Tensor:
    """A batch norm by sums over the masked map: a ResNet-50's step takes 1.45 s with it, with SparK's gathers 1.66.

    The running statistics, which cost little, are left as they are.
    """
    mask = at_size(mask, x)
    pixels, view = mask.sum(), (-1, 1, 1)
    mean = x.sum((0, 2, 3)) / pixels  # x is zero elsewhere
    centred = (x - mean.view(view)) * mask
    scale = (centred.square().sum((0, 2, 3)) / pixels + norm.eps).rsqrt() * norm.weight
    return centred * scale.view(view) + norm.bias.view(view) * mask
