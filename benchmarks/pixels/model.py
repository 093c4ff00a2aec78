"""A whole model: ResNet-50 on the photograph, where only the pixels with detail are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynops
from dynops import PixelPlan

from ..harness import masks
from ..harness.compare import compare
from ..harness.contenders import calibrated, dense_versions, formats_of, with_backward
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import LayerMacs
from ..resnet import resnet50

SIZES = ((224, 224), (576, 512))  # the photograph is 600 x 512; cropped to a multiple of the model's 32
CELL = 32  # pixels on a side of a cell of the coarse mask
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


def photo_input(size: tuple[int, int]) -> Tensor:
    """The photograph at ``size``, ``[1, 3, H, W]`` in 0..1: cropped where that suffices, else resized."""
    image = masks.photograph()[:, :, : SIZES[1][0], : SIZES[1][1]]
    if tuple(image.shape[2:]) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)


def photo_batch(size: tuple[int, int], n: int) -> Tensor:
    """``[n, 3, H, W]``: the photograph, sample i shifted by i/n of its width."""
    image = photo_input(size)
    return torch.cat([image.roll(i * size[1] // n, 3) for i in range(n)])


def gate(image: Tensor, density: float, cell: int) -> Tensor:
    """The mask of ``image`` [1, 3, H, W]: its densest cells by gradient, ``[1, H/cell, W/cell]`` bool."""
    h, w = image.shape[2:]
    return masks.densest(masks.gradients(image, (h // cell, w // cell)), density)


GATES = {"photo, 32x32 cells": CELL, "photo, pixels": 1}


def build_resnet50(image: Tensor) -> nn.Module:
    """ResNet-50 with random weights in eval mode: no download.

    Its norms are calibrated on ``image``, so that activations stay in range in half precision.
    """
    torch.manual_seed(0)
    return calibrated(resnet50(), torch.cat([image, image.flip(3)]))


def normalised(image: Tensor) -> Tensor:
    return (image - image.new_tensor(_MEAN).view(-1, 1, 1)) / image.new_tensor(_STD).view(-1, 1, 1)


# ------------------------------------------------------------------------------------------- the run


def all_cases(quick: bool = False) -> list[tuple[int, int]]:
    """The input sizes; none without the photograph."""
    if not masks.has_photograph():
        return []
    return list(SIZES[: 1 if quick else None])


def measure(
    size: tuple[int, int],
    setting: Setting,
    gates: tuple[str, ...] = tuple(GATES),
    n: int = 1,
    build: Callable = build_resnet50,
    name: str = "ResNet-50",
) -> list[Row]:
    """Rows of ``build``'s model at one input size for each mask and density, batch ``n``; the gate's time counts as ours."""
    image = photo_batch(size, n)
    model = build(normalised(image[:1]))
    image = image.to(setting.device)
    macs = LayerMacs(model.to(setting.device), normalised(image))
    model.to(setting.dtype)
    x = normalised(image).to(setting.dtype)
    ours, replays, computed = {}, {}, {}
    converted, kept_dense = _convert(model)
    for kind in gates:
        for density in setting.densities:
            ours[kind, density] = _ours(converted, image, x, density, GATES[kind], room=False)
            replays[kind, density] = _ours(converted, image, x, density, GATES[kind], room=True)
            computed[kind, density] = macs.computed(gate(image, density, GATES[kind]), kept_dense)
    if setting.backward:
        ours = {key: with_backward(call, converted.parameters()) for key, call in ours.items()}
    with torch.inference_mode(not setting.backward):
        dense = network_versions(model, x, setting)
        times = compare(dense, ours, setting, replays=replays)
    return [
        times.row(
            (kind, density),
            suite="models",
            group=name,
            case=f"{name}, {size[0]}x{size[1]}" + (f", batch {n}" if n > 1 else ""),
            mask=kind,
            density=density,
            gmacs=macs.dense / 1e9,
            computed_gmacs=computed[kind, density] / 1e9,
        )
        for kind, density in ours
    ]


def _convert(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A converted copy in channels_last, and the names of the convolutions that stayed dense."""
    converted = copy.deepcopy(model).to(memory_format=torch.channels_last)
    dynops.convert_(converted)
    kept = {
        name
        for name, module in converted.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, dynops.nn.SparseConv2d)
    }
    return converted, kept


def _ours(converted: nn.Module, image: Tensor, x: Tensor, density: float, cell: int, room: bool) -> Callable:
    """From the photograph to the logits: gate, mask resizing, plans and the model.

    ``room``: the plan has room for every cell and expects those that the gate keeps; a CUDA graph can capture the call.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, h, w = len(image), image.shape[2] // cell, image.shape[3] // cell
    sizes = n * h * w, n * masks.active(h, w, density)

    def call():
        mask = gate(image, density, cell)
        with dynops.active(PixelPlan.from_mask(mask, *sizes) if room else mask):
            return converted(x)

    return call


def network_versions(model: nn.Module, x: Tensor, setting: Setting) -> dict[str, Callable]:
    """The dense versions of a network; gradients are those of its parameters."""

    def make(memory_format: torch.memory_format):
        own = copy.deepcopy(model).to(memory_format=memory_format)
        return own, (x.contiguous(memory_format=memory_format),), list(own.parameters()), None

    return dense_versions(make, setting, formats_of(x))
