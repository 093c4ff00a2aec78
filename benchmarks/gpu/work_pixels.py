"""The work of convolutions on some pixels, of their gradients, and of the dense ones. See ``work.py``.

A shape is a :class:`benchmarks.layers.Case`; ``active`` counts output pixels; ``size`` is the bytes of an element.
"""

from __future__ import annotations

import functools

import torch

from dynops import PixelPlan
from dynops.geometry import ConvGeometry

from .. import masks
from ..layers import Case
from .work import INDEX, Step, fill, inverse_index

LARGE = 1 << 25  # bytes of a map that is filled beside its product (kernels.rows)
NARROW = 16  # channels of a group below which the kernels make no matrix product (kernels.gemm.is_narrow)


def geometry(case: Case) -> ConvGeometry:
    h, w = case.out_size
    k, s, p = case.kernel, case.stride, case.padding
    return ConvGeometry(case.n, case.h, case.w, h, w, k, k, s, s, p, p, 1, 1, case.groups, 0)


def in_pixels(case: Case) -> int:
    return case.n * case.h * case.w


def out_pixels(case: Case) -> int:
    h, w = case.out_size
    return case.n * h * w


def weights(case: Case) -> int:
    """Elements of the weight."""
    return case.o * (case.c // case.groups) * case.kernel**2


def flops(case: Case, active: float) -> float:
    return 2 * geometry(case).macs(active, case.c, case.o)


def unit(case: Case) -> str:
    """What ours multiplies on: groups narrower than a tensor core's tile are multiplied element by element."""
    narrow = case.groups > 1 and min(case.c, case.o) // case.groups < NARROW
    return "vector" if narrow else "conv"


def dense_unit(case: Case) -> str:
    """What the dense layer multiplies on at best: only depthwise ones have nothing for tensor cores."""
    return "vector" if case.groups == case.c else "conv"


# --------------------------------------------------------------------------- what of the input is read


def read_share(case: Case, mask: str, density: float) -> float:
    """The share of the input pixels that some active output reads.

    random: an input pixel is read by ``a * b`` outputs, as many in each direction as the stride leaves, and by none of
    them with probability ``(1 - density)**(a * b)``; borders are left out. Another kind of mask is made, and counted.
    """
    if mask != "random":
        return _counted_share(
            (*case.out_size, case.h, case.w), geometry(case)._replace(batch=1), mask, density
        )
    readers = [len(range(rest, case.kernel, case.stride)) for rest in range(case.stride)]
    unread = sum((1 - density) ** (a * b) for a in readers for b in readers)
    return 1 - unread / case.stride**2


@functools.lru_cache(maxsize=4096)
def _counted_share(sizes: tuple[int, ...], g: ConvGeometry, mask: str, density: float) -> float:
    out_h, out_w, in_h, in_w = sizes
    made = masks.MASKS[mask](1, out_h, out_w, density, torch.Generator().manual_seed(0))
    return PixelPlan.from_mask(made).needed_by(g).num_rows / (in_h * in_w)


def _input_read(case: Case, size: int, share: float) -> float:
    return in_pixels(case) * share * case.c * size


# ---------------------------------------------------------------------------------------- forward


def dense(case: Case, size: int) -> list[Step]:
    read = _input_read(case, size, read_share(case, "random", 1.0)) + weights(case) * size
    written = out_pixels(case) * case.o * size
    return [Step("dense", flops(case, out_pixels(case)), read, written, dense_unit(case))]


def conv(
    case: Case, active: float, size: int, share: float, *, capacity: bool = False, packed_in: bool = False,
    packed_out: bool = False,
) -> list[Step]:  # fmt: skip
    """The convolution, the plan being there.

    Args:
        share: of the input pixels that is read (:func:`read_share`).
        capacity: whether the index has room for every pixel.
        packed_in: whether x is rows on the plan of the pixels that are read; 1x1 on one plan: rows without a map of them.
        packed_out: whether the output is rows: nothing is filled, but rows past the count are written as zeros.
    """
    index = INDEX * (out_pixels(case) if capacity else active)
    read = _input_read(case, size, share) + weights(case) * size + index
    if packed_in and case.kernel > 1:
        read += INDEX * in_pixels(case) * share  # the map of rows, where it is looked at
    written = (out_pixels(case) if capacity and packed_out else active) * case.o * size
    product = Step("product", flops(case, active), read, written, unit(case))
    return [product] if packed_out else filled(product, out_pixels(case), active, case.o * size)


def filled(product: Step, pixels: int, active: float, row_size: int) -> list[Step]:
    """``product``, and zeros in the rest of its output: before it, or, in a large map, beside it (the index says where)."""
    if pixels * row_size < LARGE:
        return [fill(pixels * row_size), product]
    read, written = product.read + INDEX * active, product.written + (pixels - active) * row_size
    return [product._replace(name="product and fill", read=read, written=written, launches=2)]


# -------------------------------------------------------------------------------------- gradients


def dense_gradients(case: Case, size: int) -> list[Step]:
    """Of input and weight."""
    x, w, y = (n * size for n in (in_pixels(case) * case.c, weights(case), out_pixels(case) * case.o))
    product = flops(case, out_pixels(case))
    return [
        Step("dense input gradient", product, y + w, x, dense_unit(case)),
        Step("dense weight gradient", product, y + x, w, dense_unit(case)),
    ]


def input_gradient(case: Case, active: float, size: int) -> list[Step]:
    """Input pixels are sorted by the taps that are active for them, and every one is written.

    FLOPs are those of the active outputs: for scattered masks the tiles walk over more (``kernels/pixels.py``).
    """
    x, grad, w = in_pixels(case) * case.c * size, active * case.o * size, weights(case) * size
    if geometry(case).is_pointwise:
        product = Step(
            "product", flops(case, active), grad + w + INDEX * active, active * case.c * size, unit(case)
        )
        return filled(product, in_pixels(case), active, case.c * size)
    inverse, taps = INDEX * out_pixels(case), case.kernel**2
    ordered = _tap_order(in_pixels(case), inverse, taps) if unit(case) == "conv" else []
    order = sum(step.written for step in ordered[-1:])
    product = Step("product", flops(case, active), grad + w + inverse + order, x, unit(case))
    return [*inverse_index(out_pixels(case), active), *ordered, product]


def _tap_order(rows: int, inverse: float, taps: int) -> list[Step]:
    """Keys of 2, 4 or 8 bytes, and torch's sort of them, which returns numbers of 8 bytes; a pass for each 8 bits."""
    key = 2 if taps <= 15 else 4 if taps <= 31 else 8
    sort = Step("sort", read=rows * key, written=rows * (key + 8), launches=2 + key)
    return [Step("tap keys", read=inverse, written=rows * key), sort]


def weight_gradient(case: Case, active: float, size: int, share: float) -> list[Step]:
    """One slice of the rows; more of them, for more SMs, are more copies of the gradient, and are not counted."""
    read = active * case.o * size + _input_read(case, size, share) + INDEX * active
    copies = weights(case) * 4
    return [
        Step("product", flops(case, active), read, copies, unit(case)),
        Step("sum", read=copies, written=weights(case) * size, launches=2),
    ]
