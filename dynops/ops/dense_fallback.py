"""The dense layer and a mask in the place of a sparse op: where that is faster, and how.

The plan's density decides, by measurements of the device's architecture (``kernels.configs``) or by the cost model of
a CPU below. If neither has an answer, the dense layer runs only for a full plan. The same holds while a compiler
traces, and for a capacity plan, whose density the host does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, modes
from ..geometry import ConvGeometry
from ..kernels import configs, cpu
from ..kernels.cpu.engine import takes_winograd
from ..kernels.cpu.planes import may_take_planes
from ..kernels.layout import in_format_of, memory_format_of
from ..plans import PixelPlan
from .dense_conv import dense_layer
from .epilogue import ACTIVATIONS, Epilogue
from .pixels.rows import scatter_pixels

# From this many pixels on, the dense layer is the faster way to compute all of them. Below, it spends as much
# time on bringing its weight into the order of its kernel, in every call, as ours on some 50 pixels.
_DENSE_PIXELS = 1024
# Input channels from which on a GPU gathers pixels: what a product of its tensor cores takes at least.
_LEAST_CHANNELS = 16


def dense_wins(plan: PixelPlan, x: Tensor, weight: Tensor, g: ConvGeometry, epilogue: Epilogue) -> bool:
    """True if the dense layer and a mask compute a plan's pixels faster than the sparse op."""
    measured = _measured(plan, x, weight, g)
    if measured is not None:
        return measured
    if plan.count is not None or plan.num_pixels < _DENSE_PIXELS or not epilogue.is_plain:
        return False
    if beats_dense(x, weight, g):
        return False
    planes = memory_format_of(x) == torch.contiguous_format
    on_cpu = modes.plain(x, weight) and _has_cpu_kernel(x)
    if plan.is_full:  # where a gradient is needed, its dense form is the faster one too
        return not (on_cpu and planes and may_take_planes(weight.shape, g))
    # with a gradient the plan's own pixels are computed: backward they save more than the dense layer does
    return on_cpu and not planes and not g.transposed and cpu_dense_is_faster(plan.num_rows, weight, g)


def is_thin(x: Tensor, weight_shape, g: ConvGeometry) -> bool:
    """True if a GPU convolves every pixel by cuDNN, and picks the plan's, faster than it gathers them.

    A ResNet's stem has 3 channels. Tensor cores take 16, and of 3 no load is a vector. By the instructions of sm_90,
    at batch 64 and 25 % of the pixels, 250 us against 90 are predicted; neither was measured.
    """
    inputs = weight_shape[0] if g.transposed else weight_shape[1]
    return x.is_cuda and g.groups == 1 and inputs < _LEAST_CHANNELS


def beats_dense(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """True if the op on every pixel is faster than the dense layer: by Winograd's algorithm on a CPU.

    On maps thinner than 5 pixels too many of its tiles hang over the edge.
    """
    return _has_cpu_kernel(x) and takes_winograd(g, weight.shape, x.dtype) and min(g.out_h, g.out_w) >= 5


def _has_cpu_kernel(x: Tensor) -> bool:
    return backends.choose(None, x.device, x.dtype) == "cpp"


def masked_dense(x, weight, bias, plan: PixelPlan, g: ConvGeometry, epilogue: Epilogue, base) -> Tensor:
    """The op by the dense layer: all pixels are computed, those of the plan kept."""
    if plan.is_full and epilogue.is_plain:
        return dense_layer(x, weight, bias, g, epilogue.activation)
    base = None if base is None else base.to(x.dtype)
    return in_format_of(finish_dense(dense_layer(x, weight, bias, g, ""), plan, epilogue, base), x)


# ---------------------------------------------------------------------------------- densities


def decides(
    device: torch.device, dtype: torch.dtype, count: Tensor | None, pixels: int | None = None
) -> bool:
    """True if the density of a plan with this ``count`` may decide at all.

    Args:
        pixels: of the input of a stack on blocks, for which there is a model of a CPU too; None: of an op.
    """
    if torch.compiler.is_compiling() or count is not None:
        return False
    large = pixels is not None and pixels >= _DENSE_PIXELS
    knows = configs.of(device) is not None or (large and is_modelled(device))
    return knows and dtype in backends.FAST_DTYPES and not modes.transformed()


def is_modelled(device: torch.device) -> bool:
    """True for a CPU of which nothing was measured: break-evens of a stack on blocks are those of a model."""
    return device.type == "cpu" and configs.of(device) is None


def break_even(
    path: str, device: torch.device, dtype: torch.dtype, weight: Tensor, g: ConvGeometry
) -> float | None:
    """The share of a convolution's output pixels below which ``path`` is faster than the dense layer.

    None where that was not measured: a transposed convolution, or groups that are neither one nor depthwise. Of a CPU
    there is a model: "tiles" are the dense layer on their pixels, "rows" the products below.

    Args:
        path: "pixels", "full", "rows" or "tiles", as :meth:`configs.Config.shares` has them.
        dtype: that of the product, which under autocast is not that of the input.
    """
    config, inputs = configs.of(device), weight.shape[1] * g.groups
    if is_modelled(device):
        return 1.0 if path == "tiles" else _cpu_share_of_rows(weight, g, dtype)
    depthwise = g.groups == inputs == weight.shape[0]
    if config is None or g.transposed or not (g.groups == 1 or depthwise):
        return None
    form, pixels = "conv" if g.groups == 1 else "depthwise", g.batch * g.out_h * g.out_w
    shares = config.shares(configs.precision(dtype), form, g.taps, inputs, weight.shape[0], pixels)
    return None if shares is None else shares.get(path)


def _measured(plan: PixelPlan, x: Tensor, weight: Tensor, g: ConvGeometry) -> bool | None:
    """True if the dense layer was measured to be faster; None if this layer was not measured."""
    if not decides(x.device, x.dtype, plan.count):
        return None
    share = break_even("full" if plan.is_full else "pixels", x.device, x.dtype, weight, g)
    return None if share is None else plan.num_rows > share * plan.num_pixels


# A CPU's time in products of float32, of which two cores make 150 a ns. Of a pixel, ours takes for each output its
# products and as many as 50 more (the table of its taps, sums that begin and end; 1x1: 20), and depthwise 1200 and 37 a channel
# where the dense layer's bytes take 32. The dense layer comes to its result by one more pass and calls, which leave
# its threads asleep: 100 us (64 to 256 channels, 56 x 56: 0.37 ms alone, 0.45 after a plan was built).
# Measured, channels_last, Sapphire Rapids and Zen 5, the densities from which the dense layer won: 18 products an output
# (2 to 16 channels, 3x3) 0.1 to 0.3; 64 (1x1) 0.6 to 0.9; 72 (groups of 8) 0.5; 144 to 147 0.6 to 0.7; 256 (1x1) 0.8
# to 0.95; 1152 (3x3, stride 2) 0.95; depthwise 32 channels 0.15, 144 0.3 to 0.5, 512 and more never to 0.7.
_PIXEL_PRODUCTS, _POINTWISE_PRODUCTS, _FINISH = 50, 20, 15e6
CPU_CALLS = 15e6  # of a stack on blocks: plans and copies. 2 layers, 16 channels, 56 x 56: 0.4 ms, dense 0.26
_DEPTHWISE_PIXEL, _DEPTHWISE_ROWS, _DEPTHWISE_DENSE = 1200, 37, 32


def _cpu_share_of_rows(weight: Tensor, g: ConvGeometry, dtype: torch.dtype) -> float:
    """The break-even of a layer of a stack that runs on rows. Winograd's takes 0.55 to 0.7 of the dense layer's time."""
    if takes_winograd(g, weight.shape, dtype):
        return 1.4
    products = weight.shape[1] * g.taps
    if g.groups == weight.shape[0] and weight.shape[1] == 1:
        return _DEPTHWISE_DENSE / (_DEPTHWISE_ROWS + _DEPTHWISE_PIXEL / weight.shape[0])
    return products / (products + (_PIXEL_PRODUCTS if g.taps > 1 else _POINTWISE_PRODUCTS))


def cpu_dense_is_faster(rows: int, weight: Tensor, g: ConvGeometry) -> bool:
    """True if a CPU computes ``rows`` scattered pixels of a channels_last map faster by the dense layer and a mask."""
    pixels, outputs, products = g.batch * g.out_h * g.out_w, weight.shape[0], weight.shape[1] * g.taps
    more = _PIXEL_PRODUCTS if g.taps > 1 else _POINTWISE_PRODUCTS
    ours, dense = rows * outputs * (products + more), pixels * outputs * products
    if g.groups == outputs and weight.shape[1] == 1:
        ours = rows * (_DEPTHWISE_PIXEL + _DEPTHWISE_ROWS * outputs)
        dense = pixels * _DEPTHWISE_DENSE * outputs
    return ours > dense + _FINISH


# -------------------------------------------------------------------------------- the mask


def finish_dense(out: Tensor, plan: PixelPlan, epilogue: Epilogue, base: Tensor | None) -> Tensor:
    """The op's result from that of the dense convolution, bias included: where(mask, epilogue(out), base or 0).

    Args:
        out: ``[N, O, H, W]``; written over where gradients are off.
        base: ``[N, O, H, W]`` of ``out``'s dtype.
    """
    activation, scale, shift, gate, residual = epilogue
    watched = torch.is_grad_enabled() or modes.transformed()
    if watched and not plan.is_full and not epilogue.is_empty:
        # an infinity there times a gradient of zero would be NaN
        out = out.masked_fill(_inactive_mask(plan), 0)
    if scale is not None:
        out = out * scale.to(out.dtype)[:, None, None]
    if shift is not None:
        out = out + shift.to(out.dtype)[:, None, None]
    if gate is not None:
        out = out * scatter_pixels(gate.to(out.dtype)[:, None], plan)
    if residual is not None:
        out = out + (residual if residual.dim() == 4 else scatter_pixels(residual, plan))
    out = ACTIVATIONS[activation](out)
    return out if plan.is_full else keep_pixels(out, plan, base)


def keep_pixels(out: Tensor, plan: PixelPlan, base: Tensor | None) -> Tensor:
    """``out`` at the plan's pixels, ``base`` (or zero) elsewhere; written over where gradients are off.

    Without gradients only inactive rows are touched. A mask would read and write all of a map that is nearly full.
    """
    maps = (out,) if base is None else (out, base)
    watched = torch.is_grad_enabled() or modes.transformed()
    if watched or not all(t.is_contiguous(memory_format=torch.channels_last) for t in maps):
        inactive = _inactive_mask(plan)
        return out.masked_fill(inactive, 0) if base is None else torch.where(inactive, base, out)
    if out.device.type == "cpu" and backends.has_binary():
        return cpu.rows.keep_pixels(out, plan.index, plan.count, base)
    rows, *base_rows = (t.permute(0, 2, 3, 1).view(-1, t.shape[1]) for t in maps)
    index = _inactive_index(plan)
    if base_rows:
        rows.index_copy_(0, index, base_rows[0].index_select(0, index))
    else:
        rows.index_fill_(0, index, 0)
    return out


def _inactive_mask(plan: PixelPlan) -> Tensor:
    """Bool ``[N, 1, H, W]``."""
    return (plan.inverse() < 0)[:, None]


def _inactive_index(plan: PixelPlan) -> Tensor:
    """int64 flat positions of the pixels that are not in a compact plan (kept).

    Their number is known, so that nothing waits for a GPU.
    """
    size = plan.num_pixels - plan.num_rows
    return plan.derived(
        "inactive", lambda: torch.nonzero_static(plan.inverse().view(-1) < 0, size=size)[:, 0]
    )
