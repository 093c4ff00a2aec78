"""Max and mean pooling over windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry, pair
from ..receptive_field import Span, Window
from ..trace import Step, dense_type
from .base import Layer, spans_of


class _Pool(Layer):
    def __init__(self, name: str, step: Step, pool: nn.Module, dilation=1):
        self.pool, self.converted = pool, step.kind == "pool"
        self.forward = dense_type(pool).forward
        self.kernel, self.stride = pair(pool.kernel_size, "kernel_size", 1), pair(pool.stride, "stride", 1)
        self.pad, self.dilation = pair(pool.padding, "padding", 0), pair(dilation, "dilation", 1)
        ceil = bool(pool.ceil_mode)
        reach = tuple(
            Window(self.kernel[i], self.stride[i], self.pad[i], self.pad[i], self.dilation[i], ceil)
            for i in (0, 1)
        )
        super().__init__(name, step.inputs, step.out, (reach,))

    def rows(self, run):
        if not self.converted:
            return self.recorded.rows(run)
        return run.masked(self.pool, self.inputs[0])


class MaxPool(_Pool):
    outside = "-inf"

    def __init__(self, name: str, step: Step, pool: nn.MaxPool2d):
        super().__init__(name, step, pool, pool.dilation)
        if pool.return_indices:
            self.refusal = f"{name}: expected return_indices=False, got {pool}"

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return F.max_pool2d(inputs[0], self.kernel, self.stride, 0, self.dilation)


class AvgPool(_Pool):
    outside = "zero"

    def __init__(self, name: str, step: Step, pool: nn.AvgPool2d):
        super().__init__(name, step, pool)
        self.divisor, self.counts_pad = pool.divisor_override, pool.count_include_pad
        # a window that hangs over what is counted has a smaller divisor
        hangs = bool(pool.ceil_mode) or (self.pad != (0, 0) and not self.counts_pad)
        self.varies = hangs and self.divisor is None

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        if not self.varies:
            return F.avg_pool2d(inputs[0], self.kernel, self.stride, 0, divisor_override=self.divisor)
        sums = F.avg_pool2d(inputs[0], self.kernel, self.stride, 0, divisor_override=1)
        y, x = (self._counted(axis, span, blocks) for axis, span in enumerate(spans_of(out)))
        return sums / (y[:, None, :, None] * x[:, None, None, :]).to(sums.dtype)

    def _counted(self, axis: int, span: Span, blocks) -> Tensor:
        """int64 ``[B, tile]``: the pixels of each window along one axis that its mean is over."""
        at = blocks.at(axis)[:, None] * span.step + span.first
        at = at + torch.arange(span.size, device=at.device)
        start = at * self.stride[axis] - self.pad[axis]
        beyond = self.pad[axis] if self.counts_pad else 0
        end = (start + self.kernel[axis]).clamp(max=blocks.size_of(self.inputs[0])[axis] + beyond)
        return (end - start.clamp(min=-beyond)).clamp(min=1)


def max_pool(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """The module of a call of ``F.max_pool2d``."""
    return nn.MaxPool2d(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode)


def avg_pool(
    kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """The module of a call of ``F.avg_pool2d``."""
    return nn.AvgPool2d(kernel_size, stride or None, padding, ceil_mode, count_include_pad, divisor_override)
