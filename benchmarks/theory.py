"""The MACs that a chain of layers must do for some of its output, each layer wherever a later one reads it."""

from __future__ import annotations

from torch import nn

from dynops import PixelPlan
from dynops.geometry import ConvGeometry
from dynops.stack.module_geometry import geometry_of

_CONVS = (nn.Conv2d, nn.ConvTranspose2d)


def chain_macs(module: nn.Module, in_shape: tuple[int, int, int], plan: PixelPlan | None = None) -> float:
    """The MACs for the output pixels of ``plan``, or for all of them.

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
    macs = 0.0
    for layer, geometry in reversed(chain):
        if isinstance(layer, _CONVS):
            macs += geometry.macs(plan.num_rows, layer.in_channels, layer.out_channels)
        plan = plan.needed_by(geometry)
    return macs


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
