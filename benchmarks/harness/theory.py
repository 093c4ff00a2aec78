"""The MACs and the bytes that an input needs: of a chain of layers for some pixels, of a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynops import PixelPlan
from dynops.geometry import ConvGeometry
from dynops.plans import resize_mask
from dynops.stack.module_geometry import geometry_of

_CONVS = (nn.Conv2d, nn.ConvTranspose2d)


class Work(NamedTuple):
    """The work of a chain: its MACs, and the values that must move (weights, inputs read, outputs written)."""

    macs: float
    values: float


def chain_work(module: nn.Module, in_shape: tuple[int, int, int], plan: PixelPlan | None = None) -> Work:
    """The work for the output pixels of ``plan``, or for all of them; each layer runs wherever a later one reads it.

    Every output is written, as zero where it is not computed. Values between the layers are not counted.

    Args:
        module: convolutions, transposed convolutions and max-pools that run one after the other in the order
            in which they were registered (a ResNet bottleneck without downsample is one such chain: its
            shortcut adds no MACs and reads no more); layers that act on each pixel by itself count nothing.
        in_shape: ``(N, H, W)`` of the input.

    Raises:
        ValueError: a plan of another resolution than the output's.
    """
    chain = _chain(module, in_shape)
    out_shape = output_shape(module, in_shape)
    plan = PixelPlan.full(out_shape) if plan is None else plan
    if plan.shape != out_shape:
        raise ValueError(f"plan: expected one for the output's {out_shape}, got {plan.shape}")
    convs = [layer for layer, _ in chain if isinstance(layer, _CONVS)]
    macs, outputs = 0.0, plan.num_pixels * convs[-1].out_channels
    for layer, geometry in reversed(chain):
        if isinstance(layer, _CONVS):
            macs += geometry.macs(plan.num_rows, layer.in_channels, layer.out_channels)
        plan = plan.needed_by(geometry)
    weights = sum(layer.weight.numel() for layer in convs)
    return Work(macs, weights + plan.num_rows * convs[0].in_channels + outputs)


def chain_macs(module: nn.Module, in_shape: tuple[int, int, int], plan: PixelPlan | None = None) -> float:
    """The MACs of :func:`chain_work`."""
    return chain_work(module, in_shape, plan).macs


def output_shape(module: nn.Module, in_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """``(N, H, W)`` of the chain's output."""
    chain = _chain(module, in_shape)
    return chain[-1][1].out_shape if chain else in_shape


def _chain(module: nn.Module, in_shape: tuple[int, int, int]) -> list[tuple[nn.Module, ConvGeometry]]:
    """The layers that read more than one pixel or have MACs, each with its geometry."""
    chain = []
    for layer in module.modules():
        if isinstance(layer, (*_CONVS, nn.MaxPool2d)):
            chain.append((layer, geometry_of(_as_conv(layer), in_shape)))
            in_shape = chain[-1][1].out_shape
    return chain


def _as_conv(layer: nn.Module) -> nn.Module:
    """A convolution that reads the pixels that a max-pool reads; a convolution as it is."""
    if isinstance(layer, nn.MaxPool2d):
        return nn.Conv2d(1, 1, layer.kernel_size, layer.stride, layer.padding, layer.dilation, device="meta")
    return layer


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
