"""Gate heads that decide for each channel: FBS's saliency, and GaterNet for all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_features, check_floating, check_int, check_number, check_rate
from .functions import Decision, top_k
from .heads import open_, pool
from .modules import ImprovedSemHash


class ChannelGate(nn.Module):
    """FBS's channel saliency: the mean of abs(x) per channel, a linear layer, relu; the largest are kept.

    ``y = norm(conv(x)) * mask``: the kept channels are multiplied by their saliency, which takes the place of
    the batch norm's weight. Of the ``ceil(keep * O)`` kept channels those of no saliency are zero too, and
    are not computed either. FBS adds the mean of ``score``, times a factor such as 1e-8, to the loss.

    Args:
        in_channels: C.
        out_channels: O, the channels of the layer that it gates.
        keep: the share of them that is kept, in (0, 1]; an attribute, which FBS lowers while it trains.
        device, dtype: of the parameters. The bias is 1 at first, so that every channel passes nearly as it
            is.

    Shape:
        - x: the layer's input, ``[N, C]`` or ``[N, C, ...]``.
        - output: :class:`Decision` of ``[N, O]``. The mask is soft: the saliency where it is kept, zero
          elsewhere. The score is the saliency of all channels, at least 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Gao et al., Dynamic channel pruning: Feature boosting and suppression (ICLR 2019).
    """

    def __init__(self, in_channels: int, out_channels: int, keep: float, *, device=None, dtype=None):
        super().__init__()
        check_int("in_channels", in_channels)
        check_int("out_channels", out_channels)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.keep = keep
        self.fc = nn.Linear(in_channels, out_channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")
        nn.init.ones_(self.fc.bias)

    @property
    def keep(self) -> float:
        return self._keep

    @keep.setter
    def keep(self, value: float) -> None:
        check_number("keep", value)
        if not 0 < value <= 1:
            raise ValueError(f"keep: expected it in (0, 1], got {value!r}")
        self._keep = value

    def forward(self, x: Tensor) -> Decision:
        check_features(x, self.in_channels)
        saliency = F.relu(self.fc(pool(x.abs())))
        # rounded first: 0.07 * 100 is a little over 7
        kept = top_k(saliency.detach(), math.ceil(round(self.keep * self.out_channels, 9)), 1).mask
        return Decision(saliency * kept, saliency)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


class GaterNet(nn.Module):
    """GaterNet: a backbone network looks at the input once and emits the channel gates of all layers.

    ``backbone(x)``, a bottleneck (linear, batch norm, relu), a linear layer to all gates, Improved SemHash.
    All masks are known before the first gated layer runs, so their plans can be built at once. In training
    half of the samples have soft masks.

    Args:
        backbone: a module that gives ``[N, features]``, or a map ``[N, features, ...]``, whose mean is taken.
        features: the backbone's.
        channels: the gated channels of each layer.
        bottleneck: features between the two linear layers.
        open_rate: the probability, about, that a channel is open at first.

    Shape:
        - x: what the backbone takes.
        - output: a list of :class:`Decision`, mask and score ``[N, channels[i]]``.

    Raises:
        TypeError, ValueError: an argument that does not fit. In training mode a batch of one sample, as every
            batch norm over single features does.

    Paper: Chen et al., You look twice: GaterNet for dynamic filter selection in CNNs (CVPR 2019).
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        channels: Sequence[int],
        bottleneck: int = 256,
        *,
        open_rate: float = 0.85,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_int("features", features)
        check_int("bottleneck", bottleneck)
        check_rate("open_rate", open_rate)
        self.features, self.channels, self.open_rate = features, list(channels), open_rate
        if not self.channels:
            raise ValueError("channels: expected those of at least one layer, got none")
        for width in self.channels:
            check_int("channels", width)
        factory = {"device": device, "dtype": dtype}
        self.backbone = backbone
        self.fc1 = nn.Linear(features, bottleneck, **factory)
        self.bn = nn.BatchNorm1d(bottleneck, **factory)
        self.fc2 = nn.Linear(bottleneck, sum(self.channels), **factory)
        self.semhash = ImprovedSemHash()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The backbone keeps its parameters."""
        self.fc1.reset_parameters()
        self.bn.reset_parameters()
        open_(self.fc2, NormalDist().inv_cdf(self.open_rate))  # the noise is normal

    def forward(self, x: Tensor) -> list[Decision]:
        seen = self.backbone(x)
        check_floating("backbone(x)", seen)
        check_features(seen, self.features)
        mask, score = self.semhash(self.fc2(F.relu(self.bn(self.fc1(pool(seen))))))
        return list(map(Decision, mask.split(self.channels, 1), score.split(self.channels, 1)))
