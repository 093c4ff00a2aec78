"""A whole model: ResNet-50 on the photograph, where only the pixels with detail are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynops
from dynops import PixelPlan
from dynops.plans import resize_mask

from . import masks
from .layers import Setting
from .report import Row
from .timing import Comparison, best_dense, compare, interleaved, progress

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
    """ResNet-50 with random weights in eval mode, its norms calibrated on ``image``: no download, and
    activations stay in range in half precision."""
    from .resnet import resnet50

    torch.manual_seed(0)
    return calibrated(resnet50(), torch.cat([image, image.flip(3)]))


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in eval mode, the statistics of its norms those of the batch ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def normalised(image: Tensor) -> Tensor:
    return (image - image.new_tensor(_MEAN).view(-1, 1, 1)) / image.new_tensor(_STD).view(-1, 1, 1)


# ------------------------------------------------------------------------------------------- theory


class LayerMacs:
    """The MACs of every convolution and linear layer of a model for one input, dense and masked."""

    def __init__(self, model: nn.Module, x: Tensor):
        self.layers: dict[str, tuple[tuple[int, int] | None, int]] = {}  # name: (H, W) of the output, MACs
        hooks = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable:
        def record(module, inputs, out):
            if isinstance(module, nn.Linear):
                self.layers[name] = None, out.numel() * module.in_features
            else:
                self.layers[name] = tuple(out.shape[2:]), out.numel() * module.weight[0].numel()

        return record

    @property
    def dense(self) -> int:
        return sum(macs for _, macs in self.layers.values())

    def computed(self, mask: Tensor, kept_dense: set[str]) -> float:
        """MACs with every convolution but those ``kept_dense`` at the mask's pixels, resized as they are."""
        share: dict[tuple[int, int], float] = {}
        total = 0.0
        for name, (size, macs) in self.layers.items():
            if size is None or name in kept_dense:
                total += macs
                continue
            if size not in share:
                share[size] = resize_mask(mask, size).float().mean().item()
            total += macs * share[size]
        return total


# ------------------------------------------------------------------------------------------- the run


def run(
    setting: Setting, sizes=SIZES, gates=tuple(GATES), build=build_resnet50, name="ResNet-50", n=1
) -> list[Row]:
    """Rows of ``build``'s model at each input size, mask and density, batch ``n``; the gate's time counts as ours."""
    rows = []
    for size in progress(list(sizes), name, "size"):
        rows += measure(build, name, size, gates, setting, n)
    return rows


def measure(build, name: str, size: tuple[int, int], gates, setting: Setting, n: int = 1) -> list[Row]:
    image = photo_batch(size, n)
    model = build(normalised(image[:1]))
    image = image.to(setting.device)
    macs = LayerMacs(model.to(setting.device), normalised(image))
    model.to(setting.dtype)
    x = normalised(image).to(setting.dtype)
    ours, replays, plans = {}, {}, {}
    converted, kept_dense = _convert(model)
    for kind in gates:
        for density in setting.densities:
            ours[kind, density] = _ours(converted, image, x, density, GATES[kind], setting)
            replays[kind, density] = _capturable(converted, image, x, density, GATES[kind])
            plans[kind, density] = macs.computed(gate(image, density, GATES[kind]), kept_dense)
    with torch.inference_mode(not setting.backward):
        times = _times(model, x, setting, ours, replays)
    return [
        Row(
            suite="models",
            group=name,
            case=f"{name}, {size[0]}x{size[1]}" + (f", batch {n}" if n > 1 else ""),
            mask=kind,
            density=density,
            variant="plain",
            mode=setting.mode,
            dtype=str(setting.dtype).removeprefix("torch."),
            gmacs=macs.dense / 1e9,
            computed_gmacs=plans[kind, density] / 1e9,
            dense_ms=times.dense_ms,
            dense_name=times.dense_name,
            ours_ms=times.ours[kind, density],
            dense_all=times.dense_all,
            **times.versions((kind, density)),
        )
        for kind, density in ours
    ]


def _times(model: nn.Module, x: Tensor, setting: Setting, ours: dict, replays: dict) -> Comparison:
    dense = dense_versions(model, x, setting)
    if setting.graph:
        return compare(dense, ours, setting.device, setting.budget, replays)
    first_look, dense = best_dense(dense, setting.device)
    beside = _frozen(model, x) if setting.compiled and not setting.backward else {}
    times = interleaved({**dense, **beside, **ours}, setting.device, setting.budget)
    best = min(dense, key=times.get)
    dense_all = first_look | {n: times[n] for n in (*dense, *beside)}
    return Comparison({key: times[key] for key in ours}, times[best], best, dense_all)


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


def _ours(converted: nn.Module, image: Tensor, x: Tensor, density: float, cell: int, setting: Setting):
    """From the photograph to the logits: gate, mask resizing, plans and the model."""
    x = x.contiguous(memory_format=torch.channels_last)

    def call():
        with dynops.active(gate(image, density, cell)):
            return converted(x)

    return with_backward(call, converted) if setting.backward else call


def _capturable(converted: nn.Module, image: Tensor, x: Tensor, density: float, cell: int) -> Callable:
    """The same with a plan that has room for every cell, which a CUDA graph can capture."""
    x = x.contiguous(memory_format=torch.channels_last)

    def call():
        mask = gate(image, density, cell)
        with dynops.active(PixelPlan.from_mask(mask, capacity=mask.numel())):
            return converted(x)

    return call


def dense_versions(model: nn.Module, x: Tensor, setting: Setting) -> dict[str, Callable]:
    """{NCHW, channels_last} x {eager, torch.compile}."""
    torch._dynamo.reset()
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    calls: dict[str, Callable] = {}
    for format_name, memory_format in formats.items():
        own = copy.deepcopy(model).to(memory_format=memory_format)
        functions = {"eager": own}
        if setting.compiled and format_name in setting.compiled_formats:
            functions["compiled"] = torch.compile(own, dynamic=False)
        for function_name, function in functions.items():
            call = _bound(function, x.contiguous(memory_format=memory_format))
            calls[f"{format_name} {function_name}"] = with_backward(call, own) if setting.backward else call
    return calls


FROZEN = "channels_last compiled, freezing=True (not one of the four)"


def _frozen(model: nn.Module, x: Tensor) -> dict[str, Callable]:
    """A fifth dense version, reported beside the four: weights as constants, so Inductor folds the norms
    into them and lays them out for the library once, as a deployment may."""
    from torch._inductor import config

    function = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last), dynamic=False)
    x = x.contiguous(memory_format=torch.channels_last)
    with config.patch(freezing=True):
        function(x)
    return {FROZEN: _bound(function, x)}


def _bound(function, x: Tensor) -> Callable:
    return lambda: function(x)


def with_backward(call: Callable, model: nn.Module) -> Callable:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(call().square().sum(), parameters)
