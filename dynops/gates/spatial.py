"""Gate heads that decide for each pixel: DynConv's squeeze unit, SACT's halting score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_features, check_int, check_number, check_rate
from .functions import Decision
from .heads import LAST_STD, logit, pool
from .modules import GumbelSigmoid


class _Squeeze(nn.Module):
    """``conv(x) + fc(mean(x))``: what is seen here, and what the whole map is about."""

    def __init__(self, channels: int, stride: int, bias: float, global_bias: bool, factory: dict):
        super().__init__()
        check_int("channels", channels)
        check_int("stride", stride)
        self.channels, self.first_bias = channels, bias
        self.conv = nn.Conv2d(channels, 1, 3, stride, 1, **factory)
        self.fc = nn.Linear(channels, 1, bias=global_bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.conv, self.fc):
            nn.init.normal_(layer.weight, std=LAST_STD)
        nn.init.constant_(self.conv.bias, self.first_bias)
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    def _logits(self, x: Tensor) -> Tensor:  # [N, 1, H, W]
        check_features(x, self.channels, 4)
        return self.conv(x) + self.fc(pool(x))[:, :, None, None]


class SpatialGate(_Squeeze):
    """DynConv's squeeze unit: a 3×3 convolution plus a linear layer of the map's mean, then a Gumbel-sigmoid.

    The mask is at the output resolution of the layers that it gates, as :class:`dynops.PixelPlan` takes it.
    In evaluation it is ``logits > 0``.

    Args:
        channels: C.
        stride: of the convolution: that of the block.
        open_rate: the probability, about, that a pixel is open at first.
        temperature: of the relaxation; :func:`set_temperature` anneals it, :func:`set_noise` turns the noise
            off (DynConv: in the last epochs).

    Shape:
        - x: ``[N, C, H, W]``.
        - output: :class:`Decision`, mask and score ``[N, 1, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Verelst and Tuytelaars, Dynamic convolutions: Exploiting spatial sparsity for faster inference
    (CVPR 2020).
    """

    def __init__(
        self,
        channels: int,
        stride: int = 1,
        *,
        open_rate: float = 0.85,
        temperature: float = 1.0,
        device=None,
        dtype=None,
    ):
        check_rate("open_rate", open_rate)
        super().__init__(channels, stride, logit(open_rate), True, {"device": device, "dtype": dtype})
        self.gumbel = GumbelSigmoid(temperature)

    def forward(self, x: Tensor) -> Decision:
        return self.gumbel(self._logits(x))


class SpatialHaltingHead(_Squeeze):
    """SACT's halting score for each pixel: ``sigmoid(conv(x) + fc(mean(x)))``, with a 3×3 convolution.

    It decides nothing: the scores of a pixel add up over the layers until they reach 1 - eps. The authors'
    code normalises both inputs first; put a batch norm before the head for that.

    Args:
        channels: C.
        bias: of the convolution, at first; the authors' -3 halts late.

    Shape:
        - x: ``[N, C, H, W]``.
        - output: ``[N, 1, H, W]``, in (0, 1).

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Figurnov et al., Spatially adaptive computation time for residual networks (CVPR 2017).
    """

    def __init__(self, channels: int, *, bias: float = -3.0, device=None, dtype=None):
        check_number("bias", bias)
        super().__init__(channels, 1, bias, False, {"device": device, "dtype": dtype})

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self._logits(x))
