"""The steps of a sequence, and what they multiply by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...geometry import ConvGeometry
from ...kernels.cpu.prepared import StepKind
from ..maps import Standardised
from ..norm import check_features, fold, tensors_of


@dataclass
class Weights:
    """What a step multiplies by.

    Attributes:
        geometry: of the convolution.
        conv: the module with ``weight`` and ``bias``, a convolution or a Linear; None: each row is taken by itself.
        norm: the BatchNorm2d after it, or None; of a layer norm that itself.
        scale: makes the vector of C values that it multiplies by after it, of ``scaled_by``; or None.
        scale_shape: the shape of that vector, as it was bound.
    """

    geometry: ConvGeometry
    conv: nn.Module | None = None
    norm: nn.Module | None = None
    activation: str = ""
    scale: Callable[[], Tensor] | None = None
    scaled_by: Callable[[], tuple] = tuple
    scale_shape: tuple[int, ...] = ()

    def tensors(self) -> tuple[Tensor | None, ...]:
        if type(self.conv) is Standardised:
            own = self.conv.tensors()
        else:
            own = (
                () if self.conv is None else (self.conv._parameters["weight"], self.conv._parameters["bias"])
            )
        own = own if self.norm is None else (*own, *tensors_of(self.norm))
        return (*own, *self.scaled_by())

    def scales_as_bound(self) -> bool:
        """True where the vector that it multiplies by is still one of float32, of the same shape; or there is none."""
        if self.scale is None:
            return True
        scale = self.scale()
        return isinstance(scale, Tensor) and scale.dtype is torch.float32 and scale.shape == self.scale_shape

    def affine(self, channels: int) -> tuple[Tensor | None, Tensor | None]:
        """What follows the products."""
        if self.norm is not None:
            check_features(self.norm, channels)
            return fold(self.norm)
        if self.scale is None:
            return None, None
        scale = self.scale().detach().reshape(-1)
        return scale.expand(channels).contiguous(), None


@dataclass
class Step:
    """A step of the binary; ``inputs`` and ``out`` are numbers of values."""

    kind: StepKind
    inputs: tuple[int, ...]
    out: int
    weights: Weights | None = None
    geometry: ConvGeometry | None = None
    channels: list[int] = field(default_factory=list)  # that are taken
    layer_norm: nn.Module | None = None
    linear: tuple | None = None  # of a bilinear resizing; see ..layers.resample.Resizing

    def norm_tensors(self) -> tuple[Tensor | None, ...]:
        found = () if self.layer_norm is None else self.layer_norm._parameters
        return (found["weight"], found["bias"]) if found else ()


def as_kernel(conv: nn.Module) -> Tensor:
    """``[O, C/groups, kh, kw]``, of a Linear too."""
    weight = conv._parameters["weight"]
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def each(channels: int) -> ConvGeometry:
    """The geometry of a depthwise 1x1 convolution, which takes each row by itself."""
    return ConvGeometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, channels, 0)
