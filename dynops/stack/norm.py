"""BatchNorm2d on packed rows: folded to a scale and a shift, or with the statistics of the active rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import modes
from ..kept import kept
from ..ops.epilogue import apply_epilogue
from ..plans import PixelPlan


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """True where ``norm`` normalises with the statistics of its input, as nn.BatchNorm2d decides it."""
    return norm.training or norm._buffers["running_mean"] is None


def check_features(norm: nn.Module, channels: int) -> None:
    """Raises ValueError for other channels than those of a batch, group or instance norm."""
    expected = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if expected != channels and not (isinstance(norm, nn.InstanceNorm2d) and not norm.affine):
        raise ValueError(f"input: expected {expected} channels, as the norm has features, got {channels}")


def fold(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``scale, shift`` ``[C]`` with ``norm(x) = scale * x + shift`` in eval mode.

    Kept until a parameter or a statistic changes (``dynops.kept``), except where a gradient flows through them.
    """
    return fold_of(norm.eps, *tensors_of(norm))


def tensors_of(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """Weight, bias, mean, variance and number of batches."""
    parameters, buffers = norm._parameters, norm._buffers  # nn.Module.__getattr__ costs half a microsecond
    return (
        parameters["weight"],
        parameters["bias"],
        buffers["running_mean"],
        buffers["running_var"],
        buffers.get("num_batches_tracked"),
    )


def fold_of(
    eps: float, weight, bias, mean: Tensor, var: Tensor, batches: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`fold`, of a norm's tensors.

    Args:
        batches: the number of batches. The statistics' own versions do not move; this one's does, which is what shows
            on a GPU.
    """
    if not modes.plain(var, mean, weight, bias):
        return _fold(eps, weight, bias, mean, var)
    return kept.get(
        ("fold", eps), lambda: _fold(eps, weight, bias, mean, var), var, mean, weight, bias, batches
    )


def _fold(eps: float, weight, bias, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(var.dtype, torch.float32)  # half-precision statistics are folded in float32
    scale = (var.to(dtype) + eps).rsqrt()
    scale = scale if weight is None else weight.to(dtype) * scale
    shift = -mean.to(dtype) * scale
    return scale, (shift if bias is None else shift + bias.to(dtype))


def norm_rows(
    norm: nn.BatchNorm2d,
    rows: Tensor,  # [P, C]
    plan: PixelPlan,
    residual: Tensor | None = None,  # [P, C], added after the norm
    activation: str = "",
) -> Tensor:  # [P, C]
    """``activation(norm(rows) + residual)``; see :class:`dynops.nn.MaskedBatchNorm2d` for the statistics.

    Raises:
        ValueError: rows of other channels than the norm's.
    """
    check_features(norm, rows.shape[1])
    if not uses_batch_statistics(norm):
        scale, shift = fold(norm)
        return apply_epilogue(rows, activation, scale, shift, None, residual)
    ranks = _ranks(norm)
    if plan.count is None and ranks is None:
        rows = _train_rows(norm, rows)
    elif plan.count is None and rows.is_cuda:  # torch's own kernels
        rows = nn.SyncBatchNorm.forward(norm, rows)
    else:
        rows = _train_counted(norm, rows, plan.count, ranks)
    return apply_epilogue(rows, activation, None, None, None, residual)


def _ranks(norm: nn.BatchNorm2d):
    """The process group over which the statistics are, or None: this process alone."""
    found = torch.distributed
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and found.is_available()):
        return None
    if not found.is_initialized():
        return None
    group = norm.process_group or found.group.WORLD
    return group if found.get_world_size(group) > 1 else None


def _train_rows(norm: nn.BatchNorm2d, rows: Tensor) -> Tensor:
    if rows.shape[0] < 2:  # no variance can be had from fewer
        if norm.running_mean is None:
            return apply_epilogue(rows * 0, "", None, norm.bias, None, None)
        return apply_epilogue(rows, "", *fold(norm), None, None)
    mean = var = None
    momentum = 0.0
    if norm.training and norm.track_running_stats:
        mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(rows, mean, var, norm.weight, norm.bias, True, momentum, norm.eps)


def _train_counted(norm: nn.BatchNorm2d, rows: Tensor, count: Tensor | None, ranks=None) -> Tensor:
    """As ``_train_rows``, with a count that only the device knows, or other ranks: no branch, no synchronisation.

    A rank without rows takes part all the same: the others wait for it.
    """
    valid = None if count is None else (torch.arange(rows.shape[0], device=rows.device) < count)[:, None]
    values = _held(rows.to(torch.promote_types(rows.dtype, torch.float32)), valid)
    n = values.new_full((1,), rows.shape[0]) if count is None else count.to(values.dtype)
    total, n = _over_ranks(torch.cat([values.sum(0), n]), ranks).split([rows.shape[1], 1])
    enough, n = n[0] > 1, n.detach().clamp(min=1)
    mean = total / n
    var = _over_ranks(_held(values - mean, valid).square().sum(0), ranks) / n
    scale, shift = fold_batch(norm, mean, var, n, enough)
    return _held(values * scale + shift, valid).to(rows.dtype)


def _held(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else torch.where(valid, values, 0)


def _over_ranks(total: Tensor, ranks) -> Tensor:
    """The sum over all ranks, with its gradient."""
    return total if ranks is None else _SumOverRanks.apply(total, ranks)


class _SumOverRanks(torch.autograd.Function):
    """torch's own all_reduce with a gradient warns from 2.13 on."""

    @staticmethod
    def forward(ctx, total: Tensor, ranks) -> Tensor:
        ctx.ranks, total = ranks, total.clone()
        torch.distributed.all_reduce(total, group=ranks)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _SumOverRanks.apply(grad.contiguous(), ctx.ranks), None


def fold_batch(
    norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n: Tensor, enough: Tensor
) -> tuple[Tensor, Tensor]:
    """``scale, shift`` ``[C]`` of a norm with the statistics of a batch, whose running ones follow them.

    Args:
        mean, var: ``[C]``, of ``n`` values.
        enough: bool ``[]``, or ``[C]`` for each channel: false takes the running statistics and leaves them.
    """
    if norm.running_mean is not None:
        if norm.training and norm.track_running_stats:
            with torch.no_grad():
                _track(norm, mean, var * (n / (n - 1).clamp(min=1)), enough)
        mean = torch.where(enough, mean, norm.running_mean)
        var = torch.where(enough, var, norm.running_var)
    return _fold(norm.eps, norm.weight, norm.bias, mean, var)


def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, enough: Tensor) -> None:
    norm.num_batches_tracked.add_(1 if enough.dim() else enough.to(torch.int64))
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype).clamp(min=1)
    momentum = enough.to(mean.dtype) * momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum.to(norm.running_mean.dtype))
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum.to(norm.running_var.dtype))
