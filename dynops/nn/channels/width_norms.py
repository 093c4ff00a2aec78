"""The norms of slimmable networks: statistics for each width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...stack.norm import fold, uses_batch_statistics
from .widths import Side, Slimmable, Width


class SwitchableBatchNorm2d(Slimmable, nn.Module):
    """A ``nn.BatchNorm2d`` for each switch of a slimmable network: ``bn[i]`` of ``num_features_list[i]`` channels.

    Args:
        num_features_list: channels of each switch.
        eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``, for all of them.

    Shape:
        - width: as in :class:`dynops.nn.SlimmableConv2d`, the index of a switch, or a tensor ``[N]`` of them.
        - input, output: for the whole batch ``[N, channels of the switch, H, W]``; for each sample
          ``[N, C, H, W]`` with the channels of the widest. Channels past a sample's width are not read, and are zero in
          the output.

    With a width for each sample the statistics of training are those of the samples of the switch; which these are
    is read on the host, so that a GPU is waited for. In eval mode it is one pass, without that.

    Paper: Yu et al., Slimmable Neural Networks (ICLR 2019).
    """

    def __init__(
        self,
        num_features_list: list[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self._features = Side(num_features_list, "num_features_list")
        if self._features.universal:
            raise ValueError(f"num_features_list: expected a list of ints, got {num_features_list!r}")
        self.num_features_list, self.num_features = self._features.list, self._features.most
        self.bn = nn.ModuleList(
            nn.BatchNorm2d(c, eps, momentum, affine, track_running_stats, device, dtype)
            for c in self.num_features_list
        )

    def forward(self, input: Tensor, width: Width | None = None) -> Tensor:
        width = self.width if width is None else width
        if width is None:
            width = self.num_features_list.index(self.num_features)
        features = self._features.of(width)
        if not isinstance(width, Tensor):
            return self.bn[width](input)
        _check_samples(input, width, self.num_features)
        if any(uses_batch_statistics(norm) for norm in self.bn):
            return self._by_switch(input, width)
        return self._by_sample(input, width, features)

    def _by_switch(self, input: Tensor, width: Tensor) -> Tensor:
        out = torch.zeros_like(input)
        for i, norm in enumerate(self.bn):
            samples = (width == i).nonzero()[:, 0]
            if samples.numel():
                normed = norm(input[samples, : norm.num_features])
                missing = self.num_features - norm.num_features
                out = out.index_copy(0, samples, F.pad(normed, (0, 0, 0, 0, 0, missing)))
        return out

    def _by_sample(self, input: Tensor, width: Tensor, features: int | Tensor) -> Tensor:
        folds = [fold(norm) for norm in self.bn]
        factor, shift = (
            torch.stack([F.pad(f[k], (0, self.num_features - len(f[k]))) for f in folds])[width.long()]
            for k in (0, 1)
        )
        out = torch.addcmul(shift[:, :, None, None], input, factor[:, :, None, None])
        channel = torch.arange(self.num_features, device=input.device)
        if isinstance(features, Tensor):
            out = torch.where((channel < features[:, None])[:, :, None, None], out, 0)
        return out.to(input.dtype)


class UniversalBatchNorm2d(Slimmable, nn.BatchNorm2d):
    """The norm of a universally slimmable network: affine parameters shared by all widths, statistics for some.

    The parameters and ``state_dict`` are those of the published ``USBatchNorm2d``: ``weight`` and ``bias`` ``[C]``, and
    ``bn.{i}.running_mean`` and the like of the i-th width of ``width_mult_list``.

    Args:
        num_features: C.
        width_mult_list: the multipliers that have running statistics.
        ratio: channels of a width are a multiple of it.
        eps, momentum, device, dtype: as in ``nn.BatchNorm2d``.

    Shape:
        - width: a multiplier in (0, 1] for the whole batch, or a tensor ``[N]``, one for each sample; None as in
          :class:`dynops.nn.SlimmableConv2d`. In eval mode one of ``width_mult_list``; in training any, the statistics being
          those of the samples of a width.
        - input, output: for the whole batch ``[N, channels of the width, H, W]``; for each sample ``[N, C, H, W]``, of
          which channels past its width are not read, and zero in the output. Which samples have which width is read
          on the host.

    Paper: Yu and Huang, Universally Slimmable Networks (ICCV 2019).
    """

    def __init__(
        self,
        num_features: int,
        width_mult_list: list[float] = (1.0,),
        ratio: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__(num_features, eps, momentum, True, False, device, dtype)
        self._features = Side(num_features, "num_features", True, ratio)
        self.width_mult_list, self.ratio = list(width_mult_list), ratio
        self.bn = nn.ModuleList(
            nn.BatchNorm2d(self._features.of(width), eps, momentum, False, True, device, dtype)
            for width in self.width_mult_list
        )

    def forward(self, input: Tensor, width: Width | None = None) -> Tensor:
        width = self.width if width is None else width
        if not isinstance(width, Tensor):
            return self._norm(input, 1.0 if width is None else width)
        _check_samples(input, width, self.num_features)
        out = torch.zeros_like(input)
        for one in width.unique():
            samples = (width == one).nonzero()[:, 0]
            channels = int(self._features.of(one[None]))
            normed = self._normed(input[samples, :channels], float(one), channels)
            out = out.index_copy(0, samples, F.pad(normed, (0, 0, 0, 0, 0, self.num_features - channels)))
        return out

    def _norm(self, input: Tensor, width: float) -> Tensor:
        channels = self._features.of(width)
        if input.dim() != 4 or input.shape[1] != channels:
            raise ValueError(
                f"input: expected {channels} channels at this width, got shape {tuple(input.shape)}"
            )
        return self._normed(input, width, channels)

    def _normed(self, input: Tensor, width: float, channels: int) -> Tensor:
        mean, var, momentum = None, None, 0.0
        # float32 has 1/3 as 0.33333334
        norm = next(
            (n for w, n in zip(self.width_mult_list, self.bn, strict=True) if abs(w - width) < 1e-6), None
        )
        if norm is not None:
            mean, var, momentum = norm.running_mean, norm.running_var, self.momentum
            if self.training:
                norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / max(float(norm.num_batches_tracked), 1.0)
        elif not self.training:
            raise ValueError(f"width: expected one of {self.width_mult_list} in eval mode, got {width}")
        weight, bias = self.weight[:channels], self.bias[:channels]
        return F.batch_norm(input, mean, var, weight, bias, self.training, momentum, self.eps)


def _check_samples(input: Tensor, width: Tensor, channels: int) -> None:
    if input.dim() != 4 or tuple(input.shape[:2]) != (len(width), channels):
        raise ValueError(
            f"input: expected {len(width)} samples, one for each width, of {channels} channels, "
            f"[N, C, H, W], got shape {tuple(input.shape)}"
        )
