"""Convolutions that stay on packed rows: from one plan's rows to another's.

The mathematics and the gradients are those of ``conv.py``; the input is zero where its plan has no pixel.
"""

from __future__ import annotations

from torch import Tensor

from ...plans import PixelPlan
from .. import checks
from .conv import _pixel_conv


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_plan: PixelPlan | None,
    plan: PixelPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The convolution from one plan's rows to another's.

    Args:
        x: packed rows ``[in_plan.num_rows, C]``, or ``[N, C, H, W]`` where ``in_plan`` is None.
        in_plan: the pixels that ``x`` holds; the convolution reads zero at all others.
        plan: the output pixels, at the output resolution.
        residual: packed ``[P, O]`` or ``[N, O, H, W]``.
        weight, bias, and the rest: as in :func:`sparse_conv2d`.

    Returns:
        ``[plan.num_rows, O]``; in the capacity form rows past the count are zero.
    """
    options = stride, padding, dilation, groups, "zeros"
    x, weight, bias, g = checks.conv_arguments(x, weight, bias, plan, options, in_plan)
    epilogue = checks.epilogue(plan, x, weight.shape[0], activation, scale, shift, gate, residual, None)
    return _pixel_conv(x, weight, bias, plan, in_plan, g, epilogue, None, True, backend)


def packed_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_plan: PixelPlan | None,
    plan: PixelPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The transposed convolution from one plan's rows to another's; see :func:`packed_conv2d`."""
    options = stride, padding, dilation, groups, output_padding
    x, weight, bias, g = checks.conv_arguments(x, weight, bias, plan, options, in_plan, transposed=True)
    epilogue = checks.epilogue(plan, x, weight.shape[1] * groups, activation, scale, shift, gate, residual, None)  # fmt: skip
    return _pixel_conv(x, weight, bias, plan, in_plan, g, epilogue, None, True, backend)
