"""Functions of maps that move pixels: pools, resizing, shuffling, views, slices and joins of channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ...geometry import ConvGeometry, enlarged_geometry, pair
from ...kernels.cpu.prepared import StepKind
from ...plans import PixelPlan
from ..layers.base import Rows
from ..layers.pool import avg_pool, kind_of_mean, max_of_rows, max_pool, whole_map, windows_of_rows
from ..layers.resample import resizing
from . import axes, layout
from .images import named, of_each_image, pool_of_images
from .layout import NCHW
from .pointwise import reduced
from .value import SparseMap, View, masked


def at_pixels(out: Tensor, plan: PixelPlan, active) -> SparseMap:
    """The map of a dense tensor at the pixels of a plan."""
    return SparseMap.of_rows(layout.gathered(out, plan, NCHW), plan, active)


def resized_by(geometry_of):
    """A function that makes a map of another size, dense: what it makes is a map at the mask of that size.

    Args:
        geometry_of: called with the input's and the output's shape and the arguments: the input pixels that an output pixel
            stands for, and whether sizes are rounded up; None for a ratio of sizes.
    """

    def run(func, name: str, args: tuple, kwargs: dict):
        x = args[0] if args else kwargs.get("input")
        if type(x) is not SparseMap or x.axes != NCHW or kwargs.get("return_indices"):
            return NotImplemented
        if name == "max_pool2d" and not x.is_input and x.margins is None:
            made = max_of_rows(
                max_pool(*args[1:], **_without(kwargs, "input")), Rows(x.rows(), x.plan), x.active
            )
            if made is not None:
                return SparseMap.of_rows(*made, x.active)
        if x.active.ragged and (made := of_each_image(func, name, x, args[1:], kwargs)) is not None:
            return made
        if x.active.ragged and name in ("max_pool2d", "avg_pool2d"):
            out = pool_of_images(func, name, x, args[1:], kwargs)
        elif (made := _on_rows(name, x, geometry_of, args[1:], kwargs)) is not None:
            return made
        else:
            out = func(x.dense(), *args[1:], **kwargs) if args else func(**{**kwargs, "input": x.dense()})
        if not isinstance(out, Tensor) or out.dim() != 4:
            return out
        shapes = (x.shape[0], *x.shape[2:]), (out.shape[0], *out.shape[2:])
        if out.shape == x.shape and name.startswith("adaptive"):
            return x
        found = geometry_of(*shapes, args[1:], kwargs)
        if found is None:
            return at_pixels(out, x.active.plan(shapes[1], out.device), x.active)
        geometry, ceil = found
        if x.margins is not None:
            left, right, top, bottom = x.margins
            geometry = geometry._replace(
                in_h=geometry.in_h - top - bottom, in_w=geometry.in_w - left - right,
                pad_h=geometry.pad_h + top, pad_w=geometry.pad_w + left,
            )  # fmt: skip
        return at_pixels(out, x.active.after(geometry, out.device, ceil), x.active)

    return run


def _on_rows(name: str, x: SparseMap, geometry_of, args: tuple, kwargs: dict) -> SparseMap | None:
    """A pool or a resizing by the kernel of rows, or None."""
    if x.is_input or x.margins is not None or x.requires_grad:
        return None
    if name == "interpolate":
        return _resized(x, args, _without(kwargs, "input"))
    small = torch.empty(1, 1, *x.shape[2:], device="meta")
    if name == "max_pool2d":
        kind, pool = StepKind.MAX_POOL, max_pool(*args, **{k: v for k, v in kwargs.items() if k != "input"})
        size = pool(small).shape[2:]
    elif name == "avg_pool2d":
        pool = avg_pool(*args, **{k: v for k, v in kwargs.items() if k != "input"})
        kind = kind_of_mean(pool)
        if kind is None:
            return None
        size = pool(small).shape[2:]
    else:
        return None
    g, ceil = geometry_of((x.shape[0], *x.shape[2:]), (x.shape[0], *size), args, kwargs)
    plan = x.active.after(g, x.device, ceil)
    rows = windows_of_rows(kind, x.rows(), x.plan, plan, g)
    return None if rows is None else SparseMap.of_rows(rows, plan, x.active)


def _resized(x: SparseMap, args: tuple, kwargs: dict) -> SparseMap | None:
    found = resizing((x.shape[0], *x.shape[2:]), *args, **kwargs)
    if found is None:
        return None
    g = found.geometry
    plan = (
        x.active.plan(g.out_shape, x.device) if found.moves is None else x.active.after(found.moves, x.device)
    )
    rows = windows_of_rows(found.kind, x.rows(), x.plan, plan, g, found.linear)
    return None if rows is None else SparseMap.of_rows(rows, plan, x.active)


def lp_pool(x, norm_type, kernel_size, stride=None, ceil_mode=False):
    """``F.lp_pool2d`` of a map: a root of a mean."""
    if type(x) is not SparseMap:
        return NotImplemented
    mean = F.avg_pool2d(x.pow(norm_type), kernel_size, stride, 0, ceil_mode)
    return (
        (mean.sign() * mean.abs().relu()).mul(math.prod(pair(kernel_size, "kernel_size"))).pow(1 / norm_type)
    )


def _without(kwargs: dict, name: str) -> dict:
    return {k: v for k, v in kwargs.items() if k != name}


def _window(in_shape, out_shape, given: dict):
    kernel = pair(given["kernel_size"], "kernel_size")
    stride = given.get("stride")
    stride = kernel if stride is None or stride == [] else pair(stride, "stride")
    padding, dilation = pair(given.get("padding", 0), "padding"), pair(given.get("dilation", 1), "dilation")
    g = ConvGeometry(*in_shape, *out_shape[1:], *kernel, *stride, *padding, *dilation, 1, 0)
    return g, bool(given.get("ceil_mode", False))


def _max_window(in_shape, out_shape, args, kwargs):
    return _window(
        in_shape, out_shape, named(args, kwargs, "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    )


def _mean_window(in_shape, out_shape, args, kwargs):
    return _window(in_shape, out_shape, named(args, kwargs, "kernel_size", "stride", "padding", "ceil_mode"))


def _enlarged(in_shape, out_shape, args, kwargs):
    found = enlarged_geometry(in_shape, out_shape)
    return None if found is None else (found, False)


def _pools(settings, pools):
    """A pool: of one window that is the whole map over the mask, as adaptive ones to one pixel."""

    def run(func, name: str, args: tuple, kwargs: dict):
        given = {k: v for k, v in kwargs.items() if k != "input"}
        x = args[0] if args else kwargs["input"]
        if type(x) is SparseMap and not x.is_input and x.axes == NCHW:
            kind = whole_map(settings(*args[1:], **given), *x.shape[2:])
            if kind:
                return reduced(getattr(torch, kind), kind, (x, (2, 3), True), {})
        return pools(func, name, args, kwargs)

    return run


max_pools = _pools(max_pool, resized_by(_max_window))
avg_pools = _pools(avg_pool, resized_by(_mean_window))
enlarged = resized_by(_enlarged)
resampled = resized_by(lambda *_: None)


def adaptive_pool(func, name: str, args: tuple, kwargs: dict):
    """Adaptive pools: to one pixel over the mask, else dense."""
    given = named(args, kwargs, "input", "output_size")
    size = given["output_size"]
    if size in (1, (1, 1), [1, 1]) and type(given["input"]) is SparseMap and given["input"].axes == NCHW:
        kind = "mean" if "avg" in name else "amax"
        found = reduced(getattr(torch, kind), kind, (given["input"], (2, 3), True), {})
        if found is not NotImplemented:
            return found
    return resampled(func, name, args, kwargs)


# ------------------------------------------------------------------------------- views of channels


def view_of(x: SparseMap, axes, channels: tuple[int, ...], read, put, same: bool = False) -> SparseMap:
    """A map that shows another's rows."""
    return SparseMap.of_pending(View(x, read, put, same), x.plan, x.active, channels, axes)


def view(x: SparseMap, shape: tuple) -> SparseMap:
    """view, unflatten and unsqueeze: channels parted or joined, height and width joined."""
    found = layout.reshaped(x.axes, tuple(x.shape), tuple(shape), tuple(x.plan.shape[1:]))
    if found is None:
        return NotImplemented
    axes, channels = found
    return view_of(
        x, axes, channels,
        lambda rows: rows.reshape(rows.shape[0], *channels),
        lambda old, rows: rows.reshape(old.shape),
        axes.count("c") == x.axes.count("c") == 1,
    )  # fmt: skip


def reshape(x: SparseMap, shape: tuple) -> SparseMap:
    """As :func:`view`, with a copy where a tensor would be copied: what is written into it shows nowhere else."""
    out = view(x, shape)
    if out is NotImplemented or (strides := _strides(x)) is None:
        return out
    if is_compiling():  # what is tried would be a part of the graph
        return out.like(out.rows())
    try:
        torch.empty_strided(x.shape, strides, device="meta").view(out.shape)
    except RuntimeError:
        return out.like(out.rows())
    return out


def _strides(x: SparseMap) -> tuple[int, ...] | None:
    """The strides of a permuted map, were it dense; None for any other."""
    return x.pending.strides if type(x.pending) is View else None


def data_of(x: SparseMap) -> SparseMap:
    """``x.data``: what is written into it shows in the map, which keeps its gradient."""
    channels = tuple(size for size, letter in zip(x.shape, x.axes, strict=True) if letter == "c")

    def put(old: Tensor, rows: Tensor) -> Tensor:
        new = old.clone()
        new.data.copy_(rows)
        return new

    return view_of(x, x.axes, channels, Tensor.detach, put, False)


def permute(x: SparseMap, dims) -> SparseMap:
    dims = layout.normalized(dims, x.dim())
    if dims is None or sorted(dims) != list(range(x.dim())):
        return NotImplemented
    axes, order = layout.permuted(x.axes, dims)
    back = [order.index(i) for i in range(len(order))]
    channels = layout.shape_of(
        ("c",) * axes.count("c"), x.plan, tuple(x.shape[d] for d in dims if x.axes[d] == "c")
    )
    same = order == sorted(order)
    out = view_of(
        x, axes, channels, lambda rows: rows.permute(order), lambda old, rows: rows.permute(back), same
    )
    strides = _strides(x) or torch.empty(x.shape, device="meta").stride()
    out.pending.strides = tuple([strides[d] for d in dims])
    return out


def narrowed(x: SparseMap, dim: int, part: slice) -> SparseMap:
    """Some channels of a map."""
    axis = layout.channel_axis(x.axes, dim)
    if axis is None:
        return NotImplemented
    where = (slice(None),) * axis + (part,)
    channels = [size for size, letter in zip(x.shape, x.axes, strict=True) if letter == "c"]
    channels[axis - 1] = len(range(*part.indices(channels[axis - 1])))

    def put(old: Tensor, rows: Tensor) -> Tensor:
        new = old.clone()
        new[where] = rows
        return new

    return view_of(x, x.axes, tuple(channels), lambda rows: rows[where], put)


def split(x: SparseMap, sizes, dim: int) -> tuple[SparseMap, ...]:
    dim = dim % x.dim()
    if x.axes[dim] != "c":
        return NotImplemented
    if isinstance(sizes, int):
        total = x.shape[dim]
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(narrowed(x, dim, slice(start, start + size)))
        start += size
    return tuple(parts) if start == x.shape[dim] else NotImplemented


def chunk(x: SparseMap, chunks: int, dim: int = 0) -> tuple[SparseMap, ...]:
    return split(x, max(1, -(-x.shape[dim] // chunks)), dim)


def index(x: SparseMap, where):
    """``x[:, a:b]`` and the like: whole axes, slices of channels, single channels, and None for a new axis."""
    where = where if isinstance(where, tuple) else (where,)
    if not all(w is None or w is Ellipsis or isinstance(w, slice) or type(w) is int for w in where):
        return NotImplemented
    taken = sum(w is not None and w is not Ellipsis for w in where)
    if taken > x.dim() or where.count(Ellipsis) > 1:
        return NotImplemented
    at = where.index(Ellipsis) if Ellipsis in where else len(where)
    where = (*where[:at], *(slice(None),) * (x.dim() - taken), *where[at + 1 :])
    if x.axes == NCHW and None not in where and where[0] == slice(None) and any(_steps(x, where)):
        return _subsampled(x, where)
    dim = 0
    for part in where:
        if part is None:
            x = view(x, (*x.shape[:dim], 1, *x.shape[dim:]))
        elif type(part) is int:
            x, dim = axes.select(x, dim, part), dim - 1
        elif part.indices(x.shape[dim]) != (0, x.shape[dim], 1):
            if x.axes[dim] != "c" or (part.step or 1) < 1:
                return NotImplemented
            x = narrowed(x, dim, part)
        if x is NotImplemented:
            return x
        dim += 1
    return x


def _steps(x: SparseMap, where: tuple) -> list[bool]:
    """Of height and width: whether a slice takes every k-th pixel to the end."""
    parts = [
        (part, size) for part, size in zip(where[2:], x.shape[2:], strict=True) if isinstance(part, slice)
    ]
    found = [(part.indices(size), size) for part, size in parts]
    return [step > 1 and start < step and stop == size for (start, stop, step), size in found]


def _subsampled(x: SparseMap, where: tuple):
    """Every k-th row and column, as a layer of stride k takes them."""
    whole = [part == slice(None) for part in where[2:]]
    if not all(a or b for a, b in zip(whole, _steps(x, where), strict=False)) or isinstance(where[1], int):
        return NotImplemented
    out = x.dense()[where]
    (top, _, sh), (left, _, sw) = (
        part.indices(size) for part, size in zip(where[2:], x.shape[2:], strict=True)
    )
    g = ConvGeometry(x.shape[0], *x.shape[2:], *out.shape[2:], 1, 1, sh, sw, -top, -left, 1, 1, 1, 0)
    return at_pixels(out, x.active.after(g, out.device), x.active)


def cat(tensors, dim: int = 0):
    """Maps joined along channels: those of the same pixels, and dense tensors at them."""
    base = next((x for x in tensors if type(x) is SparseMap and not x.is_input), None)
    if base is None or dim >= base.dim() or dim < -base.dim():
        return NotImplemented
    dim %= base.dim()
    axis = layout.channel_axis(base.axes, dim)
    shapes = [
        x.shape[:dim] + x.shape[dim + 1 :] for x in tensors if isinstance(x, Tensor) and x.dim() == base.dim()
    ]
    if axis is None or len(shapes) != len(tensors) or any(shape != shapes[0] for shape in shapes):
        return NotImplemented
    rows = [
        x.at(base.plan, base.axes) if type(x) is SparseMap else layout.gathered(x, base.plan, base.axes)
        for x in tensors
    ]
    sizes = [x.shape[dim] for x in tensors]
    rows = [
        r if r.shape[0] == base.plan.num_rows and r.dim() == 1 + base.axes.count("c") else None for r in rows
    ]
    if any(r is None for r in rows) or any(r.shape[axis] != s for r, s in zip(rows, sizes, strict=True)):
        return NotImplemented
    return base.like(torch.cat(rows, axis))


def set_item(x: SparseMap, where, value) -> None:
    """``x[where] = value``; outside of the mask it stays zero."""
    value = value.dense() if type(value) is SparseMap else value
    if x.is_input:
        x.dense()[where] = value
        return
    dense = x.dense().clone()
    dense[where] = value
    x.exchange(x.like(layout.gathered(masked(dense, x.plan, x.axes), x.plan, x.axes)))


def flattened(shape, start: int, end: int) -> tuple[int, ...]:
    start, end = start % len(shape), end % len(shape)
    return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def pixel_unshuffle_geometry(in_shape, out_shape, args, kwargs):
    f = in_shape[1] // max(out_shape[1], 1)
    return ConvGeometry(*in_shape, *out_shape[1:], f, f, f, f, 0, 0, 1, 1, 1, 0), False


unshuffled = resized_by(pixel_unshuffle_geometry)
